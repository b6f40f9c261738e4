"""HPSv2.1 and the LAION aesthetic predictor, each a picture at a time.

    config.rewards.hpsv2 = {"weight": 1.0, "path": "rewards/hpsv2"}
    config.rewards.aesthetic = {"weight": 1.0, "path": "rewards/aesthetic"}

HPSv2.1 tells how well people would like each frame as a picture of the prompt. The cosine of image
and text features, for each frame; the mean of the largest 30 % is the score, usually 0.2 to 0.35.
Beside it `mean`, over all frames, is logged. Prompts of more than 77 tokens are cut, as when the
model was trained. See docs/rewards.md, HPSv2.1.

The aesthetic predictor tells how beautiful frames are, whatever the prompt. The published code
takes single pictures; of a video, frames are scored, and their mean, usually 4 to 7, is the reward.
See docs/rewards.md, Aesthetic.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from astrolabe_jax.convert.nets import Net
from astrolabe_jax.models import layers
from astrolabe_jax.rewards import directory, images
from astrolabe_jax.rewards.clip import net as clip
from astrolabe_jax.rewards.clip.tokenizer import load_tokenizer, token_ids
from astrolabe_jax.rewards.clip.weights import AESTHETIC, HPSV2
from astrolabe_jax.rewards.frames import check_counts, map_frames, top_mean, work
from astrolabe_jax.rewards.registry import Clip, Scorer, Setting, Work
from astrolabe_jax.runtime.files import local_directory

_PROMPTS = 8  # of a call, or the next multiple of the devices


@dataclasses.dataclass(frozen=True)
class CLIPOptions:
    """Options of config.rewards.hpsv2; ValueError names one that cannot be."""

    path: str  # of a directory that `python -m astrolabe_jax.convert reward` wrote for this reward
    # every so many frames are scored, from the first on (the published code of HPSv2 scores all;
    # the mean of the largest 30 % is another statistic of fewer)
    frame_stride: int = 1
    frames_per_batch: int = 32
    dtype: str = "float32"  # of the activations

    def __post_init__(self):
        check_counts(frame_stride=self.frame_stride, frames_per_batch=self.frames_per_batch)


@dataclasses.dataclass(frozen=True)
class AestheticOptions(CLIPOptions):
    """Options of config.rewards.aesthetic."""

    frame_stride: int = 8


def work_hpsv2(names: Any, net: Net, clip_: Clip, options: CLIPOptions) -> Iterator[Work]:
    """Yield what HPSv2.1 computes of the frames of a video; its prompt is little beside them."""
    del names
    yield _work(_image_features, net, clip_, options)


def work_aesthetic(names: Any, net: Net, clip_: Clip, options: CLIPOptions) -> Iterator[Work]:
    """Yield what the aesthetic predictor computes of a video."""
    del names
    yield _work(_scores, net, clip_, options)


def _work(function: Callable, net: Net, clip_: Clip, options: CLIPOptions) -> Work:
    count = len(range(0, clip_.frames, options.frame_stride))
    return work(function, net.graphdef, clip_, count, options.frames_per_batch)


def load_hpsv2(names: Sequence[str], setting: Setting, options: CLIPOptions) -> Scorer:
    """Return the scorer of a reward directory.

    Raises:
      ValueError, OSError: naming the file or the option at fault.
    """
    path = local_directory(options.path)
    graphdef, params, config = directory.read(
        path,
        HPSV2,
        setting.mesh,
        options.dtype,
    )
    tokenizer = load_tokenizer(path)
    rows = tokenizer.get_vocab_size()
    if rows > config.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {rows} tokens, the net {config.vocab_size}; copy CLIP's own"
        )
    image_features = functools.partial(
        layers.run,
        _image_features,
        graphdef,
        mesh=setting.mesh,
    )
    text_features = functools.partial(
        layers.run,
        _text_features,
        graphdef,
        mesh=setting.mesh,
    )

    def score(params: Any, frames: Any, prompts: Sequence[str]) -> dict[str, jax.Array]:
        # a row of tokens goes through as a video of one frame does
        ids = token_ids(tokenizer, prompts, config.text_len)[:, None]
        pictures = _map_strided(
            image_features,
            params,
            frames,
            options,
            setting.mesh,
        )
        texts = map_frames(
            text_features, params, ids, np.arange(1), per_call=_PROMPTS, mesh=setting.mesh
        )
        cosines = _cosines(pictures, texts)
        scores = {}
        for name in names:
            scores[name] = top_mean(cosines)
            scores[f"{name}/mean"] = jnp.mean(cosines, axis=1)
        return scores

    return Scorer(score, params, directory.identity(path))


def load_aesthetic(names: Sequence[str], setting: Setting, options: AestheticOptions) -> Scorer:
    """Return the scorer of a reward directory, as `load_hpsv2` does."""
    path = local_directory(options.path)
    graphdef, params, _ = directory.read(
        path,
        AESTHETIC,
        setting.mesh,
        options.dtype,
    )
    scores_of = functools.partial(
        layers.run,
        _scores,
        graphdef,
        mesh=setting.mesh,
    )

    def score(params: Any, frames: Any, prompts: Sequence[str]) -> dict[str, jax.Array]:
        del prompts
        scores = _map_strided(
            scores_of,
            params,
            frames,
            options,
            setting.mesh,
        )
        return dict.fromkeys(names, jnp.mean(scores, axis=1))

    return Scorer(score, params, directory.identity(path))


def on_black(pictures: jax.Array, size: int) -> jax.Array:
    """Return images float32 [N, size, size, 3] of pictures uint8 [N, h, w, 3], as HPSv2 sees them.

    The longer side is resized to `size`, and black fills the shorter: half of it, rounded down, is
    above or left. It is there before the normalisation, and always: the published code leaves it
    out where the longer side has that size already (docs/published.md, Rewards).
    """
    height, width = pictures.shape[1:3]
    scale = size / max(height, width)
    inner = (max(1, round(height * scale)), max(1, round(width * scale)))
    rows, columns = (((size - side) // 2, (size - side + 1) // 2) for side in inner)
    resized = images.resize(pictures, inner, "torch")
    return images.normalised(jnp.pad(resized, ((0, 0), rows, columns, (0, 0))))


def middle(pictures: jax.Array, size: int) -> jax.Array:
    """Return images float32 [N, size, size, 3] of pictures uint8 [N, h, w, 3], for aesthetics.

    The shorter side is resized to `size`, the longer one rounded down, and the middle is cut out,
    as CLIPProcessor does it with PIL.
    """
    height, width = pictures.shape[1:3]
    short = min(height, width)
    inner = (size * height // short, size * width // short)
    top, left = ((side - size) // 2 for side in inner)
    resized = images.resize(pictures, inner, "pil")
    return images.normalised(resized[:, top : top + size, left : left + size])


def _map_strided(
    function: Callable, params: Any, frames: Any, options: CLIPOptions, mesh: Mesh
) -> jax.Array:
    """Return `map_frames` of every so many frames, as the options say."""
    return map_frames(
        function,
        params,
        frames,
        np.arange(0, frames.shape[1], options.frame_stride),
        per_call=options.frames_per_batch,
        mesh=mesh,
    )


def _image_features(net: clip.CLIP, pictures: jax.Array) -> jax.Array:
    pixels = on_black(pictures, net.vision.config.image_size)
    return clip.normalised(net.vision(pixels))


def _text_features(net: clip.CLIP, ids: jax.Array) -> jax.Array:
    return clip.normalised(net.text(ids))


def _scores(net: clip.AestheticNet, pictures: jax.Array) -> jax.Array:
    return net(middle(pictures, net.vision.config.image_size))


@jax.jit
def _cosines(images: jax.Array, texts: jax.Array) -> jax.Array:
    """Return [B, F] of features of images [B, F, E] and of texts [B, 1, E]."""
    return jnp.einsum(
        "bfe,be->bf",
        images,
        texts[:, 0],
        precision=jax.lax.Precision.HIGHEST,
    )
