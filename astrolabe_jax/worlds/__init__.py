"""The embedded worlds: everything can be tried in them without real videos, prompts of people, or
reward models.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from astrolabe_jax.worlds.moving_shapes import render, vocabulary


class World(NamedTuple):
    """What a run can ask of a world."""

    prompts: Callable[[str], list[str]]  # the prompts of a split; ValueError for an unknown one
    # A real video [T, height, width, 3] of scenes after one another, each a prompt without scenes
    # and its pixel frames.
    sample: Callable[[Sequence[tuple[str, int]], np.random.Generator], np.ndarray]


WORLDS = {"moving_shapes": World(vocabulary.prompts, render.sample_scenes)}
