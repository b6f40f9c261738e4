"""Windows of long videos: what a window sees of its past, against the cached rollout and the
uncached forward.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astrolabe_jax import rollout
from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.wan import cache as kv
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.models.wan.transformer import Past
from tests.models import tiny

LAYOUTS = {
    "sink, relative": Layout(block=3, window=12, sink=3, positions="relative"),
    "sink, absolute": Layout(block=3, window=12, sink=3),
    "no sink": Layout(block=3, window=9, positions="relative"),
    "sink of two": Layout(block=3, window=11, sink=2, positions="relative"),
    "frames": Layout(block=1, window=6, sink=3, positions="relative"),
    "global": Layout(block=3, max_global=9),
}
SAMPLER = rollout.Sampler()
FRAMES = 21


@functools.cache
def streamed(name: str, stop: int, partial: bool = True):
    """The clean passes of a video of FRAMES frames to frame `stop`: (cache, velocities of every
    block so far).
    """
    layout, (graphdef, params) = LAYOUTS[name], tiny.model()
    text = rollout.encode_text(graphdef, params, tiny.adapter(), tiny.text(2))
    cache = kv.empty_cache(tiny.CONFIG, 2, layout.capacity, tiny.LATENT_HW)
    put = jax.jit(
        lambda latents, cache, start: rollout.cache_block(
            graphdef,
            params,
            tiny.adapter(),
            text,
            latents,
            cache,
            start,
            layout=layout,
            sampler=SAMPLER,
            partial=True,
        )
    )
    made, video = [], tiny.latents(FRAMES, 2)
    for start in range(0, stop, layout.block):
        cache, record = put(video[:, start : start + layout.block], cache, jnp.int32(start))
        made.append(record.velocity[0])
    return cache, np.concatenate(made, axis=1) if made else None


def window(name: str, start: int, frames: int, context: bool, t: float = 0.0, latents=None):
    """Velocity of a window behind the streamed frames."""
    layout, (graphdef, params) = LAYOUTS[name], tiny.model()
    x = tiny.latents(FRAMES, 2)[:, start : start + frames] if latents is None else latents

    @jax.jit
    def run(cache, start):
        model, adapter = merge(graphdef, params), tiny.adapter()
        text, past = model.encode_text(tiny.text(2), adapter), Past(cache, start)
        clean = None
        if context:
            clean = model.context(
                x[:, : frames - layout.block], text, adapter, layout=layout, past=past
            )
        times = jnp.full(x.shape[:2], t)
        return model(x, times, text, adapter, layout=layout, context=clean, past=past)

    return run(streamed(name, start)[0], jnp.int32(start))


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize(
    "start", [0, *(pytest.param(start, marks=pytest.mark.slow) for start in (3, 6)), 12]
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_clean_window_equals_the_stream(name, start, context):
    """Read clean, the frames behind a cache give what the stream gives, before and after its window
    is full.
    """
    _, expected = streamed(name, FRAMES)
    np.testing.assert_allclose(
        window(name, start, 9, context), expected[:, start : start + 9], atol=2e-5
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_first_window_equals_the_forward_of_a_short_video(name):
    """At frame 0, with noisy context, it is the training forward without a past (streaming.md
    10.1).
    """
    layout, (graphdef, params), x = LAYOUTS[name], tiny.model(), tiny.latents(9, 2, seed=3)

    @jax.jit
    def plain(x):
        model = merge(graphdef, params)
        text = model.encode_text(tiny.text(2), tiny.adapter())
        return model(x, jnp.full(x.shape[:2], 700.0), text, tiny.adapter(), layout=layout)

    np.testing.assert_allclose(window(name, 0, 9, False, 700.0, x), plain(x), atol=2e-5)


def test_policies_of_positions_agree_until_the_window_is_full():
    """streaming.md 10.7."""
    x = tiny.latents(9, 2, seed=3)
    same = [window(name, 3, 9, False, 500.0, x) for name in ("sink, relative", "sink, absolute")]
    np.testing.assert_allclose(*same, atol=2e-5)
    apart = [window(name, 12, 9, False, 500.0, x) for name in ("sink, relative", "sink, absolute")]
    assert np.abs(apart[0] - apart[1]).max() > 1e-2


def test_a_prompts_past_serves_all_of_its_samples():
    layout, (graphdef, params) = LAYOUTS["sink, relative"], tiny.model()
    cache, x = streamed("sink, relative", 12)[0], tiny.latents(9, 4, seed=4)

    @jax.jit
    def run(cache):
        model = merge(graphdef, params)
        text = model.encode_text(tiny.text(2).repeat(2, axis=0), tiny.adapter())
        return model(
            x,
            jnp.full(x.shape[:2], 500.0),
            text,
            tiny.adapter(),
            layout=layout,
            past=Past(cache, 12),
        )

    repeated = jax.tree.map(lambda part: jnp.repeat(part, 2, axis=1), cache)
    np.testing.assert_allclose(run(cache), run(repeated), atol=2e-6)


@pytest.mark.parametrize("start", [3, 6, 12])
def test_reencoding_what_is_all_there_gives_the_stream(start):
    """While nothing is evicted the one pass equals the stream; afterwards it has not seen what is
    gone.
    """
    name = "sink, relative"
    layout, (graphdef, params), video = LAYOUTS[name], tiny.model(), tiny.latents(FRAMES, 2)

    @jax.jit
    def again(first, recent, start):
        model, adapter = merge(graphdef, params), tiny.adapter()
        text = model.encode_text(tiny.text(2), adapter)
        return model.reencode(first, recent, 0.0, text, start, adapter, layout=layout)

    # anything before the video
    padded = np.concatenate([np.full_like(video[:, :12], 9.0), video], axis=1)
    made = again(video[:, :3], padded[:, 12 + start - 6 : 12 + start], jnp.int32(start))
    expected = streamed(name, start)[0]
    for layer in range(2):
        for got, want in zip(
            *(kv.past_frames(c, layer, layout, start, 4, 6) for c in (made, expected)), strict=True
        ):
            present = np.concatenate([np.arange(3) < start, start - 6 + np.arange(6) >= 3]).repeat(
                4
            )
            gap = np.abs(got - want)[:, present].max()
            assert gap < 2e-5 if start <= 9 or layer == 0 else gap > 1e-3
