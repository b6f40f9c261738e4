"""Scores a policy on held-out prompts: always the same prompts and noise, so that before and after are comparable."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from astrolabe_jax import prompts, sharding
from astrolabe_jax.advantages import total_reward
from astrolabe_jax.config import piece
from astrolabe_jax.generate import encode_texts, generate, score
from astrolabe_jax.models import layers
from astrolabe_jax.prepare import Run
from astrolabe_jax.report import Progress
from astrolabe_jax.types import Evaluation, PromptBatch, Purpose


def held_out(run: Run) -> PromptBatch:
    """The videos of every evaluation of this run."""
    return prompts.held_out(run.test_prompts, run.config.seed, run.config.eval.videos)


def evaluate(run: Run, adapter: dict, progress: Progress, what: str) -> tuple[Evaluation, np.ndarray]:
    """Scores of every held-out video, and the frames [eval.shown, T, height, width, 3] of the first ones."""
    batch, shown = held_out(run), run.config.eval.shown
    parts, frames = [], []
    texts = encode_texts(run, batch, progress)
    keys = prompts.sample_keys(batch, run.config.seed, Purpose.HELD_OUT, 0)
    for videos in generate(run, adapter, batch, texts, keys, progress, what):
        parts.append(videos.scores)
        if sum(map(len, frames)) < shown:
            frames.append(videos.frames)
    return _total(run, parts), np.concatenate(frames)[:shown]


def ceiling(run: Run, progress: Progress) -> Evaluation | None:
    """Scores of real videos of the held-out prompts after a round trip through the VAE; None where there are none.

    A policy that imitates real videos perfectly would score this: its decoder can draw no better.
    """
    world = prompts.world_of(run.config.prompts.test)
    if world is None or not run.config.eval.ceiling:
        return None
    batch, size, parts = held_out(run), piece(run.config, run.config.sampler.batch, run.mesh.size), []
    for start in range(0, len(batch.texts), size):
        part = batch.part(slice(start, start + size))
        videos = np.stack([world.sample(*_draw(run, part, j)) for j in range(len(part.texts))])
        with progress.phase("encode"):
            padded = videos[np.resize(np.arange(len(videos)), size)]
            vae, placed = run.base.vae, sharding.shard_batch(run.mesh, padded)
            latents = jax.block_until_ready(_encode(vae.graphdef, vae.params, placed, mesh=run.mesh))
        parts.append(score(run, latents, part, progress, start).scores)
    return _total(run, parts)


def _draw(run: Run, batch: PromptBatch, j: int) -> tuple[list[tuple[str, int]], np.random.Generator]:
    place = [run.config.seed, Purpose.REAL, batch.index[j], batch.candidate[j]]
    return [(batch.texts[j], run.config.video.frames)], np.random.default_rng(place)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"))
def _encode(graphdef: Any, params: dict, frames: jax.Array, *, mesh: Mesh) -> jax.Array:
    """Frames [B, T, height, width, 3] uint8 -> latents [B, F, C, H, W], samples split over all devices."""

    def encode(params, frames):
        pixels = sharding.by_sample(frames).astype("float32") / 127.5 - 1
        return sharding.by_sample(layers.merge(graphdef, params).encode(pixels)[0])

    return sharding.on_mesh(mesh, encode)(params, frames)


def _total(run: Run, parts: list[dict[str, np.ndarray]]) -> Evaluation:
    values = {name: np.concatenate([part[name] for part in parts]).astype(np.float64) for name in run.config.rewards}
    return values | {"total": total_reward(values, dict(run.config.rewards))}
