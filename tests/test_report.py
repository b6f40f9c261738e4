"""Figures and files that a run reports: exact statistics, honest clocks, metrics that survive a
kill.
"""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrolabe_jax import report
from astrolabe_jax.config import get_config
from astrolabe_jax.runtime import media
from astrolabe_jax.types import PromptBatch


def evaluation(seed, shift=0.0, n=40):
    values = np.random.default_rng(seed).uniform(0, 1, n) + shift
    return {"shapes_vq": values / 2, "total": values}


def test_interval_is_that_of_the_mean():
    row = report.mean_and_interval(np.array([1.0, 2.0, 3.0, 6.0]))
    assert row == {"mean": 3.0, "ci95": pytest.approx(1.96 * np.sqrt(14 / 3) / 2), "n": 4}


def test_summary_pairs_the_videos_and_measures_the_way_to_the_ceiling(tmp_path):
    before = evaluation(0)
    after = {name: values + 0.3 for name, values in before.items()}
    ceiling = {name: values + 1.0 for name, values in before.items()}
    given = {"before": before, "after": after, "ceiling": ceiling}
    summary = report.write_summary(tmp_path, get_config(), given, {"update": 1.23456})
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["gain"]["total"] == {
        "mean": pytest.approx(0.3),
        "ci95": pytest.approx(0, abs=1e-9),
        "n": 40,
    }
    assert summary["share_of_ceiling"] == pytest.approx(0.3)
    assert summary["eval"]["after"]["shapes_vq"]["mean"] == pytest.approx(
        before["shapes_vq"].mean() + 0.3
    )
    assert "30% of the way to the ceiling" in report.closing(tmp_path, summary)
    without = report.write_summary(tmp_path, get_config(), {"before": before, "after": after}, {})
    assert without["share_of_ceiling"] is None and "ceiling" not in report.closing(
        tmp_path, without
    )


def test_metrics_are_cut_back_to_where_the_run_goes_on(tmp_path):
    metrics = report.Metrics(tmp_path, 0, lambda record: True)
    for epoch in range(1, 5):
        metrics.add({"kind": "epoch", "epoch": epoch, "loss": epoch / 3})
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    # a spoilt line; killed while it wrote the last one
    path.write_bytes(b"\xff\x00\n" + path.read_bytes()[:-9])
    metrics = report.Metrics(tmp_path, 2, lambda record: record["epoch"] <= 2)
    metrics.add({"kind": "epoch", "epoch": 3, "loss": 7.0})
    metrics.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["loss"] for record in records] == [
        1 / 3,
        2 / 3,
        7.0,
    ] and records == metrics.records


def test_a_record_that_was_added_is_on_the_disk(tmp_path, monkeypatch):
    durable, sync = [], os.fsync

    def fsync(file):
        durable.append((os.fstat(file).st_ino, os.fstat(file).st_size))
        sync(file)

    metrics = report.Metrics(tmp_path, 0, lambda record: True)
    monkeypatch.setattr(os, "fsync", fsync)
    for epoch in (1, 2):
        metrics.add({"kind": "epoch", "epoch": epoch, "loss": 0.5})
        written = (tmp_path / "metrics.jsonl").stat()
        assert (written.st_ino, written.st_size) in durable and written.st_size > 40 * epoch
    metrics.close()


def test_metrics_never_hold_nan(tmp_path):
    metrics = report.Metrics(tmp_path, 0, lambda record: True)
    with pytest.raises(ValueError):
        metrics.add({"kind": "epoch", "epoch": 0, "loss": float("nan")})
    metrics.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(report.time, "monotonic", lambda: self.now)


def test_phases_add_up_and_parts_are_told_apart(monkeypatch):
    clock, progress = (
        Clock(monkeypatch),
        report.Progress({"update": 10.0}, lambda: None, lambda text: None),
    )
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

    progress = report.Progress({}, check, lambda text: None)
    with progress.phase("update"):
        asked.append(True)
    with pytest.raises(InterruptedError), progress.phase("rollout"):
        raise AssertionError("the phase must not begin")


def test_long_phases_speak_from_time_to_time(monkeypatch):
    said = []
    clock, progress = Clock(monkeypatch), report.Progress({}, lambda: None, said.append)
    for i in range(1, 101):
        progress.tick("sampling batch", i, 100)
        clock.now += 1
    assert 8 <= len(said) <= 10 and all("1.0 s each" in line for line in said)
    assert "sampling batch 51/100, 1.0 s each, 49 s left" in said[4]


def test_the_line_of_an_epoch_has_rewards_phases_and_the_time_left(monkeypatch):
    said = []
    Clock(monkeypatch)
    progress = report.Progress({}, lambda: None, said.append)
    record = {
        "epoch": 3,
        "reward/shapes_vq": 0.5,
        "kl_div": 2e-4,
        "seconds": {"rollout": 1.0, "update": 3.0},
    }
    progress.epoch(record, 40, after=20.0)
    assert said == [
        "epoch  3/40  shapes_vq 0.500  kl 2.0e-04  |  rollout 1.0 + update 3.0 = 4.0 s  |  2 min "
        "48 s left"
    ]


@given(st.floats(0, 1e6))
def test_clock_reads_back(seconds):
    units = {"s": 1, "min": 60, "h": 3600}
    parts = report.clock(seconds).split()
    value = sum(
        int(number) * units[unit] for number, unit in zip(parts[::2], parts[1::2], strict=True)
    )
    assert abs(value - seconds) <= (0.5 if seconds < 3599 else 60)


def test_counts_are_for_people():
    assert [report.count(n) for n in (12, 1_234, 24_600_000, 1.3e9)] == [
        "12",
        "1.23 k",
        "24.6 M",
        "1.3 B",
    ]


@given(st.sets(st.integers(1, 60)))
def test_spans_name_exactly_the_numbers(numbers):
    text = report.spans(sorted(numbers))
    ends = [[int(end) for end in part.split("-")] for part in text.split(", ") if part]
    assert {n for first, *last in ends for n in range(first, (last or [first])[0] + 1)} == numbers
    assert all(len(end) == 1 or end[0] < end[1] for end in ends)
    assert all(second[0] > first[-1] + 1 for first, second in zip(ends[:-1], ends[1:], strict=True))


def moving(frames=33, size=48):
    video = np.zeros((frames, size, size, 3), np.uint8)
    for t in range(frames):
        video[t, 8:20, t : t + 10] = (255, 0, 0)
    return video


def test_the_same_frames_give_the_same_bytes(tmp_path):
    video, names = (
        np.random.default_rng(0).integers(0, 256, (9, 48, 48, 3), np.uint8),
        [f"{i}.mp4" for i in range(8)],
    )
    for name in names:
        media.write_mp4(tmp_path / name, video, 16)
    assert len({(tmp_path / name).read_bytes() for name in names}) == 1


def test_a_strip_shows_the_first_and_the_last_frame():
    video = moving()
    strip = media.strip(video)
    assert np.array_equal(strip[:, :48], video[0]) and np.array_equal(strip[:, -49:-1], video[-1])
    assert (strip[:, 48] == 255).all() and strip.shape == (48, 7 * 49, 3)
    assert media.strip(video[:2]).shape == (48, 2 * 49, 3)


def test_the_contact_sheet_holds_every_strip_enlarged(tmp_path):
    batch = PromptBatch(("a red square", "another"), np.arange(2), np.zeros(2, int))
    results = {"before": evaluation(0, n=2), "after": evaluation(1, n=2)}
    videos = {
        "before": np.stack([moving(), moving()]),
        "after": np.stack([moving()[::-1], moving() // 2]),
    }
    for heading, frames in videos.items():
        report.write_samples(tmp_path / "samples" / heading, frames, 16)
    sheet = media.read_png(report.write_contact_sheet(tmp_path, "demo", batch, results))
    for heading, frames in videos.items():
        for i, video in enumerate(frames):
            strip = media.strip(video)
            assert np.array_equal(
                media.read_png(tmp_path / "samples" / heading / f"{i:02d}.png"), strip
            )
            large = strip.repeat(2, 0).repeat(2, 1)
            places = [
                (y, x)
                for y in range(0, sheet.shape[0] - large.shape[0])
                for x in (16, 16 + large.shape[1] + 16)
                if np.array_equal(sheet[y : y + large.shape[0], x : x + large.shape[1]], large)
            ]
            assert places, (heading, i)


def test_curves_survive_a_run_without_epochs_and_with_one(tmp_path):
    report.write_curves(tmp_path, [])
    empty = (tmp_path / "curves.png").read_bytes()
    names = (
        "total_reward",
        "total_loss",
        "policy_loss",
        "kl_loss",
        "kl_div",
        "old_deviate",
        "old_kl_div",
    )
    record = {"kind": "epoch", "epoch": 1, "reward/x": 1.0} | dict.fromkeys(names, 0.0)
    report.write_curves(tmp_path, [record])
    assert (tmp_path / "curves.png").read_bytes() != empty
