"""Stage checkpoint: what a run needs to go on exactly (docs/checkpoints.md, Run directory).

No other module that deals with runs knows Orbax. A working directory holds

    run.json                    the fingerprint of its run: config, hashes of base model and prompts
    run.lock                    who writes here, locked by that process while it lives
    checkpoints/EPOCH/state     adapters and optimizer state; base weights are never saved
    checkpoints/EPOCH/progress  JSON: counters, controllers, fingerprint, shapes and checksum of the
                                state, and its own digest
    checkpoints/EPOCH.damaged   one that was found damaged and is kept aside
    samples_in_flight/EPOCH/    the same of what the epoch after EPOCH finished ones has sampled and
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
import math
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from astrolabe_jax.config import renamed
from astrolabe_jax.runtime import files, multihost
from astrolabe_jax.runtime.progress import quiet_orbax

CHECKPOINTS = "checkpoints"
SAMPLES = "samples_in_flight"
_FOLDERS = (CHECKPOINTS, SAMPLES, "samples", "lora", "scores", "tensorboard")
_RECORD = "run.json"  # whose the directory is
_LOCK = "run.lock"
# What a kill may leave of the files that a run writes: FILE.partial.PROCESS, or of a video.
_HALF_WRITTEN = re.compile(
    r"(run\.json|metrics\.jsonl|summary\.json|curves\.png|(samples|lora|scores)/.+)\.partial\.(\d+|mp4)"
)
# Seconds until all hosts see a new file: shared file systems remember what was not there.
_SEEN_WITHIN = 30.0

# What makes a run, or a model, the same one: a flat mapping that JSON can hold, of config fields
# (`config.FIELD`) and of hashes.
Fingerprint = Mapping[str, Any]

# Fields of the config that may change between the pieces of a run: they say how far it goes, where
# it computes, or where the files lie whose content is in the fingerprint.
MAY_DIFFER = frozenset(
    f"config.{field}"
    for field in (
        "name",
        "base",
        "transformer",
        "prompts.train",
        "prompts.test",
        "prompts.switch_frames",
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
        "prompts.encoder",
        "scoring.overlap",
        "scoring.weights",
        "scoring.timeout",
    )
)
# The same for the options of rewards, whose weights are known by their content.
MAY_DIFFER_OPTION = re.compile(
    r"config\.rewards\.\w+\.(path|template|url|timeout|retries|concurrency|key_variable|\w+_per_batch)"
)

_WEIGHT = re.compile(r"^(config\.rewards\.\w+)\.weight$")
_ABSENT = "(none)"  # in place of an entry that is missing
# Entries of a fingerprint that are hashes, which tell a reader nothing: what they are hashes of.
_HASHED = {
    "base": "the base model of config.base or config.transformer",
    "lora.init": "the adapter in config.lora.init",
    "prompts.train": "the list of config.prompts.train",
    "prompts.test": "the list of config.prompts.test",
}


class SaveError(files.WriteError):
    """A checkpoint could not be written; other processes may still wait for their part of it."""


class Snapshot(NamedTuple):
    """The state of a run between two epochs, or the samples of the epoch that follows."""

    epoch: int  # epochs that are finished
    state: Any  # pytree of arrays, not a lone one, of any dtypes that JAX has
    progress: dict  # what JSON can hold: counters and controllers, or the scores of samples


def check_workdir(workdir: Path, fingerprint: Fingerprint) -> None:
    """Raise what `claim` would raise, as far as can be told before the base is read.

    Nothing stays that is written. `fingerprint` may lack the hashes of weights.
    """
    try:
        there = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    except OSError as error:
        raise OSError(
            f"workdir {workdir} cannot be looked at: {error.strerror}; give another --workdir"
        ) from None
    # what another user began may be there, but not take files
    for folder in (there, *(workdir / name for name in _FOLDERS if (workdir / name).is_dir())):
        files.check_takes_files(folder, f"workdir {workdir}", "another --workdir")
    saved = _record_of(workdir)
    if saved and fingerprint:
        saved, fingerprint = (_one_form(entries) for entries in (saved, fingerprint))
        saved = {
            name: value
            for name, value in saved.items()
            if name in fingerprint or renamed(name.removeprefix("config."))
        }
        refuse_differences(saved, fingerprint, f"workdir {workdir} belongs to another run")
    with _in_use(workdir):
        files.refuse_locked(workdir / _LOCK)


@contextlib.contextmanager
def _in_use(workdir: Path) -> Iterator[None]:
    """Name the directory, and what to do, in front of the error of a lock that another holds."""
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f"workdir {workdir} {error}; wait for its end, stop it, or give another --workdir"
        ) from None


def _record_of(workdir: Path) -> Fingerprint | None:
    """Return the fingerprint of the run in a directory; None where there is none.

    Raises ValueError for a spoilt one, and for files of somebody else.
    """
    record = workdir / _RECORD
    if record.exists():
        try:
            return files.read_json(record)
        except ValueError as error:
            raise ValueError(
                f"{error}; give another --workdir, or put back the file that was there"
            ) from None
    paths = workdir.iterdir() if workdir.exists() else ()
    others = [
        path.name for path in paths if path.name != _LOCK and not _HALF_WRITTEN.fullmatch(path.name)
    ]
    if CHECKPOINTS in others:
        raise ValueError(
            f"{record} is missing, which tells whose the checkpoints beside it are; put it back, "
            "or give a new --workdir"
        )
    if others:
        raise ValueError(
            f"workdir {workdir} holds {sorted(others)[0]!r} but no run of astrolabe_jax; give a "
            "new or empty --workdir"
        )
    return None


def claim(workdir: Path, fingerprint: Fingerprint) -> str:
    """Make `workdir` the directory of the run with this fingerprint, and of this process.

    Files that a killed run had half written are removed.

    Returns:
      who holds it now, for `check_shared`; `release` gives it up, as does the end of the process.

    Raises:
      ValueError: if it belongs to another run, is in use or holds other files.
      OSError: if it cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
        saved = _record_of(workdir)
    except OSError as error:
        there = isinstance(error, FileExistsError)  # a link to nothing
        reason = files.what_is_at(workdir) if there else error.strerror
        raise OSError(
            f"workdir {workdir} cannot be written ({reason}); give another --workdir"
        ) from None
    if saved is not None:
        refuse_differences(saved, fingerprint, f"workdir {workdir} belongs to another run")
    with _in_use(workdir):
        holder = files.lock(workdir / _LOCK)
    for pattern in (
        "*.partial.*",
        "samples/**/*.partial.*",
        "lora/*.partial.*",
        "scores/*.partial.*",
    ):
        for path in workdir.glob(pattern):
            if _HALF_WRITTEN.fullmatch(path.relative_to(workdir).as_posix()):
                path.unlink()
    files.write_json(workdir / _RECORD, dict(fingerprint))
    return holder


def check_shared(workdir: Path, holder: str) -> None:
    """Raise ValueError unless this process sees the directory that `holder` has claimed."""
    if jax.process_index() == 0:  # it has written the file, whose lock would end where it is read
        return
    deadline = time.monotonic() + _SEEN_WITHIN
    seen = ""
    while seen != holder:
        with contextlib.suppress(OSError):
            seen = (workdir / _LOCK).read_text()
        if seen != holder and time.monotonic() > deadline:
            raise ValueError(
                f"workdir {workdir.absolute()} of process {jax.process_index()} "
                f"({socket.gethostname()}) is not that of process 0 ({holder}): its {_LOCK} was "
                f"not seen within {_SEEN_WITHIN:g} s; expected one directory that all processes "
                "see: give a --workdir on a shared file system, by its absolute path"
            )
        time.sleep(0.2 * (seen != holder))


def check_there(workdir: Path) -> None:
    """Raise OSError if a directory that was claimed is not there any more.

    Else what is written next would make another one in its place.
    """
    if not (workdir / _RECORD).is_file():
        raise OSError(
            f"{workdir / _RECORD} has gone while the run went on: its workdir was moved, removed "
            "or emptied; put it back, and run the same command again"
        )


def release(workdir: Path) -> None:
    """Give up what `claim` has claimed."""
    files.unlock(workdir / _LOCK)


def refuse_differences(saved: Fingerprint, current: Fingerprint, complaint: str) -> None:
    """Raise ValueError, with every difference, unless two fingerprints are of the same run.

    Entries of MAY_DIFFER may differ. A fingerprint of an older version is refused by the names that
    its fields have today (docs/checkpoints.md, Old checkpoints). `complaint` opens the message.
    """
    saved, current = (_one_form(entries) for entries in (saved, current))
    today = {name: renamed(name.removeprefix("config.")) for name in saved}
    older = [f"{name} is config.{new} now" for name, new in today.items() if new]
    if older:
        opening = (
            f"{complaint}: an older version of astrolabe_jax has written it, with other names of "
            "fields; give a new --workdir, or go on with that version; to start anew from its "
            "adapter, set config.lora.init to the lora/ of a run that has ended, or to what "
            "`python -m astrolabe_jax.convert export-lora` writes:"
        )
        raise ValueError("\n  ".join([opening, *older]))
    differing = [
        _difference(name, saved, current)
        for name in sorted({*saved, *current} - MAY_DIFFER)
        if saved.get(name, _ABSENT) != current.get(name, _ABSENT)
        and not MAY_DIFFER_OPTION.fullmatch(name)
    ]
    if differing:
        opening = f"{complaint}; give another --workdir, or the same settings as there:"
        raise ValueError("\n  ".join([opening, *differing]))


def _one_form(fingerprint: Fingerprint) -> Fingerprint:
    """Return a fingerprint in which a reward's weight has one name, however it was given."""
    return {_WEIGHT.sub(r"\1", name): value for name, value in fingerprint.items()}


def _difference(name: str, saved: Fingerprint, current: Fingerprint) -> str:
    """Return a line that says how an entry differs."""
    if name not in _HASHED:
        there, now = (entries.get(name, _ABSENT) for entries in (saved, current))
        return f"{name}: {there!r} there, {now!r} now"
    if name not in saved:
        return f"{name}: {_HASHED[name]} is given, and the run began without one"
    if name not in current:
        return f"{name}: {_HASHED[name]} is not given, and the run began with one"
    return f"{name}: {_HASHED[name]} differs from the one that the run began with"


def save(workdir: Path, snapshot: Snapshot, fingerprint: Fingerprint, keep: int) -> int:
    """Save a checkpoint, of which the last `keep` are kept, and return its bytes on the disk.

    Samples in flight of epochs that are finished are removed. All processes call it. Raises
    WriteError if the file system refuses.
    """
    size = _write(workdir / CHECKPOINTS, snapshot, {"identity": dict(fingerprint)}, keep)
    _remove_samples(workdir, before=snapshot.epoch)
    return size


def restore(
    workdir: Path, template: Callable[[int], Any], fingerprint: Fingerprint
) -> Snapshot | None:
    """Return the newest checkpoint that is whole, or None if there is none.

    The devices and processes may be others than those it was saved on. Newer ones, whose content is
    missing or corrupt, are renamed to EPOCH.damaged. Nothing is renamed where an error is raised.
    All processes call it.

    Args:
      workdir: directory of the run.
      template: epoch -> shapes, dtypes and shardings of what was saved after so many epochs.
      fingerprint: of the run.

    Raises:
      ValueError: for a checkpoint of another model, config or program, and if there are checkpoints
        but none is whole.
      OSError: if the system fails to read one.
    """
    directory = workdir / CHECKPOINTS
    found = None
    damaged = {}
    for epoch in _epochs(directory):
        path = directory / str(epoch)
        found, fault = _sound(
            functools.partial(_load, path, template(epoch), fingerprint, f"checkpoint {path}"),
            _Damaged,
        )
        if found:
            break
        damaged[path] = fault
    if not damaged:
        return found
    if found is None:
        opening = (
            f"no checkpoint in {directory} is whole; put a whole one back, or move the directory "
            "away to start this run over:"
        )
        reasons = (f"{path.name}: {fault}" for path, fault in damaged.items())
        raise ValueError("\n  ".join([opening, *reasons]))
    for path, fault in damaged.items():
        aside = multihost.on_primary(functools.partial(_put_aside, path))
        logging.warning("checkpoint %s is damaged (%s); it is now %s", path, fault, aside)
    logging.warning("going on from the checkpoint before it, %s", directory / str(found.epoch))
    return found


def save_samples(workdir: Path, samples: Snapshot, policy: Any, fingerprint: Fingerprint) -> int:
    """Save what an epoch has sampled, before anything is learnt from it, and return its bytes.

    It takes the place of any other epoch's. Raises and is called as `save`, which removes it again.

    Args:
      workdir: directory of the run.
      samples: with the epoch of the checkpoint that they follow. Numpy arrays in them are equal on
        all processes.
      policy: the adapter that has sampled.
      fingerprint: of the run.
    """
    # Those of a later epoch, of a checkpoint that was damaged, would count as newer.
    _remove_samples(workdir)
    return _write(
        workdir / SAMPLES,
        samples,
        {"identity": dict(fingerprint), "policy": int(checksum(policy))},
        keep=1,
    )


def restore_samples(
    workdir: Path, epoch: int, template: Any, policy: Any, fingerprint: Fingerprint
) -> Snapshot | None:
    """Return what `save_samples` has saved for this epoch, policy and run; None: sample again.

    A warning says why samples that are there are not used: they are damaged, or not those of this
    epoch, policy or run. All processes call it.

    Args:
      workdir: directory of the run.
      epoch: finished epochs.
      template: shapes, dtypes and shardings; a leaf without sharding is read as numpy.
      policy: the adapter that samples.
      fingerprint: of the run.
    """
    sampled_by = int(checksum(policy))
    for number in _epochs(workdir / SAMPLES):
        path = workdir / SAMPLES / str(number)
        if number < epoch:  # learnt from; a kill came before they were removed
            continue
        samples = None
        fault = f"of epoch {number + 1}"
        if number == epoch:
            samples, fault = _sound(
                functools.partial(_load, path, template, fingerprint, str(path), sampled_by),
                (_Damaged, ValueError, OSError),  # they can be made again, whatever is the matter
            )
        if samples:
            return samples
        logging.warning(
            "samples in %s are not used (%s): epoch %d is sampled again",
            path,
            fault.partition(";")[0],  # without its advice
            epoch + 1,
        )
    return None


def _remove_samples(workdir: Path, before: float = math.inf) -> None:
    """Remove the samples in flight that follow a checkpoint of an earlier epoch than `before`."""

    def remove():
        for path in (workdir / SAMPLES).glob("*"):
            if not path.name.isdecimal() or int(path.name) < before:
                shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # not there, or not empty
            (workdir / SAMPLES).rmdir()

    multihost.on_primary(remove)


# Reading, and telling damage from what the content cannot be blamed for.


class _Damaged(Exception):
    """Content is missing or corrupt; the message says how."""


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever missing or corrupt content makes the readers raise into _Damaged.

    There is no common class. Other errors of the system, and a lack of memory, stay what they are:
    the content cannot be blamed for them.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        raise _Damaged(reason) from error
    except OSError as error:
        raise OSError(
            f"checkpoint {path} cannot be read: {error}; it may be whole: make it readable and "
            "try again"
        ) from error
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        reason = str(error).partition(" [tensorstore_spec")[0].partition("\n")[0][:300]
        raise _Damaged(f"{type(error).__name__}: {reason}") from error


def _read_all(path: Path) -> None:
    """Raise the errors of the system, which later readers would wrap in errors of their own."""
    for file in path.rglob("*"):
        if not file.is_dir():
            with open(file, "rb") as content:
                while content.read(1 << 24):
                    pass


def _sound(
    load: Callable[[], Snapshot], faults: type[Exception] | tuple[type[Exception], ...]
) -> tuple[Snapshot | None, str]:
    """Return what `load` gives on all processes and "", if its content gives its checksum.

    Otherwise return None and the fault that any process has found; errors that are none of `faults`
    are raised.
    """

    def attempt() -> tuple[Snapshot | None, str]:
        try:
            return load(), ""
        except faults as error:
            return None, str(error)

    loaded, fault = multihost.on_all(attempt)
    fault = multihost.first_nonempty(fault)
    if fault:
        return None, fault
    if int(checksum(loaded.state)) != loaded.progress["checksum"]:
        return None, "its content does not give its checksum"
    return loaded._replace(progress=loaded.progress["progress"]), ""


def _load(
    path: Path, template: Any, fingerprint: Fingerprint, what: str, policy: int | None = None
) -> Snapshot:
    """Read EPOCH, on each process alone, with its whole record as `progress`.

    `what` names it in errors; `policy` is the checksum of the policy that must have sampled it.
    Raises _Damaged, ValueError or OSError.
    """
    with _reading(path):
        _read_all(path)
    record = _read_part(path, "progress", ocp.args.JsonRestore())
    with _reading(path):
        if record.pop("digest") != _digest(record):
            raise ValueError("its progress does not give its digest")
        if record.get("epoch", int(path.name)) != int(path.name):
            raise ValueError(f"it is of epoch {record['epoch']}, under another name")
        saved = record["identity"]
        shapes = record["shapes"]
    refuse_differences(saved, fingerprint, f"{what} is of another run")
    refuse_differences(
        shapes, _shapes(template), f"{what} holds another state than this program trains"
    )
    if policy is not None and record.get("policy") != policy:
        raise ValueError("another policy has sampled them")
    targets = ocp.args.StandardRestore(jax.tree.map(_target, template))
    return Snapshot(int(path.name), _read_part(path, "state", targets), record)


def _read_part(path: Path, part: str, how: Any) -> Any:
    """Read EPOCH/PART, on each process alone. Raises _Damaged or OSError."""
    with _reading(path), quiet_orbax(), _manager(path.parent, keep=None, alone=True) as manager:
        return manager.restore(int(path.name), args=ocp.args.Composite(**{part: how}))[part]


def _target(leaf: Any) -> Any:
    """Return what Orbax is asked for: an array on devices if it has a sharding, else numpy."""
    on_devices = getattr(leaf, "sharding", None) is not None
    return ocp.utils.to_shape_dtype_struct(leaf) if on_devices else np.empty(leaf.shape, leaf.dtype)


def _put_aside(path: Path) -> str:
    """Rename EPOCH to EPOCH.damaged, or EPOCH.damaged.2 and so on, and return the new name."""
    endings = itertools.chain(["damaged"], (f"damaged.{i}" for i in itertools.count(2)))
    places = (path.with_name(f"{path.name}.{ending}") for ending in endings)
    return path.rename(next(place for place in places if not place.exists())).name


# Writing, and what proves that content is whole.


def _write(directory: Path, snapshot: Snapshot, record: dict[str, Any], keep: int) -> int:
    """Save `snapshot` as EPOCH with `record` in its progress; return the bytes on the disk."""
    record = record | {
        "epoch": snapshot.epoch,
        "progress": snapshot.progress,
        "shapes": _shapes(snapshot.state),
        "checksum": int(checksum(snapshot.state)),
    }
    arguments = ocp.args.Composite(
        state=ocp.args.StandardSave(snapshot.state),
        progress=ocp.args.JsonSave(record | {"digest": _digest(record)}),
    )
    path = directory / str(snapshot.epoch)
    try:
        multihost.on_primary(lambda: directory.mkdir(parents=True, exist_ok=True))
        with quiet_orbax(), _manager(directory, keep, clean=True) as manager:
            manager.save(snapshot.epoch, args=arguments)
    except (OSError, ValueError) as error:
        code = files.system_error(error)
        if not code:
            raise
        raise SaveError(path, os.strerror(code)) from error
    return multihost.on_primary(
        lambda: sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    )


def _shapes(state: Any) -> dict[str, str]:
    """Return the dtype and shape of every array by its path."""
    return {
        jax.tree_util.keystr(path): f"{leaf.dtype} {list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _digest(record: Mapping[str, Any]) -> str:
    """Return a hash that is the same before and after a way through JSON."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


@jax.jit
def checksum(state: Any) -> jax.Array:
    """Return the uint32 sum of all bits, weighted by their place.

    It is exact, so the same on any number of devices and processes.
    """

    def leaf_sum(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
        strides = [math.prod(leaf.shape[axis + 1 :]) for axis in range(leaf.ndim)]
        place = sum(  # not flattened: arrays stay where they are
            jnp.uint32(stride % 2**32) * jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            for axis, stride in enumerate(strides)
        )
        return jnp.sum(leaf.astype(jnp.uint32) * (2 * place + 1), dtype=jnp.uint32)

    return sum(
        (number * leaf_sum(leaf) for number, leaf in enumerate(jax.tree.leaves(state), start=1)),
        start=jnp.uint32(0),
    )


# Orbax.


def _epochs(directory: Path) -> list[int]:
    """Return the epochs in a directory, newest first; unfinished ones are removed."""

    def clean() -> list[int]:
        if not directory.is_dir():
            return []
        with _manager(directory, keep=None, alone=True, clean=True) as manager:
            return sorted(manager.all_steps(), reverse=True)

    return multihost.on_primary(clean)


def _manager(
    directory: Path, keep: int | None, alone: bool = False, clean: bool = False
) -> ocp.CheckpointManager:
    """Open a directory of epochs.

    Args:
      directory: which exists.
      keep: how many epochs stay; None: all.
      alone: whether this process reads without the others, in place of all of them together.
      clean: whether unfinished epochs are removed.
    """
    processes = ocp.options.MultiprocessingOptions()
    if alone:
        index = jax.process_index()
        processes = ocp.options.MultiprocessingOptions(
            primary_host=index, active_processes={index}, barrier_sync_key_prefix=f"{index}"
        )
    return ocp.CheckpointManager(
        directory.absolute(),
        options=ocp.CheckpointManagerOptions(
            create=False,
            max_to_keep=keep,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=clean,
            multiprocessing_options=processes,
        ),
    )
