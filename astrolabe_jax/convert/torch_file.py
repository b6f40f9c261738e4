"""Reads the .pt and .pth files of torch without torch, and without running anything in them.

Such a file is an uncompressed zip with one root folder (docs/checkpoints.md, Torch files). In it,
`data.pkl` is a pickle that describes nested containers and tensors, and `data/KEY` are the bytes of
the storages that tensors view. The pickle is interpreted here, one opcode at a time. Only the
opcodes that containers, scalars and tensors need are known. Nothing is imported, and nothing is
called but what CALLS has for a name. A tensor is read from the file when it is asked for.

Whatever a file says, reading it ends within seconds and in some 100 MB, and its errors are short:
the bounds below are many times what the checkpoints that people train need.
"""

import io
import itertools
import math
import os
import pickletools
import re
import reprlib
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from astrolabe_jax.runtime.files import Lazy

# Names in a pickle are "module name". An untyped storage holds bytes; its tensors have the dtype.
STORAGES = {
    "torch DoubleStorage": np.dtype(np.float64),
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(jnp.bfloat16),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
    "torch ComplexFloatStorage": np.dtype(np.complex64),
    "torch ComplexDoubleStorage": np.dtype(np.complex128),
    "torch.storage UntypedStorage": None,
}
_DTYPES_WITHOUT_STORAGE = (
    np.uint16,
    np.uint32,
    np.uint64,
    jnp.float8_e4m3fn,
    jnp.float8_e4m3fnuz,
    jnp.float8_e5m2,
    jnp.float8_e5m2fnuz,
    jnp.float8_e8m0fnu,
)
DTYPES = {
    f"torch {dtype.name}": dtype
    for dtype in (*filter(None, STORAGES.values()), *map(np.dtype, _DTYPES_WITHOUT_STORAGE))
}
# What torch takes to be safe, too, though it is no plain tensor.
_OTHER_TENSORS = re.compile(
    r"torch\.(_utils|_tensor) _rebuild_\w+|torch (\w+Storage|(q?u?int|bits|complex|float)\w+)"
)
SAVE_STATE = "Save the state dict alone: torch.save(model.state_dict(), ...)"
MOST_READ = 8 << 20  # bytes of data.pkl, or of the archive's directory; published files have 1 MB
MOST_MEMBERS = 1 << 16  # of the archive
MOST_STEPS = 1_000_000  # opcodes of data.pkl; a tensor has some 35
CALL_STEPS = 8  # a call takes the time and the memory of so many opcodes
STEP_BYTES = 64  # that a step of a call may take; a large result takes more steps
MOST_PLACES = 1_000_000  # of objects in the tree; one that stands in two places counts twice
MOST_DEPTH = 32  # containers inside each other
MOST_AXES = 8
# Keys and members of sets that are numbers. Unlike those of text, their hashes can be chosen, and
# so that each collides with all others.
MOST_NUMBERS = 1 << 15
MOST_NAME = 100  # characters of a storage's name or a device's
MOST_MESSAGE = 300  # characters of an error, behind the path
# What zipfile and struct raise for content that they cannot read; there is no common class.
NOT_AN_ARCHIVE = (
    zipfile.BadZipFile,
    NotImplementedError,
    struct.error,
    ValueError,
    EOFError,
    OverflowError,
)
_UNREAD = 150  # characters of what they say
# How a file begins that is no whole archive -> what would do.
_WAYS_OUT = (
    (rb"PK", "its end is missing or damaged: download or copy it again"),
    (
        rb"\x80[\x02-\x05]",
        "it is a pickle, as torch wrote before 1.6: read it with torch and write it anew, "
        "torch.save(torch.load(OLD, map_location='cpu', weights_only=True), NEW)",
    ),
    (rb"(?s).{8}\{", "by its content it is a safetensors file: let its name end in .safetensors"),
    (rb"", "download it again, or take it as a safetensors file"),
)
_TOO_DEEP = f"its containers are more than {MOST_DEPTH} deep, or one is inside itself"
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
    size: int  # bytes
    dtype: np.dtype | None  # None: that of the tensors


def read_torch(path: Path | str) -> Any:
    """Read what torch.save wrote: nested dicts, lists, tuples and sets of scalars and tensors.

    A tensor is a files.Lazy, which is read when it is asked for. A dtype is NumPy's, a size a
    tuple, a device or a layout the text of its name. Attributes of containers (a state dict's
    `_metadata`) and of tensors are dropped. A container may stand in several places, though not
    inside itself, and whoever walks the tree comes to an end.

    Raises:
      TorchFileError: naming the file and what is wrong with it.
      OSError: from the file system.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise TorchFileError("it is a directory, a device or a pipe; expected a file")
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            members = _members(archive)
            places = _places(file, members)
            pickled = archive.read(members["data.pkl"])
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise TorchFileError("its numbers are not little-endian")
        tree = _Machine(path, places).run(pickled)
        _measure(tree, {})
        return tree
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {_cut(error)}") from None
    except NOT_AN_ARCHIVE as error:
        raise TorchFileError(
            f"{path} is not a whole zip archive of torch.save (torch 1.6 or later): "
            f"{_cut(error, _UNREAD)}; {_way_out(path)}"
        ) from None


def _cut(error: Exception, most: int = MOST_MESSAGE) -> str:
    """Return the message of an error, at most `most` characters of it."""
    text = str(error)
    return text if len(text) <= most else f"{text[:most]}..."


def _way_out(path: Path) -> str:
    """Return what would do in place of a file that is no archive, by how it begins."""
    with open(path, "rb") as file:
        begins = file.read(16)
    return next(way for pattern, way in _WAYS_OUT if re.match(pattern, begins))


_printer = reprlib.Repr()
_printer.maxlevel = 2
_printer.maxtuple = MOST_AXES + 1
_printer.maxstring = 100


def _show(item: Any) -> str:
    """Return the repr of what a pickle made, cut short: whole, it may be without end."""
    return _printer.repr(item)


class _Bounded(io.FileIO):
    """A file of which at most MOST_READ bytes are read at once.

    zipfile reads the directory of an archive, and a member, at once.
    """

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MOST_READ:
            raise TorchFileError(
                f"data.pkl or the directory of the archive has {size} bytes; expected at most "
                f"{MOST_READ}. {SAVE_STATE}"
            )
        return super().read(size)


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the members of the archive by their names under its root folder."""
    members = {}
    if len(archive.infolist()) > MOST_MEMBERS:
        raise TorchFileError(f"it has more than {MOST_MEMBERS} members; a storage is one")
    for info in archive.infolist():
        _, _, name = info.filename.partition("/")
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.compress_size != info.file_size
            or info.flag_bits & 1
        ):
            raise TorchFileError(
                f"member {_show(info.filename)} is compressed or encrypted; torch.save does neither"
            )
        if name in members:
            raise TorchFileError(f"member {_show(info.filename)} occurs twice")
        members[name] = info
    roots = {info.filename.partition("/")[0] for info in members.values()}
    if len(roots) != 1 or "data.pkl" not in members:
        raise TorchFileError("expected one root folder with a data.pkl, as torch.save writes it")
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
        raise TorchFileError(f"member {_show(info.filename)} lies before the file")
    file.seek(info.header_offset)
    signature, name_size, extra_size = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    if signature != b"PK\x03\x04":
        raise TorchFileError(f"member {_show(info.filename)} has no header")
    start = info.header_offset + _LOCAL_HEADER.size + name_size + extra_size
    if start + info.file_size > file.seek(0, os.SEEK_END):
        raise TorchFileError(f"member {_show(info.filename)} reaches beyond the end of the file")
    return range(start, start + info.file_size)


class _Machine:
    """The pickle machine: a stack, those below its marks, and a memo."""

    def __init__(self, path: Path, places: Mapping[str, range]):
        self._path = path
        self._places = places
        self._stack: list[Any] = []  # above the last mark
        self._below: list[list[Any]] = []  # a stack for each mark
        self._memo: list[Any] = []  # pickle numbers its objects in their order
        self._steps = 0
        self._numbers = 0  # so many keys and members of sets are numbers

    def run(self, pickled: bytes) -> Any:
        """Return the object that the pickle describes."""
        for name, argument in _opcodes(pickled):
            if name == "STOP":
                result = self._pop()
                if self._stack or self._below:
                    raise TorchFileError("data.pkl leaves objects behind")
                return result
            self._spend(1)
            self._step(name, argument)
        raise TorchFileError("data.pkl has no end")

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MOST_STEPS:
            raise TorchFileError(
                f"data.pkl describes more than weights: it has over {MOST_STEPS} steps. "
                f"{SAVE_STATE}"
            )

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
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self._memoize(len(self._memo) if argument is None else argument)
            case "BINGET" | "LONG_BINGET" if argument < len(self._memo):
                self._push(self._memo[argument])
            case "BINGET" | "LONG_BINGET":
                raise TorchFileError(f"data.pkl uses object {argument} before it is there")
            case "MARK":
                self._below.append(self._stack)
                self._stack = []
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self._push({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                self._push({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self._push(tuple(self._last(int(name[-1]))))
            case "TUPLE":
                self._push(tuple(self._marked()))
            case "APPEND" | "APPENDS":
                items = self._last(1) if name == "APPEND" else self._marked()
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                self._set_items(self._last(2) if name == "SETITEM" else self._marked())
            case "GLOBAL":
                self._push(_global(argument))
            case "BINPERSID":
                self._push(self._storage(self._pop()))
            case "REDUCE":
                self._spend(CALL_STEPS)
                self._push(self._call(*self._last(2)))
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

    def _memoize(self, number: int) -> None:
        if number > len(self._memo):
            raise TorchFileError(
                f"data.pkl numbers an object {number}; expected {len(self._memo)}, the next"
            )
        self._memo[number : number + 1] = [self._top()]

    def _set_items(self, items: list) -> None:
        target = self._top(dict)
        if len(items) % 2:
            raise TorchFileError("data.pkl has a key without a value")
        self._check_keys(items[::2])
        target.update(zip(items[::2], items[1::2], strict=True))

    def _check_keys(self, keys: list) -> None:
        """Raise for keys of a dict, or members of a set, whose hashes may take long."""
        for key in keys:
            if type(key) not in (str, int, float, bool, type(None)):
                raise TorchFileError(f"a key is a {type(key).__name__}; expected text or a number")
            if type(key) is int and key.bit_length() > 60:
                raise TorchFileError(f"a key is a number of {key.bit_length()} bits")
            self._numbers += type(key) is not str
        if self._numbers > MOST_NUMBERS:
            raise TorchFileError(
                f"more than {MOST_NUMBERS} keys are numbers; expected text. {SAVE_STATE}"
            )

    def _storage(self, reference: Any) -> _Storage:
        """Return the storage for ('storage', class, key, location, elements)."""
        if not (isinstance(reference, tuple) and len(reference) == 5 and reference[0] == "storage"):
            raise TorchFileError("a storage is not described as torch.save does it")
        _, kind, key, _, count = reference
        name = kind.name if isinstance(kind, _Global) else ""
        if name not in STORAGES:
            raise TorchFileError(f"storage {_show(key)} is of no class that torch.save writes")
        is_name = isinstance(key, str) and len(key) < MOST_NAME
        place = self._places.get(f"data/{key}") if is_name else None
        if place is None:
            raise TorchFileError(f"storage {_show(key)} has no content in the file")
        dtype = STORAGES[name]
        item_size = dtype.itemsize if dtype else 1
        if type(count) is not int or count * item_size != len(place):
            raise TorchFileError(
                f"storage {_show(key)} has {len(place)} bytes; expected {_show(count)} elements "
                f"of {item_size} bytes"
            )
        return _Storage(self._path, place.start, len(place), dtype)

    def _call(self, function: Any, arguments: Any) -> Any:
        """Return what a function among CALLS does."""
        name = function.name if isinstance(function, _Global) else ""
        if name == _WITH_ATTRIBUTES and _is_plain(arguments):
            function, _, arguments, _ = arguments
            name = function.name
        least, kinds, run = CALLS.get(name, (1, (), dict))
        if not (
            isinstance(arguments, tuple)
            and least <= len(arguments) <= len(kinds)
            and all(map(isinstance, arguments, kinds))
        ):
            raise TorchFileError(
                f"data.pkl calls {name or 'what cannot be called'} as torch.save does not"
            )
        if run is set:
            self._check_keys(arguments[0])
        made = run(*arguments)
        self._spend(sys.getsizeof(made) // STEP_BYTES)
        return made


def _global(name: str) -> Any:
    """Return what a name in a pickle stands for: a dtype, or a function or class by its name."""
    if name in DTYPES:
        return DTYPES[name]
    if name in CALLS or name in STORAGES or name in _CLASSES or name == _WITH_ATTRIBUTES:
        return _Global(name)
    dotted = _show(name.replace(" ", "."))
    if _OTHER_TENSORS.fullmatch(name):
        raise TorchFileError(
            f"data.pkl asks for {dotted}, which is safe and yet not read: the tensor is sparse, "
            "quantised, nested, of a class of its own or without content; store plain tensors"
        )
    raise TorchFileError(
        f"data.pkl asks for {dotted}, which could run code; only tensors, containers and scalars "
        f"are read. {SAVE_STATE}"
    )


def _opcodes(pickled: bytes) -> Iterator[tuple[str, Any]]:
    """Yield name and argument of each opcode."""
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            yield opcode.name, argument
    # These are the parser's; TorchFileError is raised by who takes the opcodes.
    except (ValueError, IndexError) as error:
        raise TorchFileError(f"data.pkl is no pickle: {str(error)[:200]}") from None


def _tensor(*arguments: Any) -> Lazy:
    """Return the tensor of (storage, offset, shape, strides, gradient, hooks, what is pending)."""
    storage, *numbers = arguments[:4]
    return _view(storage, storage.dtype, numbers, arguments[6:])


def _tensor_of_dtype(*arguments: Any) -> Lazy:
    """Return the tensor of what `_tensor` takes, with a dtype before what is pending."""
    storage, *numbers = arguments[:4]
    return _view(storage, arguments[6], numbers, arguments[7:])


def _view(
    storage: _Storage, dtype: np.dtype | None, numbers: Sequence[Any], pending: Sequence[Any]
) -> Lazy:
    """Return the tensor that views a storage.

    It must stay in the storage, and its elements must not overlap.

    Args:
      storage: that it views.
      dtype: of its elements.
      numbers: offset, shape and strides; offset and strides count elements.
      pending: a conjugation or negation of the stored numbers, which is not done here.
    """
    offset, shape, strides = numbers
    if dtype is None or any(pending):
        raise TorchFileError(
            f"a tensor has no dtype, or is to be changed when it is read ({_show(pending)}); save "
            "tensor.resolve_conj().resolve_neg()"
        )
    if not _are_indices(offset, shape, strides):
        raise TorchFileError(
            f"a tensor has offset {_show(offset)}, shape {_show(shape)} and strides "
            f"{_show(strides)}"
        )
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
    size = storage.size // dtype.itemsize
    if stop >= size:
        raise TorchFileError(
            f"a tensor of shape {shape} at {offset} reaches beyond its storage of {size}"
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
        tensor = np.ndarray(shape, dtype, content, strides=byte_strides)
        tensor.flags.writeable = False
        return tensor

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


def _encoded(text: str, encoding: str) -> bytes:
    """Return the bytes that a pickle of protocol 2 has as text."""
    try:
        return text.encode("latin1" if encoding == "latin1" else "")
    except (LookupError, UnicodeError):
        raise TorchFileError("bytes are not stored as pickle does it") from None


def _device(kind: str, *number: int) -> str:
    """Return the name of a device, such as cuda:0."""
    if len(kind) > MOST_NAME:
        raise TorchFileError(f"a device has the name {_show(kind)}")
    return ":".join([kind, *map(str, number)])


def _first(item: Any, *_: Any) -> Any:
    return item


def _is_plain(arguments: Any) -> bool:
    """Return whether a tensor with attributes, (function, class, its arguments, attributes), is
    of one of torch's own classes.
    """
    return (
        isinstance(arguments, tuple)
        and len(arguments) == 4
        and isinstance(arguments[0], _Global)
        and isinstance(arguments[1], _Global)
        and arguments[1].name in _CLASSES
    )


# Function -> how few arguments it takes, the kinds of all that it may take, and what is done.
CALLS: dict[str, tuple[int, tuple[type, ...], Callable[..., Any]]] = {
    "torch._utils _rebuild_tensor_v2": (4, (_Storage, *[object] * 6), _tensor),
    "torch._utils _rebuild_tensor_v3": (
        7,
        (_Storage, *[object] * 5, np.dtype, object),
        _tensor_of_dtype,
    ),
    "torch._utils _rebuild_parameter": (1, (Lazy, object, object), _first),
    "torch._utils _rebuild_parameter_with_state": (1, (Lazy, *[object] * 3), _first),
    "torch Size": (1, (tuple,), _first),
    "torch device": (1, (str, int), _device),
    "torch.serialization _get_layout": (1, (str,), _first),
    "collections OrderedDict": (0, (), dict),
    "collections Counter": (1, (dict,), _first),
    "_codecs encode": (2, (str, str), _encoded),
    "__builtin__ bytes": (0, (), bytes),
    "__builtin__ bytearray": (0, (bytes,), bytearray),
    "__builtin__ set": (1, (list,), set),
    "__builtin__ complex": (2, (float, float), complex),
}
# A tensor with attributes: (function, class, the function's arguments, attributes).
_WITH_ATTRIBUTES = "torch._tensor _rebuild_from_type_v2"
_CLASSES = ("torch Tensor", "torch.nn.parameter Parameter")


def _measure(node: Any, known: dict[int, tuple[int, int]], depth: int = 0) -> tuple[int, int]:
    """Return how many containers of a tree are inside each other, and how many places it has.

    `known` holds these of the containers so far by their ids, so that each is walked once. Raises
    TorchFileError where either is too large; a container inside itself is found by its depth.
    """
    if isinstance(node, _Global | _Storage):
        raise TorchFileError(
            "it holds a class or a bare storage; expected tensors, containers and scalars"
        )
    if isinstance(node, set):
        return 0, len(node)
    if not isinstance(node, dict | list | tuple) or not node:
        return 0, 1
    if depth == MOST_DEPTH:
        raise TorchFileError(_TOO_DEEP)
    if id(node) not in known:
        height = 0
        places = 1
        for child in node.values() if isinstance(node, dict) else node:
            child_height, child_places = _measure(child, known, depth + 1)
            height = max(height, child_height + 1)
            places += child_places
        if height > MOST_DEPTH:
            raise TorchFileError(_TOO_DEEP)
        if places > MOST_PLACES:
            raise TorchFileError(
                f"its containers stand in so many places that it has over {MOST_PLACES} objects"
            )
        known[id(node)] = height, places
    return known[id(node)]
