"""The commands of `python -m astrolabe_jax.convert` for whole nets and adapters.

One tensor is in memory at a time.
"""

import contextlib
import functools
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from astrolabe_jax.convert import base, lora, nets, parts, store
from astrolabe_jax.convert.open import POLICIES, find_checkpoint, open_part, open_policy
from astrolabe_jax.convert.weights import suffix_of
from astrolabe_jax.models.tokenizer import load_tokenizer
from astrolabe_jax.runtime.files import (
    Lazy,
    check_takes_files,
    read_json,
    write_atomic,
    write_safetensors,
)
from astrolabe_jax.runtime.progress import Progress, log


def import_(
    path: Path, to: Path, entry: str = "", dtype: str = "", num_heads: int | None = None
) -> list[Path]:
    """Write a file's part, or all parts and the tokenizer of a base, as Orbax directories.

    Nothing is written before all names and shapes are checked. Numbers are as they are read: of an
    import that fails, or is stopped, no part stays. The sizes of the parts are written to
    `to`/config.json when all are whole.

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
    directory = base.place_of(path)
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
        for name in base.LAYOUTS["own"].weights[net.spec.name]:
            _check_free(to / name)  # beside another file of the part it would make a base of two
    config_path = to / "config.json"
    content = read_json(config_path) if config_path.exists() else {}
    if not set(content) <= set(parts.PARTS):
        raise FileExistsError(f"{config_path} is none that import wrote; give another --to")
    if layout is not None:
        load_tokenizer(directory / layout.tokenizer)
    leaves = [nets.stacks(net, dtype) for net in opened]
    written = [to / net.spec.name for net in opened]
    with _making(to, to, *written):
        for net, stacks, directory in zip(opened, leaves, written, strict=True):
            name = net.spec.name
            size = sum(piece.nbytes for stack in stacks.values() for piece in stack.pieces)
            store.save(directory, stacks, byte_counter(name, size))
            content[name] = nets.sizes_of(net.config)
        for file in filter(Path.is_file, tokenizer_files):
            write_atomic(to / file.name, file.read_bytes())
        write_atomic(config_path, json.dumps(content, indent=2).encode())
    return written


def export(path: Path, to: Path, part: str, form: str) -> list[Path]:
    """Write a part as one safetensors file, `to`, under the names of a format; return its path.

    `path` is what `open_part` takes.
    """
    _check_file(to)
    opened = open_part(path, part)
    return _write(to, opened, opened.tensors, form)


def merge(
    path: Path,
    adapter: Path,
    to: Path,
    form: str,
    dtype: str = "",
    num_heads: int | None = None,
) -> list[Path]:
    """Write a transformer, as `export` does, with all that a LoRA changes added to its weights.

    Products and sums are computed in float32 and rounded once, to `dtype` or that of the weight.
    """
    _check_file(to)
    opened = open_part(path, "transformer", num_heads=num_heads)
    changes = lora.read_changes(adapter, opened.config)
    tensors = {
        name: lora.merged(tensor, changes.get(name, ()), dtype, f"{adapter}: merged {name}")
        for name, tensor in opened.tensors.items()
    }
    return _write(to, opened, tensors, form)


def export_lora(path: Path, to: Path, form: str, policy: str = "") -> list[Path]:
    """Write an adapter for PEFT or diffusers; return the path of its tensors.

    Args:
      path: the working directory of a run (its newest checkpoint is read), checkpoints/EPOCH in
        it, or what `open_lora` takes.
      to: the directory, which must not be there, or of diffusers a file NAME.safetensors.
      form: a name of lora.SAVERS.
      policy: which of a checkpoint's adapters, one of open.POLICIES; by default ema.

    Raises:
      ValueError, OSError: before anything is written, for what is no adapter or cannot be `to`.
    """
    _check_free(to)
    if suffix_of(to) and (form, to.suffix) != ("diffusers", ".safetensors"):
        raise ValueError(
            f"--to is {to}; --format peft writes a directory, diffusers a directory or one file "
            "NAME.safetensors"
        )
    checkpoint = find_checkpoint(path)
    if checkpoint is not None:
        adapter, rank, alpha = open_policy(checkpoint, policy or POLICIES[0])
    elif policy:
        raise ValueError(
            f"--policy {policy} is of a run's checkpoint; {path} is none and has one adapter: "
            "leave --policy out"
        )
    else:
        adapter, scale = lora.open_lora(path)
        rank = next(iter(adapter.values()))["a"].shape[-1]
        alpha = scale * rank
    with _making(to.parent, to, to):
        whole = int(alpha) if float(alpha).is_integer() else alpha
        return [lora.SAVERS[form](adapter, to, rank, whole)]


def _check_free(to: Path) -> None:
    if to.exists():
        raise FileExistsError(f"{to} is there already; remove it or give another --to")


def _check_file(to: Path) -> None:
    _check_free(to)
    if to.suffix != ".safetensors":
        raise ValueError(f"--to is {to}; expected a name that ends in .safetensors")


@contextlib.contextmanager
def _making(directory: Path, to: Path, *written: Path) -> Iterator[None]:
    """Make a directory for what is written inside, of which the user knows `to`.

    On an error or Ctrl-C inside, what was `written` there is removed, and the folders that were
    made. Raises OSError, which says what to do, where a directory cannot be made or takes no files.
    """
    new = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"--to: no directory {directory} can be made ({error.strerror}); give another --to"
        ) from None
    try:
        check_takes_files(directory, f"--to: {to}", "another --to")
        yield
    except BaseException:
        for path in written:
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody else has written there
            for folder in new:
                folder.rmdir()
        raise


def _write(to: Path, net: nets.NetCheckpoint, tensors: Mapping[str, Lazy], form: str) -> list[Path]:
    """Write tensors, which have the original names of a part, under those of a format.

    The path of the file comes back.
    """
    names = nets.source_shapes(net.spec, net.config, form)
    original = nets.source_shapes(net.spec, net.config)
    renamed = {name: tensors[plain] for name, plain in zip(names, original, strict=True)}
    size = sum(tensor.nbytes for tensor in renamed.values())
    with _making(to.parent, to):
        write_safetensors(to, renamed, progress=byte_counter(net.spec.name, size))
    return [to]


def byte_counter(what: str, total: int) -> Callable[[int], None]:
    """Return a function that is given numbers of bytes as they are written, and logs to stderr how
    many of the total are done.
    """
    return Progress(log=functools.partial(log, file=sys.stderr)).counter(what, total, "bytes")
