"""Every back end of models/attention.py gives what the formula says, forward and backward."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astrolabe_jax import sharding
from astrolabe_jax.models.attention import attention
from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.lora import scaled
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.models.wan.transformer import Past
from tests import meshes
from tests.models import tiny
from tests.streams_of import plain_videos, policy_of, sample

# q [B, N, A, K], keys, their heads, options
CASES = {
    "all": ((2, 30, 4, 16), 40, 4, {}),
    "mask": ((2, 30, 4, 16), 40, 4, {"mask": np.tril(np.ones((30, 40), bool), 5)}),
    "length": ((2, 30, 4, 16), 40, 4, {"length": np.int32(17)}),
    "causal": ((1, 40, 4, 16), 40, 4, {"causal": True}),
    "groups": ((2, 30, 6, 16), 40, 2, {"length": np.int32(33)}),
    "tiles": ((1, 600, 1, 130), 700, 1, {"length": np.int32(520)}),  # of splash: two by two
}


def arrays(case):
    shape, keys, heads, options = CASES[case]
    kv_shape = (shape[0], keys, heads, shape[3])
    return tiny.normal(0, *shape), tiny.normal(1, *kv_shape), tiny.normal(2, *kv_shape), options


def formula(q, k, v, mask=None, length=None, causal=False):
    """Return attention in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    seen = np.ones((q.shape[1], k.shape[1]), bool) if mask is None else mask
    seen = seen & (np.arange(k.shape[1]) < (k.shape[1] if length is None else length))
    seen = np.tril(seen) if causal else seen
    scores = np.einsum("bnak,bmak->banm", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(np.where(seen, scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("banm,bmak->bnak", weights, v)


def gradients(function, q, k, v):
    """Return the gradients of a sum of the result with fixed weights."""
    weights = tiny.normal(3, *q.shape)
    return jax.jit(jax.grad(lambda *x: (function(*x) * weights).sum(), (0, 1, 2)))(q, k, v)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_a_back_end_equals_the_formula(backend, case):
    q, k, v, options = arrays(case)
    run = functools.partial(attention, **options, backend=backend)
    if backend == "splash" and "mask" in options:
        with pytest.raises(ValueError, match="splash attention takes no mask; use attention='auto"):
            run(q, k, v)
        return
    np.testing.assert_allclose(jax.jit(run)(q, k, v), formula(q, k, v, **options), atol=2e-6)
    library = functools.partial(
        jax.nn.dot_product_attention,
        mask=None if "mask" not in options else jnp.asarray(options["mask"])[None, None],
        is_causal=options.get("causal", False),
        key_value_seq_lengths=(
            jnp.full(len(q), options["length"]) if "length" in options else None
        ),
    )
    for ours, theirs in zip(gradients(run, q, k, v), gradients(library, q, k, v), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"length": np.int32(3000)}], ids=str)
def test_many_queries_are_taken_in_chunks_and_give_the_same(options):
    q, k, v = (tiny.normal(seed, 1, 4801, 1, 8) for seed in range(3))
    run = functools.partial(attention, **options, backend="xla")
    np.testing.assert_allclose(run(q, k, v), formula(q, k, v, **options), atol=2e-6)
    few = functools.partial(attention, backend="xla")
    rows = np.array([0, 17, 4800])
    seen = np.arange(4801) < options.get("length", 4801)
    seen = seen & (np.arange(4801) <= rows[:, None]) if options.get("causal") else seen[None]
    mask = np.broadcast_to(seen, (3, 4801))

    def of_rows(q, k, v):
        return run(q, k, v)[:, rows]

    def alone(q, k, v):
        return few(q[:, rows], k, v, mask)

    def total(function):
        return jax.jit(jax.grad(lambda *x: (function(*x) ** 2).sum(), (0, 1, 2)))(q, k, v)

    for ours, theirs in zip(total(of_rows), total(alone), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_scores_of_a_whole_block_are_never_held():
    """A block of Wan at 480x832, its queries and the keys of 21 frames: 6.9 GiB of scores."""
    q = jax.ShapeDtypeStruct((1, 4680, 12, 128), jnp.float32)
    k = jax.ShapeDtypeStruct((1, 32760, 12, 128), jnp.float32)

    def loss(q, k, v):
        return attention(q, k, v, backend="xla").sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k).compile()
    memory = compiled.memory_analysis()
    # the copies of keys and values with heads first, and their gradients, take 0.2 GiB each
    assert memory.temp_size_in_bytes < 2**30


@pytest.mark.parametrize("backend", ["xla", "splash"])
def test_devices_take_their_own_samples(backend):
    q, k, v = (tiny.normal(seed, 8, 20, 2, 16) for seed in range(3))
    mesh = meshes.mesh_of(4, 2)

    def run(q, k, v, length):
        return attention(*map(sharding.by_sample, (q, k, v)), backend=backend, length=length)

    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(q, k, v, np.int32(11)).compile()
        spread = compiled(*sharding.shard_batch(mesh, (q, k, v)), np.int32(11))
        assert "all-gather" not in compiled.as_text()
    np.testing.assert_allclose(spread, formula(q, k, v, length=11), atol=2e-6)


SPLASH = dataclasses.replace(tiny.CONFIG, attention="splash")
LAYOUTS = {
    "sink, relative": Layout(block=3, window=9, sink=3, positions="relative"),
    "no sink": Layout(block=3, window=6),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_stream_and_the_gradient_of_a_window_behind_it_are_those_of_xla(name):
    """Traced lengths of a cache that grows, its ring and its sink, and the frames of a window."""
    layout = LAYOUTS[name]
    videos = plain_videos(layout, 12, traced=True)
    found = {}
    for config in (tiny.CONFIG, SPLASH):
        policy = policy_of(layout, tiny.adapter(), config=config)
        video = sample(policy, videos)
        model = merge(policy.graphdef, policy.params)
        text = model.encode_text(tiny.text(), scaled(policy.adapter, 1.0))

        def loss(adapter, model=model, text=text, cache=video.state.cache):
            x = tiny.latents(6, seed=3)
            run = functools.partial(model, text=text, layout=layout, past=Past(cache, 12))
            return (run(x, jnp.full((1, 6), 500.0), adapter=scaled(adapter, 1.0)) ** 2).sum()

        found[config.attention] = (video.latents, jax.jit(jax.grad(loss))(policy.adapter))
    chex.assert_trees_all_close(found["splash"], found["auto"], rtol=1e-4, atol=1e-4)


def test_products_of_16_bits_are_not_asked_for_at_the_precision_of_float32():
    """Mosaic refuses such a kernel, forward or backward ("Bad lhs type")."""

    def products(dtype):
        x = jax.ShapeDtypeStruct((1, 128, 1, 128), dtype)
        loss = jax.grad(lambda q: attention(q, q, q, backend="splash").astype(jnp.float32).sum())
        with jax.default_matmul_precision("float32"):
            lines = str(jax.make_jaxpr(loss)(x)).splitlines()
        return [line for line in lines if "precision=" in line]

    assert any("HIGHEST" in line for line in products(jnp.float32))
    assert products(jnp.bfloat16) and not any("HIGHEST" in x for x in products(jnp.bfloat16))


def test_cudnn_is_refused_where_it_does_not_fit():
    q, k, v, _ = arrays("all")
    with pytest.raises(ValueError, match="cudnn attention needs 16-bit inputs, got float32"):
        attention(q, k, v, backend="cudnn")
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))
    with pytest.raises(ValueError, match="cudnn attention takes no mask"):
        attention(q, k, v, np.ones((30, 40), bool), backend="cudnn")
