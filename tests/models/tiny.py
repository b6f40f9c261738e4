"""A tiny DiT for tests in float32, with all weights random, also those of the head, which start at
zero in training.

The numbers come from numpy: drawing them eagerly with jax would compile a program for each shape.
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
    """Return the graph definition of a DiT and its `random_params`."""
    graphdef, params, _ = shapes("transformer", config)
    return graphdef, random_params(params, np.random.default_rng(7))


def random_params(params: dict, rng: np.random.Generator) -> dict:
    """Return parameters of these shapes: normal, times 0.3, around one in norms and zero
    elsewhere.
    """

    def draw(path, leaf):
        centre = 1.0 if path[-1].key in ("scale", "gamma") else 0.0
        return (centre + 0.3 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

    return jax.tree.map_with_path(draw, params)


def normal(seed: int, *shape: int) -> np.ndarray:
    """Draw a standard normal float32 array."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def text(batch: int = 1, seed: int = 100) -> np.ndarray:
    """Draw prompt embeddings [B, S, E]; those of a sample do not depend on the batch."""
    return np.stack([normal(seed + b, CONFIG.text_len, CONFIG.text_dim) for b in range(batch)])


def latents(frames: int, batch: int = 1, seed: int = 0) -> np.ndarray:
    """Draw standard normal latents [B, F, C, H, W]."""
    return normal(seed, batch, frames, *FRAME)


def adapter(rank: int = 2, seed: int = 50) -> dict:
    """Draw an adapter whose b is not zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32),
        adapter_shapes(CONFIG, rank),
    )
