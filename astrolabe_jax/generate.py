"""Stages rollout, decode and rewards for a list of videos, one piece at a time: training and
evaluation alike.

A piece is a sampling batch, or as much of it as the devices may hold at once (config.piece). The
videos do not depend on how they are cut into pieces.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax import encode, sharding
from astrolabe_jax.config import piece
from astrolabe_jax.decode import decode
from astrolabe_jax.prepare import Run
from astrolabe_jax.report import Progress
from astrolabe_jax.rewards.panel import Scores
from astrolabe_jax.rewards.registry import RewardError
from astrolabe_jax.rollout import noise_from_keys, rollout
from astrolabe_jax.runtime import multihost
from astrolabe_jax.types import PromptBatch


class Videos(NamedTuple):
    """A piece. `latents` may go on beyond the B videos asked for, which filled it up."""

    latents: jax.Array  # [B or more, F, C, H, W]
    frames: np.ndarray  # [B, T, height, width, 3] uint8
    scores: Callable[[], Scores]  # waits for [B] of every reward, and of its parts as REWARD/PART


class Texts(NamedTuple):
    """The prompts of a batch as the transformer reads them."""

    embeddings: np.ndarray  # [G, S, E] of the distinct prompts
    row: np.ndarray  # [B] int32, each video's prompt


def encode_texts(run: Run, batch: PromptBatch, progress: Progress) -> Texts:
    """Encodes every distinct prompt once."""
    _, first, row = np.unique(batch.index, return_index=True, return_inverse=True)
    return Texts(
        encode_distinct(run, [batch.texts[i] for i in first], progress), row.astype(np.int32)
    )


def encode_distinct(run: Run, texts: Sequence[str], progress: Progress) -> np.ndarray:
    """Embeddings [G, S, E] of G prompts."""
    net = run.base.text
    with progress.phase("encode"):
        return encode.encode_prompts(
            net.graphdef, net.params, run.base.tokenizer, texts, net.config, run.mesh
        )


def generate(
    run: Run,
    adapter: dict,
    batch: PromptBatch,
    texts: Texts,
    keys: jax.Array,
    progress: Progress,
    what: str,
) -> Iterator[Videos]:
    """Samples, decodes and scores every video of `batch` with the policy `adapter`, from one key
    [B] per video.

    The next piece may be sampled before the scores of the last one are there
    (config.scoring.overlap). Raises RewardError for a reward that is not finite, from here or from
    Videos.scores, FloatingPointError for latents.
    """
    size, count = piece(run.config, run.config.sampler.batch, run.mesh.size), len(batch.texts)
    starts = range(0, count, size)
    for i, start in enumerate(starts):
        # the last piece is filled up
        videos = np.resize(np.arange(start, min(start + size, count)), size)
        with progress.phase("rollout"):
            placed = sharding.shard_batch(
                run.mesh, (texts.embeddings[texts.row[videos]], keys[videos])
            )
            latents = jax.block_until_ready(
                sample(run, run.base.transformer.params, adapter, *placed)
            )
        yield score(run, latents, batch.part(slice(start, start + size)), progress, start)
        progress.tick(what, i + 1, len(starts))


def score(
    run: Run, latents: jax.Array, batch: PromptBatch, progress: Progress, first: int
) -> Videos:
    """Decodes latents of at least B videos and scores the first B, those of `batch`.

    first: number of the first one among the videos of its epoch or evaluation, for errors, which
    are those of `generate`.
    """
    vae, numbers = run.base.vae, range(first, first + len(batch.texts))
    with progress.phase("decode"):
        refuse_non_finite(latents, batch.texts, numbers)
        frames = decode(
            vae.graphdef, vae.params, latents, chunk=run.config.video.decode_chunk, mesh=run.mesh
        )
        frames = sharding.to_host(frames)[: len(batch.texts)]
    return Videos(latents, frames, judge(run, frames, batch.texts, numbers, progress))


def judge(
    run: Run, frames: np.ndarray, texts: Sequence[str], numbers: Sequence[int], progress: Progress
) -> Callable[[], Scores]:
    """Begins to score B videos, which have these numbers in their epoch or evaluation; the result
    waits for [B].

    Both raise RewardError.
    """

    def counted(action: Callable) -> Any:
        with progress.phase("rewards"):
            try:
                return multihost.together(action)
            except RewardError as error:
                raise RewardError(f"{error}; nothing was learnt from these videos") from error

    waiting = counted(lambda: run.panel.score_async(frames, texts, numbers))
    return lambda: counted(waiting)


def joined(scores: Sequence[Callable[[], Scores]]) -> Scores:
    """Of several pieces, one after the other."""
    pieces = [wait() for wait in scores]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def refuse_non_finite(latents: jax.Array, texts: Sequence[str], numbers: Sequence[int]) -> None:
    """FloatingPointError that names the sample: decoded, such latents would be black frames, and
    scored as such.
    """
    fine = sharding.to_host(finite(latents))[: len(texts)]
    if len(bad := np.flatnonzero(~fine)):
        index = int(bad[0])
        others = f" and those of {len(bad) - 1} more" if len(bad) > 1 else ""
        raise FloatingPointError(
            f"the latents of sample {numbers[index]} (prompt {texts[index]!r}){others} are not "
            "finite; they were not scored; lower optimizer.learning_rate or use model.dtype=float32"
        )


@jax.jit
def finite(latents: jax.Array) -> jax.Array:
    """Whether each sample has finite numbers alone: [B, ...] -> [B] bool."""
    return jnp.isfinite(latents).all(axis=range(1, latents.ndim))


def sample(run: Run, params: dict, adapter: dict, text: jax.Array, keys: jax.Array) -> jax.Array:
    """The jitted rollout of a piece: latents [B, F, C, H, W] from text [B, S, E] and a key [B] per
    video.

    params: the transformer's, on the mesh.
    """
    return _rollout(
        run.base.transformer.graphdef,
        params,
        adapter,
        text,
        keys,
        mesh=run.mesh,
        latent_shape=run.latent_shape,
        layout=run.layout,
        sampler=run.sampler,
        lora_scale=run.lora_scale,
    )


@functools.partial(
    jax.jit, static_argnames=("graphdef", "mesh", "latent_shape", "layout", "sampler", "lora_scale")
)
def _rollout(
    graphdef: Any, params, adapter, text, keys, *, mesh, latent_shape, layout, sampler, lora_scale
) -> jax.Array:
    frames, channels, *latent_hw = latent_shape
    draw = noise_from_keys(keys, (channels, *latent_hw))
    latents, _ = sharding.on_mesh(mesh, rollout)(
        graphdef,
        params,
        adapter,
        text,
        draw,
        frames=frames,
        latent_hw=tuple(latent_hw),
        layout=layout,
        sampler=sampler,
        lora_scale=lora_scale,
    )
    return jax.lax.with_sharding_constraint(
        latents.astype(jnp.float32), sharding.batch_sharding(mesh)
    )
