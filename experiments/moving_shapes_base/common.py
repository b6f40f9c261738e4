"""What the stages of the base model share: resumable training state, and the world's clips as batches."""

import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from absl import logging
from flax import serialization

from astrolabe_jax.convert.files import write_atomic
from astrolabe_jax.worlds.moving_shapes import render, vocabulary


def train(path: Path, state, step: Callable, steps: int, save_every: int = 100, log_every: int = 25):
    """Runs `state, metrics = step(state, i)` up to `steps`, resuming from `path`; returns the final state.

    `step` must draw everything it needs from its step number, so that a resumed run equals an unbroken one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    first = 0
    if path.exists():
        saved = serialization.msgpack_restore(path.read_bytes())
        first, state = int(saved["step"]), serialization.from_state_dict(state, saved["state"])
        logging.info("%s: resuming at step %d of %d", path.name, first, steps)
    began = time.monotonic()
    for i in range(first, steps):
        state, metrics = step(state, i)
        if (i + 1) % log_every == 0 or i + 1 == steps:
            rate = (time.monotonic() - began) / (i + 1 - first)
            values = " ".join(f"{k} {float(v):.4f}" for k, v in metrics.items())
            left = rate * (steps - i - 1) / 60
            logging.info("%s %d/%d %s %.2f s/step, %.1f min left", path.name, i + 1, steps, values, rate, left)
        if (i + 1) % save_every == 0 or i + 1 == steps:
            host = serialization.to_state_dict(jax.device_get(state))
            write_atomic(path, serialization.msgpack_serialize({"step": i + 1, "state": host}))
    return state


def random_clip(prompts: list[str], rng: np.random.Generator, cuts: bool = True) -> np.ndarray:
    """One full-length ground-truth video uint8; with `cuts`, one to four scenes that change at latent frames.

    Cuts show an autoencoder more scenes for the same work, and teach it that the past may stop mattering.
    """
    scenes = int(rng.integers(1, 5)) if cuts else 1
    latent_frames = (render.FRAMES - 1) // 4
    bounds = np.sort(rng.choice(np.arange(1, latent_frames), scenes - 1, replace=False)) * 4 + 1
    videos = [render.sample(prompts[rng.integers(len(prompts))], rng) for _ in range(scenes)]
    edges = [0, *bounds, render.FRAMES]
    return np.concatenate([v[a:b] for v, a, b in zip(videos, edges[:-1], edges[1:], strict=True)])


def clips(prompts: list[str], count: int, rng: np.random.Generator, cuts: bool = True) -> np.ndarray:
    """`count` random clips uint8 `[count, T, SIZE, SIZE, 3]`."""
    return np.stack([random_clip(prompts, rng, cuts) for _ in range(count)])


TRAIN_PROMPTS = vocabulary.prompts("train")
ALL_PROMPTS = TRAIN_PROMPTS + vocabulary.prompts("test")
