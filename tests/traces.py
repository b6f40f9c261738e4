"""What the network is called with while the driver of blocks samples videos.

    policy = traced(policy)
    for block, calls in traced_blocks(policy, streams.sample_blocks(policy, videos, ...)):
        calls.block.inputs      # [passes, B, P, C, H, W]

The net of such a policy is the library's own, but it hands every call to the host. So its programs
are others than those of a plain policy, and no video needs another driver.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from astrolabe_jax.models.layers import graphdef_of
from astrolabe_jax.models.wan.config import WanConfig
from astrolabe_jax.models.wan.transformer import WanTransformer
from astrolabe_jax.schedule import velocity_to_x0
from astrolabe_jax.streaming.streams import SampledBlock
from astrolabe_jax.types import Policy

_recorded: list[tuple] = []  # (program, timestep, inputs, velocity) of calls that nobody took yet


class Trace(NamedTuple):
    """Network calls of one kind for one block, in their order: the steps, then the clean pass."""

    timestep: np.ndarray  # [passes]
    inputs: np.ndarray  # [passes, B, P, C, H, W]
    velocity: np.ndarray  # as inputs
    x0: np.ndarray  # as inputs: inputs - sigma(timestep) velocity


class Calls(NamedTuple):
    """The network calls that made a block."""

    block: Trace
    change: Trace | None  # of a recache before it


class _Traced(WanTransformer):
    """The network, which also hands its calls to `_recorded`."""

    def step(self, x, t, *args, **kwargs):
        velocity, cache = super().step(x, t, *args, **kwargs)
        jax.debug.callback(_record_step, t, x, velocity, ordered=True)
        return velocity, cache

    def recache(self, x, t, *args, **kwargs):
        velocity, cache = super().recache(x, t, *args, **kwargs)
        jax.debug.callback(_record_recache, t, x, velocity, ordered=True)
        return velocity, cache


def _record_step(*call):
    _recorded.append(("step", *map(np.asarray, call)))


def _record_recache(*call):
    _recorded.append(("recache", *map(np.asarray, call)))


def traced(policy: Policy) -> Policy:
    """Return a policy with the same numbers, whose calls `traced_blocks` can tell."""
    return policy.replace(graphdef=_graphdef(policy.config))


@functools.cache
def _graphdef(config: WanConfig):
    graphdef, _ = graphdef_of(lambda: _Traced(config, rngs=nnx.Rngs(0)))
    return graphdef


def traced_blocks(
    policy: Policy, blocks: Iterable[SampledBlock]
) -> Iterator[tuple[SampledBlock, Calls]]:
    """Yield blocks that a `traced` policy makes, each with its calls."""
    _recorded.clear()
    for block in blocks:
        jax.effects_barrier()
        steps, changes = (
            [call for name, *call in _recorded if name == program]
            for program in ("step", "recache")
        )
        _recorded.clear()
        yield block, Calls(_trace(policy, steps), _trace(policy, changes) if changes else None)


def _trace(policy: Policy, calls: list) -> Trace:
    times, inputs, velocity = map(np.stack, zip(*calls, strict=True))
    timestep = times.reshape(len(calls), -1)[:, 0]  # one for all frames
    sigma = np.asarray(policy.sampler.sigma(timestep))
    x0 = [velocity_to_x0(*one) for one in zip(inputs, velocity, sigma, strict=True)]
    return Trace(timestep, inputs, velocity, np.stack(x0))
