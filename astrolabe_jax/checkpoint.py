"""Stage checkpoint: what a run needs to go on exactly (streaming.md 8), and the only place that
knows Orbax.

A working directory holds

    run.json                    which run it belongs to: config, hashes of base model and prompts
    checkpoints/EPOCH/state     adapters and optimizer state; base weights are never saved
    checkpoints/EPOCH/progress  JSON: counters, controllers, identity, shapes and checksum of the
                                state; its own digest
    checkpoints/EPOCH.damaged   one that was found damaged and is kept aside
    samples_in_flight/EPOCH/    likewise, what the epoch after EPOCH finished ones has sampled and
                                not yet learnt from

Orbax writes beside and renames, so a checkpoint is there whole or not at all. One with missing or
corrupt content is put aside for the one before it. One that the system cannot read just now, or
that another program made, is an error.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from astrolabe_jax.runtime import multihost
from astrolabe_jax.runtime.files import WriteError, read_json, write_atomic

CHECKPOINTS, SAMPLES = "checkpoints", "samples_in_flight"

# Fields of the config that may change between the pieces of a run: they say how far it goes, where
# it computes, or where the files lie that `prepare` puts into the identity by their content.
MAY_DIFFER = frozenset(
    f"config.{field}"
    for field in (
        "name",
        "base",
        "transformer",
        "prompts.train",
        "prompts.test",
        "lora.init",
        "train.epochs",
        "train.checkpoint_every",
        "train.checkpoints_kept",
        "train.save_samples",
        "streaming.save",
        "streaming.prompts_per_device",
        "mesh.data",
        "mesh.fsdp",
        "mesh.samples_per_device",
        "prompts.tuned_for",
        "model.attention",
        "scoring.overlap",
        "scoring.weights",
        "scoring.timeout",
    )
)
# Likewise of the options of rewards; weights are known by their content.
MAY_DIFFER_OPTION = re.compile(
    r"config\.rewards\.\w+\.(path|template|url|timeout|retries|concurrency|key_variable|\w+_per_batch)"
)


class Restored(NamedTuple):
    epoch: int  # epochs that are finished
    state: Any  # as in `save`
    progress: dict


def claim(workdir: Path, identity: Mapping[str, Any]) -> None:
    """Makes `workdir` the directory of the run `identity`, a flat JSON-able mapping.

    Files that a killed run had half written are removed. Raises ValueError if it belongs to another
    run or holds other files, OSError if it cannot be written.
    """
    record = workdir / "run.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
        others = [path.name for path in workdir.iterdir() if ".partial." not in path.name]
    except OSError as error:
        raise OSError(
            f"workdir {workdir} cannot be written ({error.strerror}); give another --workdir"
        ) from None
    if record.exists():
        try:
            saved = read_json(record)
        except ValueError as error:
            raise ValueError(
                f"{error}; give another --workdir, or put back the file that was there"
            ) from None
        refuse_differences(saved, identity, f"workdir {workdir} belongs to another run")
    elif others:
        raise ValueError(
            f"workdir {workdir} holds {sorted(others)[0]!r} but no run of astrolabe_jax; give a "
            "new or empty --workdir"
        )
    for half_written in ("*.partial.*", "samples/**/*.partial.*", "lora/*.partial.*"):
        for path in workdir.glob(half_written):
            path.unlink()
    write_atomic(record, json.dumps(identity, indent=1).encode())


def refuse_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], complaint: str
) -> None:
    """ValueError that lists every entry in which two identities differ, but for MAY_DIFFER."""
    absent = "(none)"
    differing = [
        f"{name}: {saved.get(name, absent)!r} there, {current.get(name, absent)!r} now"
        for name in sorted({*saved, *current} - MAY_DIFFER)
        if saved.get(name, absent) != current.get(name, absent)
        and not MAY_DIFFER_OPTION.fullmatch(name)
    ]
    if differing:
        advice = "give another --workdir, or the same settings as there"
        raise ValueError("\n  ".join([f"{complaint}; {advice}:", *differing]))


def save(
    workdir: Path, epoch: int, state: Any, progress: dict, identity: Mapping[str, Any], keep: int
) -> int:
    """Saves a pytree of arrays and a JSON-able `progress` after `epoch` finished epochs; the last
    `keep` are kept.

    Returns the bytes that it takes. Samples that are in flight are those of a finished epoch now,
    and removed. All processes call it. Raises WriteError if the file system refuses.
    """
    size = _write(
        workdir / CHECKPOINTS,
        epoch,
        state,
        {"progress": progress, "identity": dict(identity)},
        keep,
    )
    _remove_samples(workdir)
    return size


def restore(
    workdir: Path, template: Callable[[int], Any], identity: Mapping[str, Any]
) -> Restored | None:
    """The newest checkpoint that is whole, or None if there is none.

    template(epoch) gives the shapes, dtypes and shardings of what was saved after so many epochs.

    The devices and processes may be others than those it was saved on. Newer ones, whose content is
    missing or corrupt, are renamed to EPOCH.damaged. Nothing is renamed, and ValueError raised, for
    a checkpoint of another model, config or program, and if there are checkpoints but none is
    whole; OSError, if the system fails to read one. All processes call it.
    """
    directory = workdir / CHECKPOINTS
    found, damaged = None, {}
    for epoch in _epochs(directory):
        path = directory / str(epoch)
        load = functools.partial(_load, path, template(epoch), identity, f"checkpoint {path}")
        found, fault = _sound(functools.partial(_faulty, load, path))
        if found:
            break
        damaged[epoch] = fault
    if damaged and found is None:
        reasons = [f"{epoch}: {fault}" for epoch, fault in damaged.items()]
        advice = "put a whole one back, or move the directory away to start this run over"
        raise ValueError(
            "\n  ".join([f"no checkpoint in {directory} is whole; {advice}:", *reasons])
        )
    for epoch, fault in damaged.items():
        aside = multihost.on_primary(lambda epoch=epoch: _put_aside(directory / str(epoch)).name)
        logging.warning(
            "checkpoint %s is damaged (%s); it is now %s", directory / str(epoch), fault, aside
        )
    if damaged:
        logging.warning("going on from the checkpoint before it, %s", directory / str(found.epoch))
    return found


def save_samples(
    workdir: Path,
    epoch: int,
    samples: Any,
    progress: dict,
    policy: Any,
    identity: Mapping[str, Any],
) -> int:
    """Saves what an epoch has sampled, before anything is learnt from it, in the place of any other
    epoch's.

    epoch: finished ones, as of the checkpoint that it follows. samples: a pytree, not a lone array,
    of any dtypes that JAX has; its numpy arrays are equal on all processes. progress: JSON-able,
    such as scores. policy: the adapter that has sampled. Returns bytes, raises and is called as
    `save`, which removes them again.
    """
    record = {"progress": progress, "identity": dict(identity), "policy": int(_checksum(policy))}
    # those of a later epoch, of a checkpoint that was damaged, would count as newer
    _remove_samples(workdir)
    return _write(workdir / SAMPLES, epoch, samples, record, keep=1)


def restore_samples(
    workdir: Path, epoch: int, template: Any, policy: Any, identity: Mapping[str, Any]
) -> Restored | None:
    """What `save_samples` has saved for this epoch, policy and run, or None: sample again.

    template: shapes, dtypes and shardings; a leaf without sharding is read as numpy. A warning says
    why samples that are there are not used: they are damaged, or not those of this epoch, policy or
    run. All processes call it.
    """
    directory, expected = workdir / SAMPLES, int(_checksum(policy))
    for found in _epochs(directory):
        path = directory / str(found)
        if found < epoch:  # learnt from; a kill came before they were removed
            continue
        load = functools.partial(_load, path, template, identity, f"{path}", policy=expected)
        restored, fault = (
            (None, f"of epoch {found + 1}")
            if found != epoch
            else _sound(functools.partial(_unusable, load))
        )
        if restored:
            return restored
        logging.warning(
            "samples in %s are not used (%s): epoch %d is sampled again", path, fault, epoch + 1
        )
    return None


def _remove_samples(workdir: Path) -> None:
    multihost.on_primary(lambda: shutil.rmtree(workdir / SAMPLES, ignore_errors=True))


class _Damaged(Exception):
    pass


@contextlib.contextmanager
def _reading(path: Path):
    """Whatever missing or corrupt content makes the readers raise (there is no common class)
    becomes _Damaged.

    Not so what the content cannot be blamed for: other errors of the system, and a lack of memory.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise _Damaged(
            f"{error.strerror}: {error.filename}" if error.filename else str(error)
        ) from error
    except OSError as error:
        message = (
            f"checkpoint {path} cannot be read: {error}; it may be whole: make it readable and "
            "try again"
        )
        raise OSError(message) from error
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise _Damaged(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def _faulty(load: Callable[[], Restored], path: Path) -> tuple[Restored | None, str]:
    """What `load` returns, or what is damaged; raises what the content cannot be blamed for."""
    try:
        with _reading(path):
            _read_all(path)
        return load(), ""
    except _Damaged as error:
        return None, str(error)


def _unusable(load: Callable[[], Restored]) -> tuple[Restored | None, str]:
    """What `load` returns, or whatever keeps it from that, without advice: these can be made
    again.
    """
    try:
        return load(), ""
    except (_Damaged, ValueError, OSError) as error:
        return None, str(error).partition(";")[0]


def _read_all(path: Path) -> None:
    """For errors of the system, which later readers would wrap in errors of their own."""
    for file in path.rglob("*"):
        if not file.is_dir():
            with open(file, "rb") as content:
                while content.read(1 << 24):
                    pass


def _sound(load: Callable[[], tuple[Restored | None, str]]) -> tuple[Restored | None, str]:
    """What `load` gives on all processes, if the content gives its checksum; else None and the
    fault, on any.
    """
    found, fault = multihost.on_all(load)
    fault = multihost.first_nonempty(fault)
    if not fault and int(_checksum(found.state)) != found.progress["checksum"]:
        fault = "its content does not give its checksum"
    return (None, fault) if fault else (found._replace(progress=found.progress["progress"]), "")


def _load(
    path: Path, template: Any, identity: Mapping[str, Any], what: str, policy: int | None = None
) -> Restored:
    """Reads EPOCH, on each process alone; `progress` is the whole record. Raises _Damaged,
    ValueError or OSError.
    """
    with _reading(path), _manager(path.parent, keep=None, alone=True) as manager:
        record = manager.restore(
            int(path.name), args=ocp.args.Composite(progress=ocp.args.JsonRestore())
        ).progress
        if record.pop("digest") != _digest(record):
            raise ValueError("its progress does not give its digest")
        saved, shapes = record["identity"], record["shapes"]
    refuse_differences(saved, identity, f"{what} is of another run")
    refuse_differences(
        shapes, _shapes(template), f"{what} holds another state than this program trains"
    )
    if policy is not None and record.get("policy") != policy:
        raise ValueError("another policy has sampled them")
    with _reading(path), _manager(path.parent, keep=None, alone=True) as manager:
        wanted = jax.tree.map(_wanted, template)
        state = manager.restore(
            int(path.name), args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        ).state
    return Restored(int(path.name), state, record)


def _wanted(leaf: Any) -> Any:
    """How Orbax is asked for an array: on devices if it has a sharding, else as numpy."""
    if getattr(leaf, "sharding", None) is None:
        return np.empty(leaf.shape, leaf.dtype)
    return ocp.utils.to_shape_dtype_struct(leaf)


def _put_aside(path: Path) -> Path:
    """Renames EPOCH to EPOCH.damaged, or EPOCH.damaged.2 and so on where there is one already."""
    names = itertools.chain(
        [f"{path.name}.damaged"], (f"{path.name}.damaged.{i}" for i in itertools.count(2))
    )
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    return path.rename(aside)


def _shapes(state: Any) -> dict[str, str]:
    """Path of every array -> its dtype and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): f"{leaf.dtype} {list(leaf.shape)}" for path, leaf in leaves}


def _digest(record: Mapping[str, Any]) -> str:
    """The same before and after a way through JSON."""
    plain = json.loads(json.dumps(record))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _epochs(directory: Path) -> list[int]:
    """The epochs that a directory holds, newest first; what was not finished is removed."""

    def clean():
        if not directory.is_dir():
            return []
        with _manager(directory, keep=None, alone=True, clean=True) as manager:
            return sorted(manager.all_steps(), reverse=True)

    return multihost.on_primary(clean)


def _write(directory: Path, epoch: int, state: Any, record: dict, keep: int) -> int:
    """Saves `state` and its record as EPOCH; returns the bytes on the disk."""
    record = record | {"shapes": _shapes(state), "checksum": int(_checksum(state))}
    record |= {"digest": _digest(record)}
    arguments = ocp.args.Composite(
        state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(record)
    )
    try:
        multihost.on_primary(lambda: directory.mkdir(parents=True, exist_ok=True))
        with _quiet(), _manager(directory, keep, clean=True) as manager:
            manager.save(epoch, args=arguments)
    except (OSError, ValueError) as error:  # of tensorstore: ValueError
        told = re.search(r"os_error_code='(\d+)'", str(error))
        code = error.errno if isinstance(error, OSError) else told and int(told[1])
        if not code:
            raise
        raise WriteError(directory / str(epoch), os.strerror(code)) from error
    files = (directory / str(epoch)).rglob("*")
    return multihost.on_primary(
        lambda: sum(file.stat().st_size for file in files if file.is_file())
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax prints tracebacks of what it raises. After an error it stays silenced: its threads go
    on writing.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.level for logger in loggers], sys.unraisablehook
    sys.unraisablehook = lambda _: None
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    yield
    levels, sys.unraisablehook = before
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def _manager(
    directory: Path, keep: int | None, alone: bool = False, clean: bool = False
) -> ocp.CheckpointManager:
    """alone: this process reads without the others; else all of them work together. clean: remove
    unfinished ones.
    """
    me = jax.process_index()
    solo = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"{me}"
    )
    options = ocp.CheckpointManagerOptions(
        create=False,
        max_to_keep=keep,
        enable_async_checkpointing=False,
        cleanup_tmp_directories=clean,
        multiprocessing_options=solo if alone else ocp.options.MultiprocessingOptions(),
    )
    return ocp.CheckpointManager(directory.absolute(), options=options)


@jax.jit
def _checksum(state: Any) -> jax.Array:
    """uint32 sum of all bits, weighted by place: exact, so the same on any number of devices and
    processes.
    """

    def one(leaf):
        bits, place, stride = leaf, jnp.uint32(0), 1
        if jnp.issubdtype(bits.dtype, jnp.floating):
            bits = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"uint{8 * bits.dtype.itemsize}"))
        for axis in reversed(range(bits.ndim)):  # not flattened: arrays stay where they are
            place += jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(
                jnp.uint32, bits.shape, axis
            )
            stride *= bits.shape[axis]
        return jnp.sum(bits.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

    return sum(
        ((i + 1) * one(leaf) for i, leaf in enumerate(jax.tree.leaves(state))), jnp.uint32(0)
    )
