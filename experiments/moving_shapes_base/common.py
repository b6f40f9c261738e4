"""Parts that all stages of the base model share: resumable training, and batches of the world's
clips.
"""

import io
import itertools
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import flags, logging
from flax import serialization
from optax.contrib import MuonDimensionNumbers, muon

from astrolabe_jax.runtime.files import write_atomic
from astrolabe_jax.worlds.moving_shapes import render, vocabulary


def check_recipe(directory: Path, stage: str, names: Mapping[str, object]) -> None:
    """Raise unless the states in a directory are of these constants and flags.

    They are kept in its file `STAGE.recipe`, which is written if there is none.

    Args:
      directory: of the states.
      stage: its name.
      names: the namespace of the stage's module. Its upper-case names count, except those of paths.

    Raises:
      ValueError: naming what changed.
    """
    path = directory / f"{stage}.recipe"
    recipe = {}
    for name, value in names.items():
        if name.startswith("_") or not name.isupper() or name in ("DIRECTORY", "OUTPUT"):
            continue
        recipe[name] = repr(value.value if isinstance(value, flags.FlagHolder) else value)
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(recipe, indent=1).encode())
    before = json.loads(path.read_bytes())
    changed = sorted(
        key for key in before.keys() | recipe.keys() if before.get(key) != recipe.get(key)
    )
    if changed:
        raise ValueError(
            f"{path}: {', '.join(changed)} changed since; restore them or take another --directory"
        )


def optimizer(
    muon_rate: float, adam_rate: float, steps: int, kernel_ndim: int, end: float = 0.02
) -> optax.GradientTransformation:
    """Return Muon for kernels and Adam for all else, with warm-up and cosine decay.

    A kernel is a matrix from all its input axes to the last one. On the autoencoder Muon reached in
    100 steps what Adam did not reach in 200.

    Args:
      muon_rate: peak learning rate of kernels.
      adam_rate: peak learning rate of all else.
      steps: length of the schedule.
      kernel_ndim: axes of a kernel; axes before them stack layers.
      end: last learning rate, as a fraction of the peak.
    """

    def rates(peak):
        return optax.warmup_cosine_decay_schedule(
            0.0, peak, min(50, steps // 10), steps, end * peak
        )

    def matrices(params):
        def numbers(path, x):
            if path[-1].key != "kernel":
                return None
            inputs = range(max(x.ndim - kernel_ndim, 0), x.ndim - 1)
            return MuonDimensionNumbers(tuple(inputs), x.ndim - 1)

        return jax.tree_util.tree_map_with_path(numbers, params)

    rule = muon(
        rates(muon_rate),
        consistent_rms=0.2,
        adam_b2=0.99,
        adam_learning_rate=rates(adam_rate),
        muon_weight_dimension_numbers=matrices,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), rule)


def descent(
    loss_and_metrics: Callable, optimizer: optax.GradientTransformation, average_decay: float
) -> Callable:
    """Return a jitted `(state, *args) -> (state, metrics)` that takes one step down a loss.

    The state is (params, moments, average); the average of the parameters is what is kept in the
    end.

    Args:
      loss_and_metrics: `(params, *args) -> (loss, metrics)`.
      optimizer: of the step.
      average_decay: of the average, per step.
    """

    @jax.jit
    def update(state, *args):
        params, moments, average = state
        gradients, metrics = jax.grad(loss_and_metrics, has_aux=True)(params, *args)
        changes, moments = optimizer.update(gradients, moments, params)
        params = optax.apply_updates(params, changes)
        average = optax.incremental_update(params, average, 1 - average_decay)
        return (params, moments, average), metrics

    return update


def save_array(path: Path, array: np.ndarray) -> None:
    """Write `array` as a .npy file, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomic(path, buffer.getvalue())


# Wider than the world's, so that a shape which a generator puts elsewhere is drawn all the same.
JITTER = 2 * render.JITTER


def train(
    path: Path, state: Any, step: Callable, steps: int, save_every: int = 100, log_every: int = 25
) -> Any:
    """Run a training loop and return its final state.

    Args:
      path: of the saved state; the loop resumes from it if it is there.
      state: of step 0.
      step: `(state, i) -> (state, metrics)`. It must draw all that it needs from the step number i,
        so that a resumed run equals an unbroken one.
      steps: in all.
      save_every: steps between two saves.
      log_every: steps between two lines of the log.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    first = 0
    if path.exists():
        saved: Any = serialization.msgpack_restore(path.read_bytes())
        first = int(saved["step"])
        state = serialization.from_state_dict(state, saved["state"])
        logging.info("%s: resuming at step %d of %d", path.name, first, steps)
    start = time.monotonic()
    for i in range(first, steps):
        state, metrics = step(state, i)
        done = i + 1
        if done % log_every == 0 or done == steps:
            seconds = (time.monotonic() - start) / (done - first)
            logging.info(
                "%s %d/%d %s %.2f s/step, %.1f min left",
                path.name,
                done,
                steps,
                " ".join(f"{name} {float(value):.4f}" for name, value in metrics.items()),
                seconds,
                seconds * (steps - done) / 60,
            )
        if done % save_every == 0 or done == steps:
            host = serialization.to_state_dict(jax.device_get(state))
            write_atomic(path, serialization.msgpack_serialize({"step": done, "state": host}))
    return state


def random_clip(prompts: list[str], rng: np.random.Generator, cuts: bool = True) -> np.ndarray:
    """Draw a ground-truth video of full length, uint8 [T, SIZE, SIZE, 3].

    With `cuts` it has one to four scenes, which change at latent frames. They show an autoencoder
    more scenes for the same work, and teach it that the past may stop mattering.
    """
    scenes = int(rng.integers(1, 5)) if cuts else 1
    latent_frames = (render.FRAMES - 1) // 4
    bounds = np.sort(rng.choice(np.arange(1, latent_frames), scenes - 1, replace=False)) * 4 + 1
    videos = [
        render.sample(prompts[rng.integers(len(prompts))], rng, jitter=JITTER)
        for _ in range(scenes)
    ]
    edges = itertools.pairwise([0, *bounds, render.FRAMES])
    parts = [video[first:stop] for video, (first, stop) in zip(videos, edges, strict=True)]
    return np.concatenate(parts)


def clips(
    prompts: list[str], count: int, rng: np.random.Generator, cuts: bool = True
) -> np.ndarray:
    """Draw `count` random clips, uint8 [count, T, SIZE, SIZE, 3]."""
    return np.stack([random_clip(prompts, rng, cuts) for _ in range(count)])


TRAIN_PROMPTS = vocabulary.prompts("train")
ALL_PROMPTS = TRAIN_PROMPTS + vocabulary.prompts("test")
