"""Questions as token ids, against transformers' tokenizer on the whole string, and what is
refused.
"""

import json

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from astrolabe_jax.rewards.qwen2_vl import chat
from tests.rewards.qwen2_vl import chats

KINDS = {
    "image": (chats.HPSV3, chat.IMAGE, (1, 6, 8)),
    "video": (chats.VIDEOALIGN, chat.VIDEO, (3, 4, 6)),
}
PROMPTS = [
    "",
    "a cat",
    "a {curly} {0} {text_prompt} % \\n 'quoted' \"dog\"",
    "ein Bär läuft\nüber 猫 🐈‍⬛\r\n ",
    "< | > <| |>",
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    tokens, placeholder, grid = KINDS[request.param]
    directory = chats.write(tmp_path_factory.mktemp(request.param), tokens)
    return directory, tokens, placeholder, grid


@pytest.fixture(scope="module")
def loaded(kind):
    directory, tokens, placeholder, _ = kind
    return chat.load(directory, tokens, placeholder, chats.rows(tokens))


@pytest.fixture(scope="module")
def oracle(kind):
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(kind[0] / "tokenizer.json"))


def whole(tokens, placeholder, grid, prompt):
    """The string of the published code, written out."""
    pictures = placeholder * (grid[0] * grid[1] * grid[2] // 4)
    before, after = chats.TEMPLATES[tokens].split("{text_prompt}")
    return (
        "<|im_start|>system\nYou are a helpful "
        f"assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>{pictures}<|vision_end|>{before}{prompt}{after}<|im_end|>\n<|im_start|>assistant\n"
    )


def check(kind, loaded, oracle, prompt):
    _, tokens, placeholder, grid = kind
    question = chat.ask(loaded, prompt, grid)
    wanted = oracle(whole(tokens, placeholder, grid, prompt))["input_ids"]
    assert len(question.ids) % 64 == 0 and 0 <= len(question.ids) - len(wanted) < 64
    padding = oracle.convert_tokens_to_ids("<|endoftext|>")
    assert question.ids.tolist() == wanted + [padding] * (len(question.ids) - len(wanted))
    assert question.ids[question.where].tolist() == oracle.convert_tokens_to_ids(list(tokens))
    assert (question.ids == oracle.convert_tokens_to_ids(placeholder)).sum() == np.prod(grid) // 4
    assert question.ids.dtype == question.where.dtype == np.int32


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_those_of_the_whole_string(kind, loaded, oracle, prompt):
    check(kind, loaded, oracle, prompt)


@settings(max_examples=50, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=80).filter(
        lambda text: "<|" not in text
    )
)
def test_ids_of_any_prompt(kind, loaded, oracle, prompt):
    check(kind, loaded, oracle, prompt)


@pytest.mark.parametrize("token", [*chats.SPECIAL, *chats.HPSV3, *chats.VIDEOALIGN])
def test_prompts_with_special_strings_are_refused(loaded, token):
    prompt = f"a cat {token} b"
    with pytest.raises(
        ValueError, match="the prompt holds '.*', which stands for a special token"
    ) as error:
        chat.check_prompt(prompt)
    assert repr(token) in str(error.value)
    with pytest.raises(ValueError, match="stands for a special token"):
        chat.ask(loaded, prompt, (1, 4, 4))
    chat.check_prompt("a cat <b> |c| <|d e|>")


def test_a_published_tokenizer_gets_the_tokens_of_the_reward(tmp_path):
    path = tmp_path / "tokenizer.json"
    published = chats.tokenizer()
    published.enable_padding(length=7)
    published.enable_truncation(3)
    published.save(str(path))
    rows = chats.rows(chats.VIDEOALIGN)
    ours = chat.read_tokenizer(path, chats.VIDEOALIGN)
    assert chat.ids_of(ours, chats.VIDEOALIGN, rows, path) == (rows - 3, rows - 2, rows - 1)
    assert len(ours.encode("a long text about nothing").ids) > 7
    ours.save(str(path))  # with the tokens it stays as it is
    assert chat.read_tokenizer(path, chats.VIDEOALIGN).to_str() == ours.to_str()


def test_tokens_that_are_not_the_last_embeddings(tmp_path):
    directory = chats.write(tmp_path, chats.VIDEOALIGN)
    swapped = chats.VIDEOALIGN[::-1]
    rows = chats.rows(swapped)
    with pytest.raises(
        ValueError, match=f"tokenizer.json gives <.TA_reward.>, .* the ids {rows - 1}, {rows - 2}, "
    ):
        chat.load(directory, swapped, chat.VIDEO, rows)
    with pytest.raises(
        ValueError, match=f"; expected {rows - 2}, {rows - 1}, {rows}, the last embeddings"
    ):
        chat.load(directory, chats.VIDEOALIGN, chat.VIDEO, rows + 1)
    with pytest.raises(ValueError, match="gives <.Reward.> the ids None; expected"):
        chat.load(directory, chats.HPSV3, chat.VIDEO, rows)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("{text_prompt}", ""),
        lambda text: text + "{text_prompt}",
        lambda text: text.replace("<|MQ_reward|>", ""),
        lambda text: text + "<|TA_reward|>",
        lambda text: (
            text.replace("<|VQ_", "<|x_").replace("<|MQ_", "<|VQ_").replace("<|x_", "<|MQ_")
        ),
        lambda text: text + "<|im_end|>",
    ],
)
def test_templates_that_ask_something_else(tmp_path, change):
    directory = chats.write(tmp_path, chats.VIDEOALIGN)
    path = directory / "template.txt"
    path.write_text(change(path.read_text()))
    with pytest.raises(
        ValueError,
        match=f"{path} has . places .* expected one place and <.VQ_reward.>, <.MQ_reward.>",
    ):
        chat.load(directory, chats.VIDEOALIGN, chat.VIDEO, chats.rows(chats.VIDEOALIGN))


def test_tokenizers_of_others(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(
        FileNotFoundError, match=f"no {path}; expected the tokenizer.json of Qwen2-VL"
    ):
        chat.read_tokenizer(path)
    path.write_text("{}")
    with pytest.raises(
        ValueError, match=f"{path} cannot be read: .*; expected a whole tokenizer.json"
    ):
        chat.read_tokenizer(path)
    content = json.loads(chats.tokenizer().to_str())
    for name in ("<|im_end|>", "<|video_pad|>"):
        without = content | {
            "added_tokens": [token for token in content["added_tokens"] if token["content"] != name]
        }
        path.write_text(json.dumps(without))
        with pytest.raises(
            ValueError, match=f"{path} has no special token {name[:2]}.{name[3:-2]}..; expected"
        ):
            chat.read_tokenizer(path)
    other = chats.tokenizer()
    other.add_special_tokens(["<tool_call>"])
    other.save(str(path))
    with pytest.raises(
        ValueError, match=f"{path} has the added tokens <tool_call>; expected only such as"
    ):
        chat.read_tokenizer(path)
