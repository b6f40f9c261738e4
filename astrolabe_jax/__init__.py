"""Reinforcement learning of few-step autoregressive video models on the forward process, in JAX."""

import os
import signal
import sys

__version__ = "0.2.0"


def _exit_in_one_line(number, _):
    """Exit on Ctrl-C without a traceback, and with the status that a shell gives it."""
    signal.signal(number, signal.SIG_DFL)  # the next one ends the program at once
    os.write(2, b"\nSIGINT: ended\n")
    raise SystemExit(128 + number)


# Python runs `-m astrolabe_jax.PROGRAM` and has imported nothing else yet, which takes seconds.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _exit_in_one_line)
