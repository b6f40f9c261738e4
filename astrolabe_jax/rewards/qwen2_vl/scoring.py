"""What the rewards on Qwen2-VL share: questions about frames of videos, in calls of few shapes.

A sample is some frames of a video and a question. Samples whose questions have one length, which
depends on nothing but the prompt, go through the net together, a fixed number at a time: what a
sample gets does not depend on the others.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from astrolabe_jax import sharding
from astrolabe_jax.convert.nets import Net
from astrolabe_jax.models import layers
from astrolabe_jax.rewards.qwen2_vl import patches
from astrolabe_jax.rewards.qwen2_vl.chat import Chat, Question, ask
from astrolabe_jax.rewards.qwen2_vl.patches import Preparation
from astrolabe_jax.rewards.registry import SampleError, Work


class QuestionBatch(NamedTuple):
    """B questions, each about S choices of frames of its own video."""

    frames: np.ndarray  # [B, time, height, width, 3] uint8
    questions: Sequence[Question]
    times: np.ndarray  # [S, T] int, the frames of a choice


class Asked(NamedTuple):
    """The questions about a video, from their sizes."""

    questions: int
    shape: tuple[int, int, int]  # frames of a question, height, width
    text: int  # tokens of the instruction and a long prompt
    outputs: int  # tokens that are read


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
    """Return the outputs float32 [B, S, outputs] of a QwenRewardNet for B x S samples.

    Args:
      graphdef: of the net.
      params: of the net, on the mesh.
      batch: the samples.
      preparation: of their frames.
      per_call: samples on each device.
      mesh: of the devices.
    """
    size = per_call * mesh.size
    choices = len(batch.times)
    calls = list(_calls(batch, size))
    outputs = []
    for samples in calls:
        rows = np.resize(samples, size)  # the last call of a length is filled up
        videos = rows // choices
        pictures = batch.frames[videos[:, None], batch.times[rows % choices]]
        ids, where = map(np.stack, zip(*(batch.questions[i] for i in videos), strict=True))
        inputs = sharding.shard_batch(mesh, [pictures, ids, where])
        call = _outputs(graphdef, params, *inputs, preparation=preparation, mesh=mesh)
        outputs.append(call)
        jax.block_until_ready(outputs[-2:-1])  # one call computes while the next is prepared
    filled = zip(sharding.to_host(outputs), calls, strict=True)
    by_call = np.concatenate([output[: len(samples)] for output, samples in filled])
    return by_call[np.argsort(np.concatenate(calls))].reshape(-1, choices, by_call.shape[-1])


def _calls(batch: QuestionBatch, size: int) -> Iterator[np.ndarray]:
    """Yield the numbers of the samples of each call; those of a video follow one another."""
    lengths = np.repeat([len(question.ids) for question in batch.questions], len(batch.times))
    for length in np.unique(lengths):
        samples = np.flatnonzero(lengths == length)
        yield from np.split(samples, range(size, len(samples), size))


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

    run = functools.partial(_forward, graphdef, preparation, mesh.size)
    outputs = sharding.on_mesh(mesh, run)(params, frames, ids, where)
    return jax.lax.with_sharding_constraint(outputs, sharding.replicated(mesh))


def _forward(
    graphdef: Any,
    preparation: Preparation,
    devices: int,
    params: dict,
    frames: jax.Array,
    ids: jax.Array,
    where: jax.Array,
) -> jax.Array:
    rows = patches.prepared(sharding.by_sample(frames), preparation, devices=devices)
    grid = patches.grid_of(frames.shape[1], *preparation.size)
    return layers.merge(graphdef, params)(sharding.by_sample(rows), grid, ids, where)


def work(net: Net, preparation: Preparation, asked: Asked, per_call: int) -> Work:
    """Return what `evaluate` computes of the questions about a video, on one device."""
    frames, height, width = asked.shape
    grid = patches.grid_of(frames, *preparation.size)
    tokens = asked.text + math.prod(grid) // 4
    return Work(
        functools.partial(_forward, net.graphdef, preparation, 1),
        (
            jax.ShapeDtypeStruct((per_call, frames, height, width, 3), np.uint8),
            jax.ShapeDtypeStruct((per_call, tokens), np.int32),
            jax.ShapeDtypeStruct((per_call, asked.outputs), np.int32),
        ),
        asked.questions / per_call,
    )
