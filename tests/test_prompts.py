"""Prompt lists: every refusal names file and line; draws depend on (seed, epoch) only and repeat
nothing too early.
"""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from astrolabe_jax import prompts
from astrolabe_jax.types import RngStream
from astrolabe_jax.worlds.moving_shapes import vocabulary


def words(text):
    return len(text.split())


def write(tmp_path, content):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("ending", [b"", b"\n"])
@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_file_keeps_its_lines_in_order(tmp_path, newline, ending):
    source = write(tmp_path, newline.join(["a köln dome".encode(), b"b", b"  a  "]) + ending)
    assert prompts.load(source, words, 5) == ("a köln dome", "b", "a")


@pytest.mark.parametrize("split", ["train", "test"])
def test_world_gives_its_split(split):
    assert prompts.load(f"world:moving_shapes/{split}", words, 16) == tuple(
        vocabulary.prompts(split)
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "list.txt is empty"),
        (b" \n\n", "list.txt is empty"),
        (b"one\n\nthree\n", "list.txt, line 2 is empty"),
        (b"one\n   \n", "list.txt, line 2 is empty"),
        (b"one\n\n", "list.txt, line 2 is empty"),
        (b"one\nlong " + b"word " * 9, "list.txt, line 2 has 10 tokens, the text encoder takes 5"),
        (b"one\nna\xefve\n", "list.txt is not UTF-8: byte 6 (line 2) is 0xef"),
    ],
)
def test_bad_files_are_refused_by_file_and_line(tmp_path, content, expected):
    with pytest.raises(ValueError) as error:
        prompts.load(write(tmp_path, content), words, 5)
    assert expected in str(error.value)


def test_what_the_rewards_cannot_judge_is_refused_by_file_and_line(tmp_path):
    def check(prompt):
        if "cat" in prompt:
            raise ValueError("no cats")

    source = write(tmp_path, b"a dog\n a cat \na cow\n")
    assert prompts.load(source, words, 5) == ("a dog", "a cat", "a cow")
    with pytest.raises(ValueError, match="list.txt, line 2: no cats"):
        prompts.load(source, words, 5, check)


@pytest.mark.parametrize(
    "source", ["missing.txt", "world:nowhere/train", "world:moving_shapes/dev", "world:"]
)
def test_unknown_sources_are_refused_by_name(source):
    with pytest.raises(
        (OSError, ValueError), match=source.removeprefix("world:").split("/")[-1] or "world:"
    ):
        prompts.load(source, words, 5)


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
