"""From frames to videos: score pictures a few at a time, and make one number of a video's."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from astrolabe_jax import sharding
from astrolabe_jax.models import layers
from astrolabe_jax.rewards.registry import Clip, Work


def check_counts(**counts: int) -> None:
    """Raise ValueError naming the options that are not whole numbers from 1 on."""
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}; expected a whole number, at least 1")


def top_mean(scores: jax.Array | np.ndarray) -> jax.Array:
    """Return [B], the mean of the largest max(1, floor(0.3 F)) of scores [B, F] of frames."""
    count = max(1, math.floor(0.3 * scores.shape[1]))
    return jnp.mean(jax.lax.top_k(scores, count)[0], axis=1)


def map_frames(
    function: Callable,
    params: Any,
    frames: Any,
    times: np.ndarray,
    *,
    per_call: int,
    mesh: Mesh,
    following: int = 1,
) -> Any:
    """Return what `function(params, *pictures)` makes of all frames at `times`.

    Args:
      function: jitted; pictures are uint8 [n, height, width, 3], split over all devices of the
        mesh, and the results have n rows, each of its own pictures alone.
      params: its first argument.
      frames: videos uint8 [B, T, height, width, 3].
      times: numbers [F] of frames in each video.
      per_call: pictures of a call, which bounds memory; n is the next multiple of the devices. The
        last call is filled up, so that one shape compiles.
      mesh: of the devices.
      following: how many pictures an item has, those at time, time + 1, ...

    Returns:
      The results [B, F, ...], on the devices.
    """
    batch = frames.shape[0]
    count = len(times)
    per_call = -(-per_call // mesh.size) * mesh.size
    results = []
    for start in range(0, batch * count, per_call):
        items = np.minimum(np.arange(start, start + per_call), batch * count - 1)
        pictures = [
            _taken(
                frames,
                items // count,
                times[items % count] + i,
                mesh,
            )
            for i in range(following)
        ]
        results.append(function(params, *pictures))

    def joined(*parts: jax.Array) -> jax.Array:
        return jnp.concatenate(parts)[: batch * count].reshape(batch, count, *parts[0].shape[1:])

    return jax.tree.map(joined, *results)


def work(
    function: Callable,
    graphdef: Any,
    clip: Clip,
    times: int,
    per_call: int,
    following: int = 1,
) -> Work:
    """Return what `map_frames` computes of `times` frames of a video, on one device.

    function: (net, *pictures), before it is bound to a net.
    """
    picture = jax.ShapeDtypeStruct((per_call, clip.height, clip.width, 3), np.uint8)

    def run(params: Any, *pictures: jax.Array) -> Any:
        return function(layers.merge(graphdef, params), *pictures)

    return Work(run, (picture,) * following, times / per_call)


def _taken(frames: Any, videos: np.ndarray, times: np.ndarray, mesh: Mesh) -> jax.Array:
    """Return frames on the devices that are to see them; those on the host are sent only now."""
    if isinstance(frames, jax.Array):
        return _taken_on_devices(frames, videos, times, mesh=mesh)
    return sharding.shard_batch(mesh, frames[videos, times])


@functools.partial(jax.jit, static_argnames="mesh")
def _taken_on_devices(
    frames: jax.Array, videos: jax.Array, times: jax.Array, *, mesh: Mesh
) -> jax.Array:
    return jax.lax.with_sharding_constraint(frames[videos, times], sharding.batch_sharding(mesh))
