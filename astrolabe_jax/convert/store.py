"""Nets as Orbax checkpoints, written layer by layer and read leaf by leaf: a net need not fit into
memory.

A directory is what ocp.PyTreeCheckpointer saves: any program with Orbax restores it, with shardings
if it likes.
"""

import asyncio
import concurrent.futures
import dataclasses
import glob
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from astrolabe_jax.convert.engine import Stack, flatten, nested
from astrolabe_jax.runtime.files import WriteError, listed, read_json, system_error, writing
from astrolabe_jax.runtime.progress import quiet_orbax

METADATA = "_METADATA"  # of Orbax; an import that was stopped has none under its final name
CHUNK = 16 << 20  # bytes that are written at once
_ARRAYS = ("np.ndarray", "jax.Array")  # types of entries; the others are empty containers


class StoreError(ValueError):
    """A store is damaged, or is not of the net that is asked for."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array of a store: np.asarray reads it all, leaf[i] a part."""

    array: Any  # tensorstore.TensorStore

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole array."""
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        """As stored."""
        return self.array.dtype.numpy_dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        try:
            return self.array[index].read().result()
        except ValueError as error:
            raise _unreadable(error) from None

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[...].astype(dtype or self.dtype, copy=False)


class _StackHandler(ocp.type_handlers.NumpyHandler):
    """Writes a Stack piece by piece; the pieces of different leaves take turns.

    Attributes:
      fault: what ended it. It is kept, and nothing more is written, as Orbax, in whose threads this
        runs, would print it with all its calls.
    """

    def __init__(self, progress: Callable[[int], None]):
        super().__init__(deepcopy_host_arrays=False)
        self._progress = progress
        self._turn = asyncio.Lock()
        self.fault: BaseException | None = None

    async def _open_and_write(
        self, value: Stack, tspec: dict[str, Any], ts_context: tensorstore.Context
    ) -> None:
        shape = value.pieces[0].shape
        # of the first axis
        rows = max(1, CHUNK * shape[0] // value.pieces[0].nbytes) if shape else 1
        chunks = (min(rows, shape[0]), *shape[1:]) if shape else ()
        tspec["metadata"]["chunks"] = (1, *chunks) if value.stacked else chunks
        async with self._turn:
            try:
                target = await tensorstore.open(
                    tensorstore.Spec(tspec), create=True, open=True, context=ts_context
                )
                for i, piece in enumerate(value.pieces):
                    if self.fault:
                        return
                    content = np.asarray(piece)
                    place = target[i] if value.stacked else target
                    for start in range(0, shape[0] if shape else 1, rows):
                        part = slice(start, min(start + rows, shape[0])) if shape else ...
                        await place[part].write(content[part])
                    self._progress(content.nbytes)
            except Exception as error:
                self.fault = self.fault or error


def save(
    directory: Path,
    stacks: Mapping[tuple, Stack],
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Write leaves by their paths; one piece of one leaf is in memory at a time.

    The directory appears whole; on an error, or Ctrl-C, nothing is left of it.
    """
    writer = _StackHandler(progress)
    begun = directory.absolute().with_name(f"{directory.name}.partial.{os.getpid()}")
    try:
        # In a thread, so that Orbax comes to its end also where Ctrl-C is raised in this one.
        with quiet_orbax(), concurrent.futures.ThreadPoolExecutor(1) as pool:
            saved = pool.submit(_save, begun, stacks, writer)
            try:
                saved.result()
            except BaseException as error:
                writer.fault = writer.fault or error
            with writing(directory):
                if writer.fault:
                    raise _refused(directory, writer.fault)
        os.rename(begun, directory)
    finally:
        for left in begun.parent.glob(f"{glob.escape(begun.name)}*"):
            shutil.rmtree(left, ignore_errors=True)


def _refused(directory: Path, fault: BaseException) -> BaseException:
    """Return a WriteError in place of an error of tensorstore for what the system refused, such as
    a full disk; any other fault as it is.
    """
    code = None if isinstance(fault, OSError) else system_error(fault)
    return WriteError(directory, os.strerror(code)) if code else fault


def _save(directory: Path, stacks: Mapping[tuple, Stack], writer: _StackHandler) -> None:
    registry = ocp.type_handlers.create_type_handler_registry(
        (Stack, writer),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # it warns without the second
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory, nested(stacks.items()))


def is_store(path: Path) -> bool:
    """Return whether Orbax finished writing a checkpoint here."""
    return (path / METADATA).is_file()


def open_leaves(directory: Path) -> dict[str, Leaf]:
    """Return the arrays of a store by their dotted paths; none is read.

    Raises:
      StoreError: if the store is damaged.
    """
    described = read_json(directory / METADATA)
    folder = {"driver": "file", "path": f"{directory.absolute()}/"}
    try:
        names = [
            ".".join(str(key["key"]) for key in entry["key_metadata"])
            for entry in described["tree_metadata"].values()
            if entry["value_metadata"]["value_type"] in _ARRAYS
        ]
        spec = {
            "driver": "zarr3" if described.get("use_zarr3") else "zarr",
            "kvstore": {"driver": "ocdbt", "base": folder} if described["use_ocdbt"] else folder,
        }
        leaves = {
            name: Leaf(tensorstore.open(spec | {"path": f"{name}/"}, read=True).result())
            for name in names
        }
        _check_size(directory, leaves)
        return leaves
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(error) from None


def _check_size(directory: Path, leaves: Mapping[str, Leaf]) -> None:
    """Raise ValueError if the files of a store are smaller than its arrays, as when one is lost.

    What is compressed tells nothing.
    """
    arrays = [leaf.array for leaf in leaves.values()]
    if any(array.spec().to_json()["metadata"].get("compressor", True) for array in arrays):
        return
    content = sum(array.size * array.dtype.numpy_dtype.itemsize for array in arrays)
    held = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    if held < content:
        raise ValueError(f"its files hold {held:,} bytes in place of {content:,} at least")


def _unreadable(error: Exception) -> StoreError:
    """Return the error of a damaged store; tensorstore's own has many lines."""
    reason = str(error).partition(" [tensorstore_spec")[0].partition("\n")[0][:300]
    return StoreError(f"it cannot be read: {reason}; copy or import it again")


def tree(leaves: Mapping[str, Any], expected: dict) -> dict:
    """Return the leaves in the tree `expected`.

    Raises:
      StoreError: listing every leaf that is missing, unknown or of another shape.
    """
    flat = {".".join(map(str, path)): (path, leaf) for path, leaf in flatten(expected).items()}
    faults = [
        *(f"missing leaf: {name}" for name in flat if name not in leaves),
        *(f"unknown leaf: {name}" for name in leaves if name not in flat),
        *(
            f"changed shape: {name} is {list(leaves[name].shape)}, the model expects "
            f"{list(leaf.shape)}"
            for name, (_, leaf) in flat.items()
            if name in leaves and tuple(leaves[name].shape) != tuple(leaf.shape)
        ),
    ]
    if faults:
        raise StoreError(listed("the stored net is not that of this config:", faults))
    return nested((path, leaves[name]) for name, (path, _) in flat.items())
