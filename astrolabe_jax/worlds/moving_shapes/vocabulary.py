"""The prompts of the moving-shapes world: a combinatorial vocabulary with a held-out split.

A prompt reads "a red circle moving left quickly on a blue background"; without an adverb the speed
is medium. The held-out split contains every prompt of twelve combinations of colour, shape and
background that no training prompt has. Each pair of the three occurs in training, so that a
held-out prompt asks for something new whose parts are known.

The splits `long_train` (240 prompts) and `long_test` (96) ask for videos of LONG_FRAMES pixel
frames: a third of them is one prompt as above, whose shape bounces at the borders; the others are
two or three scenes of one shape, each with its duration except the last:

    a red circle moving left on a blue background[4.5s] | a red circle moving right quickly on a
    blue background

From scene to scene the direction, the speed or both change, in `long_train` also the colour alone.
(`long_test` has held-out combinations only, and each shape and background has just one held-out
colour.) Durations are multiples of SCENE_FRAMES, which is a window of 9 latent frames.
"""

import collections
import functools
import itertools
import operator
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 190, 60),
    "blue": (40, 70, 230),
    "yellow": (245, 220, 40),
    "magenta": (220, 50, 210),
    "cyan": (40, 215, 225),
}
BACKGROUNDS = {
    "black": (12, 12, 12),
    "white": (244, 244, 244),
    "grey": (128, 128, 128),
    "blue": COLOURS["blue"],
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
# unit steps (x, y); y grows downwards
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# pixels per frame; the middle speed has no word
SPEEDS = {"slowly": 0.25, "": 0.5, "quickly": 0.85}

# pixel frames of the shortest scene of a long video, 3 less where the video begins: 9 latent frames
SCENE_FRAMES = 36
LONG_UNITS = 7  # that many shortest scenes make a long video
# its pixel frames: the first latent frame is one pixel frame, not four
LONG_FRAMES = LONG_UNITS * SCENE_FRAMES - 3
FPS = 16  # pixel frames a second
LONG_SPLITS = {"long_train": 240, "long_test": 96}  # videos
# What a new scene of a long video changes: one of these.
CHANGES = (("direction",), ("speed",), ("direction", "speed"), ("colour",))


class Attributes(NamedTuple):
    """What a prompt asks for; each field is a key of the table of the same name above."""

    colour: str
    shape: str
    direction: str
    speed: str
    background: str


def to_prompt(attributes: Attributes) -> str:
    """Return the prompt of these attributes."""
    colour, shape, direction, speed, background = attributes
    motion = f"{direction} {speed}".strip()
    return f"a {colour} {shape} moving {motion} on a {background} background"


def all_attributes() -> list[Attributes]:
    """Return every combination but a shape of its background's colour, in a fixed order."""
    return [
        Attributes(*values)
        for values in itertools.product(COLOURS, SHAPES, DIRECTIONS, SPEEDS, BACKGROUNDS)
        if values[0] != values[-1]
    ]


_BY_PROMPT = {to_prompt(attributes): attributes for attributes in all_attributes()}


def parse(prompt: str) -> Attributes:
    """Return the attributes of a prompt; raise ValueError, with the form, for anything else."""
    try:
        return _BY_PROMPT[" ".join(prompt.split())]
    except KeyError:
        raise ValueError(
            f"not a prompt of the moving-shapes world: {prompt!r}; expected 'a COLOUR SHAPE moving "
            f"DIRECTION [SPEED] on a BACKGROUND background' with colours {', '.join(COLOURS)}; "
            f"shapes {', '.join(SHAPES)}; directions {', '.join(DIRECTIONS)}; speeds slowly, "
            f"quickly or none; backgrounds {', '.join(BACKGROUNDS)}; shape and background of "
            "different colours"
        ) from None


def held_out(attributes: Attributes) -> bool:
    """Return whether this combination of colour, shape and background is kept from training.

    A diagonal cut through the cube of combinations: two of each colour, four of each shape, three
    of each background.
    """
    colour = list(COLOURS).index(attributes.colour)
    shape = SHAPES.index(attributes.shape)
    background = list(BACKGROUNDS).index(attributes.background)
    return (colour + 2 * shape + background) % len(COLOURS) == 0


def prompts(split: str) -> list[str]:
    """Return all prompts of a split, in a fixed order.

    Splits are `train`, `test` (held-out combinations), `long_train` and `long_test`, whose prompts
    may have scenes (module docstring). Raises ValueError for another one.
    """
    if split in LONG_SPLITS:
        return [_to_scenes(video) for video in _long_videos(split)]
    if split not in ("train", "test"):
        known = ", ".join(map(repr, ("train", "test", *LONG_SPLITS)))
        raise ValueError(f"unknown split {split!r} of moving_shapes; expected one of {known}")
    return [to_prompt(attributes) for attributes in _of_split(split)]


def long_scenes(split: str) -> list[list[tuple[str, int]]]:
    """Return the scenes, (plain prompt, pixel frames), of each prompt of a long split.

    They add up to LONG_FRAMES.
    """
    videos = []
    for video in _long_videos(split):
        scenes = [(to_prompt(attributes), units * SCENE_FRAMES) for attributes, units in video]
        prompt, frames = scenes[0]
        scenes[0] = (prompt, frames - 3)  # the first latent frame is one pixel frame, not four
        videos.append(scenes)
    return videos


def _of_split(split: str) -> list[Attributes]:
    test = split == "test"
    return [attributes for attributes in _BY_PROMPT.values() if held_out(attributes) == test]


@functools.cache
def _long_videos(split: str) -> tuple[tuple[tuple[Attributes, int], ...], ...]:
    """Return videos of one, two and three scenes by turns.

    A scene is its attributes and its length in multiples of SCENE_FRAMES. All draws are
    `random.random`, the one function whose values Python promises to keep for a seed.
    """
    draw = random.Random(split).random
    pool = _of_split(split.removeprefix("long_"))

    def pick(options: Sequence) -> Any:
        return options[int(draw() * len(options))]

    def next_scene(last: Attributes) -> Attributes:
        by_change = collections.defaultdict(list)
        for attributes in pool:
            by_change[_differing(last, attributes)].append(attributes)
        return pick(pick([by_change[change] for change in CHANGES if change in by_change]))

    shuffled = sorted(pool, key=lambda _: draw())
    videos = []
    for number, first in enumerate(shuffled[: LONG_SPLITS[split]]):
        scenes = [first]
        for _ in range(number % 3):
            scenes.append(next_scene(scenes[-1]))
        cuts = pick(list(itertools.combinations(range(1, LONG_UNITS), len(scenes) - 1)))
        lengths = [stop - start for start, stop in itertools.pairwise((0, *cuts, LONG_UNITS))]
        videos.append(tuple(zip(scenes, lengths, strict=True)))
    return tuple(videos)


def _differing(a: Attributes, b: Attributes) -> tuple[str, ...]:
    """Return the names of the fields in which they differ."""
    return tuple(itertools.compress(Attributes._fields, map(operator.ne, a, b)))


def _to_scenes(video: tuple[tuple[Attributes, int], ...]) -> str:
    """Return the scene string of a long video."""
    *first, (last, _) = video
    scenes = [
        f"{to_prompt(attributes)}[{units * SCENE_FRAMES / FPS:g}s]" for attributes, units in first
    ]
    return " | ".join([*scenes, to_prompt(last)])
