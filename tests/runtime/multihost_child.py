"""Two processes that meet without a model, see test_multihost.py.

python -m tests.runtime.multihost_child PORT PROCESS CASE
"""

import os
import random
import signal
import sys
import threading
import time
import types

import numpy as np

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


def killed(me, by=1):
    """Process `by` is killed while the other waits for it in a computation, again and again."""
    with multihost.exit_together():
        for i in range(1000):
            multihost.first_nonempty(f"{me}")
            if me == by and i == 20:
                os.kill(os.getpid(), signal.SIGKILL)


def first_killed(me):
    killed(me, 0)


def scores(me):
    """Those of a reward that gives another number each time, and what it was asked and raised."""
    # after joining: no array may exist before it
    from astrolabe_jax.rewards.panel import RewardRunner
    from astrolabe_jax.rewards.registry import Loaded, RewardError, Scorer
    from astrolabe_jax.runtime.progress import Progress
    from astrolabe_jax.streaming import windows

    asked = []

    def draw(params, frames, prompts):
        asked.append(len(prompts))
        if len(asked) == 3:
            raise ValueError("away")
        return [random.Random(me).random() for _ in prompts]

    results = []
    for overlap in ("none", "host", "none"):
        run = types.SimpleNamespace(
            reward_runner=RewardRunner([Loaded(("a",), Scorer(draw))], overlap)
        )
        given = (np.zeros((2, 1, 2, 2, 3), np.uint8), ["b", "c"], range(2), Progress())
        try:
            results.append(windows.score_async(run, *given)()["a"].tolist())
        except (RewardError, OSError) as error:
            results.append("away" in str(error))
    return [results, len(asked) == (0 if me else 3)]


def silent(me):
    """What ends the wait for a reward of process 0 that never answers; process 1 has a signal."""
    from astrolabe_jax.rewards.panel import RewardRunner
    from astrolabe_jax.rewards.registry import Loaded, Scorer

    def never(params, frames, prompts):
        threading.Event().wait()

    runner = RewardRunner([Loaded(("a",), Scorer(never))])
    with preemption.listening() as check:
        if me == 1:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        try:
            runner.score_async(np.zeros((2, 1, 2, 2, 3), np.uint8), ["b", "c"], check=check)
        except preemption.Stopped as stopped:
            return [str(stopped)]


if __name__ == "__main__":
    port, me, case = sys.argv[1:]
    multihost.join(False, f"127.0.0.1:{port}", 2, int(me))
    print("result", globals()[case](int(me)), flush=True)
