"""A random base model of the real classes at the smallest sizes, for tests that need every part but no quality."""

from pathlib import Path

import jax
import numpy as np

from astrolabe_jax.convert.base import random_base, save_base
from astrolabe_jax.models.tokenizer import word_tokenizer
from astrolabe_jax.models.umt5 import UMT5Config
from astrolabe_jax.models.wan.config import WanConfig
from astrolabe_jax.models.wan.vae import VaeConfig
from astrolabe_jax.worlds.moving_shapes import vocabulary


def write_tiny_base(directory: Path, seed: int = 0) -> Path:
    """Writes the base (about 0.4 MB) and returns its directory; give it as `config.base`."""
    float32 = {"dtype": "float32", "param_dtype": "float32"}
    words = vocabulary.words()
    nets = random_base(
        {
            "transformer": WanConfig(
                dim=24,
                ffn_dim=48,
                num_layers=2,
                num_heads=2,
                freq_dim=16,
                text_dim=16,
                text_len=16,
                in_channels=4,
                **float32,
            ),
            "vae": VaeConfig(
                dim=4, z_dim=4, dim_mult=(1, 1, 2, 2), num_res_blocks=1, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4
            ),
            "text_encoder": UMT5Config(
                vocab_size=3 + len(words),
                dim=16,
                dim_attn=16,
                dim_ffn=32,
                num_heads=2,
                num_layers=2,
                text_len=16,
                **float32,
            ),
        },
        seed,
    )
    # The head starts at zero, as the real one does; without weights there every video would be its noise.
    head = nets["transformer"].params["head"]["linear"]
    head["kernel"] = 0.2 * jax.random.normal(jax.random.key(seed), head["kernel"].shape)
    save_base(
        directory, nets["transformer"], nets["vae"], nets["text_encoder"], word_tokenizer(words), dtype=np.float32
    )
    return directory
