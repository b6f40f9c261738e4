"""Wan VAE: a video in chunks equals the whole, causality, sizes, errors.

Parity with the published code is tested by tests/golden (its files d_*).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from astrolabe_jax.models import layers
from astrolabe_jax.models.wan.vae import Vae, VaeConfig

CONFIG = VaeConfig(
    dim=2,
    z_dim=3,
    dim_mult=(1, 2, 2, 2),
    num_res_blocks=1,
    latent_mean=(0.1, 0.0, -0.2),
    latent_std=(0.5, 1.0, 2.0),
)


@pytest.fixture(scope="module")
def vae():
    """Return a net that is random everywhere.

    The residual branches of a fresh one are zero, which would hide a fault of theirs.
    """
    graphdef, params = layers.split(Vae(CONFIG, nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return graphdef, jax.tree.unflatten(tree, noisy)


@functools.partial(jax.jit, static_argnames=("graphdef", "method"))
def _run(graphdef, params, method, x, state=None):
    return getattr(layers.merge(graphdef, params), method)(x, state)


def _in_chunks(vae, method, x, chunks):
    parts = []
    state = None
    start = 0
    for size in chunks:
        part, state = _run(*vae, method, x[:, start : start + size], state)
        parts.append(part)
        start += size
    assert start == x.shape[1]
    return jnp.concatenate(parts, axis=1)


@pytest.mark.parametrize("chunks", [(1, 4, 4, 4), (5, 8), (1, 12)])
def test_a_video_encoded_in_chunks_equals_the_whole(vae, chunks):
    pixels = jax.random.uniform(jax.random.key(2), (2, 13, 16, 8, 3), minval=-1)
    whole, _ = _run(*vae, "encode", pixels)
    assert whole.shape == (2, 4, 3, 2, 1)
    np.testing.assert_allclose(_in_chunks(vae, "encode", pixels, chunks), whole, atol=2e-5)


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1), (2, 2), (1, 3), (3, 1)])
def test_a_video_decoded_in_chunks_equals_the_whole(vae, chunks):
    latents = jax.random.normal(jax.random.key(3), (2, 4, 3, 2, 1))
    whole, _ = _run(*vae, "decode", latents)
    assert whole.shape == (2, CONFIG.pixel_frames(4), 16, 8, 3)
    np.testing.assert_allclose(_in_chunks(vae, "decode", latents, chunks), whole, atol=2e-5)


@pytest.mark.parametrize("latent_frame", [0, 1, 2])
def test_no_pixel_depends_on_a_later_latent(vae, latent_frame):
    """The derivative along a change of one latent frame is exactly zero on every earlier pixel
    frame.
    """
    latents = jax.random.normal(jax.random.key(4), (1, 4, 3, 2, 1))
    change = jnp.zeros_like(latents).at[:, latent_frame + 1].set(1.0)

    def decode(x):
        return _run(*vae, "decode", x)[0]

    _, derivative = jax.jvp(decode, (latents,), (change,))
    first_changed = CONFIG.pixel_frames(latent_frame + 1)
    assert jnp.all(derivative[:, :first_changed] == 0)
    assert jnp.all(jnp.any(derivative[:, first_changed:] != 0, axis=(0, 2, 3, 4)))


@pytest.mark.slow
def test_a_black_input_has_finite_gradients(vae):
    """The norm of a zero vector must not make the gradient of x / |x| infinite."""

    def energy(params, pixels):
        return jnp.sum(_run(vae[0], params, "encode", pixels)[0] ** 2)

    silent = jax.tree.map(jnp.zeros_like, vae[1])
    for gradient in jax.tree.leaves(
        jax.grad(energy, argnums=(0, 1))(silent, jnp.zeros((1, 5, 8, 8, 3)))
    ):
        assert jnp.all(jnp.isfinite(gradient))


def test_latents_are_normalised(vae):
    """Encoding subtracts the mean and divides by the std; decoding undoes it, as a net with neither
    shows.
    """
    pixels = jax.random.uniform(jax.random.key(5), (1, 5, 8, 8, 3), minval=-1)
    mean, _ = _run(*vae, "encode_mean", pixels)
    latents, _ = _run(*vae, "encode", pixels)
    shape = (1, 1, 1, 1, CONFIG.z_dim)
    shift = jnp.asarray(CONFIG.latent_mean).reshape(shape)
    scale = jnp.asarray(CONFIG.latent_std).reshape(shape)
    expected = (mean - shift) / scale
    np.testing.assert_allclose(jnp.moveaxis(latents, 2, -1), expected, rtol=1e-5, atol=1e-6)
    plain = dataclasses.replace(CONFIG, latent_mean=(0.0,) * 3, latent_std=(1.0,) * 3)
    graphdef, _ = layers.graphdef_of(lambda: Vae(plain, nnx.Rngs(0)))
    decoded = _run(graphdef, vae[1], "decode", jnp.moveaxis(mean, -1, 2))[0]
    np.testing.assert_allclose(_run(*vae, "decode", latents)[0], decoded, atol=1e-4)


def test_the_published_size():
    """It has 126,892,531 parameters (docs/checkpoints.md, VAE tensors), and the decoder's state has
    32 arrays of two frames (docs/models.md, VAE streaming).
    """
    graphdef, params = layers.graphdef_of(lambda: Vae(VaeConfig(), nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == 126_892_531
    latents = jax.ShapeDtypeStruct((1, 1, 16, 60, 104), jnp.float32)
    pixels, state = jax.eval_shape(
        lambda p, z: layers.merge(graphdef, p).decode(z), params, latents
    )
    assert pixels.shape == (1, 1, 480, 832, 3)
    assert len(state) == 32 and all(x.shape[1] == 2 for x in state)
    assert [x.shape[-1] for x in state[:6]] == [16, 384, 384, 384, 384, 384]
    assert state[-1].shape == (1, 2, 480, 832, 96)


def test_wrong_sizes_are_refused(vae):
    with pytest.raises(ValueError, match="got 6 frames in a chunk, expected 1 modulo 4"):
        _run(*vae, "encode", jnp.zeros((1, 6, 8, 8, 3)))
    _, state = _run(*vae, "encode", jnp.zeros((1, 5, 8, 8, 3)))
    with pytest.raises(ValueError, match="got 5 frames in a chunk, expected a multiple of 4"):
        _run(*vae, "encode", jnp.zeros((1, 5, 8, 8, 3)), state)
    with pytest.raises(ValueError, match="80 pixel frames: expected 1 modulo 4"):
        CONFIG.latent_frames(80)
    with pytest.raises(ValueError, match="temporal_downsample has 3 entries"):
        VaeConfig(dim_mult=(1, 2))
    with pytest.raises(ValueError, match="latent_std has 16 entries; z_dim is 4"):
        VaeConfig(z_dim=4, latent_mean=(0.0,) * 4)
