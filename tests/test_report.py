"""Figures and files that a run reports: exact statistics, a sheet of all strips, curves."""

import json
import re
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrolabe_jax import report
from astrolabe_jax.config import get_config
from astrolabe_jax.runtime import media
from astrolabe_jax.types import PromptBatch
from tests.tiny_base import VAE


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


@pytest.mark.parametrize(
    ("mode", "reached", "told"),
    [
        (
            "progressive",
            6,
            "29, 8 latent frames, of which windows of 3 reach 6: .* 21 on .* 21 or 33",
        ),
        ("progressive", 8, None),
        ("epoch", 6, None),
    ],
)
def test_frames_that_no_window_of_a_progressive_video_reaches_are_told(mode, reached, told):
    config = get_config()
    fields = {"video.frames": 29, "streaming.window": 3, "streaming.mode": mode}
    config.update_from_flattened_dict(fields)
    base = types.SimpleNamespace(vae=types.SimpleNamespace(config=VAE))
    run = types.SimpleNamespace(config=config, latent_shape=(reached, 4, 2, 2), base=base)
    lines = report.warnings(run)
    assert len(lines) == (told is not None)
    if told:
        assert re.search(f"warning: config.video.frames is {told}", lines[0])


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


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_a_contact_sheet_can_be_looked_at_whatever_the_size(columns):
    """Strips of 480x832 are 5,831 pixels wide each."""
    strips = np.full((480, 7 * 833, 3), (200, 30, 90), np.uint8)
    shown = {f"evaluation {i}": [(strips, "shapes_vq 0.50")] * 2 for i in range(columns)}
    sheet = media.contact_sheet("demo", ["a red square", "another"], shown)
    assert 1900 < sheet.width <= 2000
    coloured = (np.asarray(sheet) == (200, 30, 90)).all(-1)
    width = coloured.any(0).sum() / columns
    height = coloured.any(1).sum() / 2
    assert width / height == pytest.approx(7 * 833 / 480, rel=0.02)


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
