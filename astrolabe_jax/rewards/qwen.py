"""What the rewards on Qwen2-VL share: questions about pictures, in calls of few shapes
(spec/rewards.md 3, 4, 12).

A sample is some frames of a video and a question. Samples whose questions have one length, which
depends on nothing but the prompt, go through the net together, a fixed number at a time: what a
sample gets does not depend on the others.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from astrolabe_jax import sharding
from astrolabe_jax.models import layers
from astrolabe_jax.rewards import SampleError, chat, images


class View(NamedTuple):
    """How frames are prepared, by images.prepared."""

    size: tuple[int, int]  # height and width, multiples of 28
    rounding: str
    gray: bool = False


class Samples(NamedTuple):
    """N of them, in numpy arrays."""

    video: np.ndarray  # [N] int, its number among the videos
    times: np.ndarray  # [N, T] int, its frames
    question: np.ndarray  # [N] int, its number among the questions


def questions(
    talk: chat.Chat, prompts: Sequence[str], grid: tuple[int, int, int]
) -> list[chat.Question]:
    """One of each prompt; SampleError for a prompt that cannot be asked."""

    def ask(row: int, prompt: str) -> chat.Question:
        try:
            return chat.ask(talk, prompt, grid)
        except ValueError as error:
            raise SampleError(row, str(error)) from None

    return [ask(row, prompt) for row, prompt in enumerate(prompts)]


def evaluate(
    graphdef: Any,
    params: dict,
    frames: np.ndarray,
    asked: Sequence[chat.Question],
    samples: Samples,
    view: View,
    *,
    per_call: int,
    mesh: Mesh,
) -> np.ndarray:
    """The outputs float32 [N, outputs] of a RewardNet for N samples of the videos uint8 [B, time,
    height, width, 3].

    per_call: samples on each device. One call computes while the next is prepared.
    """
    found, waiting = {}, None
    for part in _calls(samples, asked, per_call * mesh.size):
        rows = np.resize(part, per_call * mesh.size)  # the last call of a length is filled up
        pictures = frames[samples.video[rows, None], samples.times[rows]]
        ids, where = (
            np.stack(arrays)
            for arrays in zip(*(asked[i] for i in samples.question[rows]), strict=True)
        )
        batch = sharding.shard_batch(mesh, [pictures, ids, where])
        outputs = _outputs(graphdef, params, *batch, view=view, mesh=mesh)
        if waiting:
            found |= _rows(*waiting)
        waiting = part, outputs
    found |= _rows(*waiting)
    return np.stack([found[i] for i in range(len(samples.video))])


def _calls(samples: Samples, asked: Sequence[chat.Question], size: int) -> Iterator[np.ndarray]:
    """Numbers of the samples of each call."""
    lengths = np.array([len(asked[i].ids) for i in samples.question])
    for length in np.unique(lengths):
        chosen = np.flatnonzero(lengths == length)
        yield from (chosen[start : start + size] for start in range(0, len(chosen), size))


def _rows(part: np.ndarray, outputs: jax.Array) -> dict[int, np.ndarray]:
    return dict(zip(part.tolist(), sharding.to_host(outputs), strict=False))


@functools.partial(jax.jit, static_argnames=("graphdef", "view", "mesh"))
def _outputs(
    graphdef: Any,
    params: dict,
    frames: jax.Array,
    ids: jax.Array,
    where: jax.Array,
    *,
    view: View,
    mesh: Mesh,
) -> jax.Array:
    """Frames uint8 [N, T, height, width, 3] and questions [N, L], [N, n] -> outputs, whole on every
    device.
    """

    def run(params, frames, ids, where):
        rows = images.prepared(sharding.by_sample(frames), *view, devices=mesh.size)
        grid = images.grid_of(frames.shape[1], *view.size)
        return layers.merge(graphdef, params)(sharding.by_sample(rows), grid, ids, where)

    return jax.lax.with_sharding_constraint(
        sharding.on_mesh(mesh, run)(params, frames, ids, where), sharding.replicated(mesh)
    )


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """ValueError naming the rewards that this loader does not have."""
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown {', '.join(unknown)}; expected {', '.join(known)}")
