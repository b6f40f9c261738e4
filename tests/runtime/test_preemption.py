"""Signals end a program politely, and a second one at once; never with a traceback."""

import os
import signal
import subprocess
import sys

import pytest

from astrolabe_jax.runtime import preemption

LISTENS = """
import signal, time
from astrolabe_jax.runtime import preemption
with preemption.listening():
    print("ready", flush=True)
    time.sleep(30)
    time.sleep(30)
"""


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_is_seen_at_the_next_check(number, capfd):
    with preemption.listening() as check:
        check()
        os.kill(os.getpid(), number)
        with pytest.raises(preemption.Stopped, match=number.name):
            check()
    assert f"{number.name}: ending at the next phase" in capfd.readouterr().err


def test_a_hangup_that_is_ignored_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with preemption.listening() as check:
            os.kill(os.getpid(), signal.SIGHUP)
            check()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_at_once_in_one_line():
    program = [sys.executable, "-c", LISTENS]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stderr
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert first == "SIGINT: ending at the next phase; send it again to end at once\n"
    assert errors == "SIGINT: ended at once; what was saved before stays\n"
    assert process.returncode == -signal.SIGINT


def test_ctrl_c_while_a_program_imports_is_one_line(tmp_path, monkeypatch):
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    (tmp_path / "absl.py").write_text(slow)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    program = [sys.executable, "-m", "astrolabe_jax.main"]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert errors.strip() == "SIGINT: ended"
    assert process.returncode == 128 + signal.SIGINT
