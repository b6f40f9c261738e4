"""Killed, stopped, out of disk or damaged at any moment, a run ends in the bits of an undisturbed
one.

And it repeats at most the phase that it was in: what an epoch has sampled is not sampled again, a
saved epoch not run again.
"""

import itertools
import random
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.e2e import runs
from tests.e2e.disks import small_disk
from tests.e2e.runs import finish, launch

# Changes of runs.SMALL. A stream carries its past from one epoch to the next.
CASES = {"short videos": {}, "windows": runs.WINDOWS, "streams": runs.PROGRESSIVE}
SAVING = {"train.save_samples": True, "train.checkpoint_every": 1}
FAULTS = ("kill", "full", "damage", "nearly full", "stop")
SEED = 0


@pytest.fixture(
    scope="module",
    params=[
        "short videos",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("windows", "streams")),
    ],
)
def undisturbed(request, straight, base, tmp_path_factory):
    """Changes of a config, and the config and directory of a whole run with it."""
    changes = CASES[request.param]
    if not changes:
        return changes, *straight[:2]
    config, workdir = (
        runs.small_config(base, **changes),
        tmp_path_factory.mktemp("undisturbed") / "run",
    )
    runs.start(config, workdir)
    return changes, config, workdir


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as found:
        yield found


class Moment(NamedTuple):
    """`fault` comes `delay` seconds after the `line`-th beginning or end of a phase."""

    fault: str
    line: int
    delay: float


def moments(seed: int):
    """Without end; an epoch is about 14 lines and, once compiled, a second."""
    draw = random.Random(seed)
    for fault in itertools.cycle(FAULTS):
        yield Moment(fault, draw.randint(1, 25), draw.uniform(0, 0.3))


class Saved:
    """What a run has saved, by what it told; told to begin it again, it has lost more than it
    may.
    """

    def __init__(self):
        self.sampled, self.finished = set(), set()

    def follow(self, log: Path) -> None:
        lines = (
            [line.split(" ", 2) for line in log.read_text().splitlines()] if log.exists() else []
        )
        for what, epoch, phase in lines:
            assert phase != "rollout" or epoch not in self.sampled, (
                f"epoch {epoch} is sampled again"
            )
            assert "/" in phase or phase == "checkpoint" or epoch not in self.finished, (
                f"epoch {epoch} is run again"
            )
            if what == "end":
                self.sampled |= {epoch} if phase == "save samples" else set()
                self.finished |= {epoch} if phase == "checkpoint" else set()


def damage(workdir: Path, saved: Saved, draw: random.Random) -> None:
    """Cuts off one file of the newest checkpoint, if it is not the only one, or of the samples in
    flight.
    """
    checkpoints = sorted(
        (int(path.name), path) for path in workdir.glob("checkpoints/*") if path.name.isdigit()
    )
    samples = [
        (int(path.name), path)
        for path in workdir.glob("samples_in_flight/*")
        if path.name.isdigit()
    ]
    candidates = samples + (checkpoints[-1:] if len(checkpoints) > 1 else [])
    if candidates:
        epoch, victim = draw.choice(candidates)
        file = draw.choice(
            sorted(path for path in victim.rglob("*") if path.is_file() and path.stat().st_size)
        )
        with open(file, "r+b") as content:
            content.truncate(draw.randrange(file.stat().st_size))
        saved.sampled.clear()
        if victim.parent.name == "checkpoints":
            saved.finished.discard(str(epoch))


def suffer(
    moment: Moment, start, disk, workdir: Path, log: Path, saved: Saved, draw: random.Random
) -> bool:
    """Starts the run and disturbs it; whether it reached its end before."""
    process, fault = start(log), moment.fault
    while process.poll() is None and not (
        log.exists() and log.read_bytes().count(b"\n") >= moment.line
    ):
        time.sleep(0.005)
    time.sleep(moment.delay)
    if fault in ("full", "nearly full"):
        disk.fill(process, 0 if fault == "full" else draw.randrange(300_000))
    elif process.poll() is None:
        process.send_signal(signal.SIGTERM if fault == "stop" else signal.SIGKILL)
    status, out, errors = finish(process)
    assert "Traceback" not in errors, errors
    saved.follow(log)
    ended = status == 0 and "gain" in out
    if fault == "full" and not ended:
        assert status == 1 and one_line(errors, workdir), errors
        again = start("-")  # as long as there is no room
        disk.fill(again)
        status, _, errors = finish(again)
        # 2 before it has begun; what the first one removed may leave room enough to begin
        assert status in (1, 2) and one_line(errors, workdir) and "Traceback" not in errors, errors
    elif fault == "nearly full" and not ended:
        assert status == 1 and one_line(errors, workdir), errors
    elif fault == "stop":
        assert status in (0, -signal.SIGTERM), errors  # before it listens a signal ends it at once
    elif fault in ("kill", "damage"):
        assert ended or status == -signal.SIGKILL, errors
    disk.free()
    if fault == "damage":
        damage(workdir, saved, draw)
    return ended


def one_line(errors: str, workdir: Path) -> bool:
    """Whether the errors are one line that names a file of the run and what to do."""
    told = [line for line in errors.splitlines() if line.startswith("error: ")]
    return (
        len(told) == 1
        and f"error: {workdir}" in told[0]
        and "make room for it, then run the same" in told[0]
    )


def endure(undisturbed, base, environment, disk, tmp_path, wanted, seed) -> list[Moment]:
    """One run through moments of `wanted` until it ends, and the comparison; the moments that it
    took.
    """
    changes, config, whole = undisturbed
    workdir, saved, draw, taken = disk.path / f"run{seed}", Saved(), random.Random(seed), []
    arguments = [*runs.flags(base, **changes, **SAVING), f"--workdir={workdir}"]

    def start(log):
        return launch(environment, arguments, log)

    for i, moment in enumerate(wanted):
        taken.append(moment)
        if suffer(moment, start, disk, workdir, tmp_path / f"log{seed}.{i}", saved, draw):
            break
    log = tmp_path / f"log{seed}.last"
    status, _, errors = finish(start(log))
    assert status == 0, errors
    saved.follow(log)
    runs.assert_same_run(config, whole, workdir)
    return taken


def test_a_full_disk_and_a_kill_leave_no_trace(undisturbed, base, environment, disk, tmp_path):
    """Each a few phases after the start: in a first update, then in an epoch whose samples are
    saved, or later.
    """
    chosen = [Moment("full", 16, 0.0), Moment("damage", 6, 0.1)]
    assert endure(undisturbed, base, environment, disk, tmp_path, chosen, SEED) == chosen


@pytest.mark.slow
def test_twenty_random_faults_leave_no_trace(undisturbed, base, environment, disk, tmp_path):
    wanted, count, seed = moments(SEED), 0, SEED
    while count < 20:
        seed += 1
        count += len(
            endure(
                undisturbed,
                base,
                environment,
                disk,
                tmp_path,
                itertools.islice(wanted, 20 - count),
                seed,
            )
        )
