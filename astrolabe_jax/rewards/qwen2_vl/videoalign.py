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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from astrolabe_jax.convert.nets import Net
from astrolabe_jax.rewards import directory
from astrolabe_jax.rewards.frames import check_counts
from astrolabe_jax.rewards.qwen2_vl import chat, patches, scoring
from astrolabe_jax.rewards.qwen2_vl.chat import VIDEOALIGN_ASPECTS as ASPECTS
from astrolabe_jax.rewards.qwen2_vl.weights import VIDEOALIGN
from astrolabe_jax.rewards.registry import Clip, Scorer, Setting, Work
from astrolabe_jax.runtime.files import local_directory

OVERALL = "videoalign"
# What each reward is the mean of.
NAMES = {f"videoalign_{aspect.lower()}": (aspect,) for aspect in ASPECTS} | {OVERALL: ASPECTS}
_MOTION = "MQ"
_PUBLISHED_FRAMES = 10
_PUBLISHED_SIZE = (336, 588)
_PUBLISHED_FACTS = {"fps": 2.0, "max_frame_pixels": 336 * 588}
_TEXT = 980  # tokens of the instruction and a long prompt


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


def select(
    shape: tuple[int, int, int], fps: float, published: bool, facts: Mapping[str, Any]
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Return (times, size): which frames of a video the net sees, and how large.

    Args:
      shape: frames, height and width of the video.
      fps: its frames a second.
      published: as of VideoAlignOptions.
      facts: of the reward directory: the frames that are taken of a second, and their most pixels.

    Raises:
      ValueError: for a video that cannot be scored.
    """
    length, height, width = shape
    if published:
        return patches.frame_indices(length, _PUBLISHED_FRAMES), _PUBLISHED_SIZE
    count = patches.sampled_count(length, fps, facts["fps"])
    size = patches.smart_resize(
        height,
        width,
        min_pixels=patches.SMALLEST_VIDEO,
        max_pixels=math.floor(facts["max_frame_pixels"]),
    )
    return patches.frame_indices(length, count), size


def work(names: Sequence[str], net: Net, clip: Clip, options: VideoAlignOptions) -> Iterator[Work]:
    """Yield what the rewards compute of a video, with the published facts."""
    shape = (clip.frames, clip.height, clip.width)
    times, size = select(shape, clip.fps, options.published, _PUBLISHED_FACTS)
    asked = scoring.Asked(1, (len(times), clip.height, clip.width), _TEXT, len(ASPECTS))
    passes = {
        part == _MOTION and not (options.published and name == OVERALL)
        for name in names
        for part in NAMES[name]
    }
    for gray in sorted(passes):
        preparation = patches.Preparation(size, "torch", gray)
        yield scoring.work(net, preparation, asked, options.videos_per_batch)


def load(names: tuple[str, ...], setting: Setting, options: VideoAlignOptions) -> Scorer:
    """Return the scorer of a reward directory.

    Raises:
      ValueError, OSError: naming the option or the file at fault.
    """
    if not 0 < setting.fps < math.inf:
        raise ValueError(f"fps is {setting.fps}; expected a positive number")
    path = local_directory(options.path)
    net = directory.read(path, VIDEOALIGN, setting.mesh, options.dtype)
    talk = chat.load(path, chat.VIDEOALIGN_TOKENS, chat.VIDEO, net.config.vocab_size)
    facts = _facts(path)
    mean, std = np.array([facts[name] for name in chat.VIDEOALIGN_SCALES]).reshape(-1, 2).T

    def score(params: Any, frames: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        times, size = select(frames.shape[1:4], setting.fps, options.published, facts)
        batch = scoring.QuestionBatch(
            frames,
            scoring.questions_of(talk, prompts, patches.grid_of(len(times), *size)),
            np.array([times]),
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
            normalised = ((outputs[:, 0] - mean) / std).astype(np.float32)
            return dict(zip(ASPECTS, normalised.T, strict=True))

        scores = {}
        for name in names:
            in_colour = options.published and name == OVERALL  # all parts of it
            parts = [aspects(part == _MOTION and not in_colour)[part] for part in NAMES[name]]
            scores[name] = np.mean(parts, axis=0)
        return scores

    return Scorer(score, net.params, directory.identity(path))


def _facts(path: Path) -> dict[str, Any]:
    """Return the facts of a reward directory; ValueError names those that are no numbers."""
    facts = directory.facts(path)
    names = ("fps", "max_frame_pixels", *chat.VIDEOALIGN_SCALES)
    if missing := [name for name in names if type(facts.get(name)) not in (int, float)]:
        raise ValueError(
            f"{path / directory.CONFIG} has no number {', '.join(missing)}; convert it again"
        )
    return facts
