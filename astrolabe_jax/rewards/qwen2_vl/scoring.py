"""What the rewards on Qwen2-VL share: questions about frames of videos, in calls of few shapes.

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
from astrolabe_jax.rewards.qwen2_vl import patches
from astrolabe_jax.rewards.qwen2_vl.chat import Chat, Question, ask
from astrolabe_jax.rewards.qwen2_vl.patches import Preparation
from astrolabe_jax.rewards.registry import SampleError


class QuestionBatch(NamedTuple):
    """N samples: questions about frames of B videos; arrays are numpy's."""

    frames: np.ndarray  # [B, time, height, width, 3] uint8
    questions: Sequence[Question]
    video: np.ndarray  # [N] int, number of a sample's video
    times: np.ndarray  # [N, T] int, its frames
    question: np.ndarray  # [N] int, number of its question


def questions_of(chat: Chat, prompts: Sequence[str], grid: tuple[int, int, int]) -> list[Question]:
    """Return a question for each prompt; SampleError for a prompt that cannot be asked."""
    questions = []
    for row, prompt in enumerate(prompts):
        try:
            questions.append(ask(chat, prompt, grid))
        except ValueError as error:
            raise SampleError(row, str(error)) from None
    return questions


def evaluate(
    graphdef: Any,
    params: dict,
    batch: QuestionBatch,
    preparation: Preparation,
    *,
    per_call: int,
    mesh: Mesh,
) -> np.ndarray:
    """Return the outputs float32 [N, outputs] of a QwenRewardNet for N samples.

    One call computes while the next is prepared.

    Args:
      graphdef: of the net.
      params: of the net, on the mesh.
      batch: the samples.
      preparation: of their frames.
      per_call: samples on each device.
      mesh: of the devices.
    """
    size = per_call * mesh.size
    outputs: dict[int, np.ndarray] = {}
    computing: tuple[np.ndarray, jax.Array] | None = None
    for samples in _calls(batch, size):
        rows = np.resize(samples, size)  # the last call of a length is filled up
        pictures = batch.frames[batch.video[rows, None], batch.times[rows]]
        questions = [batch.questions[i] for i in batch.question[rows]]
        ids = np.stack([question.ids for question in questions])
        where = np.stack([question.where for question in questions])
        inputs = sharding.shard_batch(mesh, [pictures, ids, where])
        call = _outputs(graphdef, params, *inputs, preparation=preparation, mesh=mesh)
        if computing:
            outputs |= _by_sample(*computing)
        computing = samples, call
    if computing:
        outputs |= _by_sample(*computing)
    return np.stack([outputs[i] for i in range(len(batch.video))])


def _calls(batch: QuestionBatch, size: int) -> Iterator[np.ndarray]:
    """Yield the numbers of the samples of each call."""
    lengths = np.array([len(batch.questions[i].ids) for i in batch.question])
    for length in np.unique(lengths):
        samples = np.flatnonzero(lengths == length)
        for start in range(0, len(samples), size):
            yield samples[start : start + size]


def _by_sample(samples: np.ndarray, outputs: jax.Array) -> dict[int, np.ndarray]:
    """Return number of a sample -> its outputs; rows that only fill a call up are left out."""
    return dict(zip(samples.tolist(), sharding.to_host(outputs), strict=False))


@functools.partial(jax.jit, static_argnames=("graphdef", "preparation", "mesh"))
def _outputs(
    graphdef: Any,
    params: dict,
    frames: jax.Array,
    ids: jax.Array,
    where: jax.Array,
    *,
    preparation: Preparation,
    mesh: Mesh,
) -> jax.Array:
    """Return the outputs [N, outputs], whole on every device.

    frames: uint8 [N, T, height, width, 3]. ids [N, L] and where [N, n]: the questions.
    """

    def run(params, frames, ids, where):
        rows = patches.prepared(sharding.by_sample(frames), preparation, devices=mesh.size)
        grid = patches.grid_of(frames.shape[1], *preparation.size)
        return layers.merge(graphdef, params)(sharding.by_sample(rows), grid, ids, where)

    outputs = sharding.on_mesh(mesh, run)(params, frames, ids, where)
    return jax.lax.with_sharding_constraint(outputs, sharding.replicated(mesh))


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError naming the rewards that a loader does not have."""
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown {', '.join(unknown)}; expected {', '.join(known)}")
