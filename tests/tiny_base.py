"""A random base model of the real classes at the smallest sizes, for tests that need every part but no quality."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from astrolabe_jax.convert.base import Net, save_base
from astrolabe_jax.models import layers
from astrolabe_jax.models.tokenizer import word_tokenizer
from astrolabe_jax.models.umt5 import UMT5, UMT5Config
from astrolabe_jax.models.wan.transformer import WanTransformer
from astrolabe_jax.models.wan.vae import Vae, VaeConfig
from astrolabe_jax.worlds.moving_shapes import vocabulary
from tests.models import tiny

_WORDS = vocabulary.words()
TRANSFORMER = dataclasses.replace(tiny.CONFIG, text_dim=16, text_len=16)
VAE = VaeConfig(dim=4, z_dim=4, dim_mult=(1, 1, 2, 2), num_res_blocks=1, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4)
TEXT = UMT5Config(
    vocab_size=3 + len(_WORDS),
    dim=16,
    dim_attn=16,
    dim_ffn=32,
    num_heads=2,
    num_layers=2,
    text_len=16,
    dtype="float32",
    param_dtype="float32",
)


def write_tiny_base(directory: Path, seed: int = 0) -> Path:
    """Writes the base (about 0.4 MB) and returns its directory; give it as `config.base`."""
    rng = np.random.default_rng(seed)
    nets = [
        _random(module, config, rng) for module, config in ((WanTransformer, TRANSFORMER), (Vae, VAE), (UMT5, TEXT))
    ]
    save_base(directory, *nets, word_tokenizer(_WORDS))
    return directory


def _random(module, config, rng: np.random.Generator) -> Net:
    """Weights drawn by numpy: a net's own initialisers would compile for half a minute.

    Norms are near 1, biases near 0, and kernels keep the scale; the transformer's head, too, which starts at zero in
    training, because without it every video would be its noise.
    """
    graphdef, shapes = layers.graphdef_of(lambda: module(config, rngs=nnx.Rngs(0)))

    def draw(path, leaf):
        name = path[-1].key
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if name in ("scale", "gamma"):
            return 1 + 0.1 * noise
        if name == "bias":
            return 0.1 * noise
        return noise / np.sqrt(np.prod(leaf.shape[:-1]) / (config.num_layers if "blocks" in str(path) else 1))

    return Net(graphdef, jax.tree_util.tree_map_with_path(draw, shapes), config)
