"""Stage 9, checkpoint: what a run needs to go on exactly (streaming.md 8), and the only place that knows Orbax.

A working directory holds

    run.json                    which run it belongs to: config, hashes of base model and prompts
    checkpoints/EPOCH/state     adapters and optimiser state; base weights are never saved
    checkpoints/EPOCH/progress  JSON: counters, controllers, results so far, identity, checksum of the state

Orbax writes beside and renames, so a checkpoint is there whole or not at all. One that cannot be read, or does not
give its checksum, is dropped for the one before it.
"""

import contextlib
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from astrolabe_jax.convert.files import write_atomic

# Fields of the config that may change between the pieces of a run: they say how far it goes or where it computes.
MAY_DIFFER = frozenset(
    f"config.{field}"
    for field in (
        "name",
        "train.epochs",
        "train.checkpoint_every",
        "train.checkpoints_kept",
        "mesh.data",
        "mesh.fsdp",
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
        refuse_differences(json.loads(record.read_text()), identity, f"workdir {workdir} belongs to another run")
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
    record = {"progress": progress, "identity": dict(identity), "checksum": int(_checksum(state))}
    with _manager(workdir, keep) as manager:
        if epoch in manager.all_steps():
            manager.delete(epoch)
        manager.save(
            epoch, args=ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(record))
        )


def restore(workdir: Path, template: Any, identity: Mapping[str, Any]) -> Restored | None:
    """The newest checkpoint that is whole, or None if there is none; `template` gives shapes, dtypes and shardings.

    The devices may be others than those it was saved on. Raises ValueError for a checkpoint of another model or config,
    and if there are checkpoints but none is whole.
    """
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        return None
    with _manager(workdir, keep=None) as manager:
        epochs = sorted(manager.all_steps(), reverse=True)
        for i, epoch in enumerate(epochs):
            try:
                found = _read(manager, epoch, template, identity, directory)
            except _Damaged as error:
                logging.warning("checkpoint %s is damaged (%s); trying the one before", directory / str(epoch), error)
                continue
            for damaged in epochs[:i]:
                manager.delete(damaged)
            return found
    if epochs:
        raise ValueError(f"no checkpoint in {directory} is whole; delete the directory to start this run over")
    return None


class _Damaged(Exception):
    pass


@contextlib.contextmanager
def _reading():
    """Whatever a damaged file makes the readers raise (there is no common class) becomes _Damaged."""
    try:
        yield
    except Exception as error:
        raise _Damaged(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error


def _read(manager, epoch: int, template: Any, identity: Mapping[str, Any], directory: Path) -> Restored:
    with _reading():
        record = manager.restore(epoch, args=ocp.args.Composite(progress=ocp.args.JsonRestore())).progress
        saved, checksum, progress = record["identity"], record["checksum"], record["progress"]
    refuse_differences(saved, identity, f"checkpoint {directory / str(epoch)} is of another run")
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
    with _reading():
        state = manager.restore(epoch, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes))).state
        if int(_checksum(state)) != checksum:
            raise ValueError("its content does not give its checksum")
    return Restored(epoch, state, progress)


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
