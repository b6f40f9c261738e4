"""What `python -m astrolabe_jax.convert` does with whole nets and adapters, one tensor in memory at
a time.
"""

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from astrolabe_jax.convert import base, lora, nets, parts, store
from astrolabe_jax.convert.nets import NetCheckpoint
from astrolabe_jax.convert.open import open_part
from astrolabe_jax.models.lora import TARGETS
from astrolabe_jax.models.tokenizer import load_tokenizer
from astrolabe_jax.runtime.files import Lazy, read_json, write_atomic, write_safetensors

POLICIES = ("ema", "current", "old")  # adapters in a checkpoint of a run


def import_(
    given: Path, to: Path, entry: str = "", dtype: str = "", num_heads: int | None = None
) -> list[Path]:
    """Writes a file's part, or all parts and the tokenizer of a base, as Orbax directories
    `to`/PART.

    `to`/config.json gets the sizes of each part when it is whole. dtype: by default the file's own.
    Raises ValueError or OSError before anything is written, for content that is no whole part, and
    for parts that are there already.
    """
    directory = base.SHIPPED.get(str(given), given)
    layout = None if directory.is_file() or store.is_store(directory) else base.layout_of(directory)
    if layout is None:
        sources = [open_part(given, "", entry, num_heads)]
    else:
        if entry:
            raise ValueError(f"--entry is of one file; {given} is a directory")
        sources = [open_part(given, part, "", num_heads) for part in parts.PARTS]
    for source in sources:
        if (to / source.spec.name).exists():
            raise FileExistsError(
                f"{to / source.spec.name} is there already; remove it or give another --to"
            )
    described = to / "config.json"
    content = read_json(described) if described.exists() else {}
    if not set(content) <= set(parts.PARTS):
        raise FileExistsError(f"{described} is none that import wrote; give another --to")
    words = (
        [] if layout is None else [directory / layout.tokenizer / name for name in base.TOKENIZERS]
    )
    words = [path for path in words if path.is_file()]
    if layout is not None:
        load_tokenizer(directory / layout.tokenizer)
    trees = [nets.stacks(source, dtype) for source in sources]
    to.mkdir(parents=True, exist_ok=True)
    for path in words:
        write_atomic(to / path.name, path.read_bytes())
    for source, stacks in zip(sources, trees, strict=True):
        stacked = sum(piece.nbytes for stack in stacks.values() for piece in stack.pieces)
        store.save(to / source.spec.name, stacks, Progress(source.spec.name, stacked))
        content[source.spec.name] = nets.sizes_of(source.config)
        write_atomic(described, json.dumps(content, indent=2).encode())
    return [to / source.spec.name for source in sources]


def export(given: Path, to: Path, part: str, form: str) -> Path:
    """Writes a part as one safetensors file under the names of a format; see `open_part` for
    `given`.
    """
    _check_new(to)
    source = open_part(given, part)
    return _write(to, source, source.tensors, form)


def merge(
    given: Path, adapter: Path, to: Path, form: str, dtype: str = "", num_heads: int | None = None
) -> Path:
    """Writes a transformer with W + scale B A in place of each adapted weight, as `export` does.

    Product and sum are float32 and rounded once, to `dtype` or that of the weight.
    """
    _check_new(to)
    source = open_part(given, "transformer", num_heads=num_heads)
    pairs, scale = lora.open_lora(adapter, source.config)
    tensors = dict(source.tensors)
    for module in TARGETS:
        for i, (a, b) in enumerate(
            zip(pairs[module]["a"].pieces, pairs[module]["b"].pieces, strict=True)
        ):
            name = f"blocks.{i}.{module}.weight"
            a, b = (half.map(np.transpose, half.shape[::-1]) for half in (a, b))
            tensors[name] = lora.merged(tensors[name], a, b, scale, dtype)
    if dtype:
        tensors = {
            name: tensor.map(lambda x: x.astype(dtype), dtype=dtype)
            for name, tensor in tensors.items()
        }
    return _write(to, source, tensors, form)


def export_lora(given: Path, to: Path, form: str, policy: str = "ema") -> Path:
    """Writes an adapter, of a run or in any dialect that is read, as a directory of PEFT or
    diffusers.

    given: the working directory of a run (its newest checkpoint), checkpoints/EPOCH in it, or what
    open_lora takes.
    """
    if to.exists():
        raise FileExistsError(f"{to} is there already; remove it or give another --to")
    checkpoint = _checkpoint(given)
    if checkpoint is None:
        adapter, scale = lora.open_lora(given)
        rank = next(iter(adapter.values()))["a"].shape[-1]
        alpha = scale * rank
    else:
        adapter, rank, alpha = _policy(checkpoint, policy)
    lora.SAVERS[form](adapter, to, rank, int(alpha) if float(alpha).is_integer() else alpha)
    return to


def _checkpoint(given: Path) -> Path | None:
    """The directory of an epoch, if `given` is one or the working directory of a run that has
    some.
    """
    if (given / "state").is_dir() and (given / "progress").is_dir():
        return given
    epochs = [path for path in (given / "checkpoints").glob("*") if path.name.isdigit()]
    return max(epochs, key=lambda path: int(path.name), default=None)


def _policy(checkpoint: Path, policy: str) -> tuple[dict, int, float]:
    """(adapter with leaves that are not read, rank, alpha) of one policy in a run's checkpoint."""
    identity = read_json(checkpoint / "progress" / "metadata").get("identity", {})
    try:
        rank, alpha = identity["config.lora.rank"], identity["config.lora.alpha"]
        leaves = store.open_leaves(checkpoint / "state")
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{checkpoint} is no whole checkpoint of a run: {error}") from None
    adapter: dict[str, dict[str, Any]] = {module: {} for module in TARGETS}
    for name, leaf in leaves.items():
        owner, _, rest = name.removeprefix("train.").partition(".")
        module, _, half = rest.rpartition(".")
        if owner == policy and module in adapter:
            adapter[module][half] = leaf
    if missing := [module for module, pair in adapter.items() if set(pair) != {"a", "b"}]:
        raise ValueError(f"{checkpoint} has no adapter {policy!r} of {', '.join(missing)}")
    return adapter, rank, alpha


def _check_new(to: Path) -> None:
    if to.exists():
        raise FileExistsError(f"{to} is there already; remove it or give another --to")
    if to.suffix != ".safetensors":
        raise ValueError(f"--to is {to}; expected a name that ends in .safetensors")


def _write(to: Path, source: NetCheckpoint, tensors: Mapping[str, Lazy], form: str) -> Path:
    names = nets.source_shapes(source.spec, source.config, form)
    original = nets.source_shapes(source.spec, source.config)
    renamed = {name: tensors[plain] for name, plain in zip(names, original, strict=True)}
    to.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(
        to,
        renamed,
        progress=Progress(source.spec.name, sum(tensor.nbytes for tensor in renamed.values())),
    )
    return to


class Progress:
    """Says on stderr, every few seconds, how many bytes are done, how fast, and how long it will
    take.
    """

    def __init__(self, name: str, total: int, every: float = 2.0):
        self._name, self._total, self._every = name, total, every
        self._done, self._began = 0, time.monotonic()
        self._told = self._began

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._told < self._every and self._done < self._total:
            return
        self._told, rate = now, self._done / max(now - self._began, 1e-6)
        left = (
            f"{(self._total - self._done) / rate:.0f} s left"
            if self._done < self._total
            else "done"
        )
        amounts = f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB"
        print(
            f"{self._name}: {amounts}, {rate / 1e6:.0f} MB/s, {left}", file=sys.stderr, flush=True
        )
