"""Files that appear whole or not at all, and are read so that a broken one is named."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors

# What safetensors.numpy reads of weights, and bfloat16, which it does not.
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


def write_atomic(path: Path, payload: bytes) -> None:
    """Write `payload` beside `path`, flush it to the disk, and move it into place: no reader sees half a file."""
    partial = path.with_name(f"{path.name}.partial.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict:
    """The JSON object in a file; ValueError naming the file if there is none in it."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected an object")
    return content


def parse_safetensors(content: bytes, path: Path) -> dict[str, np.ndarray]:
    """The tensors in the content of the file `path`, in their own dtypes; ValueError naming it if it cannot be read."""
    try:
        stored = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}; expected a whole safetensors file") from None
    tensors = {}
    for name, part in stored:
        if part["dtype"] not in _DTYPES:
            raise ValueError(
                f"{path} holds a tensor of dtype {part['dtype']}, {name}; expected {', '.join(_DTYPES)}: store it so"
            )
        tensors[name] = np.frombuffer(part["data"], _DTYPES[part["dtype"]]).reshape(part["shape"])
    return tensors
