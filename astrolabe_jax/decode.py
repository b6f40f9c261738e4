"""Stage decode: latents -> frames through the Wan VAE, streamed in time, and frames -> latents.

Both directions go chunk by chunk with a memory, so that besides the result nothing grows with the
length of a video, and the result is the same for every chunk length (docs/models.md, VAE
streaming). Every device decodes its own samples with a whole copy of the VAE.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from astrolabe_jax import sharding
from astrolabe_jax.convert.parts import Net
from astrolabe_jax.models import layers
from astrolabe_jax.models.wan.vae import VaeState
from astrolabe_jax.types import Frames, HostFrames, Latents


def decode_video(
    vae: Net, latents: Latents, state: VaeState | None, chunk: int
) -> tuple[list[Frames], VaeState | None]:
    """Decode the next latents [B, F, C, H, W] of a video, `chunk` latent frames at a time.

    Args:
      state: the decoder's memory, None for the first frames. Its memory is taken.

    Returns:
      frames uint8 [B, T, height, width, 3] of one chunk after another, and the memory behind them.
    """
    if state is None:
        # The first chunk takes the remainder; the rest is whole chunks, in one program.
        begin = (latents.shape[1] - 1) % chunk + 1
        decoded, state = decode_chunk(vae.graphdef, vae.params, latents[:, :begin], None)
        frames = [decoded]
        if begin < latents.shape[1]:
            decoded, state = decode_chunks(
                vae.graphdef, vae.params, latents[:, begin:], state, chunk
            )
            frames.append(decoded)
        return frames, state
    frames = []
    for first in range(0, latents.shape[1], chunk):
        decoded, state = decode_chunk(
            vae.graphdef, vae.params, latents[:, first : first + chunk], state
        )
        frames.append(decoded)
    return frames, state


@functools.partial(jax.jit, static_argnames=("graphdef", "chunk"), donate_argnames="state")
def decode_chunks(
    graphdef: Any, params: dict, latents: Latents, state: VaeState | None, chunk: int
) -> tuple[Frames, VaeState | None]:
    """Decode whole chunks one after another, in one program; see `decode_video`."""

    def step(state, part):
        pixels, state = layers.merge(graphdef, params).decode(part, state)
        return state, to_uint8(pixels)

    latents = sharding.by_sample(latents)
    parts = latents.reshape(latents.shape[0], -1, chunk, *latents.shape[2:])
    state, frames = jax.lax.scan(step, state, jnp.moveaxis(parts, 1, 0))
    frames = jnp.moveaxis(frames, 0, 1)
    frames = frames.reshape(frames.shape[0], -1, *frames.shape[3:])
    return sharding.by_sample(frames), jax.tree.map(sharding.by_sample, state)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="state")
def decode_chunk(
    graphdef: Any, params: dict, latents: Latents, state: VaeState | None
) -> tuple[Frames, VaeState | None]:
    """Decode one chunk; see `decode_video`."""
    pixels, state = layers.merge(graphdef, params).decode(sharding.by_sample(latents), state)
    return jax.tree.map(sharding.by_sample, (to_uint8(pixels), state))


def encode_video(
    vae: Net, frames: HostFrames, state: VaeState | None, chunk: int, mesh: sharding.AnyMesh
) -> tuple[Latents, VaeState | None]:
    """Encode the next frames uint8 [B, T, height, width, 3] of a video.

    Args:
      state: the encoder's memory, None for the first frames, of which the first is a latent frame
        of its own. Its memory is taken.
      chunk: latent frames at a time.

    Returns:
      latents [B, F, C, H, W] on the mesh, and the memory behind them.
    """
    stride = vae.config.temporal_stride
    latents = []
    begin = 0
    while begin < frames.shape[1]:
        count = stride * chunk - (stride - 1 if state is None else 0)
        part = sharding.shard_batch(mesh, frames[:, begin : begin + count])
        encoded, state = encode_chunk(vae.graphdef, vae.params, part, state)
        latents.append(encoded)
        begin += count
    return jnp.concatenate(latents, axis=1), state


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="state")
def encode_chunk(
    graphdef: Any, params: dict, frames: Frames, state: VaeState | None
) -> tuple[Latents, VaeState | None]:
    """Encode one chunk; see `encode_video`."""
    pixels = sharding.by_sample(frames).astype("float32") / 127.5 - 1
    latents, state = layers.merge(graphdef, params).encode(pixels, state)
    return sharding.by_sample(latents), state


def to_uint8(pixels: jax.Array) -> jax.Array:
    """Return pixels in [-1, 1] as uint8: clipped, and truncated, not rounded.

    The published code does the same (docs/published.md).
    """
    return (jnp.clip(pixels * 0.5 + 0.5, 0.0, 1.0) * 255.0).astype(jnp.uint8)
