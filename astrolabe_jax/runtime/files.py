"""Files that appear whole or not at all, and are named when they are broken.

Files of weights are read and written one tensor at a time.
"""

import contextlib
import dataclasses
import datetime
import difflib
import errno
import fcntl
import functools
import json
import logging
import math
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import jax.numpy as jnp
import numpy as np
import safetensors

# Names of dtypes in the header of a safetensors file.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    # counters, tables of positions and files as bytes, which some writers store beside the weights
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
INDEX = ".safetensors.index.json"
MOST_FAULTS = 10  # of one kind in a message
_MOST_NAMES = 6  # of a directory in a message
_LONGEST_NAME = 300  # of a tensor
_JSON_LIMIT = 1 << 25  # bytes of a document; the index of the largest published model has 9 MB
_DIGITS = 308  # a number of so many digits is a float64
# What stands in the place of a file that was not had: how its first bytes begin, and what it is.
_AGAIN = "download the file again"
_STAND_INS = (
    (
        rb"version https://git-lfs\.github\.com/",
        "a git-lfs pointer, not the file itself; run git lfs pull, or download it",
    ),
    (
        rb"(/annex|(\.\./)*\.git/annex)/objects/",
        "a git-annex pointer, not the file itself; run git annex get, or download it",
    ),
    (rb"<(!doctype html|html|head|script)\b", f"a web page, not the file itself; {_AGAIN}"),
    (
        rb"<\?xml[^>]*>\s*<(error|html)\b|\{\s*\"error\"|(entry|repository) not found|"
        rb"invalid (username or password|credentials)|access to (model|dataset) ",
        f"the error message of a server, not the file itself; {_AGAIN}",
    ),
    (
        rb"\x1f\x8b|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|7z\xbc\xaf\x27\x1c|BZh[1-9]1AY",
        "a packed archive; unpack it first",
    ),
    (rb"\x00{4096}", f"empty where it begins, as a download that was stopped leaves it; {_AGAIN}"),
    (rb"\Z", f"an empty file; {_AGAIN}"),
)
# What programs write beside a file, or add to its name, until it is there.
_UNFINISHED = (".aria2", ".part", ".crdownload", ".incomplete", ".download")
# Errors of a file that is written, never of one that is read: a full disk, a quota, a limit, a file
# system that has become read-only.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_TOO_MANY = os.strerror(errno.EMFILE)  # open files


# Held by this process until it ends; all locks of a file end when one of its descriptors is closed.
_LOCKS: dict[Path, IO[bytes]] = {}


class WriteError(OSError):
    """A file could not be written; the message names it and the next step."""

    def __init__(self, path: Path, reason: object):
        step = "raise its limit (ulimit -n)" if reason == _TOO_MANY else "make room for it"
        super().__init__(
            f"{path} cannot be written: {reason}; {step}, then run the same command again"
        )


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A tensor that is not read yet: its shape and dtype are known, and every np.asarray reads it
    anew.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]  # gives the tensor, of this shape and dtype

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        tensor = self.read()
        return tensor if dtype is None else tensor.astype(dtype, copy=False)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def map(
        self,
        change: Callable[[np.ndarray], np.ndarray],
        shape: tuple[int, ...] | None = None,
        dtype: Any = None,
    ) -> "Lazy":
        """Return this tensor with `change` applied when it is read.

        `shape` and `dtype` are those of the result; by default they stay.
        """
        return Lazy(
            self.shape if shape is None else shape,
            np.dtype(dtype or self.dtype),
            lambda: change(self.read()),
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a full disk and the like into a WriteError, around what writes `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise WriteError(path, os.strerror(error.errno)) from error


def system_error(error: BaseException) -> int | None:
    """Return the number of the system's error; tensorstore has it in the text of a ValueError."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"os_error_code='(\d+)'", str(error))
    return int(match[1]) if match else None


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """Give a file beside `path` to write to, which takes its place at the end.

    It is flushed to the disk first; on an error it is removed.
    """
    partial = path.with_name(f"{path.name}.partial.{os.getpid()}")
    try:
        with writing(path), open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: Path, payload: bytes) -> None:
    """Write a file such that no reader sees half of it, as `atomic` does."""
    with atomic(path) as file:
        file.write(payload)


def write_json(path: Path, content: Any) -> None:
    """Write what JSON can hold, its numbers all finite, as `write_atomic` does."""
    write_atomic(path, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")


def check_takes_files(folder: Path, what: str, other: str) -> None:
    """Raise OSError if nothing can be written into a folder; nothing stays.

    Args:
      folder: that exists.
      what: the user wants to be written there.
      other: what to give in its place.
    """
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"{what} cannot be written ({folder} takes no files): {error.strerror}; give {other}"
        ) from None


def new_file(text: str, flag: str) -> Path:
    """Return the file that a user wants to be written, before the work that it is about.

    Raises ValueError or OSError, naming the flag, if it cannot be.
    """
    path = local_directory(text)
    if path.is_dir():
        raise IsADirectoryError(f"{flag}: {path} is a directory; expected the name of a file")
    check_takes_files(path.parent, f"{flag}: {path}", "another")
    return path


def listed(opening: str, faults: Sequence[str]) -> str:
    """Return a message that lists the faults of a file, a line each, and cuts a long list short."""
    more = len(faults) - MOST_FAULTS
    rest = [f"and {more} more"] if more > 0 else []
    return "\n  ".join([opening, *faults[:MOST_FAULTS], *rest])


def stand_in(path: Path) -> str:
    """Return what a file is that stands in the place of one that was not had, with the next step.

    An empty text comes back for any other file, whatever it holds. At most 4096 bytes are read.
    Raises OSError if there is no such file.
    """
    with open(path, "rb") as file:
        start = file.read(4096)
    begins = start if start.startswith(b"\x00") else start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for pattern, what in _STAND_INS:
        if re.match(pattern, begins, re.IGNORECASE):
            return what
    beside = [ending for ending in _UNFINISHED if path.with_name(path.name + ending).exists()]
    if beside or path.suffix in _UNFINISHED:
        name = path.name + "".join(beside[:1])
        return f"a download that is not finished ({name}); wait for it, or {_AGAIN}"
    return ""


def what_is_at(path: Path) -> str:
    """Return what is at a path where something else is expected.

    For nothing its full path comes back, with a close name or the last of its folders that exists;
    for a directory the first names that it holds.
    """
    if path.is_file():
        return f"{path} is a file"
    if path.is_dir():
        names = sorted(child.name for child in path.iterdir())
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        held = ", ".join(names[:_MOST_NAMES]) + more
        return f"{path} is a directory that holds {held or 'nothing'}"
    full = path.absolute()
    if path.is_symlink():
        return f"{full} is a link to {os.readlink(path)}, where nothing is"
    if path.exists():
        return f"{full} is a device or a pipe"
    nearest = next(parent for parent in full.parents if parent.exists())
    names = [child.name for child in nearest.iterdir()] if nearest.is_dir() else []
    close = difflib.get_close_matches(full.relative_to(nearest).parts[0], names, 1)
    if close:
        return f"nothing is at {full} (did you mean {nearest / close[0]}?)"
    far = "" if nearest == full.parent else f" (of its folders there is {nearest})"
    return f"nothing is at {full}{far}"


def parse_json(content: str | bytes) -> Any:
    """Return what a JSON document holds, whoever wrote it; bytes may be in any UTF.

    Raises:
      ValueError: saying why, in one line, for what is no JSON, nests too deep, is longer than any
        config or index, or holds a number that no float64 holds.
    """
    if len(content) > _JSON_LIMIT:
        raise ValueError(f"it is longer than {_JSON_LIMIT:,} characters")
    try:
        return json.loads(
            content, parse_int=_whole, parse_float=_finite, parse_constant=_not_finite
        )
    except RecursionError:
        raise ValueError("it nests too deep") from None


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        _not_finite(text)
    return number


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text[:20]} is no finite number")


def local_directory(text: str | Path) -> Path:
    """Return the directory that a user names; `~` stands for the home directory.

    Raises ValueError for an address, such as that of a bucket, and for a name that is no UTF-8,
    which Orbax cannot write.
    """
    scheme, colon, _ = str(text).partition("://")
    if colon:
        raise ValueError(
            f"{text}: {scheme}:// is not supported; expected a directory of a file system (a "
            "bucket can be mounted as one)"
        )
    if fault := _not_utf8(str(text)):
        raise ValueError(fault)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text}: {str(error).rstrip('.')}; expected a directory") from None


def _not_utf8(text: str) -> str:
    """Return what to tell of a name that Python could not read in this locale; "" for others."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return (
            f"{ascii(text)} is not text in UTF-8; rename it, or, if the locale is at fault, set "
            "PYTHONUTF8=1 or LC_ALL=C.UTF-8"
        )
    return ""


def local_file(text: str | Path, what: str) -> Path:
    """Return the file that a user names; `~` stands for the home directory, `what` for its kind.

    Raises:
      ValueError: for an address, and for what stands in the place of a file, see `stand_in`.
      IsADirectoryError, FileNotFoundError: if there is no such file.
    """
    if not str(text):
        raise ValueError(f"the name of a file is empty; expected {what}")
    if "://" in str(text):
        raise ValueError(f"{text} is an address; download it, and give {what}")
    path = local_directory(text)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; expected {what}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected {what}")
    if fault := stand_in(path):
        raise ValueError(f"{path} is {fault}")
    return path


def lock(path: Path) -> str:
    """Hold the file `path` for this process alone, and return what stands in it: by whom.

    The lock goes with the process, also where that is killed, and holds for other hosts, too. Where
    a file system has no locks a warning says so.

    Raises:
      ValueError: if another process holds it, naming that.
    """
    key = path.resolve()
    held = _LOCKS.get(key)
    if held and path.exists() and os.path.samestat(os.fstat(held.fileno()), path.stat()):
        return _holder(held)
    unlock(path)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(path, "a+b", buffering=0))
        fault = _take(file, fcntl.LOCK_EX)
        if fault:
            logging.warning("%s cannot be locked (%s): use it in one run at a time", path, fault)
        file.truncate(0)
        now = datetime.datetime.now().astimezone().isoformat(sep=" ")
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}".encode())
        stack.pop_all()
    _LOCKS[key] = file
    return _holder(file)


def refuse_locked(path: Path) -> None:
    """Raise ValueError if another process holds the file `path`, as `lock` would; nothing is kept.

    A lock of this process, which would end with any descriptor of the file, is not looked at.
    """
    if path.resolve() not in _LOCKS and path.exists():
        with open(path, "rb") as file:
            _take(file, fcntl.LOCK_SH)  # several may look at once


def _take(file: IO[bytes], kind: int) -> OSError | None:
    """Lock a file, and return the error of a file system that has no locks.

    Raises:
      ValueError: if another process holds it, naming that.
    """
    try:
        fcntl.lockf(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(f"is in use by {_holder(file)}") from None
        return error


def _holder(file: IO[bytes]) -> str:
    return os.pread(file.fileno(), 1000, 0).decode(errors="replace")


def unlock(path: Path) -> None:
    """Give up a lock that this process may hold."""
    held = _LOCKS.pop(path.resolve(), None)
    if held:
        held.close()


def read_jsonl(path: Path) -> list[dict]:
    """Return the JSON objects in a file, one a line; an empty list if there is no file.

    Lines that are half written or spoilt are left out.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            records.append(parse_json(line))
    return [record for record in records if isinstance(record, dict)]


def read_json(path: Path) -> dict:
    """Return the JSON object in a file; raise ValueError, naming the file, if there is none."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size  # as much is set aside as is asked for
            content = parse_json(file.read(min(size, _JSON_LIMIT) + 1))
    except ValueError as error:
        reason = stand_in(path) or f"not valid JSON: {error}"
        raise ValueError(f"{path} is {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected an object")
    return content


def check_names(path: Path, names: Iterable[str]) -> None:
    """Raise ValueError, naming the file, for a name of a tensor that no message could show."""
    for name in names:
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise ValueError(
                f"{path} names a tensor {ascii(name[:60])}; expected at most {_LONGEST_NAME} "
                "characters that can be printed"
            )


def read_safetensors(path: Path) -> dict[str, Lazy]:
    """Return the tensors of a file of weights, in their own dtypes.

    Only the header is read now. The file is opened anew for each tensor, so that nothing stays
    mapped in memory. Raises ValueError, naming the file, if it is not whole.
    """
    tensors = {}
    try:
        with safetensors.safe_open(path, "np") as file:
            check_names(path, file.keys())
            for name in file.keys():
                header = file.get_slice(name)
                kind = header.get_dtype()
                if kind not in DTYPES:
                    raise ValueError(
                        f"{path} holds a tensor of dtype {kind}, {name}; expected "
                        f"{', '.join(map(str, DTYPES.values()))}: store it so"
                    )
                shape = tuple(header.get_shape())
                tensors[name] = Lazy(
                    shape,
                    DTYPES[kind],
                    functools.partial(_read_tensor, path, name, shape, DTYPES[kind]),
                )
    except safetensors.SafetensorError as error:
        raise _unreadable(path, error) from None
    return tensors


def _read_tensor(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if dtype.itemsize > 1:
        with safetensors.safe_open(path, "np") as file:
            return file.get_tensor(name)
    start, entries = _header(path)  # the library does not read float8
    begin, end = entries[name]["data_offsets"]
    return np.fromfile(path, dtype, end - begin, offset=start + begin).reshape(shape)


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the content of a safetensors file begins, and its header."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(min(size, _JSON_LIMIT + 1)))
    return 8 + size, header


def _shortfall(path: Path) -> str:
    """Return how much a safetensors file lacks of what its header tells; "" if that is not it."""
    try:
        start, entries = _header(path)
        if start > 8 + _JSON_LIMIT:  # which no writer makes
            return ""
        ends = [entry["data_offsets"][1] for entry in entries.values() if "data_offsets" in entry]
        lacking = start + max(ends, default=0) - path.stat().st_size
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""
    if lacking <= 0:
        return ""
    return f"cut short, {lacking:,} bytes of its content are missing; {_AGAIN}"


def _archive(path: Path) -> str:
    """Return what a zip archive is that has the name of a safetensors file; "" for any other."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return ""
    return "a zip archive; if torch.save wrote it, give it a name that ends in .pt"


def safetensors_metadata(path: Path) -> dict[str, str]:
    """Return the free text entries in the header of a file that `read_safetensors` reads."""
    try:
        with safetensors.safe_open(path, "np") as file:
            return file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ValueError:
    fault = stand_in(path) or _shortfall(path) or _archive(path)
    text = f"cannot be read: {str(error)[:200]}; expected a whole safetensors file: {_AGAIN}"
    return ValueError(f"{path} is {fault}" if fault else f"{path} {text}")


def read_index(path: Path) -> dict[str, str]:
    """Return what X.safetensors.index.json tells: names of tensors -> names of files beside it.

    Raises ValueError, naming the index, for one that is broken.
    """
    index: Any = read_json(path).get("weight_map")
    if not (
        isinstance(index, dict) and index and all(type(shard) is str for shard in index.values())
    ):
        raise ValueError(
            f"{path}: expected an object weight_map, from names of tensors to names of files "
            "beside it"
        )
    check_names(path, index)
    for shard in index.values():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(
                f"{path} names the shard {shard[:100]!r}; expected a .safetensors file beside it"
            )
    return index


def read_sharded(path: Path) -> dict[str, Lazy]:
    """Return the tensors of X.safetensors.index.json from the files beside it that it names.

    Raises:
      FileNotFoundError: naming a shard that is not there.
      ValueError: naming the index if it is broken, and tensors that are not in the shard that the
        index gives, or in two.
    """
    index = read_index(path)
    shards = {}
    for shard in sorted(set(index.values())):
        if not (path.parent / shard).is_file():
            raise FileNotFoundError(
                f"{path.parent / shard} is missing, which {path.name} names; download it again"
            )
        shards[shard] = read_safetensors(path.parent / shard)
    tensors = {}
    faults = [
        f"{name} is not in {shard}" for name, shard in index.items() if name not in shards[shard]
    ]
    for shard, content in shards.items():
        for name, tensor in content.items():
            if name not in index:
                faults.append(f"{name} is in {shard}, but not in the index")
            elif index[name] != shard:
                faults.append(f"{name} is in {shard} and in {index[name]}")
            else:
                tensors[name] = tensor
    if faults:
        raise ValueError(
            listed(f"{path} and its shards do not agree; download all of them again:", faults)
        )
    return tensors


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a file of weights as `atomic` does, with one tensor in memory at a time.

    The format: the length of the header as 8 bytes, the header (JSON; padded to 8 bytes), the
    content one after the other.

    Args:
      path: of the file.
      tensors: arrays or Lazy, of the dtypes in DTYPES.
      metadata: free text entries of the header.
      progress: is called with the bytes of each tensor that is written.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
    stop = 0
    for name, tensor in tensors.items():
        start = stop
        stop += tensor.nbytes
        header[name] = {
            "dtype": kinds[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            content = np.ascontiguousarray(np.asarray(tensor))
            file.write(content.reshape(-1).view(np.uint8).data)
            progress(content.nbytes)
