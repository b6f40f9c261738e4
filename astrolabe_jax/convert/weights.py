"""Files of weights as they are published -> tensors under the plain names of the classes that wrote
them.

A file of torch may nest its state dict, and training leaves prefixes in the names
(spec/checkpoints.md 1.1): Self-Forcing has `generator_ema` and `model.`, Causal Forcing adds
`_fsdp_wrapped_module.`, Krea has `model.` alone.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from astrolabe_jax.convert.torch_file import read_torch
from astrolabe_jax.runtime.files import INDEX, Lazy, read_safetensors, read_sharded

# By the end of a file's name.
READERS = {
    ".safetensors": read_safetensors,
    INDEX: read_sharded,
    ".pth": read_torch,
    ".pt": read_torch,
    ".bin": read_torch,
}
# the first that is there is read
CONTAINERS = ("generator_ema", "generator", "model", "state_dict")
_PREFIXES = re.compile(
    r"^(model\.|diffusion_model\.|module\.|generator\.|net\.|base_model\.model\.)+"
)
_WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
# Buffers that some writers store: the rotary table, numbers of positions, how many batches a
# BatchNorm has seen.
NOT_WEIGHTS = re.compile(r"freqs|(.+\.)?(position_ids|num_batches_tracked)")


class Weights(NamedTuple):
    """The state dict of a file, and what stood around it."""

    tensors: dict[str, Lazy]  # by plain name, in their own dtypes
    entries: tuple[str, ...]  # top-level names of a nested file
    entry: str  # the one that was read, dots between levels; '' in a flat file
    prefixes: tuple[str, ...]  # what was taken out of the names


def suffix_of(path: Path) -> str | None:
    """The ending among READERS that a file's name has."""
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), None)


def read_weights(path: Path | str, entry: str = "") -> dict[str, Lazy]:
    """The tensors of `open_weights`."""
    return open_weights(path, entry).tensors


def open_weights(
    path: Path | str, entry: str = "", containers: Sequence[str] = CONTAINERS
) -> Weights:
    """Opens a published file; a tensor is read when it is asked for.

    Where a training checkpoint holds several state dicts, `entry` names the one to read; without it
    the first of `containers` is read, and a warning says so. Raises ValueError naming the file for
    one that cannot be read or whose names do not make one state dict, or OSError.
    """
    path = Path(path)
    suffix = suffix_of(path)
    if suffix is None:
        raise ValueError(f"{path}: expected a file of weights, {', '.join(READERS)}")
    tree = READERS[suffix](path)
    found, state = _state_dict(tree, path, entry, containers)
    names: dict[str, list[str]] = {}
    prefixes = {}
    for name in state:
        bare = _WRAPPERS.sub("", name)
        plain = _PREFIXES.sub("", bare)
        prefixes |= dict.fromkeys(
            filter(None, (bare.removesuffix(plain), *_WRAPPERS.findall(name)))
        )
        names.setdefault(plain, []).append(name)
    if twice := [same for same in names.values() if len(same) > 1]:
        raise ValueError(
            f"{path} holds the same weight twice: "
            f"{'; '.join(' and '.join(same) for same in twice[:3])}"
        )
    tensors = {
        plain: state[name] for plain, (name,) in names.items() if not NOT_WEIGHTS.fullmatch(plain)
    }
    if odd := [
        name for name, tensor in tensors.items() if not jnp.issubdtype(tensor.dtype, jnp.floating)
    ]:
        raise ValueError(
            f"{path} holds a tensor of dtype {tensors[odd[0]].dtype}, {odd[0]}; expected float "
            "weights"
        )
    return Weights(tensors, tuple(map(str, tree)) if found else (), found, tuple(prefixes))


def _state_dict(
    tree: Any, path: Path, entry: str, containers: Sequence[str]
) -> tuple[str, Mapping[str, Lazy]]:
    """The entry that was read and the dict of tensors in it: `entry`, or the innermost one through
    `containers`.
    """
    if not isinstance(tree, dict) or not tree:
        raise ValueError(
            f"{path} holds a {type(tree).__name__}; expected a state dict, with names and tensors"
        )
    first, _, rest = entry.partition(".")
    odd = [
        name for name, value in tree.items() if type(name) is not str or not isinstance(value, Lazy)
    ]
    if not odd and not entry:
        return "", tree
    inner = [str(name) for name, value in tree.items() if isinstance(value, dict)]
    found = [name for name in ([first] if entry else containers) if name in inner]
    if not found and entry:
        raise ValueError(f"{path} has no entry {first!r}; it has {', '.join(inner) or 'none'}")
    if not found:
        raise ValueError(
            f"{path}: {odd[0]!r} is no tensor; expected one state dict, or one under "
            f"{', '.join(containers)}; it holds {', '.join(map(str, list(tree)[:8]))}"
        )
    if len(found) > 1:
        logging.warning("%s holds %s: %s is read", path, " and ".join(found), found[0])
    deeper, state = _state_dict(tree[found[0]], path, rest, containers)
    return f"{found[0]}.{deeper}".rstrip("."), state
