"""Honest clocks: phases, rates, the time left, and the lines about them."""

import os
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrolabe_jax.runtime import progress as module
from astrolabe_jax.runtime.progress import Progress, log


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_phases_add_up_and_parts_are_told_apart(monkeypatch):
    clock = Clock(monkeypatch)
    progress = Progress({"update": 10.0}, lambda: None, lambda text: None)
    with progress.phase("update"):
        clock.now += 2
    with progress.within("evaluation"), progress.phase("rollout"):
        clock.now += 3
    with progress.phase("rollout"):
        clock.now += 1
    assert progress.seconds == {"update": 12.0, "evaluation/rollout": 3.0, "rollout": 1.0}
    assert (
        progress.take() == {"update": 2.0, "evaluation/rollout": 3.0, "rollout": 1.0}
        and progress.take() == {}
    )
    assert progress.lasted == {"evaluation": 3.0}


def test_a_run_can_be_ended_before_a_phase_but_not_inside():
    asked = []

    def check():
        if asked:
            raise InterruptedError

    progress = Progress({}, check, lambda text: None)
    with progress.phase("update"):
        asked.append(True)
    with pytest.raises(InterruptedError), progress.phase("rollout"):
        raise AssertionError("the phase must not begin")


def test_long_phases_speak_from_time_to_time(monkeypatch):
    lines = []
    clock = Clock(monkeypatch)
    progress = Progress({}, lambda: None, lines.append)
    for i in range(1, 101):
        progress.tick("sampling batch", i, 100)
        clock.now += 1
    assert 8 <= len(lines) <= 10 and all("1.0 s each" in line for line in lines)
    assert "sampling batch 51/100, 1.0 s each, 49 s left" in lines[4]


def test_the_first_item_which_compiles_is_not_in_the_rate(monkeypatch):
    lines = []
    clock = Clock(monkeypatch)
    progress = Progress({}, lambda: None, lines.append)
    add = progress.counter("2 videos", 100, "frames")
    for seconds, frames in ((60, 10), (12, 30), (4, 20), (16, 40)):
        clock.now += seconds
        add(frames)
    assert lines == [
        "  2 videos 40/100 frames, 2.5 frames/s, 24 s left",
        "2 videos: 100 frames in 1 min 32 s, 1.1 frames/s; 2.8 frames/s after the first",
    ]


def test_bytes_are_counted_in_larger_units(monkeypatch):
    lines = []
    clock = Clock(monkeypatch)
    progress = Progress(log=lines.append)
    add = progress.counter("vae", 3_000_000_000, "bytes")
    for _ in range(3):
        clock.now += 10
        add(1_000_000_000)
    assert lines == [
        "  vae 2.00/3.00 GB, 100 MB/s, 10 s left",
        "vae: 3.00 GB in 30 s, 100 MB/s; 100 MB/s after the first",
    ]
    progress.counter("text", 5, "bytes")(5)  # in no time, in one piece
    assert lines[-1].startswith("text: 0.00 GB in 0 s, ")


def test_a_count_can_be_ended_behind_each_item():
    def check():
        raise InterruptedError

    add = Progress({}, check, lambda text: None).counter("2 videos", 100, "frames")
    with pytest.raises(InterruptedError):
        add(3)


def test_lines_go_where_they_are_asked_to_go(capsys):
    log("one")
    log("two", sys.stderr)
    assert capsys.readouterr() == ("one\n", "two\n")


def test_a_program_outlives_whoever_reads_its_lines():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        log("one", closed)
        log("two", closed)
    # whatever was buffered has not failed at the end


def test_sizes_on_the_disk_are_logged_once(tmp_path):
    lines = []
    progress = Progress({}, lambda: None, lines.append)
    for _ in range(2):
        progress.takes("a checkpoint", 3 * 2**20, tmp_path)
    assert lines == [f"  a checkpoint takes 3.0 MiB in {tmp_path}"]


def test_the_line_of_an_epoch_has_rewards_phases_and_the_time_left(monkeypatch):
    lines = []
    Clock(monkeypatch)
    progress = Progress({}, lambda: None, lines.append)
    record = {
        "epoch": 3,
        "reward/shapes_vq": 0.5,
        "kl_div": 2e-4,
        "seconds": {"rollout": 1.0, "update": 3.0},
    }
    progress.epoch(record, 40, after=20.0)
    assert lines == [
        "epoch  3/40  shapes_vq 0.500  kl 2.0e-04  |  rollout 1.0 + update 3.0 = 4.0 s  |  2 min "
        "48 s left"
    ]


@given(st.floats(0, 1e6))
def test_clock_reads_back(seconds):
    units = {"s": 1, "min": 60, "h": 3600}
    parts = module.clock(seconds).split()
    value = sum(
        int(number) * units[unit] for number, unit in zip(parts[::2], parts[1::2], strict=True)
    )
    assert abs(value - seconds) <= (0.5 if seconds < 3599 else 60)
