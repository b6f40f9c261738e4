"""Rewards of motion, from the optical flow between consecutive frames.

    config.rewards.dynamic_degree = {"weight": 1.0, "path": "rewards/sea_raft"}

Flow is seen by SEA-RAFT on levels 0..255, which it expects; the published code gives it [0, 1], on
which it sees almost nothing. One pass over the pairs of frames serves both rewards. See
docs/rewards.md, Dynamic degree.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax.convert.nets import Net
from astrolabe_jax.models import layers
from astrolabe_jax.rewards import directory, frames
from astrolabe_jax.rewards.flow.net import STRIDE, SeaRaft, block_means
from astrolabe_jax.rewards.flow.weights import SEA_RAFT
from astrolabe_jax.rewards.frames import check_counts, map_frames
from astrolabe_jax.rewards.registry import Clip, Scorer, Setting, Work
from astrolabe_jax.runtime.files import local_directory

DYNAMIC = "dynamic_degree"
SMOOTH = "motion_smoothness"
_OF_ONE_FRAME = {DYNAMIC: 0.0, SMOOTH: 1.0}
_LARGE = 0.15  # of the diagonal: motion that counts as 1
_STILL = 0.001  # of the diagonal: motion that is small beside what flow errs by


@dataclasses.dataclass(frozen=True)
class FlowOptions:
    """Options of config.rewards.dynamic_degree and motion_smoothness; ValueError names a bad one.

    A pair of frames takes 370 MB at 480 x 832, 207 of them correlations.
    """

    path: str  # of a directory that `python -m astrolabe_jax.convert reward sea_raft` wrote
    pairs_per_batch: int = 8  # pairs of frames that are seen at once
    published: bool = False  # see `dynamic_degree`

    def __post_init__(self):
        check_counts(pairs_per_batch=self.pairs_per_batch)


class Motion(NamedTuple):
    """What is kept of the flow of a pair of frames; leading axes [...] are those of the pairs.

    Lengths of flow are in units of 0.15 diagonals, `clipped` where they are 1 at most.
    """

    top: jax.Array  # [...], mean of the largest 5 % over all pixels
    top_clipped: jax.Array  # [...]
    mean_clipped: jax.Array  # [...], over all pixels
    field: jax.Array  # [..., h/8, w/8, 2], means of 8 x 8 pixels, in units of 8 pixels


def work(names: Any, net: Net, clip: Clip, options: FlowOptions) -> Iterator[Work]:
    """Yield what the rewards compute of the pairs of frames of a video."""
    del names
    pairs = max(clip.frames - 1, 0)
    yield frames.work(_motion, net.graphdef, clip, pairs, options.pairs_per_batch, following=2)


def load(names: Sequence[str], setting: Setting, options: FlowOptions) -> Scorer:
    """Return the scorer of a reward directory, for one of the two rewards or both.

    Raises:
      ValueError, OSError: naming the file or the option at fault.
    """
    path = local_directory(options.path)
    graphdef, params, _ = directory.read(
        path,
        SEA_RAFT,
        setting.mesh,
        "float32",
    )
    motion_between = functools.partial(
        layers.run,
        _motion,
        graphdef,
        mesh=setting.mesh,
    )

    def score(params: Any, frames: Any, prompts: Sequence[str]) -> dict[str, Any]:
        del prompts
        batch, count = frames.shape[:2]
        if count < 2:
            return {name: np.full(batch, _OF_ONE_FRAME[name], np.float32) for name in names}
        motion = map_frames(
            motion_between,
            params,
            frames,
            np.arange(count - 1),
            per_call=options.pairs_per_batch,
            mesh=setting.mesh,
            following=2,
        )
        scores = {
            DYNAMIC: dynamic_degree(motion, published=options.published),
            SMOOTH: smoothness(motion.field),
        }
        return {name: scores[name] for name in names}

    return Scorer(score, params, directory.identity(path))


def motion_of(flow: jax.Array) -> Motion:
    """Return what the rewards need of flow [N, height, width, 2] in pixels."""
    batch, height, width, _ = flow.shape
    lengths = jnp.linalg.norm(flow, axis=-1) / (_LARGE * math.hypot(height, width))
    lengths = lengths.reshape(batch, height * width)
    top, _ = jax.lax.top_k(lengths, max(1, math.floor(0.05 * height * width)))
    side = min(STRIDE, height, width)
    return Motion(
        jnp.mean(top, axis=1),
        jnp.mean(jnp.minimum(top, 1.0), axis=1),
        jnp.mean(jnp.minimum(lengths, 1.0), axis=1),
        block_means(flow, side) / side,
    )


@functools.partial(jax.jit, static_argnames="published")
def dynamic_degree(motion: Motion, *, published: bool = False) -> jax.Array:
    """Return [B] of motion [B, F] of consecutive pairs: much, not too much, and changing slowly.

    1.5 R_mag + R_temp, between 0 and 2.5. With a the mean over time of the largest 5 % of clipped
    lengths, R_mag = exp(-(a - 0.6)^2 / 0.08) (1 - clip((e - 1.2) / 1.2, 0, 1)) (1 - exp(-3 a) / 2);
    with b_t the mean clipped length, R_temp = exp(-10 mean |b_{t+1} - b_t|).

    e punishes motion of more than 1.2 units: it is what a would be of lengths that are not clipped.
    The published formula has e = a, which cannot exceed 1, so that the factor is always 1;
    `published` gives that. A video without motion has 1.0083317 either way, of which 1 is R_temp.
    See docs/published.md, Rewards.
    """
    a = jnp.mean(motion.top_clipped, axis=1)
    excess = a if published else jnp.mean(motion.top, axis=1)
    magnitude = jnp.exp(-jnp.square(a - 0.6) / (2 * 0.2**2))
    punishment = jnp.clip((excess - 1.2) / 1.2, 0, 1)
    magnitude = magnitude * (1 - punishment) * (1 - 0.5 * jnp.exp(-3 * a))
    changes = jnp.abs(jnp.diff(motion.mean_clipped, axis=1))
    steady = jnp.exp(-jnp.mean(changes, axis=1) / 0.1) if changes.shape[1] else jnp.ones_like(a)
    return 1.5 * magnitude + steady


@jax.jit
def smoothness(field: jax.Array) -> jax.Array:
    """Return [B] in [0, 1] of flow [B, F, h, w, 2] in units of its grid: is motion steady?

    The module of the published code is missing. As VBench's motion smoothness (Huang et al. 2024)
    does, this asks whether what happens next follows from constant velocity; VBench looks at frames
    that it interpolates, here a point's velocity f_t(x) is compared with the one that it has a
    frame later, g_t(x) = f_{t+1}(x + f_t(x)):

        mean over t of 1 - sum |g_t - f_t| / sum (|g_t| + |f_t| + c)

    over the points x that are still in the frame; c, a thousandth of the diagonal, outweighs what
    flow errs by where nothing moves, and is counted for all points. 1 for a video without motion,
    or where everything moves at one velocity, however fast; near 0 for fast motion that turns back
    in every frame; the same for a mirrored video. With fewer than two pairs there is nothing to
    compare, and it is 1.
    """
    batch, count, rows, columns, _ = field.shape
    if count < 2:
        return jnp.ones(batch, jnp.float32)
    here = field[:, :-1].reshape(-1, rows, columns, 2)
    after = field[:, 1:].reshape(-1, rows, columns, 2)
    later, inside = jax.vmap(_advected)(here, after)
    still = _STILL * math.hypot(rows, columns) * rows * columns

    def total(vectors: jax.Array) -> jax.Array:
        lengths = jnp.linalg.norm(vectors, axis=-1)
        return jnp.sum(jnp.where(inside, lengths, 0.0), axis=(1, 2))

    whole = total(later) + total(here) + still
    jitter = (total(later - here) / whole).reshape(batch, count - 1)
    return jnp.mean(1 - jitter, axis=1)


def _advected(here: jax.Array, after: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the flow `after` where each point is once it has moved, and whether that is inside.

    here, after: flow [h, w, 2] of consecutive pairs.
    """
    rows, columns = here.shape[:2]
    x = here[..., 0] + jnp.arange(columns, dtype=jnp.float32)[None, :]
    y = here[..., 1] + jnp.arange(rows, dtype=jnp.float32)[:, None]
    inside = (x >= 0) & (x <= columns - 1) & (y >= 0) & (y <= rows - 1)
    later = [
        jax.scipy.ndimage.map_coordinates(
            after[..., i],
            [y, x],
            order=1,
            mode="nearest",
        )
        for i in range(2)
    ]
    return jnp.stack(later, axis=-1), inside


def _motion(net: SeaRaft, first: jax.Array, second: jax.Array) -> Motion:
    return motion_of(net(first, second))
