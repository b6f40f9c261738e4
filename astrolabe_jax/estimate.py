"""What a run holds and takes on devices that need not be there: whether it fits, how long it lasts.

All programs of an epoch are traced on one device's share, and counted by cost.py. A program's time
is that of its products and convolutions, or that of its memory where it is longer, at shares of the
device's peak. Rewards are counted as memory alone. How near this comes: docs/hardware.md.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from astrolabe_jax import sharding
from astrolabe_jax.arithmetic import piece, repeats, rounds, samples, shares_prefix
from astrolabe_jax.cost import Cost
from astrolabe_jax.encode import call_size
from astrolabe_jax.report import streams_held
from astrolabe_jax.run import Run

# Shares of the peak that programs reach, and what compilers hold of what is counted.
PRODUCTS = 0.5
CONVOLUTIONS = 0.25
BANDWIDTH = 0.8
COMPILED = 1.2
# of products of rewards: HPSv3 on one H100, whose batches are small and of many lengths
REWARDS = 0.14


class Device(NamedTuple):
    """An accelerator, by its data sheet."""

    backend: str
    memory: float  # bytes that programs may take
    speed: float  # operations a second on bfloat16, dense
    bandwidth: float  # bytes a second


_GIB = 2.0**30
DEVICES = {
    "a100": Device("gpu", 79.2 * _GIB, 312e12, 2.04e12),
    "h100": Device("gpu", 79.2 * _GIB, 989e12, 3.35e12),
    "h200": Device("gpu", 139.8 * _GIB, 989e12, 4.8e12),
    "v5e": Device("tpu", 15.75 * _GIB, 197e12, 0.82e12),
    "v5p": Device("tpu", 95.7 * _GIB, 459e12, 2.77e12),
    "v6e": Device("tpu", 31.2 * _GIB, 918e12, 1.64e12),
}


class Phase(NamedTuple):
    """What a device does in a phase of an epoch."""

    held: float  # most bytes at once, beside what is held anyway
    operations: float
    seconds: float


class Estimate(NamedTuple):
    """What an epoch holds and takes on a device."""

    device: Device
    peaks: dict[str, float]  # bytes on the device at most, by phase
    phases: dict[str, Phase]
    rewards: dict[str, Phase]  # by the names that one call computes; those that can be counted

    @property
    def peak(self) -> float:
        """Most bytes on a device at once."""
        return max(self.peaks.values())

    @property
    def fits(self) -> bool:
        """Whether the device has so much memory."""
        return self.peak <= self.device.memory

    @property
    def seconds(self) -> float:
        """Seconds of an epoch without rewards, evaluations and checkpoints."""
        return sum(phase.seconds for phase in self.phases.values())


def of(
    run: Run,
    one: Run,
    costs: Iterable[tuple[str, str, Cost]],
    rewards: Iterable[tuple[str, Cost, float]],
    device: Device,
    arrays: Mapping[str, int],
) -> Estimate:
    """Return what an epoch of `run` holds and takes on such devices.

    Args:
      one: what one of the devices works on at once (plan.on_one_device).
      costs: stage, name and cost of each call of its programs.
      rewards: names, the cost of a call, and calls of a video, of each program of a reward.
      arrays: bytes that a device holds, by name (report.memory).
    """
    phases = _phases(run, one, costs, device)
    scoring = _rewards(run, rewards, device)
    in_update = _in_update(run)
    peaks = {}
    for name, phase in (phases | scoring).items():
        shares = in_update if name == "update" else {}
        held = sum(size * shares.get(row, 1.0) for row, size in arrays.items())
        peaks[name] = held + COMPILED * phase.held
    return Estimate(device, peaks, phases, scoring)


def _rewards(
    run: Run, rewards: Iterable[tuple[str, Cost, float]], device: Device
) -> dict[str, Phase]:
    """Return what the rewards of an epoch take on each device, by their names."""
    found: dict[str, Phase] = {}
    for names, taken, calls in rewards:
        times = calls * samples(run.config) / run.mesh.size
        before = found.get(names, Phase(0.0, 0.0, 0.0))
        found[names] = Phase(
            max(before.held, taken.held),
            before.operations + times * (taken.products + taken.convolutions),
            before.seconds + times * seconds(taken, device, REWARDS),
        )
    return found


def _in_update(run: Run) -> dict[str, float]:
    """Return the share of the rows of report.memory that an update holds, where that is not all."""
    config = run.config
    shares = {"cache": 0.0, "decoder": 0.0, "frames": 0.0}
    if not config.streaming.window:
        return shares
    caches, decoders = streams_held(run)
    sampled = piece(config, config.sampler.batch, run.mesh.size)
    if not shares_prefix(config):
        trained = piece(config, config.optimizer.microbatch, run.mesh.size)
        return shares | {"cache": trained / caches}
    kept = {"cache": 1 - sampled / caches}
    if config.streaming.mode == "progressive":
        kept["decoder"] = 1 - sampled / decoders
    return shares | kept


def parse(text: str) -> tuple[str, Device, int]:
    """Return kind, data sheet and number of the devices that `h100:8` or `v5e:4x4` names.

    Raises ValueError, saying what is expected.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    count = math.prod(map(int, match[2].split("x"))) if match else 0
    if match is None or match[1] not in DEVICES or not count:
        raise ValueError(
            f"--on is {text!r}; expected a kind and how many, such as h100:8 or v5e:4x4; kinds are "
            f"{', '.join(DEVICES)}"
        )
    return match[1], DEVICES[match[1]], count


def seconds(taken: Cost, device: Device, products: float = PRODUCTS) -> float:
    """Return how long a program runs on a device, whose products reach a share of the peak."""
    computing = taken.products / products + taken.convolutions / CONVOLUTIONS
    return max(computing / device.speed, taken.moved / (BANDWIDTH * device.bandwidth))


def _phases(
    run: Run, one: Run, costs: Iterable[tuple[str, str, Cost]], device: Device
) -> dict[str, Phase]:
    """Return the phases of an epoch, by name; arguments are those of `of`."""
    found: dict[str, Phase] = {}
    often = _times(run, one)
    for stage, name, taken in costs:
        decodes = name.startswith("decode_")
        times = often[stage] * (_decoder_calls(run) if decodes else 1.0)
        phase = "decode" if decodes else PHASES[stage]
        before = found.get(phase, Phase(0.0, 0.0, 0.0))
        found[phase] = Phase(
            max(before.held, taken.held),
            before.operations + times * (taken.products + taken.convolutions),
            before.seconds + times * seconds(taken, device),
        )
    return found


def split_shapes(run: Run) -> dict[tuple[int, ...], int]:
    """Return the shapes of stacked parameters -> devices that these are split over."""
    trees = (run.base.transformer.params, jax.eval_shape(lambda: run.adapter))
    leaves = jax.tree.leaves([sharding.shard_params(run.mesh, tree) for tree in trees])
    parts = {leaf.shape: leaf.sharding.shard_shape(leaf.shape) for leaf in leaves}
    return {shape: math.prod(shape) // math.prod(part) for shape, part in parts.items()}


# Stages of plan.programs -> phases of an epoch.
PHASES = {
    "text encoder": "encode",
    "past": "past",
    "rollout": "rollout",
    "train step": "update",
}


def _times(run: Run, one: Run) -> dict[str, float]:
    """Return how often each program of `one` runs in an epoch, on each device."""
    config = run.config
    devices = run.mesh.size
    window = config.streaming.window
    pieces = samples(config) / piece(config, config.sampler.batch, devices)
    updates = config.optimizer.inner_epochs * samples(config) / (devices * samples(one.config))
    distinct = config.prompts.prompts_per_epoch / repeats(config)
    times = {"text encoder": math.ceil(distinct / call_size(run.mesh))}
    if not window:
        return times | {"rollout": pieces, "train step": updates}
    block = config.model.block
    before = float(np.mean(run.starts)) / block  # blocks of the past
    blocks = window / block
    if not shares_prefix(config):  # an update goes along the past with one pass a block
        passes = len(run.sampler.steps) + 1
        trained = piece(config, config.optimizer.microbatch, devices)
        along = config.optimizer.inner_epochs * samples(config) / trained * before / passes
        longer = (before + blocks) / blocks
        return times | {
            "past": along,
            "rollout": pieces * (before + blocks),
            "train step": updates * longer,
        }
    goes_on = config.streaming.mode == "progressive"
    past = 0.0 if goes_on else rounds(config, devices)[0] * before
    return times | {"past": past, "rollout": pieces * blocks, "train step": updates}


def _decoder_calls(run: Run) -> float:
    """Return how often a block of a window is decoded, chunk by chunk; 1 for whole videos."""
    block = run.config.model.block
    traced = bool(run.config.streaming.window)
    return block / min(run.config.video.decode_chunk, block) if traced else 1.0
