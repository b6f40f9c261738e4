"""Files that appear whole or not at all, and are read so that a broken one is named; tensors are
read one at a time.
"""

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import numpy as np
import safetensors

# Names of dtypes in the header of a safetensors file.
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    # counters and tables of positions, which some writers store beside the weights
    "I64": np.dtype(np.int64),
}
INDEX = ".safetensors.index.json"
# What is at fault where a file is written, and never where one is read: a full disk, a quota, a
# limit, a file system that has become read-only.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class WriteError(OSError):
    """A file could not be written; the message names it and the next step."""

    def __init__(self, path: Path, reason: object):
        super().__init__(
            f"{path} cannot be written: {reason}; make room for it, then run the same command again"
        )


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A tensor that is not read yet: `shape` and `dtype` are known, and every np.asarray reads it
    anew.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        tensor = self.read()
        return tensor if dtype is None else tensor.astype(dtype, copy=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def map(self, change: Callable[[np.ndarray], np.ndarray], shape=None, dtype=None) -> "Lazy":
        """This tensor with `change` applied when it is read; `shape` and `dtype` are what that
        makes of its own.
        """
        read = self.read
        return Lazy(
            self.shape if shape is None else shape,
            np.dtype(dtype or self.dtype),
            lambda: change(read()),
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes `path`: a full disk and the like become a WriteError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise WriteError(path, os.strerror(error.errno)) from error


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` to write to; at the end it is flushed to the disk and moved into place,
    on error removed.
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
    """Write `payload` beside `path`, flush it to the disk, and move it into place: no reader sees
    half a file.
    """
    with atomic(path) as file:
        file.write(payload)


def read_jsonl(path: Path) -> list[dict]:
    """The JSON objects, one a line, of a file some of whose lines may be half written or spoilt;
    none of no file.
    """
    records = []
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


def read_json(path: Path) -> dict:
    """The JSON object in a file; ValueError naming the file if there is none in it."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected an object")
    return content


def read_safetensors(path: Path) -> dict[str, Lazy]:
    """The tensors of a file of weights, in their own dtypes; ValueError naming it if it is not
    whole.

    Only the header is read now. The file is opened anew for each tensor, so that nothing stays
    mapped in memory.
    """
    expected = (
        f"expected a whole safetensors file of {', '.join(map(str, DTYPES.values()))} tensors"
    )
    described = {}
    try:
        with safetensors.safe_open(path, "np") as file:
            for name in file.keys():
                tensor = file.get_slice(name)
                described[name] = tuple(tensor.get_shape()), tensor.get_dtype()
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}; {expected}") from None
    for name, (_, kind) in described.items():
        if kind not in DTYPES:
            raise ValueError(
                f"{path} holds a tensor of dtype {kind}, {name}; {expected}: store it so"
            )

    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            with safetensors.safe_open(path, "np") as file:
                return file.get_tensor(name)

        return read

    return {
        name: Lazy(shape, DTYPES[kind], reader(name)) for name, (shape, kind) in described.items()
    }


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The free text entries in the header of a file that `read_safetensors` reads."""
    with safetensors.safe_open(path, "np") as file:
        return file.metadata() or {}


def read_sharded(path: Path) -> dict[str, Lazy]:
    """The tensors of X.safetensors.index.json from the files that it names, which lie beside it.

    Raises FileNotFoundError naming a shard that is not there, and ValueError naming every tensor
    that is not in the shard that the index gives, or in two.
    """
    where = read_json(path).get("weight_map")
    if (
        not isinstance(where, dict)
        or not where
        or not all(type(shard) is str for shard in where.values())
    ):
        raise ValueError(
            f"{path}: expected an object weight_map, from names of tensors to names of files "
            "beside it"
        )
    shards, tensors = {}, {}
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(
                f"{path} names the shard {shard!r}; expected a .safetensors file beside it"
            )
        if not (path.parent / shard).is_file():
            raise FileNotFoundError(
                f"{path.parent / shard} is missing, which {path.name} names; download it again"
            )
        shards[shard] = read_safetensors(path.parent / shard)
    faults = [
        f"{name} is not in {shard}" for name, shard in where.items() if name not in shards[shard]
    ]
    for shard, content in shards.items():
        faults += [
            f"{name} is in {shard}, but not in the index" for name in content if name not in where
        ]
        faults += [
            f"{name} is in {shard} and in {where[name]}"
            for name in content
            if where.get(name, shard) != shard
        ]
        tensors |= {name: tensor for name, tensor in content.items() if where.get(name) == shard}
    if faults:
        raise ValueError(
            "\n  ".join(
                [f"{path} and its shards do not agree; download all of them again:", *faults]
            )
        )
    return tensors


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes a file of weights tensor by tensor, so that one is in memory at a time; atomic.

    tensors: arrays or Lazy, of the dtypes in DTYPES. `progress` is told the bytes of each when it
    is written. The format: the length of the header as 8 bytes, the header (JSON; padded to 8
    bytes), the content one after the other.
    """
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | dict(metadata or {})}
    stop = 0
    for name, tensor in tensors.items():
        start, stop = (
            stop,
            stop + int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize,
        )
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
