"""CLIP's tokens, of both forms of its files, against BPE as it is defined."""

import json
import re

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from astrolabe_jax.rewards.clip.tokenizer import check_prompt, load_tokenizer, token_ids
from tests.rewards.clip import clips

TEXT_LEN = clips.SIZES["text_len"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return clips.write_vocabulary(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory)


def bpe(text: str) -> list[int]:
    """Ids between start and end: the first merge of the list that fits is made, again and again."""
    vocabulary, ids = clips.vocabulary(), []
    for word in re.findall(r"'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower()):
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        for pair in clips.MERGES:  # a later merge never makes room for an earlier one in this list
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == pair:
                    symbols[i : i + 2] = ["".join(pair)]
                i += 1
        ids += [vocabulary[symbol] for symbol in symbols]
    return ids


@given(st.text(alphabet="abc 1'!\n", max_size=12))
def test_tokens_are_those_of_bpe(tokenizer, text):
    vocabulary = clips.vocabulary()
    want = [vocabulary[clips.START], *bpe(" ".join(text.split())), vocabulary[clips.END]]
    want = want if len(want) <= TEXT_LEN else [*want[: TEXT_LEN - 1], want[-1]]
    np.testing.assert_array_equal(
        token_ids(tokenizer, [text], TEXT_LEN)[0], want + [0] * (TEXT_LEN - len(want))
    )


def test_both_forms_of_the_files_are_one_tokenizer(directory, tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prompts = ["A cab, a bac", "abc  cab\u2019s 11", "", "a" * 40]
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        got = token_ids(load_tokenizer(path), prompts, TEXT_LEN)
        np.testing.assert_array_equal(got, token_ids(tokenizer, prompts, TEXT_LEN))


def test_limits_in_the_file_do_not_matter(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    limited = tokenizers.Tokenizer.from_file(str(path))
    limited.enable_truncation(3)
    limited.enable_padding(length=5)
    limited.save(str(path))
    ids = token_ids(load_tokenizer(tmp_path), ["a a a a a"], TEXT_LEN)
    np.testing.assert_array_equal(ids, token_ids(tokenizer, ["a a a a a"], TEXT_LEN))


@pytest.mark.parametrize("token", ["<|endoftext|>", "<|STARTOFTEXT|>", "<end_of_text>"])
def test_special_tokens_are_refused(tokenizer, token):
    for refuse in (check_prompt, lambda prompt: token_ids(tokenizer, [prompt], TEXT_LEN)):
        with pytest.raises(
            ValueError, match=f"holds '{re.escape(token)}', a special token of CLIP"
        ):
            refuse(f"a cat {token} b")


def test_files_that_are_no_tokenizer_of_clip_are_named(directory, tmp_path):
    with pytest.raises(
        FileNotFoundError,
        match="no .*vocab.json; expected tokenizer.json, or vocab.json and merges",
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json cannot be read: .*: copy it again"):
        load_tokenizer(tmp_path)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")
    )
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        ValueError, match=r"tokenizer.json makes \[\] of an empty text; expected a start token"
    ):
        load_tokenizer(tmp_path)
    other = tmp_path / "half"
    other.mkdir()
    (other / "vocab.json").write_text(json.dumps(clips.vocabulary()))
    with pytest.raises(FileNotFoundError, match="no .*merges.txt"):
        load_tokenizer(other)
