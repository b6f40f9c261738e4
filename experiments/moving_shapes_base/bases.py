"""A base of our own layout (docs/checkpoints.md, Base directories): drawn, and written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from astrolabe_jax.convert import engine, nets
from astrolabe_jax.convert.nets import Net
from astrolabe_jax.convert.parts import PARTS
from astrolabe_jax.models import layers
from astrolabe_jax.runtime.files import write_atomic, write_safetensors


def save_net(
    part: str, params: dict, config: Any, form: str = nets.ORIGINAL
) -> dict[str, np.ndarray]:
    """Return the tensors that `parts.load_net` reads, in the dtypes of the parameters."""
    tensors = engine.tensors(nets.rules(PARTS[part], config, form), params)
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


def save_base(
    directory: Path,
    transformer: Net,
    vae: Net,
    text: Net,
    tokenizer_json: str,
    dtype: Any = np.float32,
) -> None:
    """Write a base that `load_base` reads; floating-point tensors are stored as `dtype`."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = {"transformer": transformer, "vae": vae, "text_encoder": text}
    for part, net in parts.items():
        tensors = {
            name: np.asarray(tensor, dtype)
            for name, tensor in save_net(part, net.params, net.config).items()
        }
        write_safetensors(directory / f"{part}.safetensors", tensors)
    content = {part: nets.sizes_of(net.config) for part, net in parts.items()}
    write_atomic(directory / "tokenizer.json", tokenizer_json.encode())
    write_atomic(directory / "config.json", json.dumps(content, indent=2).encode())


def random_base(parts: Mapping[str, Any], seed: int) -> dict[str, Net]:
    """Return a net for each part as its class initialises it, where the training of a base starts.

    `parts` are the configs by name of the part.
    """
    drawn = {}
    for i, (part, config) in enumerate(parts.items()):
        key = jax.random.fold_in(jax.random.key(seed), i)
        graphdef, params = layers.split(PARTS[part].module(config, rngs=nnx.Rngs(key)))
        drawn[part] = Net(graphdef, params, config)
    return drawn
