"""What one process knows, all of them do: texts, results, errors, signals, the end."""

import os
import random
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from astrolabe_jax.runtime import multihost


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def both(case: str) -> list[tuple[int, str, str]]:
    """Status, result and errors of a case of multihost_child in process 0 and in process 1."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.multihost_child", str(port), str(me), case],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        )
        for me in (0, 1)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    results = [
        next((line[7:] for line in out.splitlines() if line.startswith("result ")), "")
        for out, _ in outputs
    ]
    return [
        (process.returncode, result, errors)
        for process, result, (_, errors) in zip(started, results, outputs, strict=True)
    ]


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("texts", ["", "b", "c0", "dé" * 300], None),
        (
            "errors",
            [
                "ZeroDivisionError: integer division or modulo by zero",
                "ZeroDivisionError: integer division or modulo by zero",
                "PeerError: process 1: integer division or modulo by zero",
                {"by": 0, "of": -1},
            ],
            [
                "PeerError: process 0: integer division or modulo by zero",
                "PeerError: process 0: integer division or modulo by zero",
                "ZeroDivisionError: integer division or modulo by zero",
                {"by": 0, "of": -1},
            ],
        ),
        ("signals", ["SIGTERM", 4], None),
    ],
)
def test_all_know_what_one_knows(case, first, second):
    results = both(case)
    for (status, result, errors), expected in zip(results, (first, second or first), strict=True):
        assert status == 0 and result == str(expected), errors


def test_one_asks_a_reward_and_all_believe_the_same_scores():
    value = float(np.float32(random.Random(0).random()))
    expected = [[[value, value], [value, value], True], True]
    for status, result, errors in both("scores"):
        assert status == 0 and result == str(expected), errors


def test_an_error_on_one_ends_the_other():
    """Process 0 waits in a computation for process 1, which has gone."""
    start = time.monotonic()
    (status, result, errors), (other, _, traceback) = both("one_fails")
    assert (status, other) == (1, 1) and not result
    assert "ValueError: process 1 has no more to say" in traceback
    assert (
        "error: process 0 cannot go on; has another process ended?" in errors
        and "Traceback" not in errors
    )
    assert time.monotonic() - start < 25


def test_one_process_asks_nobody():
    multihost.join(False, None, None, None)
    assert multihost.first_nonempty("") == "" and multihost.first_nonempty("a") == "a"
    value = object()
    assert multihost.on_all(lambda: value) is value and multihost.on_primary(lambda: value) is value
    with pytest.raises(ZeroDivisionError), multihost.exit_together():
        multihost.on_primary(lambda: 1 // 0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            (True, "here:1", 2, None),
            "--process missing; several processes take --coordinator, --processes, --process",
        ),
        ((False, None, 2, 0), "--coordinator missing"),
        ((False, "here:1", 2, 2), "--process is 2; expected a number from 0 to --processes - 1, 1"),
        ((False, "here:1", 2, -1), "--process is -1"),
    ],
)
def test_wrong_flags_are_named(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        multihost.join(*arguments)
