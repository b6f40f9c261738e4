"""The program as a user starts it: killed anywhere it goes on, and every mistake is one clear
line.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from astrolabe_jax import checkpoint
from astrolabe_jax.run import prepare
from tests.e2e import runs
from tests.e2e.runs import finish, launch
from tests.tiny_base import write_tiny_base


def kill_while_saving(process, checkpoints: Path) -> None:
    """SIGKILL as soon as an unfinished checkpoint lies on the disk."""
    while process.poll() is None and not list(checkpoints.glob("*tmp*")):
        time.sleep(0.001)
    process.kill()


@pytest.mark.slow
def test_killed_at_every_stage_it_ends_as_if_it_had_not_been(straight, base, tmp_path, environment):
    """SIGKILL in a rollout, an update and a save, SIGTERM before the last epoch; then to the
    end.
    """
    config, whole, _ = straight
    workdir = tmp_path / "run"
    arguments = [*runs.flags(base), f"--workdir={workdir}"]
    for where in (
        "SIGKILL:astrolabe_jax.streaming.windows.decode_video:3",
        "SIGKILL:astrolabe_jax.train.blend_old:1",
    ):
        status, _, errors = finish(launch(environment, arguments, where))
        assert status == -signal.SIGKILL, errors
    process = launch(environment, arguments)
    kill_while_saving(process, workdir / "checkpoints")
    assert finish(process)[0] == -signal.SIGKILL
    status, out, errors = finish(
        launch(environment, arguments, "SIGTERM:astrolabe_jax.train.blend_old:3")
    )
    assert status == 0, errors
    assert "SIGTERM: saved after epoch 3 of 4; run the same command to go on" in out
    status, out, errors = finish(launch(environment, arguments))
    assert status == 0, errors
    assert "going on after epoch 3 of 4" in out and str(workdir / "summary.json") in out
    runs.assert_same_run(config, whole, workdir)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--config.optimizer.learnig_rate=1"],
            "unknown config field optimizer.learnig_rate: did you mean "
            "config.optimizer.learning_rate?",
        ),
        (
            ["--config.optimiser.learning_rate=1"],
            "config.optimiser.learning_rate is now config.optimizer.learning_rate",
        ),
        (
            ["--config.prompts.groups", "3"],
            "config.prompts.groups is now config.prompts.prompts_per_epoch",
        ),
        (["--config.seed=abc"], "error: config.seed is abc; expected a whole number"),
        (
            ["--config.rewards.beauty=1"],
            (
                "config.rewards.beauty: unknown reward; expected one of aesthetic, bounce_mq, "
                "bounce_ta"
            ),
        ),
        (
            ["--config=docs/api.md"],
            "docs/api.md has no get_config; expected a recipe, a Python file",
        ),
        (["--config=configs/nowhere.py"], "no recipe configs/nowhere.py; there are configs/"),
        (
            ["--config=configs/moving_shapes.py:refrence"],
            "unknown variant 'refrence' of configs/moving_shapes.py",
        ),
        (["--wrkdir=x"], "wrkdir"),
        (
            ["--distributed"],
            (
                "--distributed: no cluster was found (coordinator_address should be defined.); "
                "start every"
            ),
        ),
        (["--process=1"], "--coordinator, --processes missing; several processes take"),
        (["surplus"], "unexpected argument 'surplus'; flags start with --"),
        (["--config.scoring.timeout=nan"], "config.scoring.timeout is nan; expected a positive"),
        (["--config.prompts.train=docs"], "prompt file docs is no file; give a text file"),
        (["--config.prompts.train=no/such.txt"], "prompt file no/such.txt does not exist"),
        (["--workdir="], "error: --workdir is empty; expected: directory of the run"),
        (["--config.prompts.train="], "config.prompts.train is empty; expected a text file"),
        (
            ["--workdir=/proc/no", "--check"],
            "workdir /proc/no cannot be written (/proc takes no files): ",
        ),
        (
            ["--workdir=gs://bucket/run"],
            "error: workdir: gs://bucket/run: gs:// is not supported; expected a directory of a",
        ),
        (
            ["--coordinator=127.0.0.1:9", "--processes=2", "--process=1", "--join_timeout=1"],
            "not reached process 0 at --coordinator=127.0.0.1:9 within 1 s (Connection refused)",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_clear_message(
    base, tmp_path, environment, arguments, expected
):
    every = [*runs.flags(base), f"--workdir={tmp_path / 'run'}", *arguments]
    status, _, errors = finish(launch(environment, every))
    assert status == 2 and "Traceback" not in errors
    message = errors[errors.index("error:") :]
    assert expected in message and len(message.splitlines()) < 8
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "get_config().seed = (1,)\n",
            ": config.seed is (1,), of type tuple; expected a whole number",
        ),
        ("", "does not know 'gadro'; expected hpsv3, "),
        (
            "get_config().prompts.groups = 3\n",
            "config.prompts.groups is now config.prompts.prompts_per_epoch",
        ),
    ],
)
def test_a_recipe_is_read_wherever_the_program_is_started(tmp_path, environment, line, expected):
    """Its neighbours are found, which no other directory has; so is what is wrong with it."""
    configs = tmp_path / "clone" / "configs"
    configs.mkdir(parents=True)
    shutil.copy(runs.ROOT / "configs" / "published.py", configs / "neighbour.py")
    recipe = (runs.ROOT / "configs" / "longlive.py").read_text()
    recipe = recipe.replace("from configs.published", "from configs.neighbour") + line
    (configs / "longlive.py").write_text(recipe)
    command = [sys.executable, "-m", "astrolabe_jax.main", "--workdir=run"]
    command.append(f"--config={configs / 'longlive.py'}:gadro")
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert expected in process.stderr
    assert not (tmp_path / "run").exists()


def test_sampling_without_the_base_is_told_what_prints_where_it_is(tmp_path, environment):
    command = [sys.executable, "-m", "astrolabe_jax.sample", "--prompt=a cat", "--output_dir=out"]
    command.append(f"--config={runs.ROOT / 'configs' / 'longlive.py'}")
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith(
        "error: config.base: base 'wan_models/Wan2.1-T2V-1.3B': nothing "
    )
    assert "; `python -m astrolabe_jax.main --config=... --workdir=... --check`" in process.stderr


@pytest.mark.slow
def test_a_second_run_in_a_workdir_is_refused_by_the_name_of_the_first(base, tmp_path, environment):
    """Before weights are read: those of the second are others, which the message does not know."""
    workdir = tmp_path / "run"
    other = write_tiny_base(tmp_path / "other", seed=1)
    arguments = [*runs.flags(other), f"--workdir={workdir}"]
    config = runs.small_config(base)
    prepare(config, workdir)
    half_written = workdir / f"summary.json.partial.{os.getpid()}"
    half_written.write_text("")
    try:
        status, _, errors = finish(launch(environment, arguments))
    finally:
        checkpoint.release(workdir)
    assert status == 2 and half_written.exists()
    assert f"error: workdir {workdir} is in use by process {os.getpid()} on " in errors
    assert "; wait for its end, stop it, or give another --workdir" in errors
    assert len(errors.splitlines()) == 1
