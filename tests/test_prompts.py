"""Prompt lists: every refusal names file and line; draws depend on (seed, epoch) only and repeat
nothing too early.
"""

import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astrolabe_jax import prompts
from astrolabe_jax.types import RngStream
from astrolabe_jax.worlds.moving_shapes import vocabulary


class Words:
    """A tokenizer that knows all words but `corgi`."""

    unk_token_id = 2

    def __init__(self):
        self.seen = []

    def __call__(self, texts, add_special_tokens):
        self.seen += texts
        return {
            "input_ids": [
                [*(2 if word == "corgi" else 5 for word in text.split()), 1] for text in texts
            ]
        }


def write(tmp_path, content, name="list.txt"):
    path = tmp_path / name
    path.write_bytes(content)
    return str(path)


def check(source, texts, limit=6, judge=lambda text: None, tokenizer=None):
    """Check prompts whose scenes are separated by slashes."""
    prompts.check(source, texts, lambda text: text.split("/"), tokenizer or Words(), limit, judge)


@pytest.mark.parametrize("ending", [b"", b"\n"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_file_keeps_its_lines_in_order(tmp_path, newline, ending):
    source = write(tmp_path, newline.join(["a köln dome".encode(), b"b", b"  a  "]) + ending)
    assert prompts.load(source) == ("a köln dome", "b", "a")


@pytest.mark.parametrize("split", ["train", "test"])
def test_world_gives_its_split(split):
    assert prompts.load(f"world:moving_shapes/{split}") == tuple(vocabulary.prompts(split))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "list.txt is empty"),
        (b" \n\n", "list.txt is empty"),
        (b"one\n\nthree\n", "list.txt, line 2 is empty"),
        (b"one\n   \n", "list.txt, line 2 is empty"),
        (b"one\n\n", "list.txt, line 2 is empty"),
        (b"one\r\rthree\r", "list.txt, line 2 is empty"),
        (b"one\rtwo\rna\xefve\r", "list.txt is not UTF-8: byte 10 (line 3) is 0xef"),
        (b"prompt,id\ra cat,1\r", "list.txt is a table, 'prompt,id' first"),
        (b"one\nna\xefve\n", "list.txt is not UTF-8: byte 6 (line 2) is 0xef"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0f3a\nsize 145875068\n",
            "list.txt is a git-lfs pointer, not the file itself; run git lfs pull",
        ),
        (b"<!DOCTYPE html>\n<html>", "list.txt is a web page"),
        (b"PK\x03\x04\xff", "list.txt is not UTF-8"),
        (b"Prompt\tCategory\na cat\tAnimals\n", "list.txt is a table, 'Prompt\\tCategory' first"),
        (b'uuid,prompt,time\n1,"a cat",0\n', "list.txt is a table, 'uuid,prompt,time' first"),
        (b'{"prompt": "a cat"}\n', "list.txt holds JSON, "),
        (b'[\n "a cat"\n]\n', "whose name ends in .jsonl"),
    ],
)
def test_bad_files_are_refused_by_file_and_line(tmp_path, content, expected):
    with pytest.raises(ValueError) as error:
        prompts.load(write(tmp_path, content))
    assert expected in str(error.value)


@pytest.mark.parametrize("name", ["list.txt", "list.jsonl"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r", b"\r\r\n"])
@pytest.mark.parametrize("last", [False, True])
def test_lines_end_as_in_any_system(tmp_path, name, end, last):
    """Two prompts whatever the ends are, so the fingerprint of a run is one, too."""
    lines = [b"a cat", "a köln\u2028dome".encode()]
    if name.endswith("l"):
        lines = [b'{"prompt": "%b"}' % line for line in lines]
    content = end.join(lines) + (end if last else b"")
    assert prompts.load(write(tmp_path, content, name)) == ("a cat", "a köln\u2028dome")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_table_is_refused_by_its_name(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} is a table"):
        prompts.load(write(tmp_path, b"a cat;0\n", name))


@pytest.mark.parametrize("line", ["{a|b} cat", "[4k] a cat", '"prompt" in neon', "neon, text"])
def test_text_that_resembles_other_forms_is_text(tmp_path, line):
    assert prompts.load(write(tmp_path, line.encode())) == (line,)


def test_lines_of_json(tmp_path):
    lines = (
        b'{"tag": "colors", "include": [], "prompt": " a k\\u00f6ln dome "}\n'
        b'{"prompts": ["a", "b", "c"]}\n'
        b'{"prompts": ["a", "b"], "switch_frames": [3]}\n'
        b'{"id": 7, "prompts": ["a | b"]}\n'
    )
    assert prompts.load(write(tmp_path, lines, "list.jsonl"), (40, 80)) == (
        "a köln dome",
        '{"prompts": ["a", "b", "c"], "switch_frames": [40, 80]}',
        '{"prompts": ["a", "b"], "switch_frames": [3]}',
        '{"prompts": ["a | b"], "switch_frames": []}',
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"a cat", "line 2: is not JSON"),
        (b"[" * 100_000, "line 2: is not JSON"),
        (b'["a cat"]', 'line 2: expected {"prompt"'),
        (b'{"prompt": " "}', 'line 2: expected {"prompt"'),
        (b'{"prompt": "a", "prompts": ["b"]}', "line 2: "),
        (b'{"prompts": ["a", "b"], "switch_frame": [3]}', 'line 2: expected {"prompt"'),
        (b'{"prompt": "\\ud800"}', r"line 2: '\ud800' is half of a character"),
        (b"", "line 2 is empty"),
    ],
)
def test_bad_lines_of_json_are_refused_by_line(tmp_path, line, expected):
    source = write(tmp_path, b'{"prompt": "a"}\n' + line + b'\n{"prompt": "a"}\n', "list.jsonl")
    with pytest.raises(ValueError) as error:
        prompts.load(source)
    assert expected in str(error.value)
    assert len(str(error.value)) < 500


def test_what_cannot_be_encoded_or_scored_is_refused_by_file_and_line():
    def judge(text):
        if "cat" in text:
            raise ValueError("no cats")

    check("list.txt", ["a dog", "a cow"], judge=judge)
    with pytest.raises(ValueError, match=r"^list.txt, line 2: no cats"):
        check("list.txt", ["a dog", "a cow/a cat"], judge=judge)
    with pytest.raises(ValueError, match=r"line 2: 'long .* has 11 tokens, .* takes 6 with the"):
        check("list.txt", ["a dog", "long " + "word " * 9])
    with pytest.raises(ValueError, match=r"^--prompt: 'word .* has 11 tokens"):
        check("--prompt", ["a dog/" + "word " * 10])


def test_equal_lines_and_unknown_words_are_warned_of(capsys):
    check("list.txt", ["a dog", "a cow"])
    assert not capsys.readouterr().out
    check("list.txt", ["a dog", "a corgi", "corgi corgi a", "a cow", "a dog"])
    assert capsys.readouterr().out.splitlines() == [
        "warning: list.txt, line 3: the tokenizer of this base does not know most words of "
        "'corgi corgi a'; so it is with 1 of 5 texts looked at",
        "warning: list.txt: 1 of 5 prompts stand there more than once, line 5 that of line 1: "
        "'a dog'",
    ]


def test_a_long_list_is_checked_without_the_tokens_of_each_text(capsys):
    """Texts that may be too long, and some of the others, are cut into tokens; all are judged."""
    tokenizer = Words()
    judged = []
    texts = [f"corgi {number}/corgi corgi" for number in range(50_000)]
    check("list.txt", texts, 512, judged.append, tokenizer)
    assert len(judged) == 100_000 and len(tokenizer.seen) < 2 * prompts.LOOKED_UP + 2
    assert re.search(r"line 26: .* so it is with 1923 of 3846 texts", capsys.readouterr().out)
    # the last two are longer once they are cleaned
    longer = ["word " * 110, "\N{ARABIC LETTER HAH}" * 40, "&#65018;" * 40]
    check("list.txt", [*texts[:20_001], *longer, *texts[:20_001]], 512, tokenizer=tokenizer)
    assert {"word " * 109 + "word", "\N{ARABIC LETTER HAH}" * 40, "\ufdfa" * 40} <= {
        *tokenizer.seen
    }


@pytest.mark.parametrize(
    "source", ["missing.txt", "world:nowhere/train", "world:moving_shapes/dev", "world:"]
)
def test_unknown_sources_are_refused_by_name(source):
    with pytest.raises(
        (OSError, ValueError), match=source.removeprefix("world:").split("/")[-1] or "world:"
    ):
        prompts.load(source)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40), distinct=st.integers(1, 12), seed=st.integers(0, 2**31 - 1))
def test_epochs_take_prompts_without_replacement(size, distinct, seed):
    distinct = min(size, distinct)
    names = [f"p{i}" for i in range(size)]
    epochs = [
        prompts.draw(names, seed, epoch, distinct, 1, 1).index
        for epoch in range(3 * size // distinct + 2)
    ]
    assert all(len(set(epoch)) == distinct for epoch in epochs)
    flat = np.concatenate(epochs)
    for turn in range(len(flat) // size):
        assert sorted(flat[turn * size : (turn + 1) * size]) == list(range(size))


def test_draw_depends_on_seed_and_epoch():
    names = [f"p{i}" for i in range(50)]
    draws = {
        (seed, epoch): tuple(prompts.draw(names, seed, epoch, 8, 2, 1).index)
        for seed in (0, 1)
        for epoch in (0, 7)
    }
    assert len(set(draws.values())) == 4
    assert draws[1, 7] == tuple(prompts.draw(names, 1, 7, 8, 2, 1).index)


@pytest.mark.parametrize("repeated", [1, 2, 3, 6])
def test_repeated_batches_share_their_prompts(repeated):
    """The number of videos stays; prompts become fewer and their groups larger."""
    batch = prompts.draw([f"p{i}" for i in range(50)], 0, 3, 6, 8, repeated)
    index, counts = np.unique(batch.index, return_counts=True)
    assert len(batch.texts) == 48 and len(index) == 6 // repeated and set(counts) == {8 * repeated}
    assert len(set(zip(batch.index, batch.candidate, strict=True))) == 48
    assert batch.texts == tuple(f"p{i}" for i in batch.index)


def test_draw_refuses_more_prompts_than_the_list_has():
    with pytest.raises(ValueError, match="5 distinct prompts .* list has 4"):
        prompts.draw("abcd", 0, 0, 5, 2, 1)
    with pytest.raises(ValueError, match="divisor of 6"):
        prompts.draw("abcdefgh", 0, 0, 6, 2, 4)


def test_held_out_goes_through_the_list_before_second_candidates():
    batch = prompts.held_out("abcde", 0, 12)
    assert sorted(batch.texts[:5]) == sorted(batch.texts[5:10]) == list("abcde")
    assert list(batch.candidate) == [0] * 5 + [1] * 5 + [2] * 2
    assert any(prompts.held_out("abcde", seed, 5).texts != batch.texts[:5] for seed in range(1, 5))


def test_sample_keys_are_distinct_and_do_not_depend_on_the_batch():
    batch = prompts.draw([f"p{i}" for i in range(9)], 0, 0, 4, 3, 1)

    def raw(batch, seed=0, stream=RngStream.ROLLOUT, epoch=0):
        return [
            tuple(row)
            for row in np.asarray(
                jax.random.key_data(prompts.sample_keys(batch, seed, stream, epoch))
            )
        ]

    rows = raw(batch)
    assert raw(batch.take(np.array([5, 6]))) == rows[5:7]
    others = raw(batch, seed=1) + raw(batch, stream=RngStream.HELD_OUT) + raw(batch, epoch=1)
    assert len({*rows, *others}) == 4 * len(rows)


def test_duplicate_lines_are_two_groups():
    batch = prompts.draw(["same", "same"], 0, 0, 2, 2, 1)
    assert sorted(batch.index) == [0, 0, 1, 1] and set(batch.texts) == {"same"}
