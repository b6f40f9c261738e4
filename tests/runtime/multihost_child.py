"""Two processes that meet without a model, see test_multihost.py.

python -m tests.runtime.multihost_child PORT PROCESS CASE
"""

import os
import signal
import sys
import time

from astrolabe_jax.runtime import multihost, preemption


def texts(me):
    return [multihost.first_nonempty(text) for text in ("", "b" * me, f"c{me}", "dé" * 300 * me)]


def errors(me):
    results = []
    for failing in (0, 1):
        for function in (multihost.on_all, multihost.on_primary):
            try:
                results.append(
                    function(lambda failing=failing: {"by": me, "of": 1 // (me - failing)})
                )
            except (ArithmeticError, OSError) as error:
                results.append(f"{type(error).__name__}: {error}")
    return results


def signals(me):
    with preemption.listening() as check:
        for i in range(1000):
            try:
                check()
            except preemption.Stopped as stopped:
                return [str(stopped), i]
            if me == 1 and i == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            if me == 0 and i == 7:
                time.sleep(0.3)


def one_fails(me):
    with multihost.exit_together():
        multihost.first_nonempty(f"{me}")
        if me == 1:
            raise ValueError("process 1 has no more to say")
        return multihost.on_primary(lambda: "nobody hears this")


if __name__ == "__main__":
    port, me, case = sys.argv[1:]
    multihost.join(False, f"127.0.0.1:{port}", 2, int(me))
    print("result", globals()[case](int(me)), flush=True)
