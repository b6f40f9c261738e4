"""A random base model of the real classes at the smallest sizes, for tests that need every part but
no quality.
"""

import dataclasses
from pathlib import Path

import numpy as np

from astrolabe_jax.convert.base import shapes
from astrolabe_jax.models.wan.vae import VaeConfig
from astrolabe_jax.worlds.moving_shapes import vocabulary
from experiments.moving_shapes_base.bases import save_base
from experiments.moving_shapes_base.words import word_tokenizer
from tests.models import tiny

WORDS = sorted(
    {
        word
        for attributes in vocabulary.all_attributes()
        for word in vocabulary.to_prompt(attributes).split()
    }
)
TRANSFORMER = dataclasses.replace(tiny.CONFIG, text_dim=16, text_len=16)
VAE = VaeConfig(
    dim=4,
    z_dim=4,
    dim_mult=(1, 1, 2, 2),
    num_res_blocks=1,
    latent_mean=(0.0,) * 4,
    latent_std=(1.0,) * 4,
)
TEXT = dataclasses.replace(tiny.TEXT, vocab_size=3 + len(WORDS), text_len=16)
PARTS = {"transformer": TRANSFORMER, "vae": VAE, "text_encoder": TEXT}


def write_tiny_base(directory: Path, seed: int = 0) -> Path:
    """Writes the base (about 0.4 MB) and returns its directory; give it as `config.base`."""
    rng = np.random.default_rng(seed)
    nets = [shapes(part, config) for part, config in PARTS.items()]
    nets = [net._replace(params=tiny.random_params(net.params, rng)) for net in nets]
    save_base(directory, *nets, word_tokenizer(WORDS))
    return directory
