"""What the stages of the base model share: resumable training state, and the world's clips as
batches.
"""

import io
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
import optax
from absl import flags, logging
from flax import serialization
from optax.contrib import MuonDimensionNumbers, muon

from astrolabe_jax.runtime.files import write_atomic
from astrolabe_jax.worlds.moving_shapes import render, vocabulary


def check_recipe(directory: Path, stage: str, names: Mapping[str, object]) -> None:
    """Refuses to resume states that other constants or flags made; `STAGE.recipe` keeps those of
    the directory.

    Args:
      names: the stage's module namespace; its upper-case names count, where the flags are not
      paths.

    Raises:
      ValueError: naming what changed.
    """
    path = directory / f"{stage}.recipe"
    values = {
        k: v.value if isinstance(v, flags.FlagHolder) else v
        for k, v in names.items()
        if k[0] != "_" and k.isupper()
    }
    recipe = {k: repr(v) for k, v in values.items() if k not in ("DIRECTORY", "OUTPUT")}
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
    """Muon for kernels and Adam for the rest, with warm-up and cosine decay to `end` of the peaks.

    A kernel is a matrix from all its input axes to the last one; `kernel_ndim` axes make a kernel,
    those before stack layers. On the autoencoder Muon reached in 100 steps what Adam did not reach
    in 200.
    """

    def rates(peak):
        return optax.warmup_cosine_decay_schedule(
            0.0, peak, min(50, steps // 10), steps, end * peak
        )

    def matrices(params):
        def numbers(path, x):
            inputs = tuple(range(max(x.ndim - kernel_ndim, 0), x.ndim - 1))
            return MuonDimensionNumbers(inputs, x.ndim - 1) if path[-1].key == "kernel" else None

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
    of_params: Callable, optimizer: optax.GradientTransformation, average_decay: float
) -> Callable:
    """Jitted `(params, moments, average), *args -> (state, metrics)` that descends
    `of_params(params, *args)`.

    of_params: gives `(loss, metrics)`. average: of the parameters, what is kept in the end.
    """

    @jax.jit
    def update(state, *args):
        params, moments, average = state
        gradients, metrics = jax.grad(of_params, has_aux=True)(params, *args)
        changes, moments = optimizer.update(gradients, moments, params)
        params = optax.apply_updates(params, changes)
        return (
            params,
            moments,
            optax.incremental_update(params, average, 1 - average_decay),
        ), metrics

    return update


def save_array(path: Path, array: np.ndarray) -> None:
    """`array` as a .npy file that is there whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomic(path, buffer.getvalue())


# Wider than the world's, so that a shape which a generator puts elsewhere is drawn all the same.
JITTER = 2 * render.JITTER


def train(
    path: Path, state, step: Callable, steps: int, save_every: int = 100, log_every: int = 25
):
    """Runs `state, metrics = step(state, i)` up to `steps`, resuming from `path`; returns the final
    state.

    `step` must draw everything it needs from its step number, so that a resumed run equals an
    unbroken one.
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
            logging.info(
                "%s %d/%d %s %.2f s/step, %.1f min left",
                path.name,
                i + 1,
                steps,
                values,
                rate,
                left,
            )
        if (i + 1) % save_every == 0 or i + 1 == steps:
            host = serialization.to_state_dict(jax.device_get(state))
            write_atomic(path, serialization.msgpack_serialize({"step": i + 1, "state": host}))
    return state


def random_clip(prompts: list[str], rng: np.random.Generator, cuts: bool = True) -> np.ndarray:
    """One full-length ground-truth video uint8; with `cuts`, one to four scenes that change at
    latent frames.

    Cuts show an autoencoder more scenes for the same work, and teach it that the past may stop
    mattering.
    """
    scenes = int(rng.integers(1, 5)) if cuts else 1
    latent_frames = (render.FRAMES - 1) // 4
    bounds = np.sort(rng.choice(np.arange(1, latent_frames), scenes - 1, replace=False)) * 4 + 1
    videos = [
        render.sample(prompts[rng.integers(len(prompts))], rng, jitter=JITTER)
        for _ in range(scenes)
    ]
    edges = [0, *bounds, render.FRAMES]
    return np.concatenate([v[a:b] for v, a, b in zip(videos, edges[:-1], edges[1:], strict=True)])


def clips(
    prompts: list[str], count: int, rng: np.random.Generator, cuts: bool = True
) -> np.ndarray:
    """`count` random clips uint8 `[count, T, SIZE, SIZE, 3]`."""
    return np.stack([random_clip(prompts, rng, cuts) for _ in range(count)])


TRAIN_PROMPTS = vocabulary.prompts("train")
ALL_PROMPTS = TRAIN_PROMPTS + vocabulary.prompts("test")
