"""HPSv3: how much people like the frames of a video, given its prompt (spec/rewards.md 3).

    config.rewards.hpsv3 = {"weight": 1.0, "path": "rewards/hpsv3"}

The reward is the mean over the best 30 % of the frames. Besides, under its name, `mean` over all
frames, and `uncertainty`, the mean over all frames of the deviation that the net was trained to
state.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from astrolabe_jax.convert import reward_store
from astrolabe_jax.convert.rewards import HPSV3, TOKENS
from astrolabe_jax.rewards import Scorer, Setting, chat, images, qwen
from astrolabe_jax.rewards.pooling import check_options, top_mean

NAME = "hpsv3"


def load(
    names: tuple[str, ...],
    setting: Setting,
    path: str,
    frame_stride: int = 1,
    frames_per_batch: int = 4,
    dtype: str = "bfloat16",
) -> Scorer:
    """The scorer of a reward directory.

    path: of the directory. frame_stride: every so many frames are scored; the mean over the best 30
    % of fewer frames is another statistic, and less expensive. frames_per_batch: on each device, at
    a time. dtype: of the computation. Raises ValueError or OSError naming the option or the file.
    """
    qwen.check_names(names, (NAME,))
    check_options(frame_stride=frame_stride, frames_per_batch=frames_per_batch)
    graphdef, first, config = reward_store.read(Path(path), HPSV3, setting.mesh, dtype)
    talk = chat.load(Path(path), TOKENS[HPSV3.name], chat.IMAGE, config.vocab_size)

    def score(params: Any, frames: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        count, length, height, width = frames.shape[:4]
        size = images.smart_resize(height, width)
        asked = qwen.questions(talk, prompts, images.grid_of(1, *size))
        picked = np.arange(0, length, frame_stride)
        video = np.repeat(np.arange(count), len(picked))
        samples = qwen.Samples(video, np.tile(picked, count)[:, None], video)
        outputs = qwen.evaluate(
            graphdef,
            params,
            frames,
            asked,
            samples,
            qwen.View(size, "pil"),
            per_call=frames_per_batch,
            mesh=setting.mesh,
        )
        scores, deviations = np.moveaxis(outputs.reshape(count, len(picked), 2), -1, 0)
        return {
            NAME: top_mean(scores),
            f"{NAME}/mean": scores.mean(axis=1),
            f"{NAME}/uncertainty": np.exp(deviations).mean(axis=1),
        }

    return Scorer(score, first, reward_store.identity(Path(path)))
