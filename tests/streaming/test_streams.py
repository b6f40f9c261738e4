"""The driver of blocks: places, forks, given frames; what a change of prompts keeps, and that
nothing else is kept.
"""

import functools

import jax
import numpy as np
import pytest

from astrolabe_jax import sharding
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.streaming import streams
from astrolabe_jax.streaming.scenes import Rules, Scene, cache_slots, shots, timeline_of
from astrolabe_jax.types import BlockPlan
from tests.meshes import mesh_of
from tests.models import tiny
from tests.streams_of import begin, cache, noise, plain_videos, policy_of, sample, videos_of

RELATIVE = Layout(block=2, window=6, sink=2, positions="relative")
TOKENS = 4  # per latent frame


def assert_equal(got, want):
    """Two states have the same bits."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


# Whole videos, and a video in parts.


def test_a_stream_gives_its_blocks_one_by_one():
    """Nothing is computed before it is asked for, and a stream that ends early leaves nothing
    behind.
    """
    policy = policy_of(RELATIVE)
    videos = plain_videos(RELATIVE, 12)
    stored = noise(12)
    asked = []

    def noise_of(plan):
        asked.append(plan.frame)
        return stored[:, :, plan.frame : plan.frame + plan.count]

    state = begin(policy, videos)
    blocks = streams.sample_blocks(policy, videos, state, range(6), noise_of)
    assert next(blocks).plan.frame == 0
    assert asked == [0]
    assert next(blocks).plan.frame == 2
    assert asked == [0, 2]


GEOMETRIES = {
    "sink, relative": Layout(block=1, window=3, sink=1, positions="relative"),
    "sink, absolute": Layout(block=1, window=3, sink=1),
    "no sink, relative": Layout(block=1, window=2, positions="relative"),
    "no sink, absolute, blocks of two": Layout(block=2, window=4),
}
ONE_SLOW = [
    name
    if name in ("sink, relative", "no sink, absolute, blocks of two")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in GEOMETRIES
]
FRAMES = 6
ADAPTED = {"adapter": tiny.adapter(), "lora_scale": 0.5}
VIDEOS = 8


@functools.cache
def eight_videos(geometry):
    """Two prompts with four videos each at traced places: policy, videos, and the whole videos."""
    policy = policy_of(GEOMETRIES[geometry], **ADAPTED)
    videos = plain_videos(policy.layout, FRAMES, VIDEOS, traced=True)
    shared = videos.take(np.array([0, 0, 0, 0, 4, 4, 4, 4]))._replace(keys=videos.keys)
    return policy, shared, sample(policy, shared)


def eight_until(geometry, frame):
    """The same to a frame, and the numbers of the blocks behind it."""
    policy, videos, whole = eight_videos(geometry)
    past = sample(policy, videos, blocks=streams.blocks_between(videos, 0, frame))
    return policy, videos, whole, past, streams.blocks_between(videos, frame, FRAMES)


@pytest.mark.parametrize("geometry", ONE_SLOW)
def test_blocks_at_traced_places_are_those_at_static_places(geometry):
    policy, videos, whole = eight_videos(geometry)
    static = sample(policy, videos._replace(traced=False))
    np.testing.assert_allclose(whole.latents, static.latents, atol=2e-5)
    for got, want in zip(whole.state.cache, static.state.cache, strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("geometry", ONE_SLOW)
def test_a_state_keeps_the_latents_of_the_sink_and_the_last_ones(geometry):
    policy, _, whole = eight_videos(geometry)
    kept = max(policy.layout.sink, 1)
    np.testing.assert_array_equal(whole.state.first, whole.latents[:, :kept])
    recent = whole.latents[:, -policy.layout.capacity :]
    np.testing.assert_array_equal(whole.state.recent, recent)


# before and after a block has stopped to see all that is before it
@pytest.mark.parametrize("start", [2, 4])
@pytest.mark.parametrize("geometry", ONE_SLOW)
def test_a_fork_with_the_keys_of_a_video_goes_on_as_the_video(geometry, start):
    """Bit for bit where as many are computed at once; with other keys it is another video."""
    policy, videos, whole, past, rest = eight_until(geometry, start)
    own = sample(policy, videos, state=streams.fork(past.state, 1), blocks=rest)
    np.testing.assert_array_equal(past.latents, whole.latents[:, :start])
    np.testing.assert_array_equal(own.latents, whole.latents[:, start:])
    assert_equal(own.state, whole.state)

    # what is before the window is the first one's
    before = sample(
        policy, videos.take(np.array([0, 4])), blocks=streams.blocks_between(videos, 0, start)
    )
    np.testing.assert_allclose(before.latents, past.latents[::4], atol=2e-5)
    forked = sample(policy, videos, state=streams.fork(before.state, 4), blocks=rest).latents
    np.testing.assert_allclose(forked[::4], whole.latents[::4, start:], atol=2e-5)
    for candidates in (forked[:4], forked[4:]):
        apart = np.abs(candidates[:, None] - candidates[None]).max(axis=(3, 4, 5))
        assert (apart[~np.eye(4, dtype=bool)] > 0.1).all()
    chosen = np.array([1, 1, 1, 1, 6, 6, 6, 6])
    again = sample(policy, videos.take(chosen), state=streams.fork(before.state, 4), blocks=rest)
    np.testing.assert_array_equal(again.latents, forked[chosen])


@pytest.mark.parametrize("each", [1, 2])
def test_a_fork_leaves_the_memory_of_its_parent_alone(each):
    policy, videos, _, past, rest = eight_until("sink, relative", 2)
    before = jax.device_get(past.state)
    part = videos.take(np.repeat(np.arange(VIDEOS), each))
    sample(policy, part, state=streams.fork(past.state, each), blocks=rest)
    assert_equal(past.state, before)


@pytest.mark.parametrize("start", [2, 4])
def test_a_stream_goes_on_behind_given_latents_as_if_it_had_sampled_them(start):
    """The clean passes alone leave the same keys and latents, bit for bit."""
    policy, videos, _, past, _ = eight_until("sink, relative", start)
    blocks = streams.blocks_between(videos, start, start + 2)
    forked = streams.fork(past.state, 1)
    sampled = sample(policy, videos, state=past.state, blocks=blocks)
    given = cache(policy, videos, sampled.latents, blocks, forked)
    assert_equal(given.state, sampled.state)


@pytest.mark.parametrize(("start", "frames"), [(2, 2), (4, 3)])
def test_keys_made_anew_are_those_of_the_stream_while_all_is_in_sight(start, frames):
    """By the same policy; behind evicted frames deep layers, which have seen them, differ."""
    policy, videos, _, past, rest = eight_until("sink, relative", start)
    again = streams.refresh_cache(policy, videos, past.state, rest[0])
    for got, want in zip(again.cache, past.state.cache, strict=True):
        apart = np.abs(got - want)[:, :, : frames * TOKENS]
        assert apart[0].max() < 2e-5
        assert (apart[1].max() < 2e-5) == (start == 2)


@pytest.mark.slow
def test_a_stream_is_the_same_on_eight_devices():
    videos = videos_of(shot_of(RELATIVE, 3, 1).timeline, 8)
    stored = noise(8, 8)
    one = sample(policy_of(RELATIVE), videos, stored)
    mesh = mesh_of(2, 4)
    policy = policy_of(RELATIVE)
    policy = policy.replace(params=sharding.shard_params(mesh, policy.params))
    with jax.set_mesh(mesh):
        eight = sample(policy, videos, stored)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(eight.state))
    np.testing.assert_allclose(eight.latents, one.latents, atol=2e-5)


# Places.


def test_a_place_is_static_while_the_cache_fills_and_traced_when_it_is_full():
    layout = Layout(block=2, window=4)
    filling = [streams.place_at(layout, 4, start, 2, None) for start in (0, 2)]
    assert [place.static_start for place in filling] == [0, 2]
    assert all(place.start is None and not place.partial for place in filling)
    for start in (3, 4, 100):
        place = streams.place_at(layout, 4, start, 2, None)
        assert place.start is not None
        assert place.frame == start
    # a window of one block, and a cache that holds the whole video
    assert streams.place_at(Layout(block=2, window=2), 2, 0, 2, None).static_start == 0
    assert streams.place_at(layout, 3, 4, 2, None).static_start == 4


def test_blocks_are_found_by_their_frames():
    videos = plain_videos(Layout(block=2, window=6, independent_first_frame=True), 7)
    assert [plan.frame for plan in videos.blocks] == [0, 1, 3, 5]
    assert [streams.block_at(videos, frame) for frame in range(7)] == [0, 1, 1, 2, 2, 3, 3]
    assert streams.blocks_between(videos, 1, 5) == range(1, 3)
    assert streams.blocks_between(videos, 0, 7) == range(4)
    positions = streams.positions_of(videos.blocks[1:3])
    np.testing.assert_array_equal(positions, [1, 2, 3, 4])
    assert positions.dtype == np.int32


def test_finite_says_which_samples_are():
    latents = tiny.latents(2, 3)
    latents[1, 1, 0, 0, 0] = np.nan
    np.testing.assert_array_equal(streams.finite(latents), [True, False, True])


# Changes of prompts.


def shot_of(layout, *lengths, cut=False, rules=None, given=0):
    """The only shot of scenes with so many blocks each."""
    fps = 4 * layout.block  # a block a second
    scenes = [Scene(str(i), float(count), count, cut) for i, count in enumerate(lengths)]
    frames = 1 + 4 * (given + layout.block * sum(lengths) - 1)
    (shot,) = shots(scenes, layout, rules or Rules(), fps, 4, frames=frames, given=given)
    return shot


def latents_of(layout, shot, rules=None, texts=(100, 200, 300), given=None):
    """Latents [1, F, C, H, W] of a shot, scene k with the prompt of seed texts[k]."""
    policy = policy_of(layout)
    videos = videos_of(shot.timeline, texts=texts)
    state = begin(policy, videos, cache_slots(layout, rules or Rules(), shot.latent_frames))
    before = streams.blocks_between(videos, 0, shot.given)
    parts = []
    if given is not None:
        past = cache(policy, videos, given, before, state)
        state = past.state
        parts = [past.latents]
    rest = range(before.stop, len(videos.blocks))
    new = sample(policy, videos, noise(shot.latent_frames), state, rest)
    return np.concatenate([*parts, new.latents], axis=1)


def test_given_frames_are_the_past():
    """A stream that goes on from the first frames of another equals it."""
    layout = Layout(block=2, window=4)
    whole = latents_of(layout, shot_of(layout, 5))
    rest = latents_of(layout, shot_of(layout, 3, given=4), given=whole[:, :4])
    np.testing.assert_allclose(rest, whole, atol=2e-5)


@pytest.mark.parametrize(
    ("rules", "layout"),
    [
        (Rules(), RELATIVE),
        pytest.param(Rules("recache"), Layout(block=2, window=6, sink=2), marks=pytest.mark.slow),
        (Rules("cut"), RELATIVE),
    ],
)
def test_a_new_prompt_changes_what_follows_and_nothing_before(rules, layout):
    shot = shot_of(layout, 4, 3, rules=rules)
    one = latents_of(layout, shot, rules, (100, 200))
    other = latents_of(layout, shot, rules, (100, 300))
    np.testing.assert_array_equal(one[:, :8], other[:, :8])
    assert np.abs(one[:, 8:] - other[:, 8:]).max() > 0.05
    plain = latents_of(layout, shot_of(layout, 7))
    np.testing.assert_allclose(one[:, :8], plain[:, :8], atol=2e-5)


def test_a_recache_for_the_same_prompt_differs_only_by_the_missing_mask():
    """Of one block there is nothing to mask: the keys made anew are those that were there."""
    layout = Layout(block=2, window=4)
    rules = Rules("recache")
    again = latents_of(layout, shot_of(layout, 1, 2, rules=rules), rules, (100, 100))
    np.testing.assert_allclose(again, latents_of(layout, shot_of(layout, 3)), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["relative", "absolute"])
def test_a_flush_of_a_window_not_full_is_that_of_a_full_one(positions):
    """The correction: the last two frames, where the published code takes the last two places of
    the buffer.
    """
    wide = Layout(block=3, window=9, sink=1, positions=positions)
    tight = Layout(block=3, window=6, sink=1, positions=positions)  # six frames fill this window
    published = Rules(published=True)
    want = latents_of(tight, shot_of(tight, 2, 1, rules=published), published)
    np.testing.assert_allclose(latents_of(wide, shot_of(wide, 2, 1)), want, atol=2e-5)
    empty = latents_of(wide, shot_of(wide, 2, 1, rules=published), published)
    assert np.abs(empty[:, 6:] - want[:, 6:]).max() > 1e-3


@pytest.mark.parametrize("cut", [True, False])
def test_behind_a_cut_only_the_sink_is_seen(cut):
    """Two pasts with the same sink go on alike, and, with a flush, not."""
    one = tiny.latents(8, seed=1)
    other = tiny.latents(8, seed=2)
    other[:, :2] = one[:, :2]  # the sink, one block: its keys depend on nothing before
    shot = shot_of(RELATIVE, 1, 1, cut=cut, given=8)
    one, other = (latents_of(RELATIVE, shot, given=past, texts=(100, 200)) for past in (one, other))
    # The block between is of the first scene; behind the cut it is gone as well.
    apart = np.abs(one[:, 10:] - other[:, 10:]).max()
    assert apart < 2e-5 if cut else apart > 1e-3


@pytest.mark.parametrize("transition", ["flush", "recache"])
def test_change_prompts_leaves_its_argument_alone_and_is_the_change_of_a_stream(transition):
    policy = policy_of(RELATIVE)
    videos = videos_of(shot_of(RELATIVE, 4, 3, rules=Rules(transition)).timeline)
    whole = sample(policy, videos)
    past = sample(policy, videos, blocks=range(4))
    before = jax.device_get(past.state)
    changed = streams.change_prompts(policy, videos, past.state, 4)
    assert np.abs(np.asarray(changed.cache.k) - before.cache.k).max() > 1e-3
    assert_equal(past.state, before)
    assert streams.change_prompts(policy, videos, changed, 5) is changed  # there is none
    rest = sample(policy, videos, state=changed, blocks=range(4, 7))
    np.testing.assert_array_equal(rest.latents, whole.latents[:, 8:])


@pytest.mark.slow
def test_a_change_is_about_the_videos_whose_prompt_changes():
    """Of two videos in one batch each goes on as it does alone."""
    policy = policy_of(RELATIVE)
    plain = plain_videos(RELATIVE, 12)
    scenes = [Scene("100", 0.0, 4, False), Scene("200", 0.0, 2, False)]
    changing = timeline_of(scenes, 12, RELATIVE, Rules("recache"))
    rows = {"100": 0, "200": 1}
    texts = np.concatenate([tiny.text(1, 100), tiny.text(1, 200)])
    two = plain.take(np.array([0, 0]))._replace(
        timelines=(*plain.timelines, changing), rows=rows, embeddings=texts
    )
    both = sample(policy, two).latents
    for video in range(2):
        alone = sample(policy, two.take(np.array([video]))).latents
        np.testing.assert_allclose(both[[video]], alone, atol=2e-5)
    np.testing.assert_array_equal(both[0, :8], both[1, :8])
    assert np.abs(both[0, 8:] - both[1, 8:]).max() > 0.05


def test_a_block_stands_at_its_positions_in_the_cache():
    """Rotary positions may jump: only the distances between frames matter."""
    layout = Layout(block=2, window=4)
    policy = policy_of(layout)
    videos = plain_videos(layout, 4)
    moved = [
        BlockPlan(plan.frame, plan.count, 0, plan.start, tuple(p + 9 for p in plan.positions))
        for plan in videos.blocks
    ]
    further = videos._replace(timelines=(videos.timelines[0]._replace(blocks=tuple(moved)),))
    np.testing.assert_allclose(
        sample(policy, further).latents, sample(policy, videos).latents, atol=2e-5
    )
