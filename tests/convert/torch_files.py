"""Writes files as torch.save does (spec/checkpoints.md 1.2), without torch: classes by name,
tensors as views.
"""

import collections
import io
import pickle
import sys
import types
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "bfloat16": "BFloat16Storage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


class Storage:
    def __init__(self, array: np.ndarray):
        self.array = array


class Tensor:
    """A tensor that views `storage` from element `offset` on, with strides in elements."""

    def __init__(self, storage: Storage, offset: int, shape: tuple, strides: tuple):
        self.parts = (storage, offset, shape, strides)

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, (
            *self.parts,
            False,
            collections.OrderedDict(),
        )


def whole(array: np.ndarray) -> Tensor:
    """A tensor with a storage of its own."""
    array = np.array(array, order="C")
    return Tensor(
        Storage(array.reshape(-1)),
        0,
        array.shape,
        tuple(step // array.itemsize for step in array.strides),
    )


@contextmanager
def _torch() -> Iterator[types.ModuleType]:
    """Stand-ins for the names that pickle looks up while it writes."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = types.FunctionType((lambda *arguments: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(utils, name, function)
    before = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules.update({"torch": torch, "torch._utils": utils})
    yield torch
    for name, module in before.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module


def pickled(tree) -> tuple[bytes, list[np.ndarray]]:
    """data.pkl of a tree of containers, scalars and Tensors, and the storages in the order of their
    keys.
    """
    storages: list[Storage] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if not isinstance(value, Storage):
                return None
            if value not in storages:
                storages.append(value)
            kind = getattr(torch, STORAGES[value.array.dtype.name])
            return "storage", kind, str(storages.index(value)), "cpu", value.array.size

    buffer = io.BytesIO()
    with _torch() as torch:
        Pickler(buffer, protocol=2).dump(tree)
    return buffer.getvalue(), [storage.array for storage in storages]


def write(path: Path, tree, root: str = "archive", compression: int = zipfile.ZIP_STORED) -> Path:
    """The file that torch.save(tree) gives."""
    data, storages = pickled(tree)
    return write_zip(
        path,
        {f"{root}/data.pkl": data, f"{root}/byteorder": b"little"}
        | {f"{root}/data/{i}": array.tobytes() for i, array in enumerate(storages)}
        | {f"{root}/version": b"3\n"},
        compression,
    )


def write_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path
