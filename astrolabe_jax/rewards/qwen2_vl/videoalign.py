"""VideoAlign: visual quality, motion quality and text alignment of a video, and their mean.

    config.rewards.videoalign_mq = {"weight": 1.0, "path": "rewards/videoalign"}

Scores are z-scores. Visual quality and text alignment are of the video as it is, motion quality is
of the video without colours: one forward for the first two, and one for motion, each only if it is
asked for. The prompt stands behind the tokens of visual and motion quality, which therefore do not
depend on it.

`videoalign` is the mean of the three rewards above. In the published code it is the mean of what
the coloured video gets for all three (in the original repository of the model, their sum):
`published` computes that. See docs/rewards.md, VideoAlign.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from astrolabe_jax.rewards import directory
from astrolabe_jax.rewards.frames import check_counts
from astrolabe_jax.rewards.qwen2_vl import chat, patches, scoring
from astrolabe_jax.rewards.qwen2_vl.chat import VIDEOALIGN_ASPECTS as ASPECTS
from astrolabe_jax.rewards.qwen2_vl.weights import VIDEOALIGN
from astrolabe_jax.rewards.registry import Scorer, Setting

OVERALL = "videoalign"
NAMES = {f"videoalign_{aspect.lower()}": aspect for aspect in ASPECTS}
_MOTION = "MQ"
_PUBLISHED_FRAMES = 10
_PUBLISHED_SIZE = (336, 588)


@dataclasses.dataclass(frozen=True)
class VideoAlignOptions:
    """Options of config.rewards.videoalign and its aspects; ValueError names one that cannot be."""

    path: str  # of a directory that `python -m astrolabe_jax.convert reward videoalign` wrote
    # 10 frames, however long the video is, of 336 x 588 pixels, whatever its shape; else 2 frames a
    # second in the size that fits the shape. The two agree for 81 frames of 480 x 832 at 16 a
    # second.
    published: bool = False
    videos_per_batch: int = 1  # on each device, at a time
    dtype: str = "bfloat16"  # of the computation; head and normalisation are float32

    def __post_init__(self):
        check_counts(videos_per_batch=self.videos_per_batch)
        if type(self.published) is not bool:
            raise ValueError(f"published is {self.published!r}; expected true or false")


class VideoInput(NamedTuple):
    """Which frames the net sees, and how large."""

    fps: float  # of the videos
    published: bool  # as of VideoAlignOptions
    rate: float  # frames that are taken of a second
    max_pixels: float  # of a frame

    def select(
        self, length: int, height: int, width: int
    ) -> tuple[tuple[int, ...], tuple[int, int]]:
        """Return (times, size) for a video of so many frames and pixels.

        Raises ValueError for a video that cannot be scored.
        """
        if self.published:
            return patches.frame_indices(length, _PUBLISHED_FRAMES), _PUBLISHED_SIZE
        count = patches.sampled_count(length, self.fps, self.rate)
        size = patches.smart_resize(
            height,
            width,
            min_pixels=patches.SMALLEST_VIDEO,
            max_pixels=math.floor(self.max_pixels),
        )
        return patches.frame_indices(length, count), size


def load(names: tuple[str, ...], setting: Setting, options: VideoAlignOptions) -> Scorer:
    """Return the scorer of a reward directory.

    Raises:
      ValueError, OSError: naming the option or the file at fault.
    """
    scoring.check_names(names, (*NAMES, OVERALL))
    if not 0 < setting.fps < math.inf:
        raise ValueError(f"fps is {setting.fps}; expected a positive number")
    path = Path(options.path)
    net = directory.read(path, VIDEOALIGN, setting.mesh, options.dtype)
    talk = chat.load(path, chat.VIDEOALIGN_TOKENS, chat.VIDEO, net.config.vocab_size)
    video_input = VideoInput(
        setting.fps, options.published, *_numbers(path, ("fps", "max_frame_pixels"))
    )
    mean = np.array(_numbers(path, [f"{aspect}_mean" for aspect in ASPECTS]))
    std = np.array(_numbers(path, [f"{aspect}_std" for aspect in ASPECTS]))

    def score(params: Any, frames: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        count, length, height, width = frames.shape[:4]
        times, size = video_input.select(length, height, width)
        batch = scoring.QuestionBatch(
            frames,
            scoring.questions_of(talk, prompts, patches.grid_of(len(times), *size)),
            np.arange(count),
            np.tile(times, (count, 1)),
            np.arange(count),
        )

        @functools.cache
        def aspects(gray: bool) -> dict[str, np.ndarray]:
            outputs = scoring.evaluate(
                net.graphdef,
                params,
                batch,
                patches.Preparation(size, "torch", gray),
                per_call=options.videos_per_batch,
                mesh=setting.mesh,
            )
            normalised = ((outputs - mean) / std).astype(np.float32)
            return dict(zip(ASPECTS, normalised.T, strict=True))

        scores = {}
        for name in names:
            if name == OVERALL:
                parts = [
                    aspects(aspect == _MOTION and not options.published)[aspect]
                    for aspect in ASPECTS
                ]
                scores[name] = np.mean(parts, axis=0)
            else:
                aspect = NAMES[name]
                scores[name] = aspects(aspect == _MOTION)[aspect]
        return scores

    return Scorer(score, net.params, directory.identity(path))


def _numbers(path: Path, names: Sequence[str]) -> list[float]:
    """Return facts of a reward directory; ValueError names those that are no numbers."""
    facts = directory.facts(path)
    if missing := [name for name in names if type(facts.get(name)) not in (int, float)]:
        raise ValueError(
            f"{path / directory.CONFIG} has no number {', '.join(missing)}; convert it again"
        )
    return [facts[name] for name in names]
