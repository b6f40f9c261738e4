"""Decoding in chunks gives the frames of decoding at once, truncated to bytes, on any number of
devices.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astrolabe_jax import sharding
from astrolabe_jax.decode import decode, to_uint8
from astrolabe_jax.models import layers
from astrolabe_jax.models.wan.vae import Vae, VaeConfig
from tests.meshes import ONE, mesh_of

SIZES = {"dim": 4, "z_dim": 4, "dim_mult": (1, 1, 2, 2), "num_res_blocks": 1}
CONFIG = VaeConfig(**SIZES, latent_mean=(0.1,) * 4, latent_std=(2.0,) * 4)


@pytest.fixture(scope="module")
def vae():
    return layers.split(Vae(CONFIG, nnx.Rngs(0)))


def latents(frames, batch=2):
    return jax.random.normal(jax.random.key(frames), (batch, frames, 4, 2, 3))


@pytest.mark.parametrize(("frames", "chunk"), [(1, 3), (2, 3), (4, 1), (6, 3), (7, 3), (5, 4)])
def test_chunks_change_nothing(vae, frames, chunk):
    x = latents(frames)
    whole = np.asarray(
        jax.jit(lambda params, x: layers.merge(vae[0], params).decode(x)[0])(vae[1], x)
    )
    got = np.asarray(decode(*vae, x, chunk=chunk, mesh=ONE))
    assert got.shape == (2, CONFIG.pixel_frames(frames), 16, 24, 3) and got.dtype == np.uint8
    exact = (np.clip(whole * 0.5 + 0.5, 0, 1) * 255.0).astype(np.float64)
    # Truncation: a byte may differ from the whole decode only where rounding straddles a whole
    # number.
    near = (np.abs(exact - np.rint(exact)) < 1e-3) & (exact > 0) & (exact < 255)
    assert np.array_equal(got[~near], np.floor(exact)[~near]) and near.mean() < 0.02
    assert np.abs(got - exact).max() < 1.001


def test_videos_do_not_depend_on_their_batch(vae):
    x = latents(4, batch=3)
    alone = decode(*vae, x[1:2], chunk=2, mesh=ONE)
    assert np.array_equal(decode(*vae, x, chunk=2, mesh=ONE)[1:2], alone)


def test_working_memory_does_not_grow_with_the_length(vae):
    """Temporaries beyond the frames themselves: a hundred times the length, not even twice the
    memory.
    """

    def temporaries(frames):
        shape = jax.ShapeDtypeStruct((1, frames, 4, 2, 3), jnp.float32)
        stats = decode.lower(*vae, shape, chunk=3, mesh=ONE).compile().memory_analysis()
        return stats.temp_size_in_bytes - 2 * stats.output_size_in_bytes

    assert temporaries(300) < 2 * temporaries(9) + 100_000


@pytest.mark.parametrize("data, fsdp", [(8, 1), (2, 4)])
def test_every_device_decodes_its_own_videos_and_talks_to_nobody(vae, data, fsdp):
    (graphdef, params), mesh = vae, mesh_of(data, fsdp)
    x = np.asarray(latents(5, batch=16))
    placed = sharding.replicate(mesh, params), sharding.shard_batch(mesh, x)
    got = decode(graphdef, *placed, chunk=2, mesh=mesh)
    assert got.sharding.is_equivalent_to(sharding.batch_sharding(mesh), got.ndim)
    assert {shard.data.shape[0] for shard in got.addressable_shards} == {2}
    want = np.asarray(decode(*vae, x, chunk=2, mesh=ONE))
    # truncated bytes
    assert np.abs(np.asarray(got).astype(int) - want).max() <= 1 and (got != want).mean() < 1e-3
    program = decode.lower(graphdef, *placed, chunk=2, mesh=mesh).compile().as_text()
    assert not re.findall(
        r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", program
    )


def test_bytes_are_truncated_and_clipped():
    values = jnp.array([-5.0, -1.0, -0.999, 0.0, 0.999, 1.0, 5.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 127, 254, 255, 255]
