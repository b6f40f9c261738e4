"""d_*: the VAE, whole and chunk by chunk. Stored pixels are [B, 3, T, H, W], ours [B, T, H, W,
3].
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax.convert.base import load_net
from astrolabe_jax.models import layers
from astrolabe_jax.models.wan.vae import VaeConfig
from tests.golden.entry import EXACT, FORWARD, Entry, Unsupported
from tests.golden.files import GoldenFile


def entries(file: GoldenFile) -> Iterator[Entry]:
    config = _config(file)
    graphdef, params, _ = load_net("vae", file.under("weights/"), config)
    pixels = np.moveaxis(file["pixels"], 1, -1)
    # The reference drops a remainder of frames that fills no latent frame; our encoder refuses it.
    pixels = pixels[:, : config.pixel_frames(1 + (pixels.shape[1] - 1) // config.temporal_stride)]

    @functools.cache
    def latents():
        return jax.jit(lambda p, x: layers.merge(graphdef, p).encode(x)[0])(params, pixels)

    decode = jax.jit(lambda p, z, stream: layers.merge(graphdef, p).decode(z, stream))

    @functools.cache
    def decoded():
        # From the stored latents: the decoder is not to be blamed for the encoder.
        return decode(params, file["latents"], None)[0]

    @functools.cache
    def stream(group: str):
        chunks, start, state = [], 0, None
        for size in file[f"{group}/chunks"]:
            frames, state = decode(params, file["latents"][:1, start : start + size], state)
            chunks.append(frames)
            start += size
        return chunks

    yield Entry("latents", latents, FORWARD)
    yield Entry("decoded_raw", lambda: jnp.moveaxis(decoded(), -1, 1), FORWARD)
    yield Entry("decoded", lambda: _frames_first(decoded()), FORWARD)
    yield Entry("video01", lambda: jnp.clip(_frames_first(decoded()) * 0.5 + 0.5, 0, 1), FORWARD)
    for group in file.groups():
        if group.startswith("cached"):
            yield Entry(
                f"{group}/decoded",
                lambda g=group: _frames_first(jnp.concatenate(stream(g), 1)),
                FORWARD,
            )
            yield Entry(
                f"{group}/frames_per_chunk", lambda g=group: [c.shape[1] for c in stream(g)], EXACT
            )


def _frames_first(frames):
    """[B, T, H, W, 3] -> the wrapper's clamped [B, T, 3, H, W]."""
    return jnp.clip(jnp.moveaxis(frames, -1, 2), -1, 1)


def _config(file: GoldenFile) -> VaeConfig:
    stored = file.config
    if stored["attn_scales"]:
        raise Unsupported(
            f"attention inside the stages (attn_scales {stored['attn_scales']}); no Wan VAE has it"
        )
    return VaeConfig(
        dim=stored["dim"],
        z_dim=stored["z_dim"],
        dim_mult=tuple(stored["dim_mult"]),
        num_res_blocks=stored["num_res_blocks"],
        temporal_downsample=tuple(stored["temperal_downsample"]),
        latent_mean=tuple(map(float, file["mean"])),
        latent_std=tuple(map(float, file["std"])),
    )
