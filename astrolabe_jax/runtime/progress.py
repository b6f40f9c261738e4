"""How far a run is and how long it has left: the one progress meter, and the lines that it logs."""

import contextlib
import errno
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax

TICK_SECONDS = 10.0  # long work reports this often


def log(text: str, file: TextIO | None = None) -> None:
    """Print a line on process 0 alone, to standard output by default.

    It is flushed, so that it appears at once also through a pipe. Where nobody reads it any more, a
    closed pipe or terminal, or where its disk is full, the program goes on without it.
    """
    if jax.process_index() != 0:
        return
    stream = file or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):
            # what is still in the buffer would fail again at the end of the program
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Progress:
    """Measures the phases of a run, counts what is done in them, and logs both.

    Attributes:
      seconds: by phase, over the whole run, its earlier pieces included.
      lasted: seconds of the last `within` of each name.
      prefix: of the names of phases, PART/ inside of `within`.
    """

    def __init__(
        self,
        seconds: Mapping[str, float] | None = None,
        check: Callable[[], None] = lambda: None,
        log: Callable[[str], None] = log,
    ):
        """Go on from `seconds`.

        `check` is called before every phase and after every count, and wherever long work can end
        in between; it may raise to end the run there.
        """
        self.seconds = dict(seconds or {})
        self.lasted: dict[str, float] = {}
        self._recent: dict[str, float] = {}  # by phase, since `take`
        self.check = check
        self._log = log
        self._epochs: list[float] = []  # seconds of each
        self.prefix = ""
        self._stopwatch = _Stopwatch("")  # of `tick`
        self._logged = time.monotonic()  # when the last line about work was
        self._sizes: set[str] = set()  # what `takes` has logged

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to the phase `name`.

        The caller waits for the device before it leaves.
        """
        self.check()
        start = time.monotonic()
        yield
        elapsed = time.monotonic() - start
        name = self.prefix + name
        for table in (self.seconds, self._recent):
            table[name] = table.get(name, 0.0) + elapsed

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Count the phases inside as PART/PHASE."""
        self.prefix = f"{part}/"
        start = time.monotonic()
        try:
            yield
        finally:
            self.prefix = ""
            self.lasted[part] = time.monotonic() - start

    def take(self) -> dict[str, float]:
        """Return the seconds by phase since the last call."""
        recent = self._recent
        self._recent = {}
        return recent

    def tick(self, what: str, done: int, total: int, unit: str = "") -> None:
        """Log every TICK_SECONDS how much of `what` is done, how fast it goes, and the time left.

        Args:
          what: names the work; a new name begins a new count.
          done: items that are finished.
          total: items in all.
          unit: 'frames' or another name of the items, 'bytes', or empty for pieces that have none.
        """
        if self._stopwatch.what != what:
            self._stopwatch = _Stopwatch(what)
        self._tick(self._stopwatch, done, total, unit)

    def counter(self, what: str, total: int, unit: str) -> Callable[[int], None]:
        """Return a function that adds to a count of items, with the lines of `tick`.

        When all are done it logs how long they took, and how fast they were.
        """
        stopwatch = _Stopwatch(what)
        done = 0

        def add(count: int) -> None:
            nonlocal done
            done += count
            self._tick(stopwatch, done, total, unit)
            if done >= total:
                self._log(stopwatch.summary(done, unit))
            self.check()

        return add

    def _tick(self, stopwatch: "_Stopwatch", done: int, total: int, unit: str) -> None:
        rate = stopwatch.rate(done)
        now = time.monotonic()
        if rate is None or done >= total or now - self._logged < TICK_SECONDS:
            return
        self._logged = now
        self._log(
            f"  {stopwatch.what} {_amount((done, total), unit)}, {_speed(rate, unit)}, "
            f"{clock((total - done) / rate)} left"
        )

    def takes(self, what: str, size: int, place: Path) -> None:
        """Log, once in a run, how many bytes `what` takes on the disk."""
        if what not in self._sizes:
            self._sizes.add(what)
            self._log(f"  {what} takes {size / 2**20:,.1f} MiB in {place}")

    def epoch(self, record: Mapping[str, Any], count: int, after: float) -> None:
        """Log the line of a finished epoch.

        Args:
          record: what metrics.jsonl has about it.
          count: epochs in all.
          after: the expected seconds from the last epoch to the end.
        """
        epoch = record["epoch"]
        seconds = record["seconds"]
        self._epochs.append(sum(seconds.values()))
        left = (count - epoch) * statistics.median(self._epochs[-5:]) + after
        self._logged = time.monotonic()
        rewards = "  ".join(
            f"{name.removeprefix('reward/')} {value:.3f}"
            for name, value in rewards_of(record).items()
        )
        phases = " + ".join(f"{name} {value:.1f}" for name, value in seconds.items())
        self._log(
            f"epoch {epoch:{len(str(count))}}/{count}  {rewards}  kl {record['kl_div']:.1e}  |  "
            f"{phases} = {self._epochs[-1]:.1f} s  |  {clock(left)} left"
        )


class _Stopwatch:
    """Measures how fast items are done; the first one, which compiles the programs, is left out."""

    def __init__(self, what: str):
        self.what = what
        self._start = time.monotonic()
        self._first: tuple[float, int] | None = None  # when the first were done, and how many

    def rate(self, done: int) -> float | None:
        """Return items a second after the first; None as long as there are no others."""
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        start, before = self._first
        if now == start or done == before:
            return None
        return (done - before) / (now - start)

    def summary(self, done: int, unit: str) -> str:
        """Return the line about work that is finished."""
        seconds = time.monotonic() - self._start
        speed = _speed(done / max(seconds, 1e-6), unit)
        steady = self.rate(done)
        if steady is not None:
            speed += f"; {_speed(steady, unit)} after the first"
        return f"{self.what}: {_amount((done,), unit)} in {clock(seconds)}, {speed}"


def _amount(numbers: tuple[int, ...], unit: str) -> str:
    """Return 3/7, 30/70 frames, or 0.30/0.70 GB."""
    if unit == "bytes":
        return "/".join(f"{number / 1e9:.2f}" for number in numbers) + " GB"
    return f"{'/'.join(map(str, numbers))} {unit}".rstrip()


def _speed(rate: float, unit: str) -> str:
    """Return 2.0 s each, 0.5 frames/s, or 500 MB/s, from a rate in items a second."""
    if unit == "bytes":
        return f"{rate / 1e6:.0f} MB/s"
    if unit:
        return f"{rate:.1f} {unit}/s"
    return f"{1 / rate:.1f} s each"


def clock(seconds: float) -> str:
    """Return a duration for people: 42 s, 3 min 08 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds // 60 % 60:02d} min"


def rewards_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the mean rewards of an epoch's record, under their keys reward/NAME."""
    return {name: value for name, value in record.items() if name.startswith("reward/")}
