"""The rollout: equal to the uncached forward, in pieces, per sample, at length.

Its agreement with the published cache is a matter of the golden runner (tests/golden, c_*).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astrolabe_jax import rollout as R
from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.wan.cache import frames_of, init_cache
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.schedule import velocity_to_x0
from tests.models import tiny

SAMPLER = R.Sampler(steps=(1000.0, 625.0))
TOKENS = 4  # per latent frame

LAYOUTS = {
    "global": (Layout(block=2), 6),
    "local": (Layout(block=2, window=4), 8),
    "sink": (Layout(block=2, window=6, sink=2), 10),
    # blocks straddle the ring's end
    "relative": (Layout(block=2, window=5, sink=1, positions="relative"), 12),
    "framewise": (Layout(block=1, window=4, sink=2), 6),
    "first frame": (Layout(block=2, window=6, sink=1, independent_first_frame=True), 9),
}


def _noise(frames, batch=1, steps=2, seed=3):
    return np.stack([tiny.latents(frames, batch, seed + j) for j in range(steps)])


def _rollout(layout, frames, *, batch=1, sampler=SAMPLER, noise=None, **options):
    graphdef, params = tiny.model()
    noise = _noise(frames, batch, len(sampler.steps)) if noise is None else noise

    @jax.jit
    def run(params, noise):
        return R.rollout(
            graphdef,
            params,
            None,
            tiny.text(batch),
            R.noise_from_array(noise),
            frames=frames,
            latent_hw=tiny.LATENT_HW,
            layout=layout,
            sampler=sampler,
            **options,
        )

    return run(params, noise)


@pytest.mark.parametrize("layout, frames", LAYOUTS.values(), ids=LAYOUTS)
def test_uncached_forward_with_clean_context_returns_the_sampled_latents(layout, frames):
    """streaming.md 6.6: the sampler's own last-step inputs, read against the clean video, give the
    video back.
    """
    latents, _, traces = _rollout(layout, frames, trace=True)
    graphdef, params = tiny.model()
    inputs = jnp.concatenate([t.inputs[-2] for t in traces], axis=1)
    t = jnp.full((1, frames), SAMPLER.steps[-1])

    @jax.jit
    def again(params, inputs, latents):
        net = merge(graphdef, params)
        text = net.encode_text(tiny.text())
        velocity = net(
            inputs, t, text, layout=layout, context=net.context(latents, text, layout=layout)
        )
        return velocity_to_x0(inputs, velocity, SAMPLER.sigma(t))

    assert np.abs(latents).max() > 0.5
    np.testing.assert_allclose(again(params, inputs, latents), latents, atol=2e-5)


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
    ours, _ = _rollout(layout, frames)
    theirs, _ = _rollout(dataclasses.replace(layout, faithful_sinks=True), frames)
    np.testing.assert_array_equal(ours, theirs)


def test_faithful_sinks_change_a_block_smaller_than_the_sink():
    layout = Layout(block=1, window=4, sink=2)
    ours, _ = _rollout(layout, 2)
    theirs, _ = _rollout(dataclasses.replace(layout, faithful_sinks=True), 2)
    assert np.abs(ours[:, 0] - theirs[:, 0]).max() > 1e-3  # zero keys of frame 1 are read
    assert np.abs(ours[:, 1] - theirs[:, 1]).max() > 1e-3  # frame 1 reads its own stale keys


def test_relative_equals_absolute_until_the_first_eviction():
    layout, frames = Layout(block=2, window=4, sink=2), 6
    absolute, _ = _rollout(layout, frames)
    relative, _ = _rollout(dataclasses.replace(layout, positions="relative"), frames)
    np.testing.assert_allclose(absolute[:, :4], relative[:, :4], atol=1e-5)
    assert np.abs(absolute[:, 4:] - relative[:, 4:]).max() > 1e-3


@pytest.mark.parametrize(
    "layout, frames, cut", [(Layout(block=2), 4, 2), (Layout(block=2, window=4, sink=2), 10, 8)]
)
def test_two_pieces_equal_one(layout, frames, cut):
    noise = _noise(frames)
    whole, end = _rollout(layout, frames, noise=noise)
    cache = init_cache(tiny.CONFIG, layout, 1, frames, tiny.LATENT_HW)
    head, cache = _rollout(layout, cut, noise=noise, cache=cache)
    tail, cache = _rollout(layout, frames - cut, noise=noise, cache=cache, start=cut)
    np.testing.assert_allclose(np.concatenate([head, tail], axis=1), whole, atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), cache, end)


def test_initial_latents_continue_the_video_they_come_from():
    """Given frames are cached at timestep 0 as a sampled block is, so its own beginning continues a
    video unchanged.
    """
    layout, frames = Layout(block=2, window=4), 8
    noise = _noise(frames)
    whole, _ = _rollout(layout, frames, noise=noise)
    graphdef, params = tiny.model()
    again, _, traces = jax.jit(
        lambda p: R.rollout(
            graphdef,
            p,
            None,
            tiny.text(),
            R.noise_from_array(noise[:, :, 4:], first=4),
            frames=4,
            latent_hw=tiny.LATENT_HW,
            layout=layout,
            sampler=SAMPLER,
            initial_latents=whole[:, :4],
            trace=True,
        )
    )(params)
    np.testing.assert_allclose(again, whole, atol=1e-6)
    assert [len(t.timestep) for t in traces] == [1, 1, 3, 3]


def test_a_sample_does_not_depend_on_its_batch():
    graphdef, params = tiny.model()
    layout = Layout(block=2, window=4)

    @jax.jit
    def run(params, text, keys):
        latents, _ = R.rollout(
            graphdef,
            params,
            None,
            text,
            R.noise_from_keys(keys, tiny.FRAME),
            frames=6,
            latent_hw=tiny.LATENT_HW,
            layout=layout,
            sampler=SAMPLER,
        )
        return latents

    keys = jax.random.split(jax.random.key(5), 3)
    together = run(params, tiny.text(3), keys)
    for i in range(3):
        np.testing.assert_allclose(
            run(params, tiny.text(3)[i : i + 1], keys[i : i + 1]), together[i : i + 1], atol=1e-6
        )
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_noise_is_counter_based():
    keys = jax.random.split(jax.random.key(1), 2)
    draw = R.noise_from_keys(keys, (1, 2, 2))
    at = jax.random.fold_in(jax.random.fold_in(keys[1], 9), 3)
    np.testing.assert_array_equal(
        jax.jit(draw, static_argnums=(1, 2))(9, 3, 4)[1], jax.random.normal(at, (4, 1, 2, 2))
    )
    assert len({float(draw(f, j, 1)[0, 0, 0, 0, 0]) for f in (0, 2) for j in (0, 1)}) == 4


def test_streaming_block_by_block_with_one_program():
    """rollout_block with a traced start serves every block of a full window from one
    compilation.
    """
    layout, frames = Layout(block=2, window=4, sink=1), 12
    noise = _noise(frames)
    whole, _ = _rollout(layout, frames, noise=noise)
    graphdef, params = tiny.model()
    text = jax.jit(lambda p: R.encode_text(graphdef, p, None, tiny.text()))(params)
    traced = []

    def block(params, noise, cache, start):
        traced.append(start)
        return R.rollout_block(
            graphdef, params, None, text, noise, cache, start, layout=layout, sampler=SAMPLER
        )[:2]

    growing, steady = jax.jit(block, static_argnums=3), jax.jit(block, donate_argnums=2)
    cache, out = init_cache(tiny.CONFIG, layout, 1, frames, tiny.LATENT_HW), []
    for start in range(0, frames, 2):
        run = growing if start + 2 < layout.window else steady
        latents, cache = run(params, noise[:, :, start : start + 2], cache, start)
        out.append(latents)
    np.testing.assert_allclose(np.concatenate(out, axis=1), whole, atol=1e-6)
    assert len(traced) == 2


def test_program_size_does_not_grow_with_length():
    graphdef, params = tiny.model()

    def equations(frames):
        def run(params, noise):
            return R.rollout(
                graphdef,
                params,
                None,
                tiny.text(),
                R.noise_from_array(noise),
                frames=frames,
                latent_hw=tiny.LATENT_HW,
                layout=Layout(block=2, window=4, positions="relative"),
                sampler=SAMPLER,
            )

        noise = jax.ShapeDtypeStruct((2, 1, frames, *tiny.FRAME), jnp.float32)
        return len(jax.make_jaxpr(run)(params, noise).eqns)

    assert equations(8) == equations(4000)


def test_first_block_may_take_other_steps():
    layout = Layout(block=1)
    sampler = dataclasses.replace(SAMPLER, first_steps=(1000.0, 750.0, 500.0))
    noise = _noise(2, steps=3)
    latents, _, traces = _rollout(layout, 2, sampler=sampler, noise=noise, trace=True)
    assert [list(t.timestep) for t in traces] == [[1000, 750, 500, 0], [1000, 625, 0]]
    np.testing.assert_array_equal(traces[0].inputs[-1], latents[:, :1])
    plain, _ = _rollout(layout, 2, noise=noise[:2])
    assert np.abs(plain[:, :1] - latents[:, :1]).max() > 1e-3


def test_trace_follows_the_sampler():
    _, _, (trace, _) = _rollout(Layout(block=2), 4, noise=(noise := _noise(4)), trace=True)
    np.testing.assert_array_equal(trace.inputs[0], noise[0][:, :2])
    np.testing.assert_allclose(
        trace.inputs[1], 0.375 * trace.x0[0] + 0.625 * noise[1][:, :2], atol=1e-6
    )
    np.testing.assert_allclose(trace.x0[1], trace.inputs[1] - 0.625 * trace.velocity[1], atol=1e-6)
    np.testing.assert_array_equal(trace.inputs[2], trace.x0[1])


def test_bfloat16_rollout_follows_float32():
    graphdef, _ = tiny.model(dataclasses.replace(tiny.CONFIG, dtype="bfloat16"))
    _, params = tiny.model()
    layout = Layout(block=2, window=4, sink=2, positions="relative")

    def run(params):
        return R.rollout(
            graphdef,
            params,
            None,
            tiny.text(),
            R.noise_from_array(_noise(6)),
            frames=6,
            latent_hw=tiny.LATENT_HW,
            layout=layout,
            sampler=SAMPLER,
        )

    latents, cache = jax.jit(run)(params)
    full, _ = _rollout(layout, 6)
    assert (
        cache.k.dtype == jnp.bfloat16
        and frames_of(cache, TOKENS) == 4
        and latents.dtype == jnp.float32
    )
    assert 1e-4 < np.abs(latents - full).mean() / np.abs(full).mean() < 0.1


@pytest.mark.parametrize(
    "options, culprit",
    [
        ({"frames": 5}, "5 frames are not a whole number of blocks"),
        ({"frames": 5, "start": 3}, "start is frame 3"),
        ({"frames": 4, "start": 2}, "needs the cache"),
        ({"frames": 3, "initial_latents": tiny.latents(1)}, "initial_latents is frame 1"),
        ({"frames": 1026}, "absolute positions"),
    ],
)
def test_rollout_refuses(options, culprit):
    graphdef, params = tiny.model()
    with pytest.raises(ValueError, match=culprit):
        R.rollout(
            graphdef,
            params,
            None,
            tiny.text(),
            R.noise_from_array(_noise(2)),
            latent_hw=tiny.LATENT_HW,
            layout=Layout(block=2),
            sampler=SAMPLER,
            **options,
        )


def test_sampler_and_cache_refuse():
    for steps in ((), (1001.0,)):
        with pytest.raises(ValueError, match="Sampler.steps"):
            R.Sampler(steps=steps)
    with pytest.raises(ValueError, match="slots"):
        init_cache(tiny.CONFIG, Layout(block=2, window=4), 1, 10, tiny.LATENT_HW, slots=6)
