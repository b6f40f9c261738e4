"""Reads the .pt and .pth files of torch without torch, and without running anything in them.

Such a file is an uncompressed zip with one root folder (docs/checkpoints.md, Torch files). In it,
`data.pkl` is a pickle that describes nested containers and tensors, and `data/KEY` are the bytes of
the storages that tensors view. The pickle is interpreted here, one opcode at a time. Only the
opcodes that containers, scalars and tensors need are known. Nothing is imported, and nothing is
called but what this file does for the names of GLOBALS and STORAGES. A tensor is read from the file
when it is asked for.
"""

import itertools
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from astrolabe_jax.runtime.files import Lazy

STORAGES = {
    "torch DoubleStorage": np.float64,
    "torch FloatStorage": np.float32,
    "torch HalfStorage": np.float16,
    "torch BFloat16Storage": jnp.bfloat16,
    "torch LongStorage": np.int64,
    "torch IntStorage": np.int32,
    "torch ShortStorage": np.int16,
    "torch CharStorage": np.int8,
    "torch ByteStorage": np.uint8,
    "torch BoolStorage": np.bool_,
    "torch ComplexFloatStorage": np.complex64,
    "torch ComplexDoubleStorage": np.complex128,
}
TENSOR = "torch._utils _rebuild_tensor_v2"
PARAMETER = "torch._utils _rebuild_parameter"
DICT = "collections OrderedDict"
GLOBALS = {TENSOR, PARAMETER, DICT, *STORAGES}
MOST_PICKLE = 64 << 20  # bytes of data.pkl; the published files have less than 1 MB
MOST_DEPTH = 32  # containers inside each other
MOST_AXES = 8
# What zipfile and struct raise for content that they cannot read; there is no common class.
NOT_AN_ARCHIVE = (
    zipfile.BadZipFile,
    NotImplementedError,
    struct.error,
    ValueError,
    EOFError,
    OverflowError,
)
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, of the extra field


class TorchFileError(ValueError):
    """The file is not one that torch.save writes, or holds more than tensors, containers and
    scalars.
    """


class _Global(NamedTuple):
    name: str  # "module name"


class _Storage(NamedTuple):
    path: Path
    start: int  # bytes in the file
    size: int  # elements
    dtype: np.dtype


def read_torch(path: Path | str) -> Any:
    """Read what torch.save wrote: nested dicts, lists and tuples of scalars and tensors.

    A tensor is a files.Lazy, which is read when it is asked for. Attributes of containers (a state
    dict's `_metadata`) are dropped.

    Raises:
      TorchFileError: naming the file and what is wrong with it.
      OSError: from the file system.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            members = _members(archive)
            places = _places(file, members)
            pickled = archive.read(members["data.pkl"])
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise TorchFileError("its numbers are not little-endian")
        tree = _Machine(path, places).run(pickled)
        _check_tree(tree, set())
        return tree
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {error}") from None
    except NOT_AN_ARCHIVE as error:
        raise TorchFileError(
            f"{path} is not a whole zip archive of torch.save (torch 1.6 or later): {error}"
        ) from None


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the members of the archive by their names under its root folder."""
    members = {}
    for info in archive.infolist():
        _, _, name = info.filename.partition("/")
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.compress_size != info.file_size
            or info.flag_bits & 1
        ):
            raise TorchFileError(
                f"member {info.filename!r} is compressed or encrypted; torch.save does neither"
            )
        if name in members:
            raise TorchFileError(f"member {info.filename!r} occurs twice")
        members[name] = info
    roots = {info.filename.partition("/")[0] for info in members.values()}
    if len(roots) != 1 or "data.pkl" not in members:
        raise TorchFileError("expected one root folder with a data.pkl, as torch.save writes it")
    size = members["data.pkl"].file_size
    if size > MOST_PICKLE:
        raise TorchFileError(f"data.pkl has {size} bytes; expected at most {MOST_PICKLE}")
    return members


def _places(file: IO[bytes], members: Mapping[str, zipfile.ZipInfo]) -> dict[str, range]:
    """Return the places in the file, in bytes, of the members' contents."""
    places = {name: _place(file, info) for name, info in members.items()}
    ordered = sorted(places.values(), key=lambda place: (place.start, place.stop))
    if any(place.stop > following.start for place, following in itertools.pairwise(ordered)):
        raise TorchFileError("its members overlap")
    return places


def _place(file: IO[bytes], info: zipfile.ZipInfo) -> range:
    """Return the place of a member's content, behind its local header.

    The header is read, as its extra field may differ from that of the archive's directory.
    """
    if info.header_offset < 0:
        raise TorchFileError(f"member {info.filename!r} lies before the file")
    file.seek(info.header_offset)
    signature, name_size, extra_size = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise TorchFileError(f"member {info.filename!r} has no header")
    start = info.header_offset + _LOCAL_HEADER.size + name_size + extra_size
    if start + info.file_size > file.seek(0, os.SEEK_END):
        raise TorchFileError(f"member {info.filename!r} reaches beyond the end of the file")
    return range(start, start + info.file_size)


class _Machine:
    """The pickle machine: a stack, those below its marks, and a memo."""

    def __init__(self, path: Path, places: Mapping[str, range]):
        self._path = path
        self._places = places
        self._stack: list[Any] = []  # above the last mark
        self._below: list[list[Any]] = []  # a stack for each mark
        self._memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        """Return the object that the pickle describes."""
        for name, argument in _opcodes(pickled):
            if name == "STOP":
                result = self._pop()
                if self._stack or self._below:
                    raise TorchFileError("data.pkl leaves objects behind")
                return result
            self._step(name, argument)
        raise TorchFileError("data.pkl has no end")

    def _step(self, name: str, argument: Any) -> None:
        match name:
            case (
                "BININT"
                | "BININT1"
                | "BININT2"
                | "LONG1"
                | "BINFLOAT"
                | "BINUNICODE"
                | "SHORT_BINUNICODE"
            ):
                self._push(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self._push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                self._push({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
            case "MARK":
                self._below.append(self._stack)
                self._stack = []
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = self._top()
            case "MEMOIZE":
                self._memo[len(self._memo)] = self._top()
            case "BINGET" | "LONG_BINGET" if argument in self._memo:
                self._push(self._memo[argument])
            case "BINGET" | "LONG_BINGET":
                raise TorchFileError(f"data.pkl uses object {argument} before it is there")
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._push(tuple(self._last(int(name[-1]))))
            case "TUPLE":
                self._push(tuple(self._marked()))
            case "APPEND" | "APPENDS":
                items = self._last(1) if name == "APPEND" else self._marked()
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                self._set_items(self._last(2) if name == "SETITEM" else self._marked())
            case "GLOBAL" if argument in GLOBALS:
                self._push(_Global(argument))
            case "GLOBAL":
                raise TorchFileError(
                    f"data.pkl asks for {argument.replace(' ', '.')!r}, which could run code; "
                    "only tensors, containers and scalars are read. Save the state dict alone: "
                    "torch.save(model.state_dict(), ...)"
                )
            case "BINPERSID":
                self._push(self._storage(self._pop()))
            case "REDUCE":
                self._push(_call(*self._last(2)))
            case "BUILD":  # attributes, such as a state dict's _metadata
                self._pop()
                self._top(dict)
            case "PROTO" | "FRAME":
                pass
            case _:
                raise TorchFileError(
                    f"data.pkl uses opcode {name}, which tensors and containers do not need; "
                    "not read"
                )

    def _push(self, item: Any) -> None:
        self._stack.append(item)

    def _pop(self) -> Any:
        if not self._stack:
            raise TorchFileError("data.pkl takes an object that is not there")
        return self._stack.pop()

    def _last(self, count: int) -> list:
        """Pop the last `count` objects; return them in order."""
        return [self._pop() for _ in range(count)][::-1]

    def _top(self, kind: type = object) -> Any:
        if not self._stack or not isinstance(self._stack[-1], kind):
            raise TorchFileError(f"data.pkl expects a {kind.__name__} that is not there")
        return self._stack[-1]

    def _marked(self) -> list:
        """Pop everything above the last mark, and the mark; return it in order."""
        if not self._below:
            raise TorchFileError("data.pkl takes objects from a mark that is not there")
        items = self._stack
        self._stack = self._below.pop()
        return items

    def _set_items(self, items: list) -> None:
        target = self._top(dict)
        if len(items) % 2:
            raise TorchFileError("data.pkl has a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise TorchFileError(
                    f"a key is a {type(key).__name__}; expected text or a whole number"
                )
            target[key] = value

    def _storage(self, reference: Any) -> _Storage:
        """Return the storage for ('storage', class, key, location, elements)."""
        if not (isinstance(reference, tuple) and len(reference) == 5 and reference[0] == "storage"):
            raise TorchFileError("a storage is not described as torch.save does it")
        _, kind, key, _, count = reference
        if not isinstance(kind, _Global) or kind.name not in STORAGES:
            raise TorchFileError(f"storage {key!r} is no {', '.join(STORAGES)}")
        place = self._places.get(f"data/{key}") if isinstance(key, str) else None
        if place is None:
            raise TorchFileError(f"storage {key!r} has no content in the file")
        dtype = np.dtype(STORAGES[kind.name])
        if type(count) is not int or count * dtype.itemsize != len(place):
            raise TorchFileError(
                f"storage {key!r} has {len(place)} bytes; expected {count} elements of "
                f"{dtype.itemsize} bytes"
            )
        return _Storage(self._path, place.start, count, dtype)


def _opcodes(pickled: bytes) -> Iterator[tuple[str, Any]]:
    """Yield name and argument of each opcode."""
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            yield opcode.name, argument
    # These are the parser's; TorchFileError is raised by who takes the opcodes.
    except (ValueError, IndexError) as error:
        raise TorchFileError(f"data.pkl is no pickle: {str(error)[:200]}") from None


def _call(function: Any, arguments: Any) -> Any:
    """Return what a function among GLOBALS does."""
    name = function.name if isinstance(function, _Global) else ""
    count = len(arguments) if isinstance(arguments, tuple) else -1
    if name == DICT and count == 0:
        return {}
    if name == PARAMETER and count >= 1 and isinstance(arguments[0], Lazy):
        return arguments[0]
    if name == TENSOR and count >= 4 and isinstance(arguments[0], _Storage):
        return _view(arguments[0], *arguments[1:4])
    raise TorchFileError(f"data.pkl calls {name or 'what cannot be called'} as torch.save does not")


def _view(storage: _Storage, offset: Any, shape: Any, strides: Any) -> Lazy:
    """Return the tensor that views a storage.

    Offset and strides count elements. The tensor must stay in the storage, and its elements must
    not overlap.
    """
    if not _are_indices(offset, shape, strides):
        raise TorchFileError(
            f"a tensor has offset {offset!r}, shape {shape!r} and strides {strides!r}"
        )
    dtype = storage.dtype
    if 0 in shape:
        if math.prod(filter(None, shape)) * dtype.itemsize >= 2**63:
            raise TorchFileError(f"a tensor has the impossible shape {shape}")
        return Lazy(shape, dtype, lambda: np.zeros(shape, dtype))
    stop = offset
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride <= stop - offset:
            raise TorchFileError(
                f"elements of a tensor of shape {shape} and strides {strides} share memory"
            )
        stop += stride * max(size - 1, 0)
    if stop >= storage.size:
        raise TorchFileError(
            f"a tensor of shape {shape} at {offset} reaches beyond its storage of {storage.size}"
        )
    # An axis of one element is never stepped along, and its stride may be out of every range.
    byte_strides = [
        stride * dtype.itemsize if size > 1 else 0
        for stride, size in zip(strides, shape, strict=True)
    ]
    byte_count = (stop - offset + 1) * dtype.itemsize

    def read() -> np.ndarray:
        start = storage.start + offset * dtype.itemsize
        content = np.fromfile(storage.path, np.uint8, byte_count, offset=start)
        if len(content) != byte_count:
            raise TorchFileError(f"{storage.path} was cut while it was in use")
        return np.lib.stride_tricks.as_strided(
            content.view(dtype), shape, byte_strides, writeable=False
        )

    return Lazy(shape, dtype, read)


def _are_indices(offset: Any, shape: Any, strides: Any) -> bool:
    """Return whether these are whole numbers >= 0, with a stride for each of at most MOST_AXES
    axes.
    """
    return (
        isinstance(shape, tuple)
        and isinstance(strides, tuple)
        and len(shape) == len(strides) <= MOST_AXES
        and all(type(number) is int and number >= 0 for number in (offset, *shape, *strides))
    )


def _check_tree(node: Any, seen: set[int], depth: int = 0) -> None:
    """Raise unless every container stands in one place and none is deeper than MOST_DEPTH.

    Whoever walks such a tree comes to an end. `seen` are the ids of the containers so far.
    """
    if isinstance(node, _Global | _Storage):
        raise TorchFileError(
            "it holds a class or a bare storage; expected tensors, containers and scalars"
        )
    if isinstance(node, dict | list | tuple) and node:
        if id(node) in seen:
            raise TorchFileError("a container stands in two places")
        if depth == MOST_DEPTH:
            raise TorchFileError(f"its containers are more than {MOST_DEPTH} deep")
        seen.add(id(node))
        for child in node.values() if isinstance(node, dict) else node:
            _check_tree(child, seen, depth + 1)
