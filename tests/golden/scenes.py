"""g_*: scene strings. Scene and prompt switching belong to the next issue."""

from collections.abc import Iterator

from tests.golden.entry import EXACT, Entry, Unsupported
from tests.golden.files import GoldenFile


def entries(file: GoldenFile) -> Iterator[Entry]:
    for key in file.keys():
        if key == "prompts":
            file[key]
        else:
            yield Entry(key, _unsupported, EXACT)


def _unsupported():
    raise Unsupported("scene strings are not supported yet")
