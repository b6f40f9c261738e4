"""Files that appear whole or not at all."""

import os
from pathlib import Path


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
