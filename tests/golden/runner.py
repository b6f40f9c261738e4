"""Walk a golden folder: pick a handler per file, compare every entry, and let nothing pass unseen.

A handler is a function GoldenFile -> Entries: an Entry for every output that a file of its kind may
hold (those that this file lacks are passed over), and iterators of entries, one for each group. An
exception while an entry is computed fails that entry; one in an iterator is a failure and ends that
group alone. A file that gives no result fails, and so does every array that no handler read or
compared, as 'not covered'.
"""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.golden.entry import Entries, Entry, Tolerance, difference
from tests.golden.files import GoldenFile

# Prefix of the file name (MANIFEST) -> module of its handler. Modules are imported when needed, so
# that one that cannot be imported fails its own files only.
HANDLERS = {
    "a": "scheduler",
    "b": "train_forward",
    "c": "rollouts",
    "d": "vae",
    "e": "umt5",
    "f": "rl",
    "fh": "nft_step",
    "g": "scenes",
    "h": "lora",
}


class Line(NamedTuple):
    """One printed result."""

    file: str
    entry: str
    error: float
    tolerance: str
    ok: bool
    reason: str = ""

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"FAIL {self.reason}"
        return f"{self.file}  {self.entry}  {self.error:.2e}  {self.tolerance}  {verdict}"


def run(directory: Path) -> Iterator[Line]:
    """Results of every .npz in `directory`; a folder that gives none is itself a failure."""
    empty = True
    for path in sorted(directory.glob("*.npz")):
        for line in run_file(path):
            empty = False
            yield line
    if empty:
        yield Line(str(directory), "-", np.inf, "-", False, "no .npz file to compare here")


def run_file(path: Path) -> Iterator[Line]:
    """Results of one file. Bare DiT weights are an input of other files and give no line."""
    try:
        file = GoldenFile(path)
        if _kind(path) not in HANDLERS and "patch_embedding.weight" in file:
            return
        handler = find_handler(path)
    except Exception as error:  # an unreadable or unknown file is a result, not a crash
        yield _failure(path.name, "-", error)
        return
    empty = True
    for line in _lines(file, handler(file)):
        empty = False
        yield line
    if empty:
        yield Line(path.name, "-", np.inf, "-", False, "no output to compare")
    for key in file.unused():
        yield Line(path.name, key, np.inf, "-", False, "not covered")


def _lines(file: GoldenFile, entries: Entries) -> Iterator[Line]:
    try:
        for entry in entries:
            if not isinstance(entry, Entry):
                yield from _lines(file, entry)
            # outputs may be left out of a file; what it holds must be covered
            elif entry.key in file:
                yield _check(file, entry)
    except Exception as error:
        yield _failure(file.path.name, "-", error)


def find_handler(path: Path) -> Callable[[GoldenFile], Entries]:
    """The handler for the kind of file that the name's prefix announces."""
    kind = _kind(path)
    if kind not in HANDLERS:
        raise ValueError(f"unknown file kind '{kind}_*'; known: {', '.join(HANDLERS)}")
    return importlib.import_module(f"tests.golden.{HANDLERS[kind]}").entries


def _kind(path: Path) -> str:
    return path.stem.split("_")[0]


def _check(file: GoldenFile, entry: Entry) -> Line:
    try:
        if entry.key.endswith("/"):
            error, ok, reason = _group_difference(
                entry.compute(), file.under(entry.key), entry.tolerance
            )
        else:
            want = file[entry.key]
            error, ok, reason = difference(entry.compute(), want, entry.tolerance)
    except Exception as failure:
        return _failure(file.path.name, entry.key, failure)
    return Line(file.path.name, entry.key, error, str(entry.tolerance), ok, reason)


def _group_difference(got: dict, want: dict, tolerance: Tolerance) -> tuple[float, bool, str]:
    """The worst of `difference` over all stored names."""
    if want.keys() - got.keys():
        return np.inf, False, f"names that we do not have: {sorted(want.keys() - got.keys())[:3]}"
    results = [(*difference(got[name], want[name], tolerance), name) for name in want]
    # refused first, then by error
    error, ok, reason, name = min(results, key=lambda result: (result[1], -result[0]))
    return error, ok, "" if ok else f"{reason}: {name}"


def _failure(file: str, entry: str, error: Exception) -> Line:
    reason = " ".join(str(error).split())[:300]
    return Line(file, entry, np.inf, "-", False, f"{type(error).__name__}: {reason}")
