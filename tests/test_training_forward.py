"""The training forward: equal to the rollout, and where gradients go and do not go.

What a window sees of its past is a matter of models/test_window.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astrolabe_jax import update
from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.wan import cache as kv
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.schedule import velocity_to_x0
from astrolabe_jax.types import PrefixContext, TrainState
from tests.models import tiny
from tests.streams_of import begin, plain_videos, policy_of, sample
from tests.tiny_training import FRAMES, LAYOUT, adapter, make_batch, make_config, make_samples


@pytest.mark.parametrize(
    "layout",
    [
        Layout(block=2),
        Layout(block=1, window=3),
        Layout(block=2, window=4, sink=1),
        Layout(block=2, window=4, sink=2, positions="relative"),
    ],
    ids=str,
)
def test_clean_context_forward_equals_the_rollout(layout):
    """From the sampler's own last-step input, every block returns exactly what was sampled."""
    graphdef, params = tiny.model()
    policy = policy_of(layout, adapter(), lora_scale=0.5)
    video = sample(policy, plain_videos(layout, 6), trace=True)
    # the last pass is the clean one
    x_t = np.concatenate([trace.inputs[-2] for trace in video.traces], axis=1)
    forwards = [
        update.training_forward(
            make_config(loss__context=context, lora__alpha=1.0), graphdef, layout
        )
        for context in ("clean", "noisy")
    ]

    @jax.jit
    def both(params, adapter, text, latents, x_t):  # as constants they would be folded, slowly
        t = jnp.array([625.0])
        return [
            velocity_to_x0(x_t, forward.velocity(params, adapter, text, latents, x_t, t), t / 1000)
            for forward in forwards
        ]

    clean, noisy = both(params, adapter(), tiny.text(1), video.latents, x_t)
    np.testing.assert_allclose(clean, video.latents, atol=2e-5)
    gap = np.abs(noisy - video.latents)
    assert gap[:, : layout.block].max() < 2e-5  # the first block has no context
    assert gap[:, layout.block :].max() > 1e-2


def test_no_gradient_through_the_clean_context():
    """The gradient is that of a forward which is handed the context as a constant."""
    graphdef, params = tiny.model()
    text = tiny.text(1)
    weight = tiny.latents(FRAMES, seed=3)
    x0 = tiny.latents(FRAMES, seed=1)
    x_t = tiny.latents(FRAMES, seed=2)
    t = jnp.array([700.0])
    forward = update.training_forward(make_config(), graphdef, LAYOUT)

    def own(policy, params, context):
        return forward.velocity(params, policy, text, x0, x_t, t)

    def given(policy, params, context):
        model = merge(graphdef, params)
        return model(
            x_t,
            jnp.full((1, FRAMES), 700.0),
            model.encode_text(text, policy),
            policy,
            layout=LAYOUT,
            context=context,
        )

    @jax.jit
    def gradients(policy, params):
        model = merge(graphdef, params)
        context = model.context(x0, model.encode_text(text, policy), policy, layout=LAYOUT)
        return [
            jax.grad(lambda policy, run=run: (run(policy, params, context) * weight).sum())(policy)
            for run in (own, given)
        ]

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
        *gradients(adapter(), params),
    )


# Windows behind a past.

SINK = Layout(block=2, window=6, sink=2, positions="relative")
PAST = 6  # frames, of which the window sees four


@functools.cache
def past_of(prefix):
    """Return a function of an adapter and latents [2, PAST, C, H, W] of the past: what the loss
    reads of it.
    """
    graphdef, params = tiny.model()

    def cache_of(adapter, latents):
        model = merge(graphdef, params)
        text = model.encode_text(tiny.text(2), adapter)
        context = model.context(latents, text, adapter, layout=SINK)
        empty = kv.empty_cache(tiny.CONFIG, 2, SINK.capacity, tiny.LATENT_HW)
        return kv.place_visible(empty, *context, SINK, PAST)

    def prefix_context(adapter, latents):
        start = jnp.int32(PAST)
        positions = np.arange(PAST, PAST + 4)
        if prefix == "full":
            return PrefixContext(start, positions, whole=latents)
        if prefix == "rollout_old":
            return PrefixContext(start, positions, cache_of(adapter, latents))
        return PrefixContext(
            start, positions, first=latents[:, :2], recent=latents[:, -SINK.capacity :]
        )

    return prefix_context


@pytest.mark.parametrize(
    "prefix",
    [
        "rollout_old",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("per_policy", "noised_prefix", "full")
        ),
    ],
)
def test_gradients_end_at_the_window_unless_they_are_asked_to_go_on(prefix):
    """Of the loss, by the latents of the past, by its keys, and by the policy through either:
    exactly zero, or not.
    """
    graphdef, params = tiny.model()
    changes = {"streaming__backprop": "full"} if prefix == "full" else {"streaming__prefix": prefix}
    config = make_config(streaming__window=4, **changes)
    objective = update.Objective(config, update.training_forward(config, graphdef, SINK))
    micro = jax.tree.map(lambda leaf: leaf[0], make_batch(make_samples(4), 4))

    def loss(params, current, behind, latents, keys):
        """behind: the policy, where it makes what is behind the window."""
        context = past_of(prefix)(behind, latents)
        if context.cache is not None:
            context = context._replace(cache=jax.tree.map(jnp.add, context.cache, keys))
        state = TrainState(current, tiny.adapter(seed=1), tiny.adapter(seed=2), None, None, 0)
        terms = update.sample_terms(objective, state, params, tiny.text(2), micro, context)
        return terms["total_loss"].sum()

    slots = SINK.capacity * 4  # of four tokens
    keys = kv.Cache(
        *[np.zeros((tiny.CONFIG.num_layers, 2, slots, 2, tiny.CONFIG.head_dim), np.float32)] * 2
    )
    x = tiny.latents(PAST, 2, seed=4)
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3, 4)))(
        params, tiny.adapter(), tiny.adapter(seed=3), x, keys
    )
    of_policy, of_behind, of_latents, of_keys = (
        max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(grad)) for grad in grads
    )
    assert np.isfinite(value)
    assert of_policy > 0
    assert of_behind == of_keys == 0
    assert (of_latents > 0) == (prefix == "full")


@pytest.mark.slow
def test_the_policy_learns_through_the_past_with_full_gradients():
    """The same predictions from its own keys of the past, held fixed, have another gradient.

    So do the latents of the past, which have none then.
    """
    graphdef, params = tiny.model()
    full = update.training_forward(
        make_config(streaming__backprop="full", streaming__window=4), graphdef, SINK
    )
    fixed = update.training_forward(
        make_config(streaming__window=4, loss__context_gradient=True), graphdef, SINK
    )
    x0 = tiny.latents(4, 2, seed=5)
    x_t = tiny.latents(4, 2, seed=6)
    t = np.full(2, 700.0, np.float32)
    weight = tiny.latents(4, 2, seed=7)
    before = tiny.latents(PAST, 2, seed=4)

    def value(adapter, before, params, forward, prefix):
        context = past_of(prefix)(adapter, before)
        velocity = forward.velocity(params, adapter, tiny.text(2), x0, x_t, t, context)
        return (velocity * weight).mean()

    both = jax.jit(
        lambda *given: [
            jax.value_and_grad(value, argnums=(0, 1))(*given, *kind)
            for kind in ((full, "full"), (fixed, "rollout_old"))
        ]
    )
    (one, (through, reached)), (other, (ended, unreached)) = both(tiny.adapter(), before, params)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(through))
    gap = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), through, ended)
    assert max(jax.tree.leaves(gap)) > 1e-3
    assert np.abs(reached).max() > 1e-5
    assert not np.any(unreached)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(block=2, window=4, sink=2, positions="relative"),
        pytest.param(Layout(block=1, window=4, sink=1), marks=pytest.mark.slow),
        pytest.param(Layout(block=2, window=4), marks=pytest.mark.slow),
        pytest.param(Layout(block=1, window=3, positions="relative"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_window_behind_a_past_returns_what_was_sampled(layout):
    """From the sampler's own last-step input, at every start by one program; not with other
    keys.
    """
    graphdef, params = tiny.model()
    count = 4
    frames = 10
    forward = update.training_forward(make_config(streaming__window=count), graphdef, layout)
    policy = policy_of(layout, adapter())
    videos = plain_videos(layout, frames, 2, traced=True)

    @jax.jit
    def predicted(params, adapter, cache, start, x0, x_t):
        context = PrefixContext(start, start + jnp.arange(count), cache)
        t = jnp.full(2, 625.0)
        velocity = forward.velocity(params, adapter, tiny.text(2), x0, x_t, t, context)
        return velocity_to_x0(x_t, velocity, t / 1000)

    state = begin(policy, videos)
    caches = []
    latents = []
    inputs = []
    for block in range(len(videos.blocks)):
        caches.append(jax.device_get(state.cache))
        sampled = sample(policy, videos, state=state, blocks=[block], trace=True)
        state = sampled.state
        latents.append(sampled.latents)
        inputs.append(sampled.traces[0].inputs[-2])  # the last pass is the clean one
    latents = np.concatenate(latents, axis=1)
    inputs = np.concatenate(inputs, axis=1)

    def window(start, cache):
        part = slice(start, start + count)
        x0 = latents[:, part]
        return predicted(params, adapter(), cache, np.int32(start), x0, inputs[:, part]), x0

    starts = range(0, frames - count + 1, layout.block)
    for start in starts:
        x0, want = window(start, caches[start // layout.block])
        np.testing.assert_allclose(x0, want, atol=2e-5)
    assert predicted._cache_size() == 1
    other = jax.tree.map(lambda part: part + np.float32(0.1), caches[starts[-1] // layout.block])
    x0, want = window(starts[-1], other)
    assert np.abs(x0 - want).max() > 1e-3
