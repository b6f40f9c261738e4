"""Figures of a run survive a kill, and are never in doubt."""

import json
import os

import pytest

from astrolabe_jax.runtime.metrics import Metrics


def test_metrics_are_cut_back_to_where_the_run_goes_on(tmp_path):
    metrics = Metrics(tmp_path, 0, lambda record: True)
    for epoch in range(1, 5):
        metrics.add({"kind": "epoch", "epoch": epoch, "loss": epoch / 3})
    metrics.close()
    path = tmp_path / "metrics.jsonl"
    spoilt = [
        b"\xff\x00",
        b'{"kind": "epoch", "epoch": ' + b"[" * 100_000,
        b'{"kind": "epoch", "epoch": "1", "loss": 0.5}',
        b'{"kind": "epoch", "epoch": 1, "loss": NaN}',
        b'{"epoch": 1}',
    ]
    # killed while it wrote the last one
    path.write_bytes(b"\n".join([*spoilt, path.read_bytes()[:-9]]))
    metrics = Metrics(tmp_path, 2, lambda record: record["epoch"] <= 2)
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

    metrics = Metrics(tmp_path, 0, lambda record: True)
    monkeypatch.setattr(os, "fsync", fsync)
    for epoch in (1, 2):
        metrics.add({"kind": "epoch", "epoch": epoch, "loss": 0.5})
        written = (tmp_path / "metrics.jsonl").stat()
        assert (written.st_ino, written.st_size) in durable and written.st_size > 40 * epoch
    metrics.close()


def test_metrics_never_hold_nan(tmp_path):
    metrics = Metrics(tmp_path, 0, lambda record: True)
    with pytest.raises(ValueError):
        metrics.add({"kind": "epoch", "epoch": 0, "loss": float("nan")})
    metrics.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
