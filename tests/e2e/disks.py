"""A disk that fills up while a run writes to it."""

import contextlib
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path


class Disk:
    """A small file system of its own at `path`; where none can be mounted, a limit on the files
    that a process writes.

    `fill` and `free` may be called at any moment.
    """

    def __init__(self, path: Path, mounted: bool):
        self.path, self._mounted = path, mounted

    def fill(self, process: subprocess.Popen, room: int = 0) -> None:
        """Leaves `room` bytes to the process, and to those after it until `free`."""
        if not self._mounted:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, room))
            return
        with contextlib.suppress(OSError), open(self.path / "filler", "ab", buffering=0) as filler:
            while filler.write(bytes(1 << 12)):
                pass
        with open(self.path / "filler", "r+b") as filler:
            filler.truncate(max(filler.seek(0, 2) - room, 0))

    def free(self) -> None:
        """Makes room again."""
        (self.path / "filler").unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(directory: Path, size: str = "16m") -> Iterator[Disk]:
    """A disk at `directory` in a name space of its own, which nobody else sees."""
    directory.mkdir()
    script = 'mount -t tmpfs -o size="$1" tmpfs "$0" && echo mounted && exec cat'
    command = ["unshare", "-rm", "sh", "-c", script, str(directory), size]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            mounted = holder.stdout.readline() == "mounted\n"
            yield Disk(
                Path(f"/proc/{holder.pid}/root{directory}") if mounted else directory, mounted
            )
        finally:
            holder.terminate()
