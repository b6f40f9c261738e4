"""python -m tests.convert.fuzz --minutes 10: reads damaged files of torch until the time is over,
and prints how many were read and refused; with --hostile 600, so many hostile ones (hostile.py)
before, and what reading them took.

Files that torch itself wrote are cut, spliced with each other, and have bytes replaced, mostly
where the pickle and the directory of the archive are. Any outcome but a tree that can be walked and
read, a TorchFileError or an OSError ends it.
"""

import argparse
import collections
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from astrolabe_jax.convert.torch_file import TorchFileError, read_torch
from astrolabe_jax.runtime.files import Lazy
from tests.convert import hostile

ALLOWED = (TorchFileError, OSError)
FLOAT8 = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
)


def with_attribute(tensor: torch.Tensor) -> torch.Tensor:
    tensor.note = 1
    return tensor


def trees() -> dict[str, Any]:
    """Return what people save: state dicts, dtypes, views, nesting; by a name for each."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, generator=generator)
    shared = {"betas": (0.9, 0.98)}
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    dtypes = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
    )
    return {
        "state_dict": module.state_dict(),
        "dtypes": {str(dtype): weight.to(dtype) for dtype in dtypes},
        "parameters": {
            "p": torch.nn.Parameter(weight),
            "frozen": torch.nn.Parameter(weight, requires_grad=False),
        },
        "views": {
            "whole": weight,
            "tied": weight,
            "turned": weight.t(),
            "part": weight[1:3, 2:5],
            "rows": weight[::2],
        },
        "odd": {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "one": torch.ones(1, 1)},
        # what torch takes to be safe beside dense tensors, and what stands in two places
        "safe": {
            "dtype": torch.bfloat16,
            "size": weight.shape,
            "device": torch.device("cuda", 1),
            "set": {"a", "b"},
            "bytes": b"\x00\xff",
            "bytearray": bytearray(b"ab"),
            "complex": 1 + 2j,
            "counter": collections.Counter("aab"),
            "fp8": {str(dtype): weight.to(dtype) for dtype in FLOAT8},
            "uint16": torch.ones(3, dtype=torch.uint16),
            "marked": with_attribute(torch.nn.Parameter(weight)),
            "noted": with_attribute(weight.clone()),
            "twice": [shared, shared, {"again": shared}],
            0.5: None,
        },
        "nested": {
            "generator_ema": collections.OrderedDict(w=weight),
            "optimizer": torch.optim.AdamW(
                [{"params": list(part.parameters())} for part in module]
            ).state_dict(),
            "step": 7,
            "scalars": [1.5, None, True, 2**70, -3, ("a", "é")],
        },
    }


def write(directory: Path) -> dict[str, bytes]:
    """Return the content of a file of torch for each of `trees`."""
    contents = {}
    for name, tree in trees().items():
        path = directory / f"{name}.pt"
        torch.save(tree, path)
        contents[name] = path.read_bytes()
    return contents


def changed(content: bytes, other: bytes, draw: random.Random) -> bytes:
    """Return `content` after one to four changes, some of them with pieces of `other`."""
    result = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        pickle = max(result.find(b"data.pkl"), 0)
        directory = max(result.rfind(b"PK\x01\x02"), 0)
        near = draw.choice((0, pickle, directory, draw.randrange(len(result) + 1)))
        at = min(near + draw.randrange(400), len(result))
        match draw.randrange(6):
            case 0 | 1:
                result[at : at + draw.randint(0, 4)] = draw.randbytes(draw.randint(0, 6))
            case 2 if at < len(result):
                result[at] ^= 1 << draw.randrange(8)
            case 3:
                start = draw.randrange(len(other))
                result[at : at + draw.randint(0, 64)] = other[start : start + draw.randint(1, 64)]
            case 4:
                del result[draw.randrange(len(result) + 1) :]
            case 5:
                result[at : at + 4] = draw.choice(
                    (b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"\x00\x00\x00\x00")
                )
    return bytes(result)


def walk(tree: Any) -> None:
    """Read every tensor of a tree that `read_torch` returned."""
    if isinstance(tree, Lazy):
        assert np.asarray(tree).shape == tree.shape
    elif isinstance(tree, dict | list | tuple | set):
        children = tree.values() if isinstance(tree, dict) else tree
        for child in children:
            walk(child)


def attempt(path: Path, content: bytes) -> str:
    """Return 'read' or 'refused'; every other outcome is an error of the reader."""
    path.write_bytes(content)
    try:
        walk(read_torch(path))
    except ALLOWED:
        return "refused"
    return "read"


def read_hostile(count: int) -> None:
    """Read so many hostile files; print what that took, and raise where one is out of bounds."""
    outcomes = collections.Counter()
    worst: dict[str, tuple[float, str]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, reading in hostile.readings(Path(directory), count):
            outcomes["refused" if reading.error else "read"] += 1
            for measure, value in reading.measured().items():
                worst[measure] = max(worst.get(measure, (0, "")), (round(value, 2), name))
            assert reading.is_bounded(), f"{name}: {reading}"
    print(f"{count} hostile files: {dict(outcomes)}, at most {worst}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Read damaged files of torch.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hostile", type=int, default=0, metavar="FILES")
    args = parser.parse_args()
    read_hostile(args.hostile)
    draw = random.Random(args.seed)
    until = time.monotonic() + 60 * args.minutes
    outcomes = collections.Counter()
    with tempfile.TemporaryDirectory() as directory:
        contents = list(write(Path(directory)).values())
        while time.monotonic() < until:
            content = changed(draw.choice(contents), draw.choice(contents), draw)
            try:
                outcomes[attempt(Path(directory) / "fuzz.pt", content)] += 1
            except BaseException:
                Path("fuzz_failure.pt").write_bytes(content)
                print("the file at fault is now fuzz_failure.pt")
                raise
    print(f"{sum(outcomes.values())} files: {dict(outcomes)}")


if __name__ == "__main__":
    main()
