"""What one process knows, all of them do: texts, results, errors, signals, the end."""

import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from astrolabe_jax.runtime import multihost, roll_call


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
            env=os.environ
            | {
                "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
                "http_proxy": "http://127.0.0.1:9",  # of no use between the processes
            },
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
        ("silent", ["SIGTERM"], None),
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


def test_process_0_ends_in_a_line_when_another_is_killed():
    (status, _, errors), (other, _, _) = both("killed")
    assert (status, other) == (1, -9) and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: process 0 cannot go on; has another process")


def test_another_ends_in_a_line_when_process_0_is_killed():
    """JAX, which aborts with a dump, may hear of it first on a busy machine."""
    for _ in range(6):
        (other, _, _), (status, _, errors) = both("first_killed")
        assert other == -9 and status in (1, -6)
        if status == 1:
            break
    assert "Traceback" not in errors
    assert re.search(r"error: process 1 of 2 .* cannot go on: process 0 at .* has ended", errors)


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
        ((False, "here:1", 0, 0), "--processes is 0; expected how many there are, at least 1"),
        ((False, None, -2, None), "--processes is -2; expected how many there are, at least 1"),
        *(
            (
                (False, None, None, None, float(limit)),
                f"--join_timeout is {limit}; expected seconds, from 0 to 1,000,000",
            )
            for limit in ("nan", "inf", "-1", "1e+07")
        ),
    ],
)
def test_wrong_flags_are_named(arguments, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        multihost.join(*arguments)


@pytest.mark.parametrize(
    "coordinator",
    [
        "",
        "here",
        "here:",
        ":1234",
        "[]:1234",
        "here:99999",
        "here:0",
        "a:b",
        "http://here:1234",
        "me@here:1234",
        "a b:1234",
    ],
)
def test_an_address_without_host_or_port_is_named(coordinator):
    expected = re.escape(f"--coordinator is '{coordinator}'; expected HOST:PORT")
    with pytest.raises(ValueError, match=expected):
        multihost.join(False, coordinator, 2, 1)


@pytest.mark.parametrize(
    ("host", "index", "expected"),
    [
        ("no.such.host.invalid", 1, "not reached process 0 at .*invalid:.* within 0.5 s .*; start"),
        ("no.such.host.invalid", 0, "not reached process 0 .*; expected an address of this host"),
        ("127.0.0.1", 1, r"within 0.5 s \(Connection refused\); start process 0 there, or correct"),
        ("127.0.0.1", 0, "process 0 of 3 .* process 1, process 2 of 3 did not come within 0.5 s"),
    ],
)
def test_who_does_not_come_is_waited_for_in_a_stated_time(capsys, host, index, expected):
    start = time.monotonic()
    with pytest.raises(ValueError, match=expected):
        multihost.join(False, f"{host}:{free_port()}", 3, index, 0.5)
    assert time.monotonic() - start < 10
    if "did not come" not in expected:
        assert f"process {index} of 3" in capsys.readouterr().err


def test_who_is_missing_is_named_while_it_is_waited_for(capsys):
    with pytest.raises(ValueError, match="process 1 of 2 did not come within 2 s"):
        multihost.join(False, f"127.0.0.1:{free_port()}", 2, 0, 2.0)
    assert "waits for process 1, 1 s at most" in capsys.readouterr().err


def at_once(port, *members):
    """What `meet` says to each of (count, index); "met" if all have met."""

    def attend(member):
        count, index = member
        try:
            with roll_call.meet(f"127.0.0.1:{port}", count, index, 10.0):
                return "met"
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(attend, members))


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([(3, 0), (3, 1), (3, 1)], "both have --process=1; expected each number from 0 to 2 once"),
        ([(2, 0), (3, 1)], "has --processes=3, process 0 has 2; start all alike"),
        ([(2, 0), (2, 1)], "met"),
    ],
)
def test_numbers_that_do_not_fit_are_told_to_all(members, expected):
    assert all(expected in said for said in at_once(free_port(), *members))


def test_others_at_the_port_do_not_disturb():
    """A scan, something that speaks another language, and a process that was ended and comes
    again.
    """
    port = free_port()

    def disturb():
        for content in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[" * 4000 + b"\n", b'{"process": []}\n'):
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", port)) as connection:
                        connection.sendall(content)
                    break
                except ConnectionRefusedError:
                    time.sleep(0.01)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b'{"process": 1, "processes": 3, "name": "gone"}\n')
            assert b"welcome" in connection.recv(100)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(at_once, port, (3, 0))
        disturb()
        time.sleep(0.5)  # until its end is seen
        assert at_once(port, (3, 1), (3, 2)) == 2 * first.result() == ["met", "met"]


def test_another_program_at_the_port_is_told_from_process_0():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer():
            with server.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        said = at_once(port, (2, 1))
        assert f"another program, or another run, answers at 127.0.0.1:{port}" in said[0]
        said = at_once(port, (2, 0))
        assert f"cannot listen at port {port} (Address already in use)" in said[0]
