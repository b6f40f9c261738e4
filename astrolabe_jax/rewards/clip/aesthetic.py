"""The LAION aesthetic predictor: how beautiful the frames of a video are, whatever the prompt.

    config.rewards.aesthetic = {"weight": 1.0, "path": "rewards/aesthetic"}

The published code takes single pictures; of a video, frames are scored, and their mean, usually 4
to 7, is the reward. See docs/rewards.md, Aesthetic.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from astrolabe_jax import sharding
from astrolabe_jax.models import layers
from astrolabe_jax.rewards import directory
from astrolabe_jax.rewards.clip.weights import AESTHETIC
from astrolabe_jax.rewards.frames import check_counts, map_frames
from astrolabe_jax.rewards.images import normalised, resize
from astrolabe_jax.rewards.registry import Scorer, Setting


@dataclasses.dataclass(frozen=True)
class AestheticOptions:
    """Options of config.rewards.aesthetic; ValueError names one that cannot be."""

    path: str  # of a directory that `python -m astrolabe_jax.convert reward aesthetic` wrote
    frame_stride: int = 8  # every so many frames are scored, from the first on
    frames_per_batch: int = 32
    dtype: str = "float32"  # of the activations

    def __post_init__(self):
        check_counts(frame_stride=self.frame_stride, frames_per_batch=self.frames_per_batch)


def load(names: Sequence[str], setting: Setting, options: AestheticOptions) -> Scorer:
    """Return the scorer of a reward directory.

    Raises:
      ValueError, OSError: naming the file or the option at fault.
    """
    path = Path(options.path)
    graphdef, params, config = directory.read(path, AESTHETIC, setting.mesh, options.dtype)
    scores_of = functools.partial(_scores, graphdef, size=config.image_size, mesh=setting.mesh)

    def score(params: Any, frames: Any, prompts: Sequence[str]) -> dict[str, jax.Array]:
        del prompts
        scores = map_frames(
            scores_of,
            params,
            frames,
            np.arange(0, frames.shape[1], options.frame_stride),
            per_call=options.frames_per_batch,
            mesh=setting.mesh,
        )
        return dict.fromkeys(names, jnp.mean(scores, axis=1))

    return Scorer(score, params, directory.identity(path))


def prepared(images: jax.Array, size: int) -> jax.Array:
    """Return images float32 [N, size, size, 3] of images uint8 [N, h, w, 3].

    The shorter side is resized to `size`, the longer one rounded down, and the middle is cut out,
    as CLIPProcessor does it with PIL.
    """
    height, width = images.shape[1:3]
    short = min(height, width)
    inner = (size * height // short, size * width // short)
    images = resize(images, inner, "pil")
    top, left = ((side - size) // 2 for side in images.shape[1:3])
    images = images[:, top : top + size, left : left + size]
    return normalised(images)


@functools.partial(jax.jit, static_argnames=("graphdef", "size", "mesh"))
def _scores(graphdef: Any, params: Any, images: jax.Array, *, size: int, mesh: Mesh) -> jax.Array:
    def scores(params, images):
        net = layers.merge(graphdef, params)
        return net(prepared(sharding.by_sample(images), size))

    return sharding.on_mesh(mesh, scores)(params, images)
