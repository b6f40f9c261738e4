"""The measurements of experiments/streaming_memory at tiny size: what must hold at any size
does.
"""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from astrolabe_jax import plan, sharding
from astrolabe_jax.arithmetic import rounds
from configs import moving_shapes
from experiments.streaming_memory import cost, memory
from tests.e2e.runs import SMALL
from tests.tiny_base import write_tiny_base

GEOMETRY = {
    "model.block": 3,
    "model.window": 9,
    "model.sink": 3,
    "model.positions": "relative",
    "video.height": 16,
    "video.width": 16,
    "sampler.steps": (1000, 500),
    "lora.rank": 2,
    "lora.alpha": 2.0,
    "streaming.window": 6,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(write_tiny_base(tmp_path_factory.mktemp("base")))


def tiny(base: str, variant: str, start: int):
    config = moving_shapes.get_config()
    config.update_from_flattened_dict(
        SMALL | GEOMETRY | {"base": base, "video.frames": 1 + 4 * (start + 6 - 1)}
    )
    return memory.setting(variant, start, config)


def test_what_a_window_behind_a_past_takes_does_not_depend_on_where_it_begins(base):
    programs = set()
    for start in (0, 60):
        run = plan.abstract_run(tiny(base, "clip_detach", start), 1)
        run = run._replace(mesh=sharding.make_mesh(run.config.mesh, jax.devices()[:1]))
        assert memory.held_bytes(run) == memory.held_bytes(
            plan.abstract_run(tiny(base, "clip_detach", 3), 1)
        )
        with jax.set_mesh(run.mesh):
            calls = memory.programs(run).values()
            programs.add("".join(call.lower().as_text() for call in calls))
    assert len(programs) == 1


def test_programs_run_behind_the_start_and_not_at_frame_0(base):
    run = plan.abstract_run(tiny(base, "clip_detach", 3), 1)
    run = run._replace(mesh=sharding.make_mesh(run.config.mesh, jax.devices()[:1]))
    with jax.set_mesh(run.mesh):
        calls = memory.programs(run)
    places = {}
    for name in ("block", "update"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(calls[name].arguments):
            field = getattr(path[-1], "name", "")
            if jnp.issubdtype(leaf.dtype, jnp.integer):
                places[name, field] = np.asarray(memory.filled(39, path, leaf)).tolist()
    block = run.layout.block
    window = run.config.streaming.window
    assert places["block", "start"] == places["update", "start"] == 39
    assert places["block", "positions"] == list(range(39, 39 + block))
    assert places["update", "positions"] == list(range(39, 39 + window))
    others = [np.max(value) for (_, field), value in places.items() if field != "start"]
    assert 0 in others  # of prompts, and of microbatches


def test_a_program_runs_as_it_is_compiled(base):
    peak = memory.measure(tiny(base, "clip_detach", 3), "here", ("decoder",), execute=True)[
        "decoder"
    ]
    # the decoder's memory, which is donated, is made anew for every call
    assert peak.program.execution.seconds > 0


@pytest.mark.slow
def test_gradients_into_the_past_take_more_the_later_a_window_begins(base):
    def update(variant, start=6):
        return memory.measure(tiny(base, variant, start), "here", ("update",))["update"]

    peaks = [update(variant) for variant in memory.VARIANTS]
    totals = [peak.total for peak in peaks]
    assert totals == sorted(set(totals))  # the order of the paper's Table 4a
    earlier = update("clip_fullbp", 3).program.temporaries
    assert peaks[0].program.temporaries < earlier < peaks[2].program.temporaries


def test_passes_are_those_of_the_past_once_and_of_the_windows(base):
    start, sizes = (
        6,
        {name: value for name, value in (SMALL | GEOMETRY).items() if name not in cost.SIZES},
    )
    config = cost.setting(
        start, **(sizes | {"base": base, "video.frames": 1 + 4 * (start + cost.WINDOW - 1)})
    )
    made, (_, streams) = cost.measure(config, start, times=1), rounds(config, jax.device_count())
    # two denoising passes and the clean one; blocks
    passes, past, window = 3, start // 3, cost.WINDOW // 3
    assert made["clip"]["passes"] == passes * (streams * past + cost.CANDIDATES * window)
    assert made["sequence"]["passes"] == passes * cost.CANDIDATES * (past + window)


@pytest.mark.slow
def test_late_windows_cost_a_seventh_of_whole_videos():
    # on one device, as each of several makes the past for itself
    out = ran("cost", "--start=219", XLA_FLAGS="")[1]
    passes, seconds = map(float, re.findall(r"clip / sequence +(\S+) passes +(\S+) s", out)[0])
    assert passes <= 1 / 7
    assert seconds <= 1 / 6


def ran(program: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """The status, output and errors of a program of this experiment."""
    command = [sys.executable, "-m", f"experiments.streaming_memory.{program}", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("program", "flag", "fault"),
    [
        ("memory", "--cells=clip:39", "expected VARIANT:START"),
        ("memory", "--programs=none", "expected some of block, decoder, update"),
        ("memory", "--target=none", "expected here, h200"),
        ("memory", "--attention=none", "config.model.attention is 'none'"),
        ("cost", "--base=none", "config.base"),
        ("cost", "--start=-1", "non-negative integer"),
        ("cost", "stray", "error: unexpected argument 'stray'; flags start with --"),
    ],
)
def test_flags_that_cannot_be_met_are_refused_in_a_line(program, flag, fault):
    status, _, errors = ran(program, flag)
    assert status == 2
    assert fault in errors
    assert "Traceback" not in errors
