"""Files of torch that are made to hang, to fill the memory or to overflow a reader, and a process
that reads them and is measured.

A shape writes one such file; what it draws decides where in the file and how large. Every pickle
is made of opcodes by hand, as no pickler writes such.
"""

import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from astrolabe_jax.convert.weights import open_weights
from tests.convert import torch_files

Draw = random.Random
ONE = b"K\x01"
DICT = b"ccollections\nOrderedDict\n)R"
STORED = bytes(4096)
MEGABYTE = 1 << 20
SECONDS = 60  # after which the process that reads is ended


def text(content: str) -> bytes:
    encoded = content.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def laughs(levels: int, kind: bytes = b"\x86") -> bytes:
    """A tuple of itself twice, at every level: 2^levels places in a few bytes a level."""
    code = b"K\x01\x85r" + struct.pack("<I", 0)
    for level in range(levels):
        code += b"j" + struct.pack("<I", level) + kind + b"r" + struct.pack("<I", level + 1)
    return code


def shared(levels: int, pair: Callable[[bytes], bytes]) -> bytes:
    """A list of containers, each of which holds the one before it twice."""
    code = b"]r" + struct.pack("<I", 0)
    for level in range(levels):
        code += pair(b"j" + struct.pack("<I", level)) + b"r" + struct.pack("<I", level + 1)
    return b"](" + code + b"e"


def storage(key: bytes = b"", count: bytes = b"", kind: bytes = b"ctorch\nFloatStorage\n") -> bytes:
    key = key or text("0")
    return b"(" + text("storage") + kind + key + text("cpu") + (count or b"M\x00\x04") + b"tQ"


def tensor(
    offset: bytes = b"K\x00",
    shape: bytes = b"K\x02\x85",
    strides: bytes = b"K\x01\x85",
    stored: bytes = b"",
    more: bytes = b"",
) -> bytes:
    function = b"ctorch._utils\n_rebuild_tensor_v2\n"
    parts = (stored or storage()) + offset + shape + strides
    return function + b"(" + parts + b"\x89" + DICT + more + b"tR"


# Where an object may stand, by name: the item of a dict with the object in that place.
PLACES: dict[str, Callable[[bytes], bytes]] = {
    "offset": lambda item: text("w") + tensor(offset=item),
    "shape": lambda item: text("w") + tensor(shape=item),
    "stride": lambda item: text("w") + tensor(strides=item),
    "storage key": lambda item: text("w") + tensor(stored=storage(key=item)),
    "count": lambda item: text("w") + tensor(stored=storage(count=item)),
    "class of a storage": lambda item: text("w") + tensor(stored=storage(kind=item)),
    "storage": lambda item: text("w") + tensor(stored=item),
    "pending": lambda item: text("w") + tensor(more=item),
    "key": lambda item: item + tensor(),
    "value": lambda item: text("w") + item,
    "size": lambda item: text("w") + b"ctorch\nSize\n" + item + b"\x85R",
    "device": lambda item: text("w") + b"ctorch\ndevice\n" + text("cuda") + item + b"\x86R",
    "bytes": lambda item: text("w") + b"c_codecs\nencode\n" + text("a") + item + b"\x86R",
    "member": lambda item: text("w") + b"c__builtin__\nset\n](" + item + b"e\x85R",
    "attributes": lambda item: text("w") + b"}" + item + b"b",
    "arguments": lambda item: text("w") + b"ctorch._utils\n_rebuild_parameter\n" + item + b"R",
    "function": lambda item: text("w") + item + b")R",
}


def write(path: Path, item: bytes, more: dict[str, bytes] | None = None) -> None:
    """Write a file whose pickle is a dict with one item."""
    program(path, b"}(" + item + b"u.", more)


def program(path: Path, code: bytes, more: dict[str, bytes] | None = None) -> None:
    members = {"a/data.pkl": b"\x80\x02" + code, "a/byteorder": b"little", "a/data/0": STORED}
    torch_files.write_zip(path, members | (more or {}))


def doubled(path: Path, draw: Draw) -> None:
    place = draw.choice(list(PLACES))
    kind = draw.choice((b"\x86", b"\x86\x85", b"K\x01\x87"))
    write(path, PLACES[place](laughs(draw.randint(15, 200), kind)))


def nested(path: Path, draw: Draw) -> None:
    depth = draw.choice((33, 900, 2000, 20_000, 300_000))
    around = draw.choice(("\x85", "list", "dict"))
    item = ONE + b"\x85" * depth
    if around == "list":
        item = b"]" * depth + b"a" * (depth - 1)
    if around == "dict":
        item = (b"}" + text("a")) * depth + ONE + b"s" * depth
    write(path, PLACES[draw.choice(list(PLACES))](item))


REPEATED = {
    "none": (b"", b"N"),
    "list": (b"", b"]"),
    "dict": (b"", b"}"),
    "mark": (b"", b"("),
    "short text": (b"", text("ab")),
    "wide text": (b"", text("a\U0001f600")),
    "long number": (b"", number(1 << 2000)),
    "memo": (b"]", b"\x94"),
    "full dict": (b"", b"}" + ONE + b"Ns"),
    "tuple": (b"", b"NNN\x87"),
    "ordered dict": (b"ccollections\nOrderedDict\nr\0\0\0\0", b"j\0\0\0\0)R"),
    "storage": (
        b"("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text("0")
        + text("cpu")
        + b"M\x00\x04tr\0\0\0\0",
        b"j\0\0\0\0Q",
    ),
    "tensor": (
        b"ctorch._utils\n_rebuild_tensor_v2\nr\0\0\0\0("
        + storage()
        + b"K\x00"
        + b"("
        + ONE * 8
        + b"t"
        + b"("
        + ONE * 8
        + b"t"
        + b"\x89"
        + DICT
        + b"tr\x01\0\0\0",
        b"h\x00h\x01R",
    ),
    "large text": (text("a" * MEGABYTE) + b"r\0\0\0\0", b"h\x00"),
    "bytes": (
        b"c_codecs\nencode\nr\0\0\0\0" + text("a" * MEGABYTE) + text("latin1") + b"\x86r\x01\0\0\0",
        b"h\x00h\x01R",
    ),
    "bytearray": (
        b"c__builtin__\nbytearray\nr\0\0\0\0c_codecs\nencode\n"
        + text("a" * MEGABYTE)
        + text("latin1")
        + b"\x86R\x85r\x01\0\0\0",
        b"h\x00h\x01R",
    ),
    "set": (
        b"c__builtin__\nset\nr\0\0\0\0]("
        + b"".join(text(str(i)) for i in range(50_000))
        + b"e\x85r\x01\0\0\0",
        b"h\x00h\x01R",
    ),
    "device": (
        b"ctorch\ndevice\nr\0\0\0\0" + text("a" * MEGABYTE) + ONE + b"\x86r\x01\0\0\0",
        b"h\x00h\x01R",
    ),
    "name of a storage": (
        b"("
        + text("storage")
        + b"ctorch\nFloatStorage\n"
        + text("0" * MEGABYTE)
        + text("cpu")
        + b"M\x00\x04tr\0\0\0\0",
        b"j\0\0\0\0Q",
    ),
    "counter": (b"ccollections\nCounter\nr\0\0\0\0}\x85r\x01\0\0\0", b"h\x00h\x01R"),
}


def repeated(path: Path, draw: Draw) -> None:
    """One thing again and again: as much as a reader takes, nearly that, or 60 MB of it."""
    before, code = REPEATED[draw.choice(list(REPEATED))]
    size = draw.choice((7 * MEGABYTE, 7 * MEGABYTE, 8 * MEGABYTE, 60 * MEGABYTE))
    count = draw.choice((size // len(code), 100_000, 160_000, 400_000, 990_000))
    count = min(count, size // len(code))
    program(path, b"](" + before + code * count + b"e.")


def entries(path: Path, draw: Draw) -> None:
    count = 200_000
    match draw.randrange(6):
        case 0:
            keys = b"".join(text(f"w{i}") + b"N" for i in range(count))
            program(path, b"}(" + keys + b"u.")
        case 1:
            keys = b"".join(b"J" + struct.pack("<I", i) + b"N" for i in range(count))
            program(path, b"}(" + keys + b"u.")
        case 2:
            keys = b"".join(text(f"w{i}") + b"Ns" for i in range(count))
            program(path, b"}" + keys + b".")
        case 3:
            program(path, b"](" + ONE * count + b"e.")
        case 4:
            program(path, b"]" + (ONE + b"a") * count + b".")
        case 5:
            write(path, text("w") + tensor(), {f"a/{i:x}": b"" for i in range(count // 4)})


def members(path: Path, draw: Draw) -> None:
    """An archive of so many empty members, or one whose directory says that it is so large."""
    count = draw.choice((60_000, 65_534, 70_000, 150_000, 200_000))
    torch_files.write_zip(path, {"a/data.pkl": b"\x80\x02}."})
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    end = content.rindex(b"PK\x05\x06")
    names = [b"a/%x" % i for i in range(count)]
    headers = b"".join(
        struct.pack("<4s5H3L2H", b"PK\3\4", 20, *[0] * 7, len(name), 0) + name for name in names
    )
    listed = bytearray()
    at = directory
    for name in names:
        numbers = (20, 3, 20, 0, *[0] * 4, *[0] * 3, len(name), *[0] * 5, at)
        listed += struct.pack("<4s4B4H3L5H2L", b"PK\1\2", *numbers) + name
        at += 30 + len(name)
    listed = content[directory:end] + listed
    few = min(count + 1, 0xFFFF)
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, few, few, len(listed), at, 0)
    path.write_bytes(content[:directory] + headers + listed + tail)


def collisions(path: Path, draw: Draw) -> None:
    """Keys whose hashes are equal, or lead a table of 2^18 through all that came before."""
    count = draw.choice((32_000, 60_000, 110_000))
    match draw.randrange(4):
        case 0:
            keys = [number(i * (2**61 - 1)) for i in range(1, count)]
        case 1:
            shift = draw.choice((20, 32, 40))
            keys = [number(i << shift) for i in range(count)]
        case 2:
            keys = [
                b"G" + struct.pack(">d", 2.0 ** (61 * (i % 16)) * (i // 16)) for i in range(count)
            ]
        case _:
            mask = (1 << 18) - 1
            at = 1
            keys = []
            for i in range(count):
                keys.append(number(at if i < count // 2 else at + ((i % 8 + 1) << 18)))
                at = (5 * at + 1) & mask
                at = 1 if i == count // 2 else at
    if draw.randrange(2):
        program(path, b"}(" + b"".join(key + b"N" for key in keys) + b"u.")
    else:
        write(path, text("w") + b"c__builtin__\nset\n](" + b"".join(keys) + b"e\x85R")


def memo(path: Path, draw: Draw) -> None:
    """Objects whose numbers are far from each other, or collide as keys of a dict."""
    step = draw.choice((1 << 12, 1 << 16, 1 << 20, 7919))
    puts = b"".join(b"r" + struct.pack("<I", i * step % 2**32) for i in range(300_000))
    program(path, b"]" + puts + b".")


def places(path: Path, draw: Draw) -> None:
    pair = draw.choice(
        (
            lambda below: b"](" + below + below + b"e",
            lambda below: b"}(" + ONE + below + b"K\x02" + below + b"u",
            lambda below: below + below + b"\x86",
        )
    )
    write(path, text("model") + shared(draw.randint(3, 300), pair))


def inside(path: Path, draw: Draw) -> None:
    """A dict that is in itself, with others between or none."""
    between = draw.randint(0, 40)
    ring = b"}r\0\0\0\0" + text("model") + (b"}" + text("model")) * between
    program(path, ring + b"j\0\0\0\0" + b"s" * (between + 1) + b".")


def numbers(path: Path, draw: Draw) -> None:
    large = number(draw.choice((1, -1)) << draw.choice((31, 62, 63, 64, 500, 2000)))
    digits = b"9" * draw.choice((5, 4000, 5000, 7 * MEGABYTE))
    item = draw.choice(
        (
            large,
            large + b"\x85",
            b"K\x00" + large + b"\x86",
            large * 8 + b"\x87",
            b"I" + digits + b"\n",
            b"L" + digits + b"L\n",
            b"F" + digits + b"\n",
            b"\x8b" + struct.pack("<i", 5 * MEGABYTE) + bytes(5 * MEGABYTE - 1) + b"\x01",
            b"\x8b\xff\xff\xff\x7f",
            b"V" + b"\\u1234" * MEGABYTE + b"\n",
            b"S'" + b"\\x00" * MEGABYTE + b"'\n",
        )
    )
    write(path, PLACES[draw.choice(list(PLACES))](item))


def names(path: Path, draw: Draw) -> None:
    long = draw.choice(("a", "\x1b[2J", "\n", "é", "\U0001f600")) * draw.choice(
        (50, 3000, MEGABYTE)
    )
    code = text("w") + b"c" + long.replace("\n", "?").encode("ascii", "replace") + b"\nx\n"
    if draw.randrange(2):
        code = PLACES[draw.choice(list(PLACES))](text(long))
    write(path, code)


def archives(path: Path, draw: Draw) -> None:
    """An archive whose numbers are not those of its content."""
    match draw.randrange(5):
        case 0:
            write(path, text("w") + tensor(), {"a/byteorder": bytes(60 * MEGABYTE)})
        case 1:
            write(path, text("w") + tensor(), {"a/" + "x" * 65_000: b""})
        case 2:
            torch_files.write_zip(path, {"a/data.pkl": b"N" * (60 * MEGABYTE)})
        case _:
            write(path, text("w") + tensor())
            content = bytearray(path.read_bytes())
            start = content.index(b"PK\x01\x02")
            for _ in range(3):
                at = draw.randrange(start, len(content) - 4)
                content[at : at + 4] = draw.choice(
                    (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4))
                )
            path.write_bytes(content)


def devices(path: Path, draw: Draw) -> None:
    target = draw.choice(("/dev/zero", "/dev/urandom", "/dev/full", "/dev/null", "/proc", "pipe"))
    if target == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)


def cut(path: Path, draw: Draw) -> None:
    """Another shape with some bytes changed."""
    draw.choice((doubled, nested, places, inside, numbers))(path, draw)
    content = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(min(len(content), 3000))
        content[at : at + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
    path.write_bytes(content)


SHAPES = (
    doubled,
    nested,
    repeated,
    entries,
    members,
    collisions,
    memo,
    places,
    inside,
    numbers,
    names,
    archives,
    devices,
    cut,
)


def attempt(path: Path) -> str:
    """Open a file as every command does; return the error, or nothing if there is none."""
    try:
        open_weights(path)
    except (ValueError, OSError) as error:
        return str(error) or "nothing is said"
    return ""


class Reading(NamedTuple):
    """What opening a file took."""

    seconds: float
    cpu: float  # seconds that it computed; the others it waited for the machine
    megabytes: int  # the most that the process had so far, with all that it imports
    error: str

    def measured(self) -> dict[str, float]:
        return self._asdict() | {"error": len(self.error)}

    def is_bounded(self) -> bool:
        return self.cpu <= 5 and self.megabytes <= 300 and len(self.error) <= 500


def written(folder: Path, count: int) -> Iterator[tuple[str, Path]]:
    """Write `count` files, the shapes in turn; give name and path of each, then remove it."""
    path = folder / "hostile.pt"
    for seed in range(count):
        shape = SHAPES[seed % len(SHAPES)]
        shape(path, random.Random(seed))
        yield f"{shape.__name__} {seed}", path
        path.unlink()


def readings(folder: Path, count: int) -> Iterator[tuple[str, Reading]]:
    """Open hostile files in a process of its own; it is ended where one takes SECONDS."""
    command = [sys.executable, "-m", "tests.convert.hostile"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        for name, path in written(folder, count):
            print(path, file=child.stdin, flush=True)
            line = child.stdout.readline()
            assert line, f"{name}: the reader was ended"
            yield name, Reading(*json.loads(line))
        child.stdin.close()


def main() -> None:
    """Read the file of each line of the input; print a Reading for it."""
    for line in sys.stdin:
        signal.alarm(SECONDS)
        start = time.perf_counter()
        computed = time.process_time()
        error = attempt(Path(line.rstrip("\n")))
        seconds = time.perf_counter() - start
        computed = time.process_time() - computed
        signal.alarm(0)
        status = Path("/proc/self/status").read_text()  # getrusage counts the parent before exec
        most = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) >> 10
        print(json.dumps(Reading(seconds, computed, most, error)), flush=True)


if __name__ == "__main__":
    main()
