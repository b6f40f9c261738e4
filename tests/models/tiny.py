"""A tiny random DiT for tests: every weight random (the head too, which starts at zero in
training), float32.

Numbers come from numpy: drawing them eagerly with jax would compile one program for each shape.
"""

import functools

import jax
import numpy as np

from astrolabe_jax.convert.base import shapes
from astrolabe_jax.models.lora import adapter_shapes
from astrolabe_jax.models.umt5 import UMT5Config
from astrolabe_jax.models.wan.config import WanConfig

CONFIG = WanConfig(
    dim=24,
    ffn_dim=32,
    num_layers=2,
    num_heads=2,
    freq_dim=16,
    text_dim=8,
    text_len=4,
    in_channels=4,
    dtype="float32",
    param_dtype="float32",
    remat=False,
)
TEXT = UMT5Config(
    vocab_size=40,
    dim=16,
    dim_attn=8,
    dim_ffn=24,
    num_heads=2,
    num_layers=3,
    text_len=12,
    dtype="float32",
    param_dtype="float32",
)
LATENT_HW = (4, 4)
FRAME = (CONFIG.in_channels, *LATENT_HW)


@functools.cache
def model(config: WanConfig = CONFIG):
    """Graph definition and `random_params`."""
    graphdef, params, _ = shapes("transformer", config)
    return graphdef, random_params(params, np.random.default_rng(7))


def random_params(params: dict, rng: np.random.Generator) -> dict:
    """For shapes: every parameter normal, times 0.3, around one in norms and around zero
    elsewhere.
    """

    def draw(path, leaf):
        centre = 1.0 if path[-1].key in ("scale", "gamma") else 0.0
        return (centre + 0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree.map_with_path(draw, params)


def normal(seed: int, *shape: int) -> np.ndarray:
    """Standard normal float32 array."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def text(batch: int = 1, seed: int = 100) -> np.ndarray:
    """Prompt embeddings [B, S, E]; one fixed prompt per sample index, whatever the batch."""
    return np.stack([normal(seed + b, CONFIG.text_len, CONFIG.text_dim) for b in range(batch)])


def latents(frames: int, batch: int = 1, seed: int = 0) -> np.ndarray:
    """Standard normal latents [B, F, C, H, W]."""
    return normal(seed, batch, frames, *FRAME)


def adapter(rank: int = 2, seed: int = 50) -> dict:
    """A random adapter whose b is not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32),
        adapter_shapes(CONFIG, rank),
    )
