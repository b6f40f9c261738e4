"""Honest clocks: phases, rates, the time left, and the lines about them."""

import os
import sys
import threading
import time

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrolabe_jax.runtime import progress as module
from astrolabe_jax.runtime.progress import Progress, log


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def compiles(self, seconds, steps=1):
        """Let this time pass while JAX makes a program, in `steps` that are within each other."""
        for _ in range(steps):
            jax.monitoring.record_scalar(module.LAST_STEP, 0.0, fun_name="f")
        self.now += seconds
        for _ in range(steps):
            jax.monitoring.record_event_duration_secs(module.LAST_STEP, seconds, fun_name="f")


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


def test_a_count_that_begins_again_is_measured_anew(monkeypatch):
    """As where an epoch is done again under the same name: no division by zero, no false rate."""
    lines = []
    clock = Clock(monkeypatch)
    progress = Progress({}, lambda: None, lines.append)
    for pause in (5, 20):
        for done in (2, 2, 4, 6):
            clock.now += pause
            progress.tick("epoch 1: sampling", done, 8)
    assert lines == [
        "  epoch 1: sampling 4/8, 2.5 s each, 10 s left",
        "  epoch 1: sampling 4/8, 10.0 s each, 40 s left",
        "  epoch 1: sampling 6/8, 10.0 s each, 20 s left",
    ]


def test_compilation_is_not_in_the_rate_whenever_it_comes(monkeypatch):
    lines = []
    clock = Clock(monkeypatch)
    progress = Progress({}, lambda: None, lines.append)
    add = progress.counter("2 videos", 100, "frames")
    for compiling, seconds, frames in ((60, 4, 10), (0, 12, 30), (30, 4, 20), (0, 16, 40)):
        clock.compiles(compiling, steps=2)
        clock.now += seconds
        add(frames)
    assert lines == [
        "  2 videos 10/100 frames, 2.5 frames/s, 36 s left",
        "  2 videos 40/100 frames, 2.5 frames/s, 24 s left",
        "  2 videos 60/100 frames, 3.0 frames/s, 13 s left",
        "2 videos: 100 frames in 2 min 06 s, 0.8 frames/s; 2.8 frames/s without 1 min 30 s of "
        "compilation",
    ]


def test_compilation_is_measured_as_jax_tells_of_it():
    compilation = module.compilation()
    before = compilation.seconds
    began = time.monotonic()
    jax.jit(lambda x: jax.jit(lambda y: y + 1.25)(x) * 3.5)(1.0)
    assert 0 < compilation.seconds - before <= time.monotonic() - began + 0.01
    before = compilation.seconds
    time.sleep(0.01)
    assert compilation.seconds == before and compilation is module.compilation()


def test_it_is_said_while_a_program_is_compiled(monkeypatch):
    said = threading.Event()
    lines = []
    monkeypatch.setattr(module, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(module, "log", lambda line: (lines.append(line), said.set()))
    module.compilation()
    jax.monitoring.record_scalar(module.LAST_STEP, 0.0, fun_name="jit(rollout)")
    said.wait(10)
    jax.monitoring.record_event_duration_secs(module.LAST_STEP, 0.0, fun_name="jit(rollout)")
    assert lines[0].startswith("  compiling jit(rollout), ") and "of compilation so far" in lines[0]


def test_an_evaluation_lasts_as_long_as_the_next_one_will(monkeypatch):
    clock = Clock(monkeypatch)
    progress = Progress({}, lambda: None, lambda text: None)
    with progress.within("evaluation"), progress.phase("rollout"):
        clock.compiles(50)
        clock.now += 3
    assert progress.lasted == {"evaluation": 3.0} and progress.seconds["evaluation/rollout"] == 53


def test_bytes_are_counted_in_larger_units(monkeypatch):
    lines = []
    clock = Clock(monkeypatch)
    progress = Progress(log=lines.append)
    add = progress.counter("vae", 3_000_000_000, "bytes")
    for _ in range(3):
        clock.now += 10
        add(1_000_000_000)
    assert lines == [
        "  vae 1.00/3.00 GB, 100 MB/s, 20 s left",
        "  vae 2.00/3.00 GB, 100 MB/s, 10 s left",
        "vae: 3.00 GB in 30 s, 100 MB/s",
    ]
    progress.counter("text", 5, "bytes")(5)  # in no time, in one piece
    assert lines[-1].startswith("text: 0.00 GB in 0 s, ")


@pytest.mark.parametrize(
    ("number", "words", "expected"),
    [
        (0, ("video",), "0 videos"),
        (1, ("video",), "1 video"),
        (2, ("video",), "2 videos"),
        (1, ("process", "processes"), "1 process"),
        (2, ("process", "processes"), "2 processes"),
    ],
)
def test_one_is_no_plural(number, words, expected):
    assert module.counted(number, *words) == expected


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


def test_a_program_outlives_a_reward_that_closes_its_output(monkeypatch):
    with open(os.devnull, "w") as closed:
        pass
    monkeypatch.setattr(sys, "stdout", closed)
    log("nobody reads this")
    monkeypatch.setattr(sys, "stdout", None)  # closed before the program began
    log("nor this")


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


def test_the_line_of_an_epoch_has_total_rewards_phases_and_the_time_left(monkeypatch):
    """The first epoch compiles for 30 of its 34 seconds, the second takes 4."""
    lines = []
    clock = Clock(monkeypatch)
    progress = Progress({}, lambda: None, lines.append)
    progress.take()
    for epoch in (1, 2):
        with progress.phase("rollout"):
            clock.compiles(30 if epoch == 1 else 0)
            clock.now += 1
        with progress.phase("update"):
            clock.now += 3
        record = {
            "epoch": epoch,
            "total_reward": 0.25,
            "reward/shapes_vq": 0.5,
            "kl_div": 2e-4,
            "seconds": progress.take(),
        }
        progress.epoch(record, 40, after=20.0)
    assert lines == [
        "epoch  1/40  total 0.250  shapes_vq 0.500  kl 2.0e-04  |  rollout 31.0 + update 3.0 = "
        "34.0 s, 30.0 of them compiling  |  2 min 56 s left",
        "epoch  2/40  total 0.250  shapes_vq 0.500  kl 2.0e-04  |  rollout 1.0 + update 3.0 = "
        "4.0 s  |  2 min 52 s left",
    ]


@given(st.floats(0, 1e6))
def test_clock_reads_back(seconds):
    units = {"s": 1, "min": 60, "h": 3600}
    parts = module.clock(seconds).split()
    value = sum(
        int(number) * units[unit] for number, unit in zip(parts[::2], parts[1::2], strict=True)
    )
    assert abs(value - seconds) <= (0.5 if seconds < 3599 else 60)
