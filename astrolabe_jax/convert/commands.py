"""The commands of `python -m astrolabe_jax.convert` for whole nets and adapters.

One tensor is in memory at a time.
"""

import functools
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from astrolabe_jax.convert import base, lora, nets, parts, store
from astrolabe_jax.convert.open import open_part
from astrolabe_jax.models.lora import TARGETS
from astrolabe_jax.models.tokenizer import load_tokenizer
from astrolabe_jax.runtime.files import Lazy, read_json, write_atomic, write_safetensors
from astrolabe_jax.runtime.progress import Progress, log

POLICIES = ("ema", "current", "old")  # adapters in a checkpoint of a run


def import_(
    path: Path, to: Path, entry: str = "", dtype: str = "", num_heads: int | None = None
) -> list[Path]:
    """Write a file's part, or all parts and the tokenizer of a base, as Orbax directories.

    Nothing is written before all content is checked. The sizes of each part are written to
    `to`/config.json when it is whole.

    Args:
      path: a file of weights, an imported part, or a base.
      to: directory of the results.
      entry: the state dict to read of a nested file.
      dtype: of the results; by default that of the file.
      num_heads: of a transformer, where nothing else tells it.

    Returns:
      The directories `to`/PART.

    Raises:
      ValueError, OSError: the content is no whole part, or a part is there already.
    """
    directory = base.SHIPPED.get(str(path), path)
    is_part = directory.is_file() or store.is_store(directory)
    layout = None if is_part else base.layout_of(directory)
    if layout is None:
        opened = [open_part(path, "", entry, num_heads)]
        tokenizer_files = []
    elif entry:
        raise ValueError(f"--entry is of one file; {path} is a directory")
    else:
        opened = [open_part(path, part, "", num_heads) for part in parts.PARTS]
        tokenizer_files = [directory / layout.tokenizer / name for name in base.TOKENIZERS]
    for net in opened:
        _check_free(to / net.spec.name)
    config_path = to / "config.json"
    content = read_json(config_path) if config_path.exists() else {}
    if not set(content) <= set(parts.PARTS):
        raise FileExistsError(f"{config_path} is none that import wrote; give another --to")
    if layout is not None:
        load_tokenizer(directory / layout.tokenizer)
    leaves = [nets.stacks(net, dtype) for net in opened]
    to.mkdir(parents=True, exist_ok=True)
    for file in tokenizer_files:
        if file.is_file():
            write_atomic(to / file.name, file.read_bytes())
    for net, stacks in zip(opened, leaves, strict=True):
        name = net.spec.name
        size = sum(piece.nbytes for stack in stacks.values() for piece in stack.pieces)
        store.save(to / name, stacks, byte_counter(name, size))
        content[name] = nets.sizes_of(net.config)
        write_atomic(config_path, json.dumps(content, indent=2).encode())
    return [to / net.spec.name for net in opened]


def export(path: Path, to: Path, part: str, form: str) -> None:
    """Write a part as one safetensors file, `to`, under the names of a format.

    `path` is what `open_part` takes.
    """
    _check_file(to)
    opened = open_part(path, part)
    _write(to, opened, opened.tensors, form)


def merge(
    path: Path,
    adapter: Path,
    to: Path,
    form: str,
    dtype: str = "",
    num_heads: int | None = None,
) -> None:
    """Write a transformer, as `export` does, with all that a LoRA changes added to its weights.

    Products and sums are computed in float32 and rounded once, to `dtype` or that of the weight.
    """
    _check_file(to)
    opened = open_part(path, "transformer", num_heads=num_heads)
    changes = lora.read_changes(adapter, opened.config)
    tensors = {
        name: lora.merged(tensor, changes.get(name, ()), dtype)
        for name, tensor in opened.tensors.items()
    }
    with nets.naming_files(adapter):
        _write(to, opened, tensors, form)


def export_lora(path: Path, to: Path, form: str, policy: str = "ema") -> None:
    """Write an adapter as a directory of PEFT or diffusers.

    Args:
      path: the working directory of a run (its newest checkpoint is read), checkpoints/EPOCH in
        it, or what `open_lora` takes.
      to: the directory, which must not be there.
      form: a name of lora.SAVERS.
      policy: which of a checkpoint's adapters, one of POLICIES.
    """
    _check_free(to)
    checkpoint = _checkpoint(path)
    if checkpoint is None:
        adapter, scale = lora.open_lora(path)
        rank = next(iter(adapter.values()))["a"].shape[-1]
        alpha = scale * rank
    else:
        adapter, rank, alpha = _policy(checkpoint, policy)
    lora.SAVERS[form](adapter, to, rank, int(alpha) if float(alpha).is_integer() else alpha)


def _checkpoint(path: Path) -> Path | None:
    """Return the directory of an epoch: `path`, or the newest of a run's working directory.

    None comes back for any other path.
    """
    if (path / "state").is_dir() and (path / "progress").is_dir():
        return path
    epochs = [epoch for epoch in (path / "checkpoints").glob("*") if epoch.name.isdigit()]
    return max(epochs, key=lambda epoch: int(epoch.name), default=None)


def _policy(checkpoint: Path, policy: str) -> tuple[dict, int, float]:
    """Return (adapter, rank, alpha) of a policy in a run's checkpoint; no leaf is read yet."""
    record = read_json(checkpoint / "progress" / "metadata").get("identity", {})
    try:
        rank = record["config.lora.rank"]
        alpha = record["config.lora.alpha"]
        leaves = store.open_leaves(checkpoint / "state")
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{checkpoint} is no whole checkpoint of a run: {error}") from None
    names = {
        module: {half: f"train.{policy}.{module}.{half}" for half in ("a", "b")}
        for module in TARGETS
    }
    missing = [module for module, pair in names.items() if not leaves.keys() >= {*pair.values()}]
    if missing:
        raise ValueError(f"{checkpoint} has no adapter {policy!r} of {', '.join(missing)}")
    return jax.tree.map(leaves.__getitem__, names), rank, alpha


def _check_free(to: Path) -> None:
    if to.exists():
        raise FileExistsError(f"{to} is there already; remove it or give another --to")


def _check_file(to: Path) -> None:
    _check_free(to)
    if to.suffix != ".safetensors":
        raise ValueError(f"--to is {to}; expected a name that ends in .safetensors")


def _write(to: Path, net: nets.NetCheckpoint, tensors: Mapping[str, Lazy], form: str) -> None:
    """Write tensors, which have the original names of a part, under those of a format."""
    names = nets.source_shapes(net.spec, net.config, form)
    original = nets.source_shapes(net.spec, net.config)
    renamed = {name: tensors[plain] for name, plain in zip(names, original, strict=True)}
    size = sum(tensor.nbytes for tensor in renamed.values())
    to.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(to, renamed, progress=byte_counter(net.spec.name, size))


def byte_counter(what: str, total: int) -> Callable[[int], None]:
    """Return a function that is given numbers of bytes as they are written, and logs to stderr how
    many of the total are done.
    """
    return Progress(log=functools.partial(log, file=sys.stderr)).counter(what, total, "bytes")
