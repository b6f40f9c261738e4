"""Adapters: counts, start at the base, merging, several in one jitted step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astrolabe_jax.models import lora
from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.wan.config import WAN_1_3B, WAN_14B, Layout
from tests.adapters import merge_adapter
from tests.models import tiny

FRAMES = 4


def _velocity(params, adapter, scale=1.0):
    net = merge(tiny.model()[0], params)
    adapter = lora.scaled(adapter, scale)
    text = net.encode_text(tiny.text(), adapter)
    t = jnp.full((1, FRAMES), 600.0)
    return net(tiny.latents(FRAMES), t, text, adapter, layout=Layout(block=2))


@pytest.mark.parametrize("config, count", [(WAN_1_3B, 349_962_240), (WAN_14B, 1_226_833_920)])
def test_parameter_count_at_rank_256(config, count):
    shapes = lora.adapter_shapes(config, 256)
    assert set(shapes) == set(lora.TARGETS) and len(shapes) == 10
    assert lora.parameter_count(shapes) == count


def test_fresh_adapter_is_the_base_exactly():
    _, params = tiny.model()
    adapter = lora.init_adapter(tiny.CONFIG, 3, jax.random.key(0))
    for name, (n_in, _) in lora.linear_sizes(tiny.CONFIG).items():
        a = np.asarray(adapter[name]["a"])
        assert 0.8 * n_in**-0.5 < np.abs(a).max() <= n_in**-0.5
    np.testing.assert_array_equal(
        jax.jit(_velocity)(params, adapter), jax.jit(_velocity)(params, None)
    )


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_merged_equals_unmerged(scale):
    _, params = tiny.model()
    adapter = tiny.adapter()
    merged = merge_adapter(params, adapter, scale)
    unmerged = jax.jit(_velocity)(params, adapter, scale)
    np.testing.assert_allclose(jax.jit(_velocity)(merged, None), unmerged, atol=2e-5, rtol=1e-5)
    assert np.abs(unmerged - jax.jit(_velocity)(params, None)).max() > 0.01


def test_merge_leaves_the_base_alone_and_keeps_its_dtype():
    _, params = tiny.model()
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    before = jax.tree.map(np.copy, low)
    merged = merge_adapter(low, tiny.adapter())
    jax.tree.map(np.testing.assert_array_equal, low, before)
    assert merged["blocks"]["ffn"]["fc2"]["kernel"].dtype == jnp.bfloat16
    assert np.any(merged["blocks"]["ffn"]["fc2"]["kernel"] != low["blocks"]["ffn"]["fc2"]["kernel"])
    np.testing.assert_array_equal(
        merged["head"]["linear"]["kernel"], low["head"]["linear"]["kernel"]
    )


def test_every_target_matters():
    """Each of the ten modules alone changes the output: no name is dropped on the way to its
    layer.
    """
    _, params = tiny.model()
    adapter = tiny.adapter()
    run = jax.jit(_velocity)
    base = run(params, jax.tree.map(jnp.zeros_like, adapter))
    for name in lora.TARGETS:
        only = jax.tree.map(jnp.zeros_like, adapter) | {name: adapter[name]}
        assert np.abs(run(params, only) - base).max() > 1e-3, name


def test_several_policies_in_one_jitted_step():
    """Current, old and reference over one base: compiled once, gradients to one of them only,
    swapped by value.
    """
    _, params = tiny.model()
    traces = []

    @jax.jit
    def step(current, old):
        traces.append(None)

        def loss(current):
            target = jax.lax.stop_gradient(_velocity(params, old) + _velocity(params, None))
            return jnp.mean((_velocity(params, current) - target) ** 2)

        return jax.value_and_grad(loss)(current)

    one, two = tiny.adapter(seed=1), tiny.adapter(seed=2)
    (loss_a, grad), (loss_b, _), (loss_c, _) = step(one, two), step(two, one), step(one, one)
    assert len(traces) == 1 and len({float(loss_a), float(loss_b), float(loss_c)}) == 3
    assert jax.tree.structure(grad) == jax.tree.structure(one)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grad))


def test_bfloat16_adapter():
    """Stored in 16 bits, it still trains and gives the same output up to its rounding."""
    _, params = tiny.model()
    assert {
        s.dtype for s in jax.tree.leaves(lora.adapter_shapes(tiny.CONFIG, 2, jnp.bfloat16))
    } == {jnp.bfloat16.dtype}
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.adapter())
    full, half = jax.jit(_velocity)(params, tiny.adapter()), jax.jit(_velocity)(params, low)
    assert 0 < np.abs(full - half).mean() < 0.02 * np.abs(full).mean()


def test_refusals():
    with pytest.raises(ValueError, match="rank is 0"):
        lora.init_adapter(tiny.CONFIG, 0, jax.random.key(0))
