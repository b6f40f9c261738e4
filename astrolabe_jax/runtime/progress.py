"""How far a run is and how long it has left: the one progress meter, and the lines that it logs."""

import contextlib
import errno
import functools
import logging
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
from absl import logging as absl_logging

TICK_SECONDS = 10.0  # long work reports this often

# JAX's names of the steps from a function to a program; each is told at its begin and its end.
LAST_STEP = "/jax/core/compile/backend_compile_duration"
STEPS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    LAST_STEP,
)


def log(text: str, file: TextIO | None = None) -> None:
    """Print a line on process 0 alone, to standard output by default.

    It is flushed, so that it appears at once also through a pipe. Where nobody reads it any more, a
    closed pipe or terminal, or where its disk is full, or where it was closed before the program
    began, or by a reward, the program goes on without it.
    """
    stream = file or sys.stdout
    if jax.process_index() != 0 or stream is None or stream.closed:
        return
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):
            # what is still in the buffer would fail again at the end of the program
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn(text: str) -> None:
    """Log a warning. All warnings look like it, see `show_warnings`."""
    log(f"warning: {text}")


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # not by `log`, which asks JAX for its processes: they may not have met yet
        words = record.getMessage().split()
        with contextlib.suppress(OSError):
            print(f"{record.levelname.lower()}:", *words, file=sys.stderr, flush=True)


@functools.cache
def show_warnings() -> None:
    """Let the warnings of libraries, and those of ours that are logged, look like those of `warn`:
    one line each, on standard error.
    """
    root = logging.getLogger()
    absl_logging.use_absl_handler()  # removes those that libraries added when they were imported
    root.removeHandler(absl_logging.get_absl_handler())
    root.addHandler(_Lines())
    warnings.showwarning = lambda message, *_: logging.warning("%s", message)


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Keep Orbax from printing tracebacks of what it raises.

    After an error it stays silenced: its threads go on writing.
    """
    levels = {name: logging.getLogger(name).level for name in ("absl", "asyncio")}
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    yield
    sys.unraisablehook = hook
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


class Compilation:
    """Measures how long this process has compiled, on any thread, and says so while it does.

    There is a line for every TICK_SECONDS of compilation; `compilation` gives the one of a process.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._under_way = 0  # steps; one may be inside of another
        self._since = 0.0  # when the outermost began
        self._before = 0.0  # seconds of those that are over
        self._told = 0.0  # seconds when the last line was logged
        self._timer = threading.Timer(0, lambda: None)
        jax.monitoring.register_scalar_listener(self._begin)
        jax.monitoring.register_event_duration_secs_listener(self._end)

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        with self._lock:
            return self._before + self._lasted()

    def _lasted(self) -> float:
        return time.monotonic() - self._since if self._under_way else 0.0

    def _begin(self, event: str, value: float | int, **kwargs: str | int) -> None:
        if event not in STEPS:
            return
        with self._lock:
            if not self._under_way:
                self._since = time.monotonic()
            self._under_way += 1
            if self._under_way == 1 and event == LAST_STEP:
                wait = max(self._told + TICK_SECONDS - self._before, 0.0)
                self._timer = threading.Timer(wait, self._tell, [kwargs.get("fun_name")])
                self._timer.daemon = True
                self._timer.start()

    def _end(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        # one that began before there was this object has no begin
        with self._lock:
            if event not in STEPS or not self._under_way:
                return
            if self._under_way == 1:
                told_of_it = self._told > self._before
                self._before += self._lasted()
                self._told = self._before if told_of_it else self._told
                self._timer.cancel()
            self._under_way -= 1

    def _tell(self, program: str) -> None:
        self._told = self.seconds
        log(f"  compiling {program}, {clock(self._told)} of compilation so far")


@functools.cache
def compilation() -> Compilation:
    """Return the compilation of this process, which is measured from the first call on."""
    return Compilation()


class Progress:
    """Measures the phases of a run, counts what is done in them, and logs both.

    Attributes:
      seconds: by phase, over the whole run, its earlier pieces included.
      lasted: seconds of the last `within` of each name, compilation left out.
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
        self._compilation = compilation()
        self._compiled_before = 0.0  # seconds of compilation at the last `take`
        self._compiled = 0.0  # and between the last two
        self._stopwatch = _Stopwatch("", 0)  # of `tick`
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
        stopwatch = _Stopwatch(part, 0)
        try:
            yield
        finally:
            self.prefix = ""
            self.lasted[part] = stopwatch.steady_seconds

    def take(self) -> dict[str, float]:
        """Return the seconds by phase since the last call."""
        recent = self._recent
        self._recent = {}
        compiled = self._compilation.seconds
        self._compiled = compiled - self._compiled_before
        self._compiled_before = compiled
        return recent

    def tick(self, what: str, done: int, total: int, unit: str = "") -> None:
        """Log every TICK_SECONDS how much of `what` is done, how fast it goes, and the time left.

        Args:
          what: names the work; a new name begins a new count, as does `done` that does not grow.
          done: items that are finished.
          total: items in all.
          unit: 'frames' or another name of the items, 'bytes', or empty for pieces that have none.
        """
        if self._stopwatch.what != what or done <= self._stopwatch.done:
            self._stopwatch = _Stopwatch(what, done)
        self._tick(self._stopwatch, done, total, unit)

    def counter(self, what: str, total: int, unit: str) -> Callable[[int], None]:
        """Return a function that adds to a count of items, with the lines of `tick`.

        When all are done it logs how long they took, and how fast they were.
        """
        stopwatch = _Stopwatch(what, 0)
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
          record: what metrics.jsonl has about it; its seconds are those of the last `take`.
          count: epochs in all.
          after: the expected seconds of what else is to come until the end.
        """
        epoch = record["epoch"]
        seconds = record["seconds"]
        whole = sum(seconds.values())
        self._epochs.append(max(whole - self._compiled, 0.0))
        left = (count - epoch) * statistics.median(self._epochs[-5:]) + after
        self._logged = time.monotonic()
        rewards = {"total": record["total_reward"]} | rewards_of(record)
        shown = "  ".join(
            f"{name.removeprefix('reward/')} {value:.3f}" for name, value in rewards.items()
        )
        phases = " + ".join(f"{name} {value:.1f}" for name, value in seconds.items())
        compiled = f", {self._compiled:.1f} of them compiling" if self._compiled >= 0.1 else ""
        self._log(
            f"epoch {epoch:{len(str(count))}}/{count}  {shown}  kl {record['kl_div']:.1e}  |  "
            f"{phases} = {whole:.1f} s{compiled}  |  {clock(left)} left"
        )


class _Stopwatch:
    """Measures how fast items are done, when `before` of them are done; compilation is left out."""

    def __init__(self, what: str, before: int):
        self.what = what
        self.done = before  # so far
        self._before = before
        self._start = time.monotonic()
        self._compiled = compilation().seconds

    @property
    def seconds(self) -> float:
        """Seconds since the begin."""
        return time.monotonic() - self._start

    @property
    def steady_seconds(self) -> float:
        """Seconds since the begin, without those of compilation."""
        return max(self.seconds - (compilation().seconds - self._compiled), 0.0)

    def rate(self, done: int) -> float | None:
        """Return items a second; None as long as nothing was done."""
        self.done = done
        seconds = self.steady_seconds
        if seconds == 0 or done <= self._before:
            return None
        return (done - self._before) / seconds

    def summary(self, done: int, unit: str) -> str:
        """Return the line about work that is finished."""
        seconds = self.seconds
        speed = _speed(done / max(seconds, 1e-6), unit)
        compiled = seconds - self.steady_seconds
        steady = self.rate(done)
        if steady is not None and compiled >= 0.1:
            speed += f"; {_speed(steady, unit)} without {clock(compiled)} of compilation"
        return f"{self.what}: {_amount((done,), unit)} in {clock(seconds)}, {speed}"


def _amount(numbers: tuple[int, ...], unit: str) -> str:
    """Return 3/7, 30/70 frames, 1 frame, or 0.30/0.70 GB."""
    if unit == "bytes":
        return "/".join(f"{number / 1e9:.2f}" for number in numbers) + " GB"
    return f"{'/'.join(map(str, numbers))} {unit.removesuffix('s' * (numbers[-1] == 1))}".rstrip()


def _speed(rate: float, unit: str) -> str:
    """Return 2.0 s each, 0.5 frames/s, or 500 MB/s, from a rate in items a second."""
    if unit == "bytes":
        return f"{rate / 1e6:.0f} MB/s"
    if unit:
        return f"{rate:.1f} {unit}/s"
    return f"{1 / rate:.1f} s each"


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return 1 video, 2 videos, or with their own plural 2 processes."""
    return f"{number} {one if number == 1 else many or one + 's'}"


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
