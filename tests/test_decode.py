"""Decoding in chunks gives the frames of decoding at once, truncated to bytes, on any number of
devices.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astrolabe_jax import sharding
from astrolabe_jax.convert.nets import Net
from astrolabe_jax.decode import decode_chunk, decode_video, to_uint8
from astrolabe_jax.models import layers
from astrolabe_jax.models.wan.vae import Vae, VaeConfig
from tests.meshes import mesh_of

SIZES = {"dim": 4, "z_dim": 4, "dim_mult": (1, 1, 2, 2), "num_res_blocks": 1}
CONFIG = VaeConfig(**SIZES, latent_mean=(0.1,) * 4, latent_std=(2.0,) * 4)


@pytest.fixture(scope="module")
def vae():
    def make():
        return Vae(CONFIG, nnx.Rngs(0))

    graphdef, _ = layers.graphdef_of(make)
    params = jax.jit(lambda: layers.split(make())[1])()  # one program, not one a parameter
    return Net(graphdef, params, CONFIG)


def decoded(vae, latents, chunk):
    """Return the frames of whole videos."""
    frames, _ = decode_video(vae, latents, None, chunk)
    return np.concatenate(frames, axis=1)


def latents(frames, batch=2):
    return jax.random.normal(jax.random.key(frames), (batch, frames, 4, 2, 3))


@pytest.fixture(scope="module")
def whole(vae):
    """The pixels of seven latent frames decoded at once; shorter videos are their beginning."""
    decode = jax.jit(lambda params, x: layers.merge(vae.graphdef, params).decode(x)[0])
    pixels = np.asarray(decode(vae.params, latents(7)))
    return (np.clip(pixels * 0.5 + 0.5, 0, 1) * 255.0).astype(np.float64)


@pytest.mark.parametrize(("frames", "chunk"), [(1, 3), (2, 3), (4, 1), (6, 3), (7, 3), (5, 4)])
def test_chunks_change_nothing(vae, whole, frames, chunk):
    got = decoded(vae, latents(7)[:, :frames], chunk)
    assert got.shape == (2, CONFIG.pixel_frames(frames), 16, 24, 3) and got.dtype == np.uint8
    exact = whole[:, : got.shape[1]]
    # Truncation: a byte may differ from the whole decode only where rounding straddles a whole
    # number.
    near = (np.abs(exact - np.rint(exact)) < 1e-3) & (exact > 0) & (exact < 255)
    assert np.array_equal(got[~near], np.floor(exact)[~near]) and near.mean() < 0.02
    assert np.abs(got - exact).max() < 1.001


def test_videos_do_not_depend_on_their_batch(vae):
    x = latents(7)[:, :6]
    assert np.array_equal(decoded(vae, x, 3)[1:], decoded(vae, x[1:], 3))


def test_working_memory_does_not_grow_with_the_length(vae):
    """What a chunk takes and hands on has the same size wherever in a video it is."""
    sizes = []
    state = None
    for _ in range(4):
        chunk = jax.ShapeDtypeStruct((1, 3, 4, 2, 3), jnp.float32)
        decode = functools.partial(decode_chunk, vae.graphdef)
        _, state = jax.eval_shape(decode, vae.params, chunk, state)
        sizes.append([(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)])
    assert sizes[0] == sizes[1] == sizes[2] == sizes[3]


@pytest.mark.parametrize("data, fsdp", [pytest.param(8, 1, marks=pytest.mark.slow), (2, 4)])
def test_every_device_decodes_its_own_videos_and_talks_to_nobody(vae, data, fsdp):
    """Neither in the first chunk nor in a later one, which has a memory."""
    mesh = mesh_of(data, fsdp)
    x = np.asarray(latents(4, batch=16))
    params = sharding.replicate(mesh, vae.params)
    state = None
    parts = []
    with jax.set_mesh(mesh):
        for part in np.split(x, 2, axis=1):
            inputs = (params, sharding.place_batch(part), state)
            program = decode_chunk.lower(vae.graphdef, *inputs).compile()
            assert not re.findall(
                r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter",
                program.as_text(),
            )
            frames, state = program(*inputs)
            assert frames.sharding.is_equivalent_to(sharding.batch_sharding(mesh), frames.ndim)
            assert {shard.data.shape[0] for shard in frames.addressable_shards} == {2}
            parts.append(frames)
    got = np.concatenate(parts, axis=1)
    want = decoded(vae, x, 2)
    # truncated bytes
    assert np.abs(got.astype(int) - want).max() <= 1 and (got != want).mean() < 1e-3


def test_bytes_are_truncated_and_clipped():
    values = jnp.array([-5.0, -1.0, -0.999, 0.0, 0.999, 1.0, 5.0])
    assert to_uint8(values).tolist() == [0, 0, 0, 127, 254, 255, 255]
