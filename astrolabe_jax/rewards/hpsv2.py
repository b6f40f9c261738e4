"""HPSv2.1 (spec/rewards.md 7): how well people would like each frame as a picture of the prompt."""

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
from astrolabe_jax.convert.clip import HPSV2
from astrolabe_jax.models import clip, layers
from astrolabe_jax.models.clip_tokenizer import load_tokenizer, token_ids
from astrolabe_jax.rewards import Scorer, Setting
from astrolabe_jax.rewards.images import normalised, resize
from astrolabe_jax.rewards.pooling import check_options, mapped, top_mean

_PROMPTS = 8  # of a call, or the next multiple of the devices


def load(
    names: Sequence[str],
    setting: Setting,
    path: str,
    frame_stride: int = 1,
    frames_per_batch: int = 32,
    dtype: str = "float32",
) -> Scorer:
    """The scorer of a reward directory: {name: [B]}, usually 0.2 to 0.35, and {name/mean: [B]}, of
    all frames.

    The cosine of image and text features, per frame; the mean of the largest 30 % is the score.
    Prompts of more than
    77 tokens are cut, as when the model was trained.

    path: directory that `python -m astrolabe_jax.convert reward hpsv2` wrote. frame_stride: score
    every so many frames (the published code scores all; the mean of the largest 30 % is another
    statistic of fewer). dtype: of the activations. Raises ValueError or OSError naming the file or
    the option.
    """
    check_options(frame_stride=frame_stride, frames_per_batch=frames_per_batch)
    graphdef, params, config = reward_store.read(Path(path), HPSV2, setting.mesh, dtype)
    tokenizer = load_tokenizer(Path(path))
    if (rows := tokenizer.get_vocab_size()) > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {rows} tokens, the net {config.vocab_size}; copy CLIP's own"
        )
    images = functools.partial(_images, graphdef, size=config.image_size, mesh=setting.mesh)
    texts = functools.partial(_texts, graphdef, mesh=setting.mesh)

    def score(params: Any, frames: Any, prompts: Sequence[str]) -> dict[str, jax.Array]:
        ids = token_ids(tokenizer, prompts, config.text_len)
        times = np.arange(0, frames.shape[1], frame_stride)
        seen = mapped(images, params, frames, times, frames_per_batch, setting.mesh)
        cosines = _cosines(seen, _read(texts, params, ids, setting.mesh))
        values = {"": top_mean(cosines), "/mean": jnp.mean(cosines, axis=1)}
        return {f"{name}{part}": value for name in names for part, value in values.items()}

    return Scorer(score, params, reward_store.identity(Path(path)))


def prepared(images: jax.Array, size: int) -> jax.Array:
    """uint8 [N, h, w, 3] -> float32 [N, size, size, 3]: the longer side is resized to `size`, black
    fills the shorter.

    Half of the filling, rounded down, is above or left. It is there before the normalisation, and
    always: the published code leaves it out where the longer side has that size already (spec
    14.13).
    """
    scale = size / max(images.shape[1:3])
    inner = tuple(max(1, round(side * scale)) for side in images.shape[1:3])
    images = resize(images, inner, "torch")
    pads = [((size - side) // 2, size - side - (size - side) // 2) for side in inner]
    return normalised(jnp.pad(images, ((0, 0), *pads, (0, 0))))


def _read(texts: Any, params: Any, ids: np.ndarray, mesh: Mesh) -> jax.Array:
    """Ids [B, S] -> features [B, E], in calls of one shape."""
    size, found = -(-_PROMPTS // mesh.size) * mesh.size, []
    for start in range(0, len(ids), size):
        rows = np.minimum(np.arange(start, start + size), len(ids) - 1)
        found.append(texts(params, sharding.shard_batch(mesh, ids[rows])))
    return jnp.concatenate(found)[: len(ids)]


@functools.partial(jax.jit, static_argnames=("graphdef", "size", "mesh"))
def _images(graphdef: Any, params: Any, images: jax.Array, *, size: int, mesh: Mesh) -> jax.Array:
    def features(params, images):
        return clip.normalised(
            layers.merge(graphdef, params).vision(prepared(sharding.by_sample(images), size))
        )

    return sharding.on_mesh(mesh, features)(params, images)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"))
def _texts(graphdef: Any, params: Any, ids: jax.Array, *, mesh: Mesh) -> jax.Array:
    def features(params, ids):
        return clip.normalised(layers.merge(graphdef, params).text(ids))

    return sharding.on_mesh(mesh, features)(params, ids)


@jax.jit
def _cosines(seen: jax.Array, read: jax.Array) -> jax.Array:
    return jnp.einsum("bfe,be->bf", seen, read, precision=jax.lax.Precision.HIGHEST)
