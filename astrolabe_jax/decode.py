"""Stage decode: latents -> frames through the Wan VAE, streamed in time (vae_and_text.md A4)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from astrolabe_jax import sharding
from astrolabe_jax.models import layers
from astrolabe_jax.models.wan.vae import VaeState


@functools.partial(jax.jit, static_argnames=("graphdef", "chunk", "mesh"))
def decode(graphdef: Any, params: dict, latents: jax.Array, *, chunk: int, mesh: Mesh) -> jax.Array:
    """Latents [B, F, C, H, W] -> frames [B, T, height, width, 3] uint8, the same for every `chunk`.

    `chunk` latent frames are decoded at a time: besides the frames themselves, memory does not grow
    with the length. The first chunk takes the remainder, so that two shapes are compiled at most.
    Samples are split over all devices of the mesh; every device decodes its own with a whole copy
    of the VAE.
    """
    return sharding.on_mesh(mesh, _decode)(graphdef, params, latents, chunk)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"), donate_argnames="stream")
def decode_chunk(
    graphdef: Any, params: dict, latents: jax.Array, stream: VaeState | None, *, mesh: Mesh
):
    """The next latents [B, n, C, H, W] of a video -> (frames [B, T, height, width, 3] uint8,
    stream).

    stream: None for the first chunk, then what the last call gave. The chunks together are the
    frames of `decode`.
    """

    def step(params, latents, stream):
        pixels, stream = layers.merge(graphdef, params).decode(sharding.by_sample(latents), stream)
        return jax.tree.map(sharding.by_sample, (to_uint8(pixels), stream))

    return sharding.on_mesh(mesh, step)(params, latents, stream)


def _decode(graphdef, params, latents, chunk):
    latents, model = sharding.by_sample(latents), layers.merge(graphdef, params)
    count = latents.shape[1]
    first = (count - 1) % chunk + 1
    pixels, stream = model.decode(latents[:, :first])
    frames = to_uint8(pixels)
    if first == count:
        return sharding.by_sample(frames)

    def step(stream, latents):
        pixels, stream = layers.merge(graphdef, params).decode(latents, stream)
        return stream, to_uint8(pixels)

    rest = latents[:, first:]
    rest = jnp.moveaxis(rest.reshape(rest.shape[0], -1, chunk, *rest.shape[2:]), 1, 0)
    _, chunks = jax.lax.scan(step, stream, rest)
    chunks = jnp.moveaxis(chunks, 0, 1)
    rest = chunks.reshape(chunks.shape[0], -1, *chunks.shape[3:])
    return sharding.by_sample(jnp.concatenate([frames, rest], axis=1))


def to_uint8(pixels: jax.Array) -> jax.Array:
    """Pixels in [-1, 1] -> uint8, clipped; truncated, not rounded, as the published code does
    (sampling.md 11.13).
    """
    return (jnp.clip(pixels * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)
