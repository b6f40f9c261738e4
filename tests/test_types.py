"""The contract: which videos a batch has, and what is static where values cross into a program."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.streaming.scenes import Rules, Scene, timeline_of
from astrolabe_jax.types import Place, RngStream, Timeline
from tests.models import tiny
from tests.streams_of import plain_videos, policy_of

LAYOUT = Layout(block=2, window=4)
# with numbers in place of keys, of which no program must be compiled
VIDEOS = plain_videos(LAYOUT, 6, 4)._replace(keys=np.arange(4))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_taken_videos_are_those_of_the_batch_in_the_order_asked_for(chosen):
    numbers = np.array(chosen)
    taken = VIDEOS.take(numbers)
    assert taken.batch.texts == tuple(VIDEOS.batch.texts[i] for i in chosen)
    np.testing.assert_array_equal(taken.batch.index, VIDEOS.batch.index[numbers])
    np.testing.assert_array_equal(taken.batch.candidate, VIDEOS.batch.candidate[numbers])
    assert taken.timelines == tuple(VIDEOS.timelines[i] for i in chosen)
    np.testing.assert_array_equal(taken.keys, numbers)
    assert taken.prompts_at(2) == [VIDEOS.prompts_at(2)[i] for i in chosen]
    # what all videos share is the same object
    for name in ("rows", "embeddings", "traced", "first_frame"):
        assert getattr(taken, name) is getattr(VIDEOS, name)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.data())
def test_taking_twice_is_taking_what_was_taken(chosen, data):
    again = data.draw(st.lists(st.integers(0, len(chosen) - 1), min_size=1, max_size=4))
    twice = VIDEOS.take(np.array(chosen)).take(np.array(again))
    once = VIDEOS.take(np.array(chosen)[again])
    assert twice.batch.texts == once.batch.texts
    assert twice.timelines == once.timelines
    np.testing.assert_array_equal(twice.keys, once.keys)


def test_prompts_follow_the_scenes_of_each_video():
    scenes = [Scene("a", 0.0, 1, False), Scene("b", 0.0, 2, False)]
    changing = timeline_of(scenes, 6, LAYOUT, Rules("recache"))
    same = Timeline(("c", "d"), changing.blocks)
    videos = VIDEOS._replace(timelines=(changing, same))
    assert [videos.prompts_at(block) for block in range(3)] == [["a", "c"], ["b", "d"], ["b", "d"]]
    assert changing.changes == [2]
    assert videos.blocks == changing.blocks


def test_arrays_of_a_policy_are_its_parameters_and_its_adapter():
    policy = policy_of(LAYOUT, tiny.adapter())
    arrays = jax.tree.leaves((policy.params, policy.adapter))
    leaves = jax.tree.leaves(policy)
    assert len(leaves) == len(arrays) > 20
    assert all(leaf is array for leaf, array in zip(leaves, arrays, strict=True))
    assert jax.tree.leaves(policy_of(LAYOUT)) == jax.tree.leaves(policy.params)


def compilations(values):
    """How many programs are compiled for these values of one argument."""
    program = jax.jit(lambda value: jax.tree.map(lambda leaf: leaf + 1, value))
    for value in values:
        program(value)
    return program._cache_size()


@pytest.mark.parametrize(
    "change",
    [{"layout": Layout(block=1)}, {"lora_scale": 0.5}, {"graphdef": "another"}, {"adapter": None}],
    ids=lambda change: next(iter(change)),
)
def test_another_static_field_of_a_policy_is_another_program(change):
    policy = policy_of(LAYOUT).replace(params={"w": np.zeros(2)}, adapter={"a": np.zeros(2)})
    other = policy.replace(adapter={"a": np.ones(2)})
    equal = policy.replace(layout=Layout(block=2, window=4))  # not identical
    assert compilations([policy, other, equal]) == 1
    assert compilations([policy, policy.replace(**change)]) == 2


def test_one_program_serves_all_traced_places():
    def place(start, **options):
        return Place(np.int32(start), np.arange(start, start + 2, dtype=np.int32), **options)

    assert compilations([place(start) for start in (2, 4, 100)]) == 1
    assert compilations([place(2), place(2, aligned=False)]) == 2
    assert compilations([place(2), place(2, partial=True)]) == 2


def test_every_static_place_is_a_program_of_its_own():
    assert compilations([Place(None, None, start) for start in (0, 2, 0)]) == 2


def test_the_frame_of_a_place_is_its_start_traced_or_not():
    assert Place(None, None, 4).frame == 4
    assert isinstance(Place(None, None, 4).frame, int)
    frame = jax.jit(lambda place: place.frame)(Place(np.int32(6), None))
    assert frame == 6


def test_numbers_of_random_streams_are_never_reused():
    """They are part of every published result."""
    assert {stream.name: stream.value for stream in RngStream} == {
        "PROMPTS": 0,
        "ADAPTER": 1,
        "ROLLOUT": 2,
        "LOSS": 3,
        "HELD_OUT": 4,
        "REAL": 5,
        "SAMPLE": 6,
        "WINDOW": 7,
        "CONTINUATION": 8,
    }
