"""SEA-RAFT equals its description in torch, at any size; its parts do what their names say."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astrolabe_jax.convert import engine
from astrolabe_jax.models import layers
from astrolabe_jax.rewards.flow import weights as tables
from astrolabe_jax.rewards.flow.net import SeaRaft, SeaRaftConfig, correlations, lookup, upsampled
from tests.rewards.flow import rafts


@functools.cache
def ours(config):
    graphdef, expected = layers.graphdef_of(lambda: SeaRaft(config, nnx.Rngs(0)))
    params = engine.load(tables.table(config), rafts.weights(config), expected)
    return jax.jit(lambda a, b: layers.merge(graphdef, params)(a, b))


def frames(height, width, count=2, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), np.uint8)


@pytest.mark.parametrize(("height", "width"), [(128, 136), (131, 125)])
def test_flow_is_that_of_the_description(height, width):
    first, second = frames(height, width), frames(height, width, seed=1)
    oracle = rafts.Oracle(rafts.TINY, rafts.weights(rafts.TINY))
    want = oracle.flow(first, second)
    assert oracle.used == set(rafts.published(rafts.TINY))
    got = ours(rafts.TINY)(first, second)
    assert got.shape == (2, height, width, 2) and got.dtype == jnp.float32
    assert 1 < np.abs(want).max()
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-5)


def test_a_pair_does_not_depend_on_the_others():
    first, second = frames(40, 24, 3), frames(40, 24, 3, seed=1)
    together = ours(rafts.TINY)(first, second)
    np.testing.assert_allclose(
        ours(rafts.TINY)(first[1:2], second[1:2])[0], together[1], rtol=1e-5, atol=1e-5
    )


def test_frames_too_small_for_all_levels_have_flow():
    assert np.isfinite(ours(rafts.TINY)(frames(9, 17), frames(9, 17, seed=1))).all()


def test_sixteen_bit_activations_stay_close_to_float32():
    first, second = frames(40, 24), frames(40, 24, seed=1)
    want = ours(dataclasses.replace(rafts.TINIEST, iterations=1))(first, second)
    got = ours(dataclasses.replace(rafts.TINIEST, iterations=1, dtype="bfloat16"))(first, second)
    assert got.dtype == jnp.float32
    assert np.abs(got - want).max() < 0.1 * np.abs(want).max()


def test_a_lookup_finds_a_shift():
    """Where the second frame is the first moved by (2, 1), the flow (2, 1) finds each position's
    own features.
    """
    rng = np.random.default_rng(0)
    first = rng.standard_normal((1, 6, 7, 64)).astype(np.float32)
    first /= np.linalg.norm(first, axis=-1, keepdims=True)
    second = np.roll(first, (1, 2), axis=(1, 2))
    flow = np.broadcast_to(np.float32([2, 1]), (1, 6, 7, 2))
    found = np.asarray(lookup(correlations(first, second, 1), jnp.asarray(flow), 1)).reshape(
        1, 6, 7, 3, 3
    )
    inside = found[:, :5, :5]
    np.testing.assert_allclose(inside[..., 1, 1], 1 / 8, atol=1e-6)
    np.testing.assert_array_equal(found[:, :, 5:, 1, 1], 0)  # points outside
    off = np.asarray(
        lookup(correlations(first, second, 1), jnp.asarray(flow - np.float32([1, 0])), 1)
    )
    # x is the slow offset
    np.testing.assert_allclose(off.reshape(1, 6, 7, 3, 3)[:, :5, :5, 2, 1], 1 / 8, atol=1e-6)


def test_an_upsampled_constant_is_itself_inside():
    weights = np.random.default_rng(0).standard_normal((1, 5, 6, 576)).astype(np.float32)
    flow = upsampled(jnp.broadcast_to(jnp.float32([0.5, -1.0]), (1, 5, 6, 2)), jnp.asarray(weights))
    np.testing.assert_allclose(
        flow[:, 8:-8, 8:-8], np.broadcast_to([4.0, -8.0], (1, 24, 32, 2)), rtol=1e-5
    )


def test_the_published_program_and_its_memory():
    """At 480 x 832: 207 MB of correlations for a pair."""
    config = SeaRaftConfig()
    graphdef, params = layers.graphdef_of(lambda: SeaRaft(config, nnx.Rngs(0)))
    pair = [jax.ShapeDtypeStruct((1, 480, 832, 3), jnp.uint8)] * 2
    out = jax.eval_shape(lambda params, a, b: layers.merge(graphdef, params)(a, b), params, *pair)
    assert (out.shape, out.dtype) == ((1, 480, 832, 2), jnp.float32)
    features = jax.ShapeDtypeStruct((1, 60, 104, 256), jnp.float32)
    pyramid = jax.eval_shape(lambda a, b: correlations(a, b, 4), features, features)
    assert [level.shape[2:] for level in pyramid] == [(60, 104), (30, 52), (15, 26), (7, 13)]
    assert round(sum(4 * level.size for level in pyramid) / 1e6) == 207


def test_two_stages_are_refused():
    with pytest.raises(ValueError, match="SeaRaftConfig.block_dims .* three stages"):
        SeaRaftConfig(block_dims=(1, 2))
