"""The LAION aesthetic predictor (spec/rewards.md 8): how beautiful the frames of a video are,
whatever the prompt.

The published code takes single pictures; of a video, frames are scored, and their mean is the
reward (14.11).
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from astrolabe_jax import sharding
from astrolabe_jax.convert import reward_store
from astrolabe_jax.convert.clip import AESTHETIC
from astrolabe_jax.models import layers
from astrolabe_jax.rewards import Scorer, Setting
from astrolabe_jax.rewards.images import normalised, resize
from astrolabe_jax.rewards.pooling import check_options, mapped


def load(
    names: Sequence[str],
    setting: Setting,
    path: str,
    frame_stride: int = 8,
    frames_per_batch: int = 32,
    dtype: str = "float32",
) -> Scorer:
    """The scorer of a reward directory: {name: [B]}, usually 4 to 7.

    path: directory that `python -m astrolabe_jax.convert reward aesthetic` wrote. frame_stride:
    score every so many frames, from the first on. dtype: of the activations. Raises ValueError or
    OSError naming the file or the option.
    """
    check_options(frame_stride=frame_stride, frames_per_batch=frames_per_batch)
    graphdef, params, config = reward_store.read(Path(path), AESTHETIC, setting.mesh, dtype)
    judge = functools.partial(_scores, graphdef, size=config.image_size, mesh=setting.mesh)

    def score(params: Any, frames: Any, prompts: Sequence[str]) -> dict[str, jax.Array]:
        del prompts
        times = np.arange(0, frames.shape[1], frame_stride)
        values = jnp.mean(
            mapped(judge, params, frames, times, frames_per_batch, setting.mesh), axis=1
        )
        return dict.fromkeys(names, values)

    return Scorer(score, params, reward_store.identity(Path(path)))


def prepared(images: jax.Array, size: int) -> jax.Array:
    """uint8 [N, h, w, 3] -> float32 [N, size, size, 3]: the shorter side is resized to `size`, the
    middle is cut out.

    As CLIPProcessor does it, with PIL; the longer side is rounded down.
    """
    short = min(images.shape[1:3])
    images = resize(images, tuple(size * side // short for side in images.shape[1:3]), "pil")
    top, left = ((side - size) // 2 for side in images.shape[1:3])
    return normalised(images[:, top : top + size, left : left + size])


@functools.partial(jax.jit, static_argnames=("graphdef", "size", "mesh"))
def _scores(graphdef: Any, params: Any, images: jax.Array, *, size: int, mesh: Mesh) -> jax.Array:
    def scores(params, images):
        return layers.merge(graphdef, params)(prepared(sharding.by_sample(images), size))

    return sharding.on_mesh(mesh, scores)(params, images)
