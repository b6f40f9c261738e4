"""Two processes with two devices each are one run: one set of files, one end, and it goes on with
other numbers.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from astrolabe_jax.run import prepare
from tests.e2e import runs
from tests.e2e.disks import small_disk
from tests.e2e.runs import finish, launch
from tests.runtime.test_multihost import free_port

# Sums over devices are taken in another order across processes, as they are on other numbers of
# devices.
TOLERANCE = 1e-4
GLOO = re.compile(r"\[Gloo\]|peer ranks")
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
SAVING = {"train.save_samples": True, "train.checkpoint_every": 1}


def environment_of(environment, devices):
    """So many CPU devices for a process, compiled as in conftest.py."""
    flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", environment["XLA_FLAGS"])
    return environment | {"XLA_FLAGS": flags}


def both(environment, arguments, where=("-", "-"), extra=((), ())):
    """The run in two processes, started."""
    port = free_port()
    return [
        launch(
            environment_of(environment, 2),
            [
                *arguments,
                f"--coordinator=127.0.0.1:{port}",
                "--processes=2",
                f"--process={i}",
                *extra[i],
            ],
            where[i],
        )
        for i in range(2)
    ]


def assert_close(config, one, other, tolerance=TOLERANCE):
    """Equal runs but for rounding: records, summaries and the last state."""
    first, second = (runs.outcome(workdir) for workdir in (one, other))
    assert first["files"].keys() == second["files"].keys() and len(first["metrics"]) == len(
        second["metrics"]
    )
    for key in ("metrics", "eval", "gain"):
        numbers, others = (jax.tree.leaves(result[key]) for result in (first, second))
        for a, b in zip(numbers, others, strict=True):
            assert a == b or abs(a - b) <= tolerance * max(1, abs(a)), key
    points = [runs.resumed(prepare(config, workdir)) for workdir in (one, other)]
    assert points[0].epoch == points[1].epoch == config.train.epochs
    states = [
        [
            np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(jax.device_get(policy))])
            for policy in point.train[:4]
        ]
        for point in points
    ]
    for a, b in zip(*states, strict=True):
        assert np.linalg.norm(a - b) <= 10 * tolerance * np.linalg.norm(b)


def assert_one_set_of_files(workdir):
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        "run.json",
        "run.lock",
        "metrics.jsonl",
        "tensorboard",
        "samples",
        "checkpoints",
        "curves.png",
        "lora",
        "summary.json",
        "scores",
    }
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kinds = [(record["kind"], record["epoch"]) for record in records]
    assert kinds == [
        ("evaluation", 0),
        *(("epoch", epoch) for epoch in range(1, 5)),
        ("evaluation", 4),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        SAVING,
        # adapters and moments lie in parts on both, and a copy of them on the hosts
        {"mesh.fsdp": 4, "train.checkpoint_every": 4},
    ],
)
def test_a_signal_to_one_of_two_processes_stops_both_and_one_process_goes_on(
    straight, base, tmp_path, environment, changes
):
    config, whole, _ = straight
    workdir = tmp_path / "run"
    arguments = [*runs.flags(base, **changes), f"--workdir={workdir}"]
    ends = [
        finish(process)
        for process in both(
            environment, arguments, ("-", "SIGTERM:astrolabe_jax.train.blend_old:1")
        )
    ]
    assert [status for status, _, _ in ends] == [0, 0], ends
    # Gloo's threads write their lines to stdout in pieces, which may come apart.
    outs = [
        "".join(line for line in out.splitlines(True) if not GLOO.search(line))
        for _, out, _ in ends
    ]
    assert (
        "SIGTERM: saved after epoch 1 of 4; run the same command to go on" in outs[0]
        and not outs[1]
    )
    assert "2 process" in outs[0] and "SIGTERM: ending at the next phase" in ends[1][2]
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["1"]
    status, out, errors = finish(launch(environment, arguments))
    assert status == 0 and "going on after epoch 1 of 4" in out, errors
    assert_one_set_of_files(workdir)
    assert_close(config, whole, workdir)


def test_what_one_process_cannot_read_ends_both(base, tmp_path, environment):
    arguments = [*runs.flags(base), f"--workdir={tmp_path / 'run'}"]
    wrong = ((), ["--config.prompts.test=no/such.txt"])
    (status, _, errors), (other, _, message) = map(
        finish, both(environment, arguments, extra=wrong)
    )
    assert (status, other) == (2, 2)
    assert "error: config.prompts.test: prompt file no/such.txt does not exist" in message
    assert "error: process 1: config.prompts.test: prompt file no/such.txt does not exist" in errors
    assert "Traceback" not in errors + message and not (tmp_path / "run").exists()


def test_one_process_cannot_check_while_the_other_runs(base, tmp_path, environment):
    arguments = [*runs.flags(base), f"--workdir={tmp_path / 'run'}"]
    first, second = map(finish, both(environment, arguments, extra=((), ["--check"])))
    told = "--check is True here and False in process 0; start all processes alike"
    assert (first[0], second[0]) == (2, 2)
    assert f"error: process 1: {told}" in first[2] and f"error: {told}" in second[2]
    assert not (tmp_path / "run").exists()


def error_lines(errors):
    """The lines without those that say what is waited for."""
    return [line for line in errors.splitlines() if "s at most" not in line]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"},
            ["error: process 1 has 3 devices and process 0 has 2; expected equally many in each"]
            * 2,
        ),
        pytest.param(
            {"JAX_PLATFORMS": "cuda"},
            [
                "error: process 0 of 2 .* cannot start: process 1 of 2 .* has ended; see what",
                "cuda",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"JAX_DEFAULT_MATMUL_PRECISION": "bfloat16"},
            [
                "error: process 1: JAX_DEFAULT_MATMUL_PRECISION is 'bfloat16' here and 'float32'",
                "error: JAX_DEFAULT_MATMUL_PRECISION is 'bfloat16' here and 'float32' in process 0",
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"PYTHONPATH": "other"},
            ["error: process 1: the code of astrolabe_jax is '.*0.0.0, sha256 .*' here and '"]
            + [""],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_hosts_that_do_not_fit_end_in_a_line(tmp_path, environment, other, expected):
    """Before anything is read: there is no base."""
    if "PYTHONPATH" in other:
        other = {"PYTHONPATH": str(tmp_path / "other")}
        shutil.copytree(runs.ROOT / "astrolabe_jax", tmp_path / "other" / "astrolabe_jax")
        (tmp_path / "other" / "astrolabe_jax" / "__init__.py").write_text('__version__ = "0.0.0"\n')
    port = free_port()
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "astrolabe_jax.main", f"--workdir={tmp_path / 'run'}"),
                f"--config={runs.ROOT / 'configs/moving_shapes.py'}",
                *(f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process={i}"),
            ],
            cwd=tmp_path,
            env=environment_of(environment, 2) | (other if i else {}),
            **PIPES,
        )
        for i in range(2)
    ]
    for process, line in zip(started, expected, strict=True):
        status, _, errors = finish(process)
        lines = error_lines(errors)
        assert status == 2 and len(lines) == 1 and re.search(line, lines[0]), errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused_before_training(base, tmp_path, environment):
    """The same relative path, started in two directories."""
    port = free_port()
    arguments = [flag.replace("configs/", f"{runs.ROOT}/configs/") for flag in runs.flags(base)]
    started = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        command = [sys.executable, "-m", "astrolabe_jax.main", *arguments, "--workdir=run"]
        command += [f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process={i}"]
        started.append(
            subprocess.Popen(
                command, cwd=tmp_path / str(i), env=environment_of(environment, 2), **PIPES
            )
        )
    (status, out, errors), (other, _, message) = map(finish, started)
    assert (status, other) == (2, 2) and "epoch" not in out
    place = f"workdir {tmp_path / '1' / 'run'} of process 1"
    assert f"error: process 1: {place}" in errors and f"error: {place}" in message
    assert "expected one directory that all processes see" in message
    assert "Traceback" not in errors + message


@pytest.mark.slow
def test_processes_that_were_started_otherwise_are_refused(base, tmp_path, environment):
    arguments = [*runs.flags(base), f"--workdir={tmp_path / 'run'}"]
    ends = list(map(finish, both(environment, arguments, extra=((), ["--config.seed=1"]))))
    assert [status for status, _, _ in ends] == [2, 2]
    for _, _, errors in ends:
        assert "config.seed is 1 here and 0 in process 0; start all processes alike" in errors


@pytest.mark.slow
def test_two_processes_equal_one_and_pieces_the_whole(base, tmp_path, environment):
    """Across processes up to rounding; cut into pieces by a signal, and by a kill of either
    process, to the bit.
    """
    config, arguments = runs.small_config(base), runs.flags(base, **SAVING)
    alone = tmp_path / "alone"
    assert (
        finish(launch(environment_of(environment, 4), [*arguments, f"--workdir={alone}"]))[0] == 0
    )
    together = tmp_path / "together"
    assert [
        finish(process)[0] for process in both(environment, [*arguments, f"--workdir={together}"])
    ] == [0, 0]
    assert_one_set_of_files(together)
    assert_close(config, alone, together)

    pieces = tmp_path / "pieces"
    for where in (
        ("-", "SIGTERM:astrolabe_jax.train.blend_old:2"),
        ("-", "SIGKILL:astrolabe_jax.streaming.windows.decode_video:1"),
        ("SIGKILL:astrolabe_jax.train.blend_old:1", "-"),
    ):
        start = time.monotonic()
        ends = [
            finish(process)
            for process in both(environment, [*arguments, f"--workdir={pieces}"], where)
        ]
        statuses = [status for status, _, _ in ends]
        if "SIGTERM" in where[1]:
            assert statuses == [0, 0], ends
            shutil.copytree(pieces, tmp_path / "fewer")
        else:
            assert -signal.SIGKILL in statuses and 0 not in statuses, ends
            assert time.monotonic() - start < 200
    assert [
        finish(process)[0] for process in both(environment, [*arguments, f"--workdir={pieces}"])
    ] == [0, 0]
    runs.assert_same_run(config, together, pieces)
    fewer = launch(environment_of(environment, 2), [*arguments, f"--workdir={tmp_path / 'fewer'}"])
    assert finish(fewer)[0] == 0
    assert_close(config, together, tmp_path / "fewer")


@pytest.mark.slow
def test_a_full_disk_of_one_process_ends_both(base, tmp_path, environment):
    """Process 0 writes; the other waits for it."""
    with small_disk(tmp_path / "disk") as disk:
        workdir, log = disk.path / "run", tmp_path / "log"
        arguments = [*runs.flags(base, **SAVING), f"--workdir={workdir}"]
        started = both(environment, arguments, (log, "-"))
        while started[0].poll() is None and not (
            log.exists() and "begin 2 update" in log.read_text()
        ):
            time.sleep(0.005)
        for process in started:
            disk.fill(process)
        (status, _, errors), (other, _, _) = map(finish, started)
        assert status == 1 and other not in (0, None) and f"error: {workdir}" in errors, errors
        disk.free()
        assert [finish(process)[0] for process in both(environment, arguments)] == [0, 0]
