"""Small real runs: the tiny random base, two prompts, sixteen pixels, a second or two per epoch
once compiled.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from astrolabe_jax import sharding, train
from astrolabe_jax.run import Run, prepare
from astrolabe_jax.runtime import preemption
from astrolabe_jax.runtime.progress import Progress
from configs import moving_shapes
from tests.meshes import mesh_of

ROOT = Path(__file__).parents[2]

# Two prompts with four videos each: 8 videos, which 1, 2, 4 and 8 devices divide.
SMALL = {
    "model.block": 1,
    "video.frames": 5,
    "video.height": 16,
    "video.width": 16,
    "sampler.steps": (1000, 500),
    "sampler.batch": 8,
    "prompts.prompts_per_epoch": 2,
    "prompts.samples_per_prompt": 4,
    "lora.rank": 2,
    "lora.alpha": 2.0,
    "optimizer.learning_rate": 1e-2,
    "optimizer.inner_epochs": 1,
    "optimizer.steps_per_pass": 1,
    "optimizer.microbatch": 8,
    "train.epochs": 4,
    "train.checkpoint_every": 2,
    "eval.videos": 8,
    "eval.shown": 2,
    "eval.ceiling": False,
}
# Windows of two latent frames out of six; from frame 3 on, a block does not see all before it.
WINDOWS = {
    "video.frames": 21,
    "eval.frames": 13,
    "model.window": 3,
    "model.sink": 1,
    "model.positions": "relative",
    "streaming.window": 2,
}
PROGRESSIVE = WINDOWS | {"streaming.mode": "progressive", "streaming.save": "full"}


def small_config(base: Path | str, variant: str = "", **changes):
    """The demo's config at the size of SMALL, with `changes` as {field: value}."""
    config = moving_shapes.get_config(variant)
    config.update_from_flattened_dict({**SMALL, "base": str(base), **changes})
    return config


def flags(base: Path, **changes) -> list[str]:
    """The command line of the same run."""
    values = SMALL | {"base": str(base)} | changes
    return [
        "--config=configs/moving_shapes.py",
        *(f"--config.{field}={value}" for field, value in values.items()),
    ]


def quiet() -> Progress:
    """Progress that says nothing, and never ends a run."""
    return Progress({}, lambda: None, lambda line: None)


def prepared(config, workdir: Path, devices: int = 1) -> Run:
    """Return the run of a config on some of the devices of this process."""
    mesh = mesh_of(devices=jax.devices()[:devices])
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        monkeypatch.setattr(sharding, "make_mesh", lambda config: mesh)
        return prepare(config, workdir)


def go_on(run: Run, check: Callable[[], None]) -> dict | None:
    """Train from the last checkpoint on: return the summary, or None if the run was stopped."""
    with jax.set_mesh(run.mesh):
        return train.train(run, train.resume(run), check)


def start(config, workdir: Path) -> dict | None:
    """Train in this process, as main does it: return the summary, or None if it was stopped."""
    run = prepare(config, workdir)
    with preemption.listening() as check:
        return go_on(run, check)


def resumed(run: Run) -> train.RunState:
    """Return the state of the last checkpoint."""
    with jax.set_mesh(run.mesh):
        return train.resume(run)


def launch(environment, arguments, where="-", **options) -> subprocess.Popen:
    """The program in a process of its own; `where` as in child.py."""
    command = [sys.executable, "-m", "tests.e2e.child", str(where), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes, **options)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Its status, output and errors at its end."""
    out, errors = process.communicate(timeout=300)
    return process.returncode, out, errors


def outcome(workdir: Path) -> dict:
    """All that must not depend on how a run was cut into pieces: files as bytes, metrics and
    summary without clocks.
    """
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((workdir / "summary.json").read_text())
    return {
        "metrics": [
            {key: value for key, value in record.items() if key != "seconds"} for record in records
        ],
        "eval": summary["eval"],
        "gain": summary["gain"],
        "share": summary["share_of_ceiling"],
        "files": outcome_files(workdir),
    }


def outcome_files(workdir: Path) -> dict[str, bytes]:
    """Return the files that are for people, by name."""
    places = ("samples/**/*.*", "lora/*", "scores/*")
    paths = sorted(path for place in places for path in workdir.glob(place))
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths}


def assert_same_run(config, one: Path, other: Path) -> None:
    """Equal outcomes and equal last checkpoints, bit for bit."""
    first, second = outcome(one), outcome(other)
    for key in first:
        assert first[key] == second[key], key
    points = [resumed(prepare(config, workdir)) for workdir in (one, other)]
    assert points[0].epoch == points[1].epoch == config.train.epochs
    assert points[0].risk == points[1].risk
    assert points[0].reset == points[1].reset
    leaves = [jax.tree.leaves((point.train, point.streams)) for point in points]
    assert len(leaves[0]) > 40
    for a, b in zip(*leaves, strict=True):
        assert a.dtype == b.dtype and np.array_equal(np.asarray(a), np.asarray(b))
