"""Published files of weights -> tensors under the names that the model's own classes give them.

A file of torch may nest its state dict, and training leaves prefixes in the names: Self-Forcing has
`generator_ema` and `model.`, Causal Forcing adds `_fsdp_wrapped_module.`, Krea has `model.` alone
(docs/checkpoints.md, Nesting and prefixes).
"""

import functools
import itertools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from astrolabe_jax.convert.torch_file import read_torch
from astrolabe_jax.runtime.files import (
    INDEX,
    Lazy,
    check_names,
    read_safetensors,
    read_sharded,
    stand_in,
    what_is_at,
)

# End of a file's name -> what reads it.
READERS = {
    ".safetensors": read_safetensors,
    INDEX: read_sharded,
    ".pth": read_torch,
    ".pt": read_torch,
    ".bin": read_torch,
    ".ckpt": read_torch,
}
# Entries that hold a state dict; the first that a file has is read.
CONTAINERS = ("generator_ema", "generator", "model", "state_dict")
_PREFIXES = re.compile(
    r"^(model\.|diffusion_model\.|module\.|generator\.|net\.|base_model\.model\.)+"
)
_WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
# What some writers store beside the weights: the rotary table, numbers of positions, how many
# batches a BatchNorm has seen; and ComfyUI a tokenizer, marks, and scales of activations.
NOT_WEIGHTS = re.compile(
    r"freqs|spiece_model|scaled_fp8"
    r"|(.+\.)?(position_ids|num_batches_tracked|scale_input|input_scale|comfy_quant)"
)
# The name of a scale, by which the weight of float8 beside it is multiplied.
_SCALE = re.compile(r"(.+\.)(scale_weight|weight_scale)")


class Weights(NamedTuple):
    """The state dict of a file, and how it was nested and prefixed."""

    tensors: dict[str, Lazy]  # by plain name, in their own dtypes
    entries: tuple[str, ...]  # top-level names of a nested file
    entry: str  # the entry that was read, dots between levels; '' in a flat file
    prefixes: tuple[str, ...]  # what was removed from the names


def suffix_of(path: Path) -> str | None:
    """Return the end of a file's name, in lower case, that is in READERS, or None."""
    return next((suffix for suffix in READERS if path.name.lower().endswith(suffix)), None)


def read_weights(path: Path | str) -> dict[str, Lazy]:
    """Return the tensors of `open_weights`, by plain name."""
    return open_weights(path).tensors


def open_weights(
    path: Path | str, entry: str = "", containers: Sequence[str] = CONTAINERS
) -> Weights:
    """Open a published file; each of its tensors is read when it is asked for.

    Args:
      path: of the file; its name ends as in READERS.
      entry: the state dict to read, where a training checkpoint holds several; dots between levels.
      containers: entries of which the first that is there is read where `entry` is empty; a warning
        says so if there are others.

    Raises:
      ValueError: the file cannot be read, or its names do not make one state dict.
      OSError: from the file system.
    """
    path = Path(path)
    suffix = suffix_of(path)
    if suffix is None:
        raise ValueError(f"{path}: expected a file of weights, {', '.join(READERS)}")
    if not path.exists():
        raise FileNotFoundError(f"{what_is_at(path)}; expected a file of weights")
    if path.is_file() and (what := stand_in(path)):  # a pipe would wait for its writer
        raise ValueError(f"{path} is {what}")
    tree = READERS[suffix](path)
    entry, state = _state_dict(tree, path, entry, containers)
    check_names(path, state)
    stored_names, prefixes = _plain_names(state, path)
    tensors = {
        plain: state[stored]
        for plain, stored in stored_names.items()
        if not NOT_WEIGHTS.fullmatch(plain)
    }
    for name, tensor in tensors.items():
        # The alpha of a LoRA may be a whole number.
        if not (jnp.issubdtype(tensor.dtype, jnp.floating) or name.endswith(".alpha")):
            raise ValueError(
                f"{path} holds a tensor of dtype {tensor.dtype}, {name}; expected float weights: "
                "of a quantised model take the file in bfloat16 or float16"
            )
    tensors = _unscaled(tensors, path, "scaled_fp8" in stored_names)
    return Weights(tensors, tuple(map(str, tree)) if entry else (), entry, prefixes)


def _unscaled(tensors: dict[str, Lazy], path: Path, scaled: bool) -> dict[str, Lazy]:
    """Return the tensors with weights of float8 in wider dtypes, multiplied by their scales.

    A scale is one number, or one for each row. `scaled` tells that the file is marked to have
    scales. Raises ValueError for a weight whose scale is missing or of another shape.
    """
    scales = {}
    for name in tensors:
        if (match := _SCALE.fullmatch(name)) and f"{match[1]}weight" in tensors:
            scales[f"{match[1]}weight"] = tensors[name]
    plain = {}
    for name, tensor in tensors.items():
        scale = scales.get(name)
        rows = tensor.shape[:1]
        if scale is not None:
            if scale.shape not in ((), (1,), rows, (*rows, *[1] * (len(tensor.shape) - 1))):
                raise ValueError(
                    f"{path}: {name} has a scale of shape {list(scale.shape)}; expected one "
                    "number, or one for each row: take the file in bfloat16 or float16"
                )
            plain[name] = tensor.map(functools.partial(_times, scale), dtype=np.float32)
        elif tensor.dtype.itemsize > 1:
            plain[name] = tensor
        elif scaled or scales:
            raise ValueError(
                f"{path}: {name} is of {tensor.dtype}, and its scale is missing, which others of "
                "the file have; take the file in bfloat16 or float16"
            )
        else:  # which holds every number of float8
            plain[name] = tensor.map(lambda x: x.astype(jnp.bfloat16), dtype=jnp.bfloat16)
    used = {id(scale) for scale in scales.values()}
    return {name: tensor for name, tensor in plain.items() if id(tensors[name]) not in used}


def _times(scale: Lazy, weight: np.ndarray) -> np.ndarray:
    factor = np.asarray(scale, np.float32)
    return weight.astype(np.float32) * factor.reshape(-1, *[1] * (weight.ndim - 1))


def _plain_names(state: Mapping[str, Lazy], path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return {plain name: stored name}, and the prefixes that stored names have.

    Raises ValueError for two stored names with the same plain one.
    """
    names: dict[str, list[str]] = {}
    prefixes = []
    for stored in state:
        unwrapped = _WRAPPERS.sub("", stored)
        plain = _PREFIXES.sub("", unwrapped)
        prefixes += [unwrapped.removesuffix(plain), *_WRAPPERS.findall(stored)]
        names.setdefault(plain, []).append(stored)
    repeated = [" and ".join(stored) for stored in names.values() if len(stored) > 1]
    if repeated:
        raise ValueError(f"{path} holds the same weight twice: {'; '.join(repeated[:3])}")
    unique = tuple(dict.fromkeys(filter(None, prefixes)))
    return {plain: stored for plain, (stored,) in names.items()}, unique


def _tensor_of(name: Any, value: Any) -> Any:
    """Return the alpha of a LoRA, which some programs store as a plain number, as a tensor."""
    if type(value) not in (int, float) or not str(name).endswith(".alpha"):
        return value
    number = np.array(value, np.float64)
    return Lazy((), number.dtype, lambda: number)


def _listed(names: Iterable[Any]) -> str:
    """Return the first six keys of a file, as a short line whatever they are."""
    return ", ".join(repr(str(name)[:40])[1:-1][:40] for name in itertools.islice(names, 6))


def _state_dict(
    tree: Any, path: Path, entry: str, containers: Sequence[str]
) -> tuple[str, Mapping[str, Lazy]]:
    """Return the entry that is read, dots between levels, and the dict of tensors in it.

    The entry is `entry`, or the innermost one through `containers`.
    """
    if not isinstance(tree, dict) or not tree:
        raise ValueError(
            f"{path} holds {'nothing' if tree == {} else f'a {type(tree).__name__}'}; expected a "
            "state dict, with names and tensors"
        )
    tree = {name: _tensor_of(name, value) for name, value in tree.items()}
    others = [
        name for name, value in tree.items() if type(name) is not str or not isinstance(value, Lazy)
    ]
    if not others and not entry:
        return "", tree
    first, _, rest = entry.partition(".")
    nested = [str(name) for name, value in tree.items() if isinstance(value, dict)]
    present = [name for name in ([first] if entry else containers) if name in nested]
    if not present and entry:
        raise ValueError(f"{path} has no entry {first!r}; it has {_listed(nested) or 'none'}")
    if not present:
        raise ValueError(
            f"{path}: '{_listed(others[:1])}' is no tensor; expected one state dict, or one under "
            f"{', '.join(containers)}; it holds {_listed(tree)}"
        )
    if len(present) > 1:
        logging.warning("%s holds %s: %s is read", path, " and ".join(present), present[0])
    deeper, state = _state_dict(tree[present[0]], path, rest, containers)
    return f"{present[0]}.{deeper}".rstrip("."), state
