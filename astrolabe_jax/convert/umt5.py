"""UMT5: names of models_t5_umt5-xxl-enc-bf16.pth <-> the parameter tree of models/umt5.py (spec/checkpoints.md 4)."""

from collections.abc import Mapping

import numpy as np
from flax import nnx

from astrolabe_jax.convert import engine
from astrolabe_jax.convert.engine import LINEAR, Rule
from astrolabe_jax.models import layers
from astrolabe_jax.models.umt5 import UMT5, UMT5Config

TABLE = [
    Rule("token_embedding.weight", "token_embedding.embedding"),
    Rule("blocks.{i}.norm1.weight", "blocks.norm1.scale"),
    *(Rule(f"blocks.{{i}}.attn.{part}.weight", f"blocks.attn.{part}.kernel", LINEAR) for part in "qkvo"),
    Rule("blocks.{i}.pos_embedding.embedding.weight", "blocks.position_bias.embedding"),
    Rule("blocks.{i}.norm2.weight", "blocks.norm2.scale"),
    Rule("blocks.{i}.ffn.gate.0.weight", "blocks.ffn.gate.kernel", LINEAR),
    Rule("blocks.{i}.ffn.fc1.weight", "blocks.ffn.fc1.kernel", LINEAR),
    Rule("blocks.{i}.ffn.fc2.weight", "blocks.ffn.fc2.kernel", LINEAR),
    Rule("norm.weight", "norm.scale"),
]


def load_umt5(tensors: Mapping[str, np.ndarray], config: UMT5Config) -> dict:
    """Tensors in the original naming -> params of `UMT5(config)`; raises engine.ConversionError on any misfit."""
    return engine.load(TABLE, tensors, expected_params(config))


def save_umt5(params: dict) -> dict[str, np.ndarray]:
    """The exact inverse of `load_umt5`."""
    return engine.save(TABLE, params)


def expected_params(config: UMT5Config) -> dict:
    """Shapes and dtypes of the params, without allocating them."""
    return layers.graphdef_of(lambda: UMT5(config, nnx.Rngs(0)))[1]
