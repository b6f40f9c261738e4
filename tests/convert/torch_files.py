"""Writes files as torch.save does (docs/checkpoints.md, Torch files), without torch: classes by
name, tensors as views.
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
    """Return a tensor with a storage of its own."""
    array = np.array(array, order="C")
    strides = tuple(step // array.itemsize for step in array.strides)
    return Tensor(Storage(array.reshape(-1)), 0, array.shape, strides)


@contextmanager
def _torch() -> Iterator[types.ModuleType]:
    """Put stand-ins in place of the modules that pickle looks up while it writes."""
    torch = types.ModuleType("torch")
    utils = types.ModuleType("torch._utils")
    for name in STORAGES.values():
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = types.FunctionType((lambda *arguments: None).__code__, {}, name)
        function.__module__ = "torch._utils"
        function.__qualname__ = name
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
    """Return the data.pkl of a tree of containers, scalars and Tensors, and its storages by key."""
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
    """Write the file that torch.save(tree) would; return its path."""
    data, storages = pickled(tree)
    members = {f"{root}/data.pkl": data, f"{root}/byteorder": b"little"}
    for key, array in enumerate(storages):
        members[f"{root}/data/{key}"] = array.tobytes()
    members[f"{root}/version"] = b"3\n"
    return write_zip(path, members, compression)


def write_zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Write an archive of members by name; return its path."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path
