"""HPSv3: how much people like the frames of a video, given its prompt.

    config.rewards.hpsv3 = {"weight": 1.0, "path": "rewards/hpsv3"}

The reward is the mean over the best 30 % of the frames. Beside it are logged `mean`, over all
frames, and `uncertainty`, the mean over all frames of the deviation that the net was trained to
state. See docs/rewards.md, HPSv3.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from astrolabe_jax.convert.nets import Net
from astrolabe_jax.rewards import directory
from astrolabe_jax.rewards.frames import check_counts, top_mean
from astrolabe_jax.rewards.qwen2_vl import chat, patches, scoring
from astrolabe_jax.rewards.qwen2_vl.weights import HPSV3
from astrolabe_jax.rewards.registry import Clip, Scorer, Setting, Work
from astrolabe_jax.runtime.files import local_directory

NAME = "hpsv3"
_TEXT = 708  # tokens of the instruction and a long prompt


@dataclasses.dataclass(frozen=True)
class HPSv3Options:
    """Options of config.rewards.hpsv3; ValueError names one that cannot be."""

    path: str  # of a directory that `python -m astrolabe_jax.convert reward hpsv3` wrote
    # every so many frames are scored; the mean over the best 30 % of fewer frames is another
    # statistic, and less expensive
    frame_stride: int = 1
    frames_per_batch: int = 4  # on each device, at a time
    dtype: str = "bfloat16"  # of the computation

    def __post_init__(self):
        check_counts(frame_stride=self.frame_stride, frames_per_batch=self.frames_per_batch)


def work(names: Any, net: Net, clip: Clip, options: HPSv3Options) -> Iterator[Work]:
    """Yield what the reward computes of a video."""
    del names
    size = patches.smart_resize(clip.height, clip.width)
    count = len(range(0, clip.frames, options.frame_stride))
    asked = scoring.Asked(count, (1, clip.height, clip.width), _TEXT, 1)
    yield scoring.work(net, patches.Preparation(size, "pil"), asked, options.frames_per_batch)


def load(names: tuple[str, ...], setting: Setting, options: HPSv3Options) -> Scorer:
    """Return the scorer of a reward directory.

    Raises:
      ValueError, OSError: naming the option or the file at fault.
    """
    del names  # it has one
    path = local_directory(options.path)
    net = directory.read(path, HPSV3, setting.mesh, options.dtype)
    talk = chat.load(path, chat.HPSV3_TOKENS, chat.IMAGE, net.config.vocab_size)

    def score(params: Any, frames: np.ndarray, prompts: Sequence[str]) -> dict[str, Any]:
        length, height, width = frames.shape[1:4]
        size = patches.smart_resize(height, width)
        batch = scoring.QuestionBatch(
            frames,
            scoring.questions_of(talk, prompts, patches.grid_of(1, *size)),
            np.arange(0, length, options.frame_stride)[:, None],
        )
        outputs = scoring.evaluate(
            net.graphdef,
            params,
            batch,
            patches.Preparation(size, "pil"),
            per_call=options.frames_per_batch,
            mesh=setting.mesh,
        )
        scores, deviations = np.moveaxis(outputs, -1, 0)
        return {
            NAME: top_mean(scores),
            f"{NAME}/mean": scores.mean(axis=1),
            f"{NAME}/uncertainty": np.exp(deviations).mean(axis=1),
        }

    return Scorer(score, net.params, directory.identity(path))
