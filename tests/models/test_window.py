"""Windows of long videos: what a window sees of its past, against the cached rollout and the
uncached forward.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.lora import scaled
from astrolabe_jax.models.wan import cache as kv
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.models.wan.transformer import Past
from astrolabe_jax.streaming import streams
from tests.models import tiny
from tests.streams_of import begin, cache, plain_videos, policy_of

LAYOUTS = {
    "sink, relative": Layout(block=3, window=12, sink=3, positions="relative"),
    "sink, absolute": Layout(block=3, window=12, sink=3),
    "no sink": Layout(block=3, window=9, positions="relative"),
    "sink of two": Layout(block=3, window=11, sink=2, positions="relative"),
    "frames": Layout(block=1, window=6, sink=3, positions="relative"),
    "global": Layout(block=3, max_global=9),
}
FRAMES = 21


@functools.cache
def streamed(name: str, stop: int):
    """The clean passes of a video of FRAMES frames to frame `stop`: (cache, velocities of every
    block so far).
    """
    layout = LAYOUTS[name]
    policy = policy_of(layout, tiny.adapter())
    videos = plain_videos(layout, FRAMES, 2, traced=True)
    blocks = streams.blocks_between(videos, 0, stop)
    if not blocks:
        return begin(policy, videos).cache, None
    video = cache(policy, videos, tiny.latents(FRAMES, 2)[:, :stop], blocks, trace=True)
    velocities = [trace.velocity[0] for trace in video.traces]
    return video.state.cache, np.concatenate(velocities, axis=1)


def model_of(params, copies: int = 1):
    """The network, its adapter as layers take it, and two prompts, each `copies` times."""
    model = merge(tiny.model()[0], params)
    adapter = scaled(tiny.adapter(), 1.0)
    text = model.encode_text(tiny.text(2).repeat(copies, axis=0), adapter)
    return model, adapter, text


@functools.cache
def window_program(name: str, context: bool):
    """The forward of a window, one program for every start."""
    layout = LAYOUTS[name]

    @jax.jit
    def run(params, cache, start, x, t):
        model, adapter, text = model_of(params)
        past = Past(cache, start)
        clean = None
        if context:
            earlier = x[:, : x.shape[1] - layout.block]
            clean = model.context(earlier, text, adapter, layout=layout, past=past)
        times = jnp.full(x.shape[:2], t)
        return model(x, times, text, adapter, layout=layout, context=clean, past=past)

    return run


def window(name: str, start: int, context: bool, t: float = 0.0, x=None):
    """Velocity of a window of 9 frames behind the streamed ones; of the video's own by default."""
    x = tiny.latents(FRAMES, 2)[:, start : start + 9] if x is None else x
    _, params = tiny.model()
    cache, _ = streamed(name, start)
    return window_program(name, context)(params, cache, jnp.int32(start), x, t)


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("start", [0, 3, 6, 12])
@pytest.mark.parametrize("name", LAYOUTS)
def test_clean_window_equals_the_stream(name, start, context):
    """Read clean, the frames behind a cache give what the stream gives, before and after its window
    is full.
    """
    _, expected = streamed(name, FRAMES)
    np.testing.assert_allclose(
        window(name, start, context), expected[:, start : start + 9], atol=2e-5
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_first_window_equals_the_forward_of_a_short_video(name):
    """At frame 0, with noisy context, it is the training forward without a past."""
    x = tiny.latents(9, 2, seed=3)

    @jax.jit
    def plain(params, x):
        model, adapter, text = model_of(params)
        return model(x, jnp.full(x.shape[:2], 700.0), text, adapter, layout=LAYOUTS[name])

    want = plain(tiny.model()[1], x)
    np.testing.assert_allclose(window(name, 0, False, 700.0, x), want, atol=2e-5)


def test_policies_of_positions_agree_until_the_window_is_full():
    x = tiny.latents(9, 2, seed=3)
    same = [window(name, 3, False, 500.0, x) for name in ("sink, relative", "sink, absolute")]
    np.testing.assert_allclose(*same, atol=2e-5)
    apart = [window(name, 12, False, 500.0, x) for name in ("sink, relative", "sink, absolute")]
    assert np.abs(apart[0] - apart[1]).max() > 1e-2


def test_a_prompts_past_serves_all_of_its_samples():
    layout = LAYOUTS["sink, relative"]
    cache, _ = streamed("sink, relative", 12)
    x = tiny.latents(9, 4, seed=4)

    @jax.jit
    def run(params, cache):
        model, adapter, text = model_of(params, copies=2)
        times = jnp.full(x.shape[:2], 500.0)
        return model(x, times, text, adapter, layout=layout, past=Past(cache, 12))

    _, params = tiny.model()
    repeated = jax.tree.map(lambda part: jnp.repeat(part, 2, axis=1), cache)
    np.testing.assert_allclose(run(params, cache), run(params, repeated), atol=2e-6)


@pytest.mark.parametrize("start", [3, 6, 12])
def test_reencoding_what_is_all_there_gives_the_stream(start):
    """While nothing is evicted the one pass equals the stream; afterwards it has not seen what is
    gone.
    """
    name = "sink, relative"
    layout = LAYOUTS[name]
    video = tiny.latents(FRAMES, 2)

    @jax.jit
    def again(params, first, recent, start):
        model, adapter, text = model_of(params)
        return model.reencode(first, recent, 0.0, text, start, adapter, layout=layout)

    # anything before the video
    padded = np.concatenate([np.full_like(video[:, :12], 9.0), video], axis=1)
    recent = padded[:, 12 + start - 6 : 12 + start]
    anew = again(tiny.model()[1], video[:, :3], recent, jnp.int32(start))
    expected, _ = streamed(name, start)
    sink = np.arange(3) < start
    before = start - 6 + np.arange(6) >= 3
    present = np.concatenate([sink, before]).repeat(4)
    for layer in range(2):
        got = kv.past_frames(anew, layer, layout, start, 4, 6)
        want = kv.past_frames(expected, layer, layout, start, 4, 6)
        for one, other in zip(got, want, strict=True):
            gap = np.abs(one - other)[:, present].max()
            assert gap < 2e-5 if start <= 9 or layer == 0 else gap > 1e-3
