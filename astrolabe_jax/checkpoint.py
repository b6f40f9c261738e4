"""Stage checkpoint: what a run needs to go on exactly (streaming.md 8), and the only place that knows Orbax.

A working directory holds

    run.json                    which run it belongs to: config, hashes of base model and prompts
    checkpoints/EPOCH/state     adapters and optimiser state; base weights are never saved
    checkpoints/EPOCH/progress  JSON: counters, controllers, identity, shapes and checksum of the state; its own digest
    checkpoints/EPOCH.damaged   one that was found damaged and is kept aside

Orbax writes beside and renames, so a checkpoint is there whole or not at all. One with missing or corrupt content is
put aside for the one before it. One that the system cannot read just now, or that another program made, is an error.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from astrolabe_jax.convert.files import read_json, write_atomic

# Fields of the config that may change between the pieces of a run: they say how far it goes, where it computes, or
# where the files lie that `prepare` puts into the identity by their content.
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
        "mesh.data",
        "mesh.fsdp",
        "mesh.samples_per_device",
        "prompts.tuned_for",
        "model.attention",
    )
)


class Restored(NamedTuple):
    epoch: int  # epochs that are finished
    state: Any  # as in `save`
    progress: dict


def claim(workdir: Path, identity: Mapping[str, Any]) -> None:
    """Makes `workdir` the directory of the run `identity`, a flat JSON-able mapping.

    Raises ValueError if it belongs to another run or holds other files, OSError if it cannot be written.
    """
    record = workdir / "run.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
        others = [path.name for path in workdir.iterdir() if ".partial." not in path.name]
    except OSError as error:
        raise OSError(f"workdir {workdir} cannot be written ({error.strerror}); give another --workdir") from None
    if record.exists():
        try:
            saved = read_json(record)
        except ValueError as error:
            raise ValueError(f"{error}; give another --workdir, or put back the file that was there") from None
        refuse_differences(saved, identity, f"workdir {workdir} belongs to another run")
    elif others:
        raise ValueError(
            f"workdir {workdir} holds {sorted(others)[0]!r} but no run of astrolabe_jax; give a new or empty --workdir"
        )
    write_atomic(record, json.dumps(identity, indent=1).encode())


def refuse_differences(saved: Mapping[str, Any], current: Mapping[str, Any], complaint: str) -> None:
    """ValueError that lists every entry in which two identities differ, but for MAY_DIFFER."""
    absent = "(none)"
    differing = [
        f"{name}: {saved.get(name, absent)!r} there, {current.get(name, absent)!r} now"
        for name in sorted({*saved, *current} - MAY_DIFFER)
        if saved.get(name, absent) != current.get(name, absent)
    ]
    if differing:
        advice = "give another --workdir, or the same settings as there"
        raise ValueError("\n  ".join([f"{complaint}; {advice}:", *differing]))


def save(workdir: Path, epoch: int, state: Any, progress: dict, identity: Mapping[str, Any], keep: int) -> None:
    """Saves a pytree of arrays and a JSON-able `progress` after `epoch` finished epochs; the last `keep` are kept."""
    record = {"progress": progress, "identity": dict(identity)}
    record |= {"shapes": _shapes(state), "checksum": int(_checksum(state))}
    record |= {"digest": _digest(record)}
    with _manager(workdir, keep) as manager:
        manager.save(
            epoch, args=ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(record))
        )


def restore(workdir: Path, template: Any, identity: Mapping[str, Any]) -> Restored | None:
    """The newest checkpoint that is whole, or None if there is none; `template` gives shapes, dtypes and shardings.

    The devices may be others than those it was saved on. Newer ones, whose content is missing or corrupt, are renamed
    to EPOCH.damaged. Nothing is renamed, and ValueError raised, for a checkpoint of another model, config or program,
    and if there are checkpoints but none is whole; OSError, if the system fails to read one.
    """
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        return None
    found, damaged = None, {}
    with _manager(workdir, keep=None) as manager:
        for epoch in sorted(manager.all_steps(), reverse=True):
            try:
                found = _read(manager, epoch, template, identity, directory / str(epoch))
                break
            except _Damaged as error:
                damaged[epoch] = error
    if damaged and found is None:
        reasons = [f"{epoch}: {error}" for epoch, error in damaged.items()]
        advice = "put a whole one back, or move the directory away to start this run over"
        raise ValueError("\n  ".join([f"no checkpoint in {directory} is whole; {advice}:", *reasons]))
    for epoch, error in damaged.items():
        aside = _put_aside(directory / str(epoch))
        logging.warning("checkpoint %s is damaged (%s); it is now %s", directory / str(epoch), error, aside.name)
    if damaged:
        logging.warning("going on from the checkpoint before it, %s", directory / str(found.epoch))
    return found


class _Damaged(Exception):
    pass


@contextlib.contextmanager
def _reading(path: Path):
    """Whatever missing or corrupt content makes the readers raise (there is no common class) becomes _Damaged.

    Not so what the content cannot be blamed for: other errors of the system, and a lack of memory.
    """
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise _Damaged(f"{error.strerror}: {error.filename}" if error.filename else str(error)) from error
    except OSError as error:
        message = f"checkpoint {path} cannot be read: {error}; it may be whole: make it readable and try again"
        raise OSError(message) from error
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise _Damaged(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


def _read(manager, epoch: int, template: Any, identity: Mapping[str, Any], path: Path) -> Restored:
    with _reading(path):
        # For errors of the system, which later readers would wrap in errors of their own.
        for file in path.rglob("*"):
            if not file.is_dir():
                with open(file, "rb") as content:
                    while content.read(1 << 24):
                        pass
        record = manager.restore(epoch, args=ocp.args.Composite(progress=ocp.args.JsonRestore())).progress
        if record.pop("digest") != _digest(record):
            raise ValueError("its progress does not give its digest")
        saved, shapes, checksum, progress = (record[key] for key in ("identity", "shapes", "checksum", "progress"))
    refuse_differences(saved, identity, f"checkpoint {path} is of another run")
    refuse_differences(shapes, _shapes(template), f"checkpoint {path} holds another state than this program trains")
    with _reading(path):
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        state = manager.restore(epoch, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted))).state
        if int(_checksum(state)) != checksum:
            raise ValueError("its content does not give its checksum")
    return Restored(epoch, state, progress)


def _put_aside(path: Path) -> Path:
    """Renames EPOCH to EPOCH.damaged, or EPOCH.damaged.2 and so on where there is one already."""
    names = itertools.chain([f"{path.name}.damaged"], (f"{path.name}.damaged.{i}" for i in itertools.count(2)))
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


def _manager(workdir: Path, keep: int | None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


@jax.jit
def _checksum(state: Any) -> jax.Array:
    """uint32 sum of all bits, weighted by place: exact, so the same on any number of devices."""

    def one(leaf):
        bits = leaf.reshape(-1)
        if jnp.issubdtype(bits.dtype, jnp.floating):
            bits = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"uint{8 * bits.dtype.itemsize}"))
        return jnp.sum(bits.astype(jnp.uint32) * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return sum(((i + 1) * one(leaf) for i, leaf in enumerate(jax.tree.leaves(state))), jnp.uint32(0))
