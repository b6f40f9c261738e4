"""HPSv2.1: how well people would like each frame as a picture of the prompt.

    config.rewards.hpsv2 = {"weight": 1.0, "path": "rewards/hpsv2"}

The cosine of image and text features, for each frame; the mean of the largest 30 % is the score,
usually 0.2 to 0.35. Beside it `mean`, over all frames, is logged. Prompts of more than 77 tokens
are cut, as when the model was trained. See docs/rewards.md, HPSv2.1.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from astrolabe_jax import sharding
from astrolabe_jax.models import layers
from astrolabe_jax.rewards import directory
from astrolabe_jax.rewards.clip import net as clip
from astrolabe_jax.rewards.clip.tokenizer import load_tokenizer, token_ids
from astrolabe_jax.rewards.clip.weights import HPSV2
from astrolabe_jax.rewards.frames import check_counts, map_frames, top_mean
from astrolabe_jax.rewards.images import normalised, resize
from astrolabe_jax.rewards.registry import Scorer, Setting

_PROMPTS = 8  # of a call, or the next multiple of the devices


@dataclasses.dataclass(frozen=True)
class HPSv2Options:
    """Options of config.rewards.hpsv2; ValueError names one that cannot be."""

    path: str  # of a directory that `python -m astrolabe_jax.convert reward hpsv2` wrote
    # every so many frames are scored (the published code scores all; the mean of the largest 30 %
    # is another statistic of fewer)
    frame_stride: int = 1
    frames_per_batch: int = 32
    dtype: str = "float32"  # of the activations

    def __post_init__(self):
        check_counts(frame_stride=self.frame_stride, frames_per_batch=self.frames_per_batch)


def load(names: Sequence[str], setting: Setting, options: HPSv2Options) -> Scorer:
    """Return the scorer of a reward directory.

    Raises:
      ValueError, OSError: naming the file or the option at fault.
    """
    path = Path(options.path)
    graphdef, params, config = directory.read(path, HPSV2, setting.mesh, options.dtype)
    tokenizer = load_tokenizer(path)
    rows = tokenizer.get_vocab_size()
    if rows > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {rows} tokens, the net {config.vocab_size}; copy CLIP's own"
        )
    image_features = functools.partial(
        _image_features, graphdef, size=config.image_size, mesh=setting.mesh
    )
    text_features = functools.partial(_text_features, graphdef, mesh=setting.mesh)

    def score(params: Any, frames: Any, prompts: Sequence[str]) -> dict[str, jax.Array]:
        ids = token_ids(tokenizer, prompts, config.text_len)
        images = map_frames(
            image_features,
            params,
            frames,
            np.arange(0, frames.shape[1], options.frame_stride),
            per_call=options.frames_per_batch,
            mesh=setting.mesh,
        )
        texts = _map_texts(text_features, params, ids, setting.mesh)
        cosines = _cosines(images, texts)
        scores = {}
        for name in names:
            scores[name] = top_mean(cosines)
            scores[f"{name}/mean"] = jnp.mean(cosines, axis=1)
        return scores

    return Scorer(score, params, directory.identity(path))


def prepared(images: jax.Array, size: int) -> jax.Array:
    """Return images float32 [N, size, size, 3] of images uint8 [N, h, w, 3].

    The longer side is resized to `size`, and black fills the shorter: half of it, rounded down, is
    above or left. It is there before the normalisation, and always: the published code leaves it
    out where the longer side has that size already (docs/published.md, Rewards).
    """
    height, width = images.shape[1:3]
    scale = size / max(height, width)
    inner = (max(1, round(height * scale)), max(1, round(width * scale)))
    images = resize(images, inner, "torch")
    missing = [size - side for side in inner]
    rows, columns = ((count // 2, count - count // 2) for count in missing)
    return normalised(jnp.pad(images, ((0, 0), rows, columns, (0, 0))))


def _map_texts(text_features: Callable, params: Any, ids: np.ndarray, mesh: Mesh) -> jax.Array:
    """Return features [B, E] of ids [B, S], in calls of one shape."""
    size = -(-_PROMPTS // mesh.size) * mesh.size
    features = []
    for start in range(0, len(ids), size):
        rows = np.arange(start, start + size)
        rows = np.minimum(rows, len(ids) - 1)
        batch = sharding.shard_batch(mesh, ids[rows])
        features.append(text_features(params, batch))
    return jnp.concatenate(features)[: len(ids)]


@functools.partial(jax.jit, static_argnames=("graphdef", "size", "mesh"))
def _image_features(
    graphdef: Any, params: Any, images: jax.Array, *, size: int, mesh: Mesh
) -> jax.Array:
    def features(params, images):
        net = layers.merge(graphdef, params)
        images = prepared(sharding.by_sample(images), size)
        return clip.normalised(net.vision(images))

    return sharding.on_mesh(mesh, features)(params, images)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"))
def _text_features(graphdef: Any, params: Any, ids: jax.Array, *, mesh: Mesh) -> jax.Array:
    def features(params, ids):
        net = layers.merge(graphdef, params)
        return clip.normalised(net.text(ids))

    return sharding.on_mesh(mesh, features)(params, ids)


@jax.jit
def _cosines(images: jax.Array, texts: jax.Array) -> jax.Array:
    """Return [B, F] of features of images [B, F, E] and of texts [B, E]."""
    return jnp.einsum("bfe,be->bf", images, texts, precision=jax.lax.Precision.HIGHEST)
