"""From frames to videos: work in pieces of one shape, and one number from those of all frames."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from astrolabe_jax import sharding


def check_options(**counts: int) -> None:
    """ValueError naming the options that are not whole numbers from 1 on."""
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}; expected a whole number, at least 1")


def top_mean(scores: jax.Array, share: float = 0.3) -> jax.Array:
    """Scores [B, F] of frames -> [B], the mean of the largest max(1, floor(share F))
    (spec/rewards.md 3.1).
    """
    count = max(1, math.floor(share * scores.shape[1]))
    return jnp.mean(jax.lax.top_k(scores, count)[0], axis=1)


def mapped(
    function: Callable,
    params: Any,
    frames: Any,
    times: np.ndarray,
    size: int,
    mesh: Mesh,
    following: int = 1,
) -> Any:
    """What `function(params, *pictures)` makes of all frames at `times`, so many at a time that
    memory is bounded.

    Args:
      function: jitted; pictures are uint8 [n, height, width, 3], split over all devices of the
      mesh, the results have
        n rows, each of its own pictures alone.
      frames: videos uint8 [B, T, height, width, 3]. times: numbers [F] of frames in each video.
      size: pictures of a call; n is the next multiple of the devices. The last call is filled up:
      one shape compiles. following: how many pictures an item has, those at time, time + 1, ...

    Returns:
      The results [B, F, ...], on the devices.
    """
    batch, count = frames.shape[0], len(times)
    size = -(-size // mesh.size) * mesh.size
    videos, moments = np.repeat(np.arange(batch), count), np.tile(times, batch)
    results = []
    for start in range(0, batch * count, size):
        items = np.minimum(np.arange(start, start + size), batch * count - 1)
        chosen = videos[items], moments[items]
        results.append(
            function(
                params, *(_taken(frames, chosen[0], chosen[1] + i, mesh) for i in range(following))
            )
        )
    return jax.tree.map(
        lambda *parts: jnp.concatenate(parts)[: batch * count].reshape(
            batch, count, *parts[0].shape[1:]
        ),
        *results,
    )


def _taken(frames: Any, videos: np.ndarray, times: np.ndarray, mesh: Mesh) -> jax.Array:
    """Frames on the devices that are to see them; those on the host are sent when they are
    needed.
    """
    if isinstance(frames, jax.Array):
        return _gathered(frames, videos, times, mesh=mesh)
    return sharding.shard_batch(mesh, frames[videos, times])


@functools.partial(jax.jit, static_argnames="mesh")
def _gathered(frames: jax.Array, videos: jax.Array, times: jax.Array, *, mesh: Mesh) -> jax.Array:
    return jax.lax.with_sharding_constraint(frames[videos, times], sharding.batch_sharding(mesh))
