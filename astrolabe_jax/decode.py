"""Stage 3, decode: latents -> frames through the Wan VAE, streamed in time (vae_and_text.md A4)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from astrolabe_jax.models import layers


@functools.partial(jax.jit, static_argnames=("graphdef", "chunk"))
def decode(graphdef: Any, params: dict, latents: jax.Array, *, chunk: int) -> jax.Array:
    """Latents [B, F, C, H, W] -> frames [B, T, height, width, 3] uint8, the same for every `chunk`.

    `chunk` latent frames are decoded at a time: besides the frames themselves, memory does not grow with the length.
    The first chunk takes the remainder, so that two shapes are compiled at most.
    """
    model = layers.merge(graphdef, params)
    count = latents.shape[1]
    first = (count - 1) % chunk + 1
    pixels, stream = model.decode(latents[:, :first])
    frames = to_uint8(pixels)
    if first == count:
        return frames

    def step(stream, latents):
        pixels, stream = layers.merge(graphdef, params).decode(latents, stream)
        return stream, to_uint8(pixels)

    rest = latents[:, first:]
    rest = jnp.moveaxis(rest.reshape(rest.shape[0], -1, chunk, *rest.shape[2:]), 1, 0)
    _, chunks = jax.lax.scan(step, stream, rest)
    chunks = jnp.moveaxis(chunks, 0, 1)
    return jnp.concatenate([frames, chunks.reshape(chunks.shape[0], -1, *chunks.shape[3:])], axis=1)


def to_uint8(pixels: jax.Array) -> jax.Array:
    """Pixels in [-1, 1] -> uint8, clipped; truncated, not rounded, as the published code does (sampling.md 11.13)."""
    return (jnp.clip(pixels * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)
