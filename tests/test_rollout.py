"""The rollout: equal to the uncached forward, in pieces, for each sample by itself, at any length.

Its agreement with the published cache is a matter of the golden runner (tests/golden, c_*).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astrolabe_jax import rollout
from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.wan.cache import empty_cache, frames_of
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.schedule import velocity_to_x0
from astrolabe_jax.streaming import streams
from astrolabe_jax.types import Place
from tests.models import tiny
from tests.streams_of import SAMPLER, begin, cache, noise, plain_videos, policy_of, sample

TOKENS = 4  # per latent frame

LAYOUTS = {
    "global": (Layout(block=2), 6),
    "local": (Layout(block=2, window=4), 8),
    "sink": (Layout(block=2, window=6, sink=2), 10),
    # blocks straddle the ring's end
    "relative": (Layout(block=2, window=5, sink=1, positions="relative"), 12),
    "framewise": (Layout(block=1, window=3, sink=2), 5),
    "first frame": (Layout(block=2, window=6, sink=1, independent_first_frame=True), 9),
}


def sampled(layout, frames, blocks=None):
    """One video from stored noise, the same for all videos of a length; always with its trace, so
    that tests of one layout share their programs.
    """
    videos = plain_videos(layout, frames)
    return sample(policy_of(layout), videos, noise(frames), blocks=blocks, trace=True)


@pytest.mark.parametrize("layout, frames", LAYOUTS.values(), ids=LAYOUTS)
def test_uncached_forward_with_clean_context_returns_the_sampled_latents(layout, frames):
    """The sampler's own last-step inputs, read against the clean video, give the video back."""
    video = sampled(layout, frames)
    graphdef, params = tiny.model()
    inputs = jnp.concatenate([trace.inputs[-2] for trace in video.traces], axis=1)
    t = jnp.full((1, frames), SAMPLER.steps[-1])

    @jax.jit
    def again(params, inputs, latents):
        net = merge(graphdef, params)
        text = net.encode_text(tiny.text())
        context = net.context(latents, text, layout=layout)
        velocity = net(inputs, t, text, layout=layout, context=context)
        return velocity_to_x0(inputs, velocity, SAMPLER.sigma(t))

    assert np.abs(video.latents).max() > 0.5
    np.testing.assert_allclose(again(params, inputs, video.latents), video.latents, atol=2e-5)


@pytest.mark.parametrize(
    "layout, frames",
    [
        (Layout(block=2, window=5, sink=1), 10),
        (Layout(block=2, window=4, sink=2, positions="relative"), 8),
        (Layout(block=2, sink=2, max_global=5), 8),  # beyond the global window
    ],
)
def test_faithful_sinks_change_nothing_where_the_sink_fits_one_block(layout, frames):
    """So the published classes, which the golden runner replays with faithful_sinks, vouch for the
    default too.
    """
    ours = sampled(layout, frames)
    theirs = sampled(dataclasses.replace(layout, faithful_sinks=True), frames)
    np.testing.assert_array_equal(ours.latents, theirs.latents)


def test_faithful_sinks_change_a_block_smaller_than_the_sink():
    layout, frames = LAYOUTS["framewise"]
    ours = sampled(layout, frames, blocks=range(2)).latents
    faithful = dataclasses.replace(layout, faithful_sinks=True)
    theirs = sampled(faithful, frames, blocks=range(2)).latents
    assert np.abs(ours[:, 0] - theirs[:, 0]).max() > 1e-3  # zero keys of frame 1 are read
    assert np.abs(ours[:, 1] - theirs[:, 1]).max() > 1e-3  # frame 1 reads its own stale keys


def test_relative_equals_absolute_until_the_first_eviction():
    layout = Layout(block=2, window=4, sink=2)
    absolute = sampled(layout, 6).latents
    relative = sampled(dataclasses.replace(layout, positions="relative"), 6).latents
    np.testing.assert_allclose(absolute[:, :4], relative[:, :4], atol=1e-5)
    assert np.abs(absolute[:, 4:] - relative[:, 4:]).max() > 1e-3


@pytest.mark.parametrize(
    "name, cut",
    [("global", 2), ("sink", 8), ("first frame", 3)],
)
def test_two_pieces_equal_one(name, cut):
    layout, frames = LAYOUTS[name]
    policy = policy_of(layout)
    videos = plain_videos(layout, frames)
    whole = sampled(layout, frames)
    blocks = range(len(videos.blocks))
    middle = streams.block_at(videos, cut)
    head = sample(policy, videos, noise(frames), blocks=blocks[:middle], trace=True)
    tail = sample(policy, videos, noise(frames), head.state, blocks[middle:], trace=True)
    pieces = np.concatenate([head.latents, tail.latents], axis=1)
    np.testing.assert_allclose(pieces, whole.latents, atol=1e-6)
    for one, other in zip(jax.tree.leaves(tail.state), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_initial_latents_continue_the_video_they_come_from():
    """Given frames are cached at timestep 0 as a sampled block is, so its own beginning continues a
    video unchanged.
    """
    layout, frames = LAYOUTS["local"]
    policy = policy_of(layout)
    videos = plain_videos(layout, frames)
    whole = sampled(layout, frames)
    given = cache(policy, videos, whole.latents[:, :4], range(2), trace=True)
    rest = sample(policy, videos, noise(frames), given.state, range(2, 4), trace=True)
    np.testing.assert_array_equal(given.latents, whole.latents[:, :4])
    np.testing.assert_allclose(rest.latents, whole.latents[:, 4:], atol=1e-6)
    passes = [len(trace.timestep) for trace in given.traces + rest.traces]
    assert passes == [1, 1, 3, 3]


def test_a_sample_does_not_depend_on_its_batch():
    layout, frames = LAYOUTS["local"]
    policy = policy_of(layout)
    videos = plain_videos(layout, frames, count=3)
    together = sample(policy, videos).latents
    for i in range(3):
        alone = sample(policy, videos.take(np.array([i])), trace=True).latents
        np.testing.assert_allclose(alone, together[i : i + 1], atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_noise_is_counter_based():
    keys = jax.random.split(jax.random.key(1), 2)
    of_step = jax.random.fold_in(jax.random.fold_in(keys[1], 9), 3)
    block = rollout.block_noise(keys, 9, 4, 4, (1, 2, 2))
    np.testing.assert_array_equal(block[3, 1], jax.random.normal(of_step, (4, 1, 2, 2)))
    blocks = [rollout.block_noise(keys, frame, 2, 1, (1, 2, 2)) for frame in (0, 2)]
    first = [block[:, 0, 0, 0, 0, 0] for block in blocks]
    assert len(np.unique(first)) == 4  # frames and steps


def test_compiled_programs_do_not_grow_with_length_once_the_cache_is_full():
    """One program serves every block of a full window, as long as the video goes on."""
    layout = Layout(block=2, window=4, positions="relative")
    policy = policy_of(layout)

    def programs(frames):
        sample(policy, plain_videos(layout, frames))
        compiled = (rollout.sample_block, rollout.block_noise, streams.finite)
        return [function._cache_size() for function in compiled]

    before = rollout.sample_block._cache_size()
    short = programs(6)
    assert short[0] == before + 3  # two blocks that fill the cache, and one behind them
    assert programs(24) == short


def test_trace_follows_the_sampler():
    layout, frames = LAYOUTS["global"]
    stored = noise(frames)
    trace = sampled(layout, frames).traces[0]
    np.testing.assert_array_equal(trace.inputs[0], stored[0][:, :2])
    np.testing.assert_allclose(
        trace.inputs[1], 0.375 * trace.x0[0] + 0.625 * stored[1][:, :2], atol=1e-6
    )
    np.testing.assert_allclose(trace.x0[1], trace.inputs[1] - 0.625 * trace.velocity[1], atol=1e-6)
    np.testing.assert_array_equal(trace.inputs[2], trace.x0[1])


def test_bfloat16_rollout_follows_float32():
    layout = Layout(block=2, window=4, sink=2, positions="relative")
    policy = policy_of(layout, config=dataclasses.replace(tiny.CONFIG, dtype="bfloat16"))
    half = sample(policy, plain_videos(layout, 6), noise(6))
    full = sampled(layout, 6).latents
    assert half.state.cache.k.dtype == jnp.bfloat16
    assert frames_of(half.state.cache, TOKENS) == 4
    assert half.latents.dtype == np.float32
    assert 1e-4 < np.abs(half.latents - full).mean() / np.abs(full).mean() < 0.1


def test_a_cache_smaller_than_the_window_refuses_to_overflow():
    layout = Layout(block=2, window=4)
    policy = policy_of(layout)
    videos = plain_videos(layout, 4)
    with pytest.raises(ValueError, match="the cache of 2 frames is full and smaller than"):
        sample(policy, videos, noise(4), begin(policy, videos, slots=2), blocks=[1])


def test_sample_block_refuses_noise_of_another_number_of_steps():
    policy = policy_of(Layout(block=2))
    slots = empty_cache(tiny.CONFIG, 1, 2, tiny.LATENT_HW)
    text = rollout.encode_text(policy, tiny.text())
    with pytest.raises(ValueError, match=r"expected \[2 steps"):
        rollout.sample_block(policy, text, noise(2, steps=3), slots, Place(None, None, 0))


@pytest.mark.parametrize("steps", [(), (1001.0,)])
def test_sampler_refuses_steps(steps):
    with pytest.raises(ValueError, match="Sampler.steps"):
        rollout.Sampler(steps=steps)
