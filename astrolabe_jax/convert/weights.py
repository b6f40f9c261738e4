"""Files of weights as they are published -> tensors under the plain names of the original Wan classes.

A file of torch may nest its state dict, and training leaves prefixes in the names (spec/checkpoints.md 1.1):
Self-Forcing has `generator_ema` and `model.`, Causal Forcing adds `_fsdp_wrapped_module.`, Krea has `model.` alone.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from astrolabe_jax.convert.files import read_safetensors
from astrolabe_jax.convert.torch_file import read_torch

READERS = {".safetensors": read_safetensors, ".pth": read_torch, ".pt": read_torch}
CONTAINERS = ("generator_ema", "generator", "model", "state_dict")  # the first that is there is read
_PREFIXES = re.compile(r"^(model\.|diffusion_model\.|module\.|generator\.|net\.|base_model\.model\.)+")
_WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
NOT_WEIGHTS = frozenset({"freqs"})  # the rotary table, which some writers store


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a published file by plain name, in their own dtypes; those of a .pt or .pth file are views of it.

    Where a training checkpoint holds several state dicts the first of CONTAINERS is read, and a warning says so. Raises
    ValueError naming the file for one that cannot be read or whose names do not make one state dict, or OSError.
    """
    tensors, names = _state_dict(READERS[path.suffix](path), path), {}
    for name in tensors:
        names.setdefault(_PREFIXES.sub("", _WRAPPERS.sub("", name)), []).append(name)
    if twice := [found for found in names.values() if len(found) > 1]:
        raise ValueError(f"{path} holds the same weight twice: {'; '.join(' and '.join(found) for found in twice[:3])}")
    return {plain: tensors[name] for plain, (name,) in names.items() if plain not in NOT_WEIGHTS}


def _state_dict(tree: Any, path: Path) -> Mapping[str, np.ndarray]:
    """The innermost dict of tensors alone, through CONTAINERS."""
    if not isinstance(tree, dict) or not tree:
        raise ValueError(f"{path} holds a {type(tree).__name__}; expected a state dict, with names and tensors")
    odd = [name for name, value in tree.items() if type(name) is not str or not isinstance(value, np.ndarray)]
    if not odd:
        return tree
    found = [name for name in CONTAINERS if isinstance(tree.get(name), dict)]
    if not found:
        raise ValueError(
            f"{path}: {odd[0]!r} is no tensor; expected one state dict, or one under {', '.join(CONTAINERS)}; "
            f"it holds {', '.join(map(str, list(tree)[:8]))}"
        )
    if len(found) > 1:
        logging.warning("%s holds %s: %s is read", path, " and ".join(found), found[0])
    return _state_dict(tree[found[0]], path)
