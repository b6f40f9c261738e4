"""A reward with weights in the mix: a tiny random HPSv3 beside the rewards of the world, in whole
runs.
"""

import ast
import csv
import subprocess
import sys
import types

import numpy as np
import pytest

from astrolabe_jax import train
from astrolabe_jax.rewards import __main__ as self_check
from astrolabe_jax.rewards import convert as convert_rewards
from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.rewards.qwen2_vl import hpsv3
from astrolabe_jax.rewards.qwen2_vl.weights import HPSV3
from astrolabe_jax.run import prepare
from astrolabe_jax.runtime import files
from astrolabe_jax.runtime.metrics import Metrics
from tests.e2e import runs
from tests.e2e.runs import finish, launch
from tests.e2e.test_processes import assert_close, both, environment_of
from tests.rewards.qwen2_vl import published

SHORT = {"train.epochs": 2, "train.checkpoint_every": 1}
OPTIONS = {"frame_stride": 4, "frames_per_batch": 1, "dtype": "float32"}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A reward directory, made of files in the published layout."""
    place = tmp_path_factory.mktemp("hpsv3")
    with pytest.MonkeyPatch.context() as monkeypatch:
        published.stand_in(monkeypatch)
        return convert_rewards.convert(
            HPSV3.name, published.write(place / "given", HPSV3.name), place / "reward"
        )


def config(base, directory, **changes):
    made = runs.small_config(base, **(SHORT | changes))
    with made.unlocked():
        made.rewards.hpsv3 = {"weight": 0.5, "path": str(directory), **OPTIONS}
    return made


@pytest.fixture(scope="module")
def whole(base, directory, tmp_path_factory, compiled_once):
    """An undisturbed run that does one thing after the other."""
    made, workdir = (
        config(base, directory, **{"scoring.overlap": "none"}),
        tmp_path_factory.mktemp("whole") / "run",
    )
    runs.start(made, workdir)
    return made, workdir


def test_it_is_one_of_the_rewards(whole):
    made, workdir = whole
    outcome = runs.outcome(workdir)
    assert {"hpsv3", "shapes_vq", "total"} <= outcome["eval"]["after"].keys()
    epochs = [record for record in outcome["metrics"] if record["kind"] == "epoch"]
    assert len({record["reward/hpsv3"] for record in epochs}) == len(epochs) == 2
    assert all(np.isfinite(record["part/hpsv3/uncertainty"]) for record in epochs)


def test_every_sample_has_its_scores_raw_and_standardised(whole):
    made, workdir = whole
    for epoch in (1, 2):
        with open(workdir / "scores" / f"{epoch:06}.csv") as file:
            rows = list(csv.DictReader(file))
        table = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
        assert (
            len(rows) == 8
            and {"prompt", "candidate", "hpsv3", "hpsv3/z", "shapes_vq"} <= table.keys()
        )
        total = 0.5 * table["hpsv3"] + sum(table[f"shapes_{part}"] for part in ("vq", "mq", "ta"))
        np.testing.assert_allclose(table["total"], total, rtol=1e-6)
        np.testing.assert_allclose(
            [table["hpsv3/z"].mean(), table["hpsv3/z"].std()], [0, 1], atol=0.05
        )
        groups = [
            table["advantage"][table["prompt"] == prompt] for prompt in np.unique(table["prompt"])
        ]
        np.testing.assert_allclose([group.mean() for group in groups], 0, atol=1e-9)


@SLOW
@pytest.mark.parametrize(("overlap", "weights"), [("all", "device"), ("host", "host")])
def test_neither_overlap_nor_where_weights_are_change_a_run(
    whole, base, directory, tmp_path, overlap, weights
):
    """Batches of four, so that there is something to overlap with, and a stop in between."""
    made, workdir = whole
    changes = {
        "prompts.encoder": weights,
        "scoring.overlap": overlap,
        "scoring.weights": weights,
        "mesh.samples_per_device": 4,
    }
    runs.start(config(base, directory, **changes, **{"train.epochs": 1}), tmp_path / "run")
    runs.start(config(base, directory, **changes), tmp_path / "run")
    runs.assert_same_run(made, workdir, tmp_path / "run")


@pytest.mark.parametrize("overlap", [pytest.param("none", marks=SLOW), "all"])
def test_a_scorer_that_fails_on_its_third_call_loses_nothing(
    whole, base, directory, tmp_path, monkeypatch, overlap
):
    """The evaluation before, the first epoch, the second: which is repeated from the start or its
    last checkpoint.
    """
    made, workdir = whole
    score, calls = rewards.score, []

    def failing(loaded, *given):
        if loaded.names == ("hpsv3",):
            calls.append(None)
            if len(calls) == 3:
                raise rewards.RewardError("reward 'hpsv3' failed on samples 0 to 7: out of memory")
        return score(loaded, *given)

    monkeypatch.setattr(rewards, "score", failing)
    with pytest.raises(
        train.REFUSED, match="'hpsv3' failed on samples 0 to 7: .*nothing was learnt from these"
    ):
        runs.start(config(base, directory, **{"scoring.overlap": overlap}), tmp_path / "run")
    assert len(calls) == 3
    assert runs.resumed(prepare(config(base, directory), tmp_path / "run")).epoch == 1
    runs.start(config(base, directory, **{"scoring.overlap": overlap}), tmp_path / "run")
    runs.assert_same_run(made, workdir, tmp_path / "run")


def test_a_reward_that_is_away_loses_no_epoch(straight, base, tmp_path, monkeypatch, capsys):
    """No checkpoint is due, but the state before the epoch is whole, and saved. Nor is an epoch
    counted whose record could not be written.
    """
    whole, workdir, _ = straight
    score, calls = rewards.score, []
    changes = {"train.checkpoint_every": whole.train.epochs}

    def failing(*given):
        calls.append(None)
        if len(calls) in (5, 8):  # the evaluation before, and an epoch each; the last evaluation
            raise rewards.RewardError("reward 'shapes_vq' failed on sample 3: no route to host")
        return score(*given)

    monkeypatch.setattr(rewards, "score", failing)
    with pytest.raises(train.REFUSED, match="no route to host"):
        runs.start(runs.small_config(base, **changes), tmp_path / "run")
    assert "saved after epoch 3 of 4; run the same command to go on" in capsys.readouterr().out
    assert runs.resumed(prepare(runs.small_config(base, **changes), tmp_path / "run")).epoch == 3

    def full(self, record):
        raise files.WriteError(tmp_path / "run" / "metrics.jsonl", "no space left")

    with monkeypatch.context() as patched, pytest.raises(files.WriteError):
        patched.setattr(Metrics, "add", full)
        runs.start(runs.small_config(base, **changes), tmp_path / "run")
    assert runs.resumed(prepare(runs.small_config(base, **changes), tmp_path / "run")).epoch == 3
    with pytest.raises(train.REFUSED, match="no route to host"):
        runs.start(runs.small_config(base, **changes), tmp_path / "run")
    assert "saved after epoch 4 of 4; run the same command to go on" in capsys.readouterr().out
    runs.start(runs.small_config(base, **changes), tmp_path / "run")
    runs.assert_same_run(whole, workdir, tmp_path / "run")


def test_a_run_does_not_go_on_with_other_weights(whole, base, directory, tmp_path, monkeypatch):
    made, workdir = whole
    other = tmp_path / "reward"
    with pytest.MonkeyPatch.context() as stand_in:
        published.stand_in(stand_in)
        given = published.write(tmp_path / "given", HPSV3.name)
        convert_rewards.convert(HPSV3.name, given._replace(dtype="bfloat16"), other)
    changed = config(base, other)
    with pytest.raises(ValueError, match="reward.hpsv3: '[0-9a-f]{64}' there, '[0-9a-f]{64}' now"):
        prepare(changed, workdir)
    moved = tmp_path / "moved"
    moved.symlink_to(directory)
    assert prepare(config(base, moved), workdir).fingerprint["reward.hpsv3"]


def test_the_program_takes_it_with_options_and_refuses_what_is_not_there(
    base, tmp_path, environment
):
    arguments = [
        *runs.flags(base),
        "--config.rewards.hpsv3={'weight': 1.0, 'path': 'nowhere'}",
        f"--workdir={tmp_path}",
    ]
    status, _, errors = finish(launch(environment, arguments))
    assert (
        status == 2
        and "error: config.rewards.hpsv3: no nowhere" in errors
        and "convert reward hpsv3" in errors
    )


SHAPES = {"shapes_vq": 1.0, "shapes_mq": 1.0, "shapes_ta": 1.0}


@pytest.mark.parametrize(
    ("flags", "outcome"),
    [
        (
            ["hpsv3.path=here", "hpsv3.dtype=float32"],
            {"hpsv3": {"path": "here", "dtype": "float32"}},
        ),
        (["shapes_vq=0", "shapes_mq=2"], {"shapes_vq": None, "shapes_mq": 2.0}),
        (["shapes_vq.weight=0"], {"shapes_vq": {"weight": 0.0}}),
        (
            ["shapes_vqq=0"],
            "config.rewards.shapes_vqq=0 takes a reward out that the recipe has not",
        ),
        (["mine.load=a:b", "mine.weight=2"], {"mine": {"load": "a:b", "weight": 2}}),
    ],
)
def test_flags_add_take_out_and_watch_rewards(flags, outcome, environment):
    program = (
        "import sys, absl.flags; from astrolabe_jax.runtime import cli; recipe = cli.define(); "
        "cli.parse(sys.argv); print(recipe.value.rewards.to_dict())"
    )
    given = [f"--config.rewards.{flag}" for flag in flags]
    done = subprocess.run(
        [sys.executable, "-c", program, "--config=configs/moving_shapes.py", *given],
        cwd=runs.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if isinstance(outcome, str):
        assert done.returncode == 2 and outcome in done.stderr and done.stderr.count("\n") == 1
    else:
        expected = {name: value for name, value in (SHAPES | outcome).items() if value is not None}
        assert ast.literal_eval(done.stdout) == expected, done.stderr


@SLOW
def test_two_processes_score_as_one(base, directory, tmp_path, environment):
    """With the reward's weights split over the devices of both. It is a steep function of bytes,
    which may differ.
    """
    changes = SHORT | {"mesh.fsdp": 4}
    arguments = [
        *runs.flags(base, **changes),
        f"--config.rewards.hpsv3={ {'weight': 0.5, 'path': str(directory)} | OPTIONS }",
    ]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert (
        finish(launch(environment_of(environment, 4), [*arguments, f"--workdir={alone}"]))[0] == 0
    )
    ends = [finish(process) for process in both(environment, [*arguments, f"--workdir={together}"])]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert_close(config(base, directory, **changes), alone, together, tolerance=1e-3)


def test_the_self_check_scores_a_video_and_compares(directory, base, tmp_path, capsys, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    monkeypatch.setattr(self_check.media, "read_video", lambda path, fps, size: pixels)
    monkeypatch.setenv("HOME", str(directory.parent))
    holders = {
        "config": config(base, f"~/{directory.name}"),
        "video": "a.mp4",
        "prompt": "a red circle moving left on a blue background",
        "golden": str(tmp_path / "golden.json"),
        "record": True,
        "tolerance": 1e-3,
    }

    def run(**changed):
        given = {
            name: types.SimpleNamespace(value=value) for name, value in (holders | changed).items()
        }
        self_check.main(given)
        return capsys.readouterr().out

    told = run()
    assert (
        "5 frames of 16x16 at 16 a second" in told
        and "hpsv3/uncertainty" in told
        and "recorded 4 scores" in told
    )
    assert "agrees with the recorded" in run(record=False)
    with pytest.raises(SystemExit) as error:  # nothing is compared
        run(record=False, prompt="a red circle moving right on a blue background")
    assert error.value.code == 1
    assert "has no score of these weights, frames and prompt" in capsys.readouterr().out
    slow = config(base, directory)
    slow.video.fps = 0
    with pytest.raises(SystemExit):
        run(config=slow)
    assert "config.video.fps is 0; expected at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(golden="")
    assert "--record takes --golden, the file to record in" in capsys.readouterr().err
    monkeypatch.setattr(hpsv3, "top_mean", lambda scores: scores.max(axis=1) + 1)
    with pytest.raises(SystemExit) as error:
        run(record=False)
    assert error.value.code == 1 and "DIFFERS from" in capsys.readouterr().out

    def full(*_):
        raise MemoryError("RESOURCE_EXHAUSTED: 9 GiB")

    monkeypatch.setattr(hpsv3, "top_mean", full)
    with pytest.raises(SystemExit) as error:
        run(record=False)
    told = capsys.readouterr().err
    assert error.value.code == 1 and told.startswith("error: out of memory: ")
    assert "in MiB and besides activations, rewards " in told
