"""The embedded worlds: where everything can be tried without real videos, prompts of people, or reward models."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from astrolabe_jax.worlds.moving_shapes import render, vocabulary


class World(NamedTuple):
    """What a run can ask of a world."""

    prompts: Callable[[str], list[str]]  # the prompts of a split; ValueError for an unknown one
    sample: Callable[[str, np.random.Generator, int], np.ndarray]  # a real video [T, height, width, 3] of a prompt
    check_frames: Callable[[Iterable[str], int], None]  # ValueError unless `sample` can show these prompts for T frames


WORLDS = {"moving_shapes": World(vocabulary.prompts, render.sample, render.check_frames)}
