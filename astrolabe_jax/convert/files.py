"""Files that appear whole or not at all, and are read so that a broken one is named."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy


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


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file of weights, in their own dtypes; ValueError naming it if it cannot be read."""
    expected = "expected a whole safetensors file of float64, float32, float16 or bfloat16 tensors"
    try:
        tensors = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, AttributeError) as error:  # AttributeError: numpy has no such dtype
        raise ValueError(f"{path} cannot be read: {error}; {expected}") from None
    for name, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(f"{path} holds a tensor of dtype {tensor.dtype}, {name}; {expected}: store it so")
    return tensors
