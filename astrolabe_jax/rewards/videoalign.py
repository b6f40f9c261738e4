"""VideoAlign: visual quality, motion quality and text alignment of a video, and their mean
(spec/rewards.md 4).

    config.rewards.videoalign_mq = {"weight": 1.0, "path": "rewards/videoalign"}

Scores are z-scores. Visual quality and text alignment are of the video as it is, motion quality of
the video without colours: one forward for the first two, and one for motion, each only if it is
asked for. The prompt stands behind the tokens of visual and motion quality, which therefore do not
depend on it.

`videoalign` is the mean of the three rewards above. In the published code it is the mean of what
the coloured video gets for all three (in the original repository of the model, their sum):
`published` computes that.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from astrolabe_jax.convert import reward_store
from astrolabe_jax.convert.rewards import ASPECTS, TOKENS, VIDEOALIGN
from astrolabe_jax.rewards import Scorer, Setting, chat, images, qwen
from astrolabe_jax.rewards.pooling import check_options

OVERALL = "videoalign"
NAMES = {f"videoalign_{aspect.lower()}": aspect for aspect in ASPECTS}
_PUBLISHED_FRAMES, _PUBLISHED_SIZE = 10, (336, 588)


def load(
    names: tuple[str, ...],
    setting: Setting,
    path: str,
    published: bool = False,
    videos_per_batch: int = 1,
    dtype: str = "bfloat16",
) -> Scorer:
    """The scorer of a reward directory.

    path: of the directory. published: 10 frames, however long the video is, of 336 x 588 pixels,
    whatever its shape; else 2 frames a second in the size that fits the shape. The two agree for 81
    frames of 480 x 832 at 16 a second. videos_per_batch: on each device, at a time. dtype: of the
    computation; head and normalisation are float32. Raises ValueError or OSError naming the option
    or the file.
    """
    qwen.check_names(names, (*NAMES, OVERALL))
    check_options(videos_per_batch=videos_per_batch)
    if type(published) is not bool:
        raise ValueError(f"published is {published!r}; expected true or false")
    if not 0 < setting.fps < math.inf:
        raise ValueError(f"fps is {setting.fps}; expected a positive number")
    graphdef, first, config = reward_store.read(Path(path), VIDEOALIGN, setting.mesh, dtype)
    talk = chat.load(Path(path), TOKENS[VIDEOALIGN.name], chat.VIDEO, config.vocab_size)
    input_of = _Input(setting.fps, published, *_facts(Path(path), ("fps", "max_frame_pixels")))
    mean, std = (
        np.array(_facts(Path(path), [f"{aspect}_{part}" for aspect in ASPECTS]))
        for part in ("mean", "std")
    )

    def score(params: Any, frames: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        count, length, height, width = frames.shape[:4]
        times, size = input_of(length, height, width)
        asked = qwen.questions(talk, prompts, images.grid_of(len(times), *size))
        samples = qwen.Samples(np.arange(count), np.tile(times, (count, 1)), np.arange(count))

        @functools.cache
        def aspects(gray: bool) -> dict[str, np.ndarray]:
            outputs = qwen.evaluate(
                graphdef,
                params,
                frames,
                asked,
                samples,
                qwen.View(size, "torch", gray),
                per_call=videos_per_batch,
                mesh=setting.mesh,
            )
            return dict(zip(ASPECTS, ((outputs - mean) / std).astype(np.float32).T, strict=True))

        found = {
            name: aspects(NAMES[name] == "MQ")[NAMES[name]] for name in names if name != OVERALL
        }
        if OVERALL in names:
            gray = {aspect: aspect == "MQ" and not published for aspect in ASPECTS}
            found[OVERALL] = np.mean([aspects(gray[aspect])[aspect] for aspect in ASPECTS], axis=0)
        return found

    return Scorer(score, first, reward_store.identity(Path(path)))


class _Input(NamedTuple):
    """Which frames the net sees, and how large."""

    fps: float  # of the videos
    published: bool
    rate: float  # frames that are taken of a second
    most: float  # pixels of a frame

    def __call__(
        self, length: int, height: int, width: int
    ) -> tuple[tuple[int, ...], tuple[int, int]]:
        """(times, size) for a video of so many frames and pixels; ValueError if it is none that can
        be scored.
        """
        if self.published:
            return images.frame_indices(length, _PUBLISHED_FRAMES), _PUBLISHED_SIZE
        times = images.frame_indices(length, images.sampled_count(length, self.fps, self.rate))
        limits = {"min_pixels": images.SMALLEST_VIDEO, "max_pixels": math.floor(self.most)}
        return times, images.smart_resize(height, width, **limits)


def _facts(directory: Path, names: Sequence[str]) -> list[float]:
    """Numbers of the directory's config.json; ValueError naming the one that is missing."""
    facts = reward_store.facts(directory)
    if missing := [name for name in names if type(facts.get(name)) not in (int, float)]:
        raise ValueError(
            f"{directory / reward_store.CONFIG} has no number {', '.join(missing)}; convert it "
            "again"
        )
    return [facts[name] for name in names]
