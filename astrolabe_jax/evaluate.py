"""Scores a policy on held-out prompts: always the same prompts and noise, so that before and after
are comparable.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from astrolabe_jax import prompts, segments, sharding
from astrolabe_jax.advantages import total_reward
from astrolabe_jax.config import clip_length, eval_frames, piece, reward_weights
from astrolabe_jax.generate import encode_texts, generate, joined, judge, score
from astrolabe_jax.models import layers
from astrolabe_jax.prepare import Run, story_of
from astrolabe_jax.rewards.panel import Scores
from astrolabe_jax.runtime.progress import Progress
from astrolabe_jax.types import Evaluation, PromptBatch, RngStream


def held_out(run: Run) -> PromptBatch:
    """The videos of every evaluation of this run."""
    return prompts.held_out(run.test_prompts, run.config.seed, run.config.eval.videos)


def evaluate(
    run: Run, adapter: dict, progress: Progress, what: str
) -> tuple[Evaluation, np.ndarray]:
    """Scores of every held-out video, and the frames [eval.shown, T, height, width, 3] of the first
    ones.
    """
    batch, shown, parts, frames = held_out(run), run.config.eval.shown, [], []
    keys = prompts.sample_keys(batch, run.config.seed, RngStream.HELD_OUT, 0)

    def keep(scores: Any, pixels: np.ndarray) -> None:
        parts.append(scores)
        if sum(map(len, frames)) < shown:
            frames.append(pixels)

    if run.starts:
        length = _length(run)
        cast = segments.cast_of(run, batch, keys, length, progress)
        for pixels, scores in segments.watch(run, adapter, batch, cast, length, progress, what):
            keep(scores, pixels)
        return _total_of_windows(run, parts), np.concatenate(frames)[:shown]
    texts = encode_texts(run, batch, progress)
    for videos in generate(run, adapter, batch, texts, keys, progress, what):
        keep(videos.scores, videos.frames)
    return _total(run, parts), np.concatenate(frames)[:shown]


def ceiling(run: Run, progress: Progress) -> Evaluation | None:
    """Scores of real videos of the held-out prompts after a round trip through the VAE; None where
    there are none.

    A policy that imitates real videos perfectly would score this: its decoder can draw no better.
    """
    world = prompts.world_of(run.config.prompts.test)
    if world is None or not run.config.eval.ceiling:
        return None
    batch, size, parts = (
        held_out(run),
        piece(run.config, run.config.sampler.batch, run.mesh.size),
        [],
    )
    for start in range(0, len(batch.texts), size):
        part = batch.part(slice(start, start + size))
        videos = np.stack([world.sample(*_draw(run, part, j)) for j in range(len(part.texts))])
        padded = videos[np.resize(np.arange(len(videos)), size)]
        parts.append(
            (_ceiling_of_windows if run.starts else _ceiling_of_videos)(
                run, part, padded, start, progress
            )
        )
    return (_total_of_windows if run.starts else _total)(run, parts)


def _ceiling_of_videos(
    run: Run, part: PromptBatch, videos: np.ndarray, first: int, progress: Progress
) -> Callable[[], Scores]:
    vae = run.base.vae
    with progress.phase("encode"):
        latents, _ = _encode(
            vae.graphdef, vae.params, sharding.shard_batch(run.mesh, videos), None, mesh=run.mesh
        )
        latents = jax.block_until_ready(latents)
    return score(run, latents, part, progress, first).scores


def _ceiling_of_windows(
    run: Run, part: PromptBatch, videos: np.ndarray, first: int, progress: Progress
) -> list:
    vae, stride = run.base.vae, run.base.vae.config.temporal_stride
    stories = [story_of(run.config, run.layout, text, _length(run)) for text in part.texts]
    encoder = decoder = None
    scores = []
    for begin, stop in segments.windows(_length(run), clip_length(run.config)):
        clip = videos[:, max(stride * begin - stride + 1, 0) : stride * stop - stride + 1]
        with progress.phase("encode"):
            placed = sharding.shard_batch(run.mesh, clip)
            latents, encoder = _encode(vae.graphdef, vae.params, placed, encoder, mesh=run.mesh)
        with progress.phase("decode"):
            frames, decoder = segments.decoded(run, latents, decoder)
        block = segments.blocks_of(run, begin, stop)[0]
        texts = [story.prompts[story.steps[block].scene] for story in stories]
        numbers = range(first, first + len(texts))
        scores.append(judge(run, segments.on_host(frames)[: len(texts)], texts, numbers, progress))
    return scores


def _length(run: Run) -> int:
    """Latent frames of a held-out video."""
    return run.base.vae.config.latent_frames(eval_frames(run.config))


def _draw(
    run: Run, batch: PromptBatch, j: int
) -> tuple[list[tuple[str, int]], np.random.Generator]:
    """The scenes of a real video, each a prompt and its pixel frames, and what its path is drawn
    from.
    """
    rng = np.random.default_rng(
        [run.config.seed, RngStream.REAL, batch.index[j], batch.candidate[j]]
    )
    if not run.starts:
        return [(batch.texts[j], run.config.video.frames)], rng
    story, stride = (
        story_of(run.config, run.layout, batch.texts[j], _length(run)),
        run.base.vae.config.temporal_stride,
    )
    ends = [*(stride * change - stride + 1 for change in story.changes), eval_frames(run.config)]
    return [(p, int(n)) for p, n in zip(story.prompts, np.diff([0, *ends]), strict=True)], rng


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"))
def _encode(
    graphdef: Any, params: dict, frames: jax.Array, stream: Any, *, mesh: Mesh
) -> tuple[jax.Array, Any]:
    """The next frames [B, T, height, width, 3] uint8 -> latents [B, F, C, H, W], samples split over
    all devices.
    """

    def encode(params, frames, stream):
        pixels = sharding.by_sample(frames).astype("float32") / 127.5 - 1
        latents, stream = layers.merge(graphdef, params).encode(pixels, stream)
        return sharding.by_sample(latents), stream

    return sharding.on_mesh(mesh, encode)(params, frames, stream)


def _total(run: Run, parts: Sequence[Callable[[], Scores]]) -> Evaluation:
    scores, weights = joined(parts), reward_weights(run.config)
    values = {name: scores[name].astype(np.float64) for name in weights}
    return values | {"total": total_reward(values, weights)}


def _total_of_windows(run: Run, parts: list[list[Callable[[], Scores]]]) -> Evaluation:
    """Means over the windows of a video; `late` is the total over those in its second half,
    total/FRAME that of one.
    """
    length = _length(run)
    windows = [_total(run, pieces) for pieces in zip(*parts, strict=True)]
    begins = [first for first, _ in segments.windows(length, clip_length(run.config))]
    late = [
        w["total"] for first, w in zip(begins, windows, strict=True) if 2 * first >= length
    ] or [windows[-1]["total"]]
    result = {name: np.mean([window[name] for window in windows], axis=0) for name in windows[0]}
    result |= {"late": np.mean(late, axis=0)}
    return result | {f"total/{first}": w["total"] for first, w in zip(begins, windows, strict=True)}
