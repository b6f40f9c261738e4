"""How an epoch's samples are cut into optimizer steps and microbatches, with their noise levels.

Whole numbers and random bits on the host; everything derives from (seed, epoch, pass), so that it
is the same on all devices and after a resume.
"""

from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from astrolabe_jax import losses
from astrolabe_jax.arithmetic import piece, rounds, shares_prefix
from astrolabe_jax.schedule import Schedule, warp
from astrolabe_jax.types import RngStream


class PassPlan(NamedTuple):
    """One pass over an epoch's samples; arrays [optimizer steps, m, B]."""

    order: np.ndarray  # int, which sample
    t: np.ndarray  # float32, its timestep in [0, 1000]
    kl_weight: np.ndarray  # float32, see losses.kl_weights


def plan_pass(
    config: ConfigDict, epoch: int, turn: int, mask: np.ndarray, devices: int = 1
) -> PassPlan:
    """Return order, timesteps and KL weights of pass `turn` (from 0) over an epoch's samples.

    Where videos share their prompt's past, a microbatch has equally many of each stream of a round,
    adjacent, so that each device has the pasts of its samples (docs/streaming.md, Rounds).

    loss.timestep_draw 'stratified': of any len(levels) neighbouring samples of the epoch, aligned,
    each has another level, and a sample goes through all levels in as many passes. 'batch': one
    random level per microbatch.

    Args:
      mask: bool [N], the samples that the KL restrains.

    Raises:
      ValueError: unless N is whole microbatches in every step.
    """
    steps = config.optimizer.steps_per_pass
    size = config.optimizer.microbatch
    if len(mask) % (size * steps):
        raise ValueError(
            f"{len(mask)} samples do not fill {steps} optimizer steps (optimizer.steps_per_pass) "
            f"with whole microbatches of {size} (optimizer.microbatch)"
        )
    order = _order(config, random_bits(config, RngStream.LOSS, epoch, len(mask), 2 * turn), devices)
    if config.kl.reduction == "epoch":
        kl_weight = losses.kl_weights(mask)[order]
    else:
        kl_weight = np.concatenate(
            [losses.kl_weights(part) for part in mask[order].reshape(-1, size)]
        )
    return PassPlan(
        order.reshape(steps, -1, size),
        _timesteps(config, epoch, turn, order).reshape(steps, -1, size),
        kl_weight.reshape(steps, -1, size),
    )


def cut(config: ConfigDict, plan: PassPlan, devices: int) -> PassPlan:
    """Return a plan with microbatches in pieces that the devices can hold.

    It has the same samples, timesteps and weights.
    """
    steps, _, size = plan.order.shape
    return PassPlan(*(part.reshape(steps, -1, piece(config, size, devices)) for part in plan))


def levels(config: ConfigDict) -> tuple[float, ...]:
    """Return the timesteps at which the loss is taken (docs/objective.md, Noise levels).

    They are the rollout's, or the raw list for loss.timesteps 'raw', without a final 0 (Krea's
    sampler has one): there is no noise to predict there, so nothing could be learnt.
    """
    steps = tuple(t for t in config.sampler.steps if t > 0)
    warped = config.loss.timesteps == "warped" and config.sampler.warp
    return warp(steps, Schedule(shift=config.sampler.shift)) if warped else steps


def _timesteps(config: ConfigDict, epoch: int, turn: int, order: np.ndarray) -> np.ndarray:
    """Return the timestep of each sample in the order of a pass, float32 [N]."""
    table = np.asarray(levels(config), np.float32)
    if config.loss.timestep_draw == "batch":
        size = config.optimizer.microbatch
        bits = random_bits(config, RngStream.LOSS, epoch, len(order) // size, 2 * turn + 1)
        return np.repeat(table[bits % np.uint64(len(table))], size)
    cycle, shift = divmod(turn, len(table))
    rows = -(-len(order) // len(table))
    bits = random_bits(config, RngStream.LOSS, epoch, rows * len(table), 2 * cycle + 1)
    strata = np.argsort(bits.reshape(rows, -1), axis=1, kind="stable")
    return table[np.roll(strata, shift, axis=1).reshape(-1)[order]]


def _order(config: ConfigDict, bits: np.ndarray, devices: int) -> np.ndarray:
    """Return a random order [N] of the samples by their random `bits`."""
    if not shares_prefix(config):
        return np.argsort(bits, kind="stable")
    count, streams = rounds(config, devices)
    # the bits of a stream's samples, which are adjacent
    by_stream = bits.reshape(count * streams, -1)
    first = np.arange(len(bits)).reshape(by_stream.shape)[:, :1]
    order = first + np.argsort(by_stream, axis=1, kind="stable")
    # videos of a stream that are together
    share = piece(config, config.optimizer.microbatch, devices) // streams
    return order.reshape(count, streams, -1, share).transpose(2, 0, 1, 3).reshape(-1)


def random_bits(
    config: ConfigDict, stream: RngStream, epoch: int, count: int, number: int = 0
) -> np.ndarray:
    """Return `count` uint64 of a counter-based generator's raw output, the `number`-th such row.

    No numpy release changes it.
    """
    key = np.array([config.seed, (stream << 32) | epoch], np.uint64)
    return np.random.Philox(key=key, counter=[0, 0, 0, number]).random_raw(count)
