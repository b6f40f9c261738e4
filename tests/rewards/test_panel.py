"""Scoring beside sampling: order, waiting, hanging, and where weights live."""

import os
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from astrolabe_jax.rewards.panel import RewardRunner
from astrolabe_jax.rewards.registry import Loaded, RewardError, Scorer
from astrolabe_jax.runtime.preemption import Stopped

FRAMES, PROMPTS = np.zeros((2, 1, 2, 2, 3), np.uint8), ["a cat", "a dog"]


def group(name, act=lambda: None, params=None):
    def score(params, frames, prompts):
        act()
        return np.arange(len(frames)) + (0 if params is None else np.asarray(params["w"]))

    return Loaded((name,), Scorer(score, params))


def weights():
    return {
        "w": jax.device_put(np.float32(10), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    }


@pytest.mark.parametrize("overlap", ["none", "host"])
def test_the_wait_for_a_silent_reward_can_be_ended(overlap):
    free = threading.Event()

    def check():
        raise Stopped("SIGTERM")

    runner = RewardRunner([group("a", lambda: free.wait(60))], overlap)
    with pytest.raises(Stopped):
        runner.score_async(FRAMES, PROMPTS, check=check)()
    start = time.monotonic()
    runner.settle()
    assert time.monotonic() - start < 1
    free.set()


@pytest.mark.parametrize(
    ("overlap", "params", "waits"),
    [
        ("none", False, True),
        ("host", False, False),
        ("host", True, True),
        ("all", False, False),
        ("all", True, False),
    ],
)
def test_what_may_overlap_does_and_nothing_else(overlap, params, waits):
    """The scorer goes on only after `score_async` has returned, or the caller has given up."""
    returned = threading.Event()
    finished = []

    def act():
        returned.wait(0.2)
        finished.append(True)

    runner = RewardRunner([group("a", act, weights() if params else None)], overlap)
    scores = runner.score_async(FRAMES, PROMPTS)
    assert bool(finished) == waits
    returned.set()
    np.testing.assert_array_equal(scores()["a"], [10, 11] if params else [0, 1])


def test_calls_do_not_overtake_each_other_and_two_batches_are_held_at_most():
    order, free = [], threading.Event()
    runner = RewardRunner([group("a", lambda: (free.wait(5), order.append("scored")))], "host")
    first = runner.score_async(FRAMES, PROMPTS)
    free.set()
    second = runner.score_async(FRAMES, PROMPTS)
    assert order[:1] == ["scored"]  # the second call has waited for the first one's scores
    assert first().keys() == second().keys() == {"a"} and order == ["scored"] * 2


def test_what_is_under_way_can_be_waited_for():
    finished = []
    runner = RewardRunner([group("a", lambda: (time.sleep(0.2), finished.append(True)))], "host")
    runner.score_async(FRAMES, PROMPTS)
    assert not finished
    runner.settle()
    assert finished


@pytest.fixture
def hang():
    """Waits until the end of the test: a thread that works on would end this process with it."""
    free = threading.Event()
    yield free.wait
    free.set()


@pytest.mark.parametrize("overlap", ["none", "host"])
def test_a_scorer_that_hangs_is_named(overlap, hang):
    """Not those before and behind it."""
    groups = [group("fast"), group("slow", hang), group("next")]
    runner = RewardRunner(groups, overlap, timeout=0.2)
    with pytest.raises(
        RewardError,
        match="^reward 'slow' did not answer within 0.2 s for samples 5 to 6; .*timeout",
    ):
        runner.score_async(FRAMES, PROMPTS, range(5, 7))()
    began = time.monotonic()
    runner.settle()  # nor is it waited for again
    assert time.monotonic() - began < 0.1


def test_a_scorer_that_hangs_is_waited_for_once(hang):
    """Not once a batch."""
    runner = RewardRunner([group("slow", hang)], "host", timeout=0.2)
    runner.score_async(FRAMES[:1], PROMPTS[:1], range(5, 6))
    with pytest.raises(RewardError, match="for sample 5;"):
        runner.score_async(FRAMES, PROMPTS, range(7, 9))


@pytest.mark.parametrize("overlap", ["none", "host"])
def test_an_error_comes_from_the_call_that_made_it(overlap):
    calls = []

    def third():
        calls.append(None)
        if len(calls) == 3:
            raise OSError("gone")

    runner, scores = RewardRunner([group("a", third)], overlap), []
    with pytest.raises(RewardError, match="'a' failed on samples 4 to 5: OSError: gone"):
        for first in (0, 2, 4, 6):
            scores.append(runner.score_async(FRAMES, PROMPTS, range(first, first + 2)))
        scores[2]()
    assert [list(wait()["a"]) for wait in scores[:2]] == [[0, 1]] * 2


def test_weights_on_the_host_are_on_the_device_only_while_they_are_used():
    params, seen = weights(), []

    def look(given, frames, prompts):
        seen.append(given["w"])
        return given["w"] + np.arange(len(frames))

    runner = RewardRunner([Loaded(("a",), Scorer(look, params))], place="host")
    assert params["w"].is_deleted()
    for _ in range(2):
        np.testing.assert_array_equal(runner.score_async(FRAMES, PROMPTS)()["a"], [10, 11])
    assert len(seen) == 2 and all(leaf.is_deleted() for leaf in seen)


OUTLIVING = """
import sys
import jax, numpy as np
from astrolabe_jax.rewards.panel import RewardRunner
from astrolabe_jax.rewards.registry import Loaded, RewardError, Scorer
from astrolabe_jax.runtime.multihost import exit_together

def score(params, frames, prompts):
    step = lambda i, x: jax.numpy.sin(x @ x)
    program = jax.jit(lambda x: jax.lax.fori_loop(0, 1000, step, x))
    x = np.ones((64, 64), np.float32)
    while True:
        x = program(x)

def main():
    runner = RewardRunner([Loaded(("slow",), Scorer(score))], timeout=0.3)
    try:
        runner.score_async(np.zeros((1, 1, 2, 2, 3), np.uint8), ["a cat"])
    except RewardError as error:
        print(error)
        {end}

with exit_together():
    main()
"""


@pytest.mark.parametrize(
    ("end", "status", "told"),
    [
        ("sys.exit(2)", 2, ""),
        ("pass", 0, ""),
        pytest.param("1 / 0", 1, "ZeroDivisionError: division", marks=pytest.mark.slow),
    ],
)
def test_a_program_ends_while_a_reward_computes_on(end, status, told):
    """Python would end under the calls of JAX, which crashes (status 134 or 139)."""
    done = subprocess.run(
        [sys.executable, "-c", OUTLIVING.replace("{end}", end)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert done.returncode == status and done.stdout.startswith("reward 'slow' did not answer")
    assert told in done.stderr
