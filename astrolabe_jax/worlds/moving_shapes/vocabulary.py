"""The prompts of the moving-shapes world: a combinatorial vocabulary with a held-out split.

A prompt reads "a red circle moving left quickly on a blue background"; without an adverb the speed is medium.
The held-out split contains every prompt of twelve combinations of colour, shape and background that no training
prompt has. Each pair of the three occurs in training, so that a held-out prompt asks for something new whose
parts are known.
"""

import itertools
from typing import NamedTuple

COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 190, 60),
    "blue": (40, 70, 230),
    "yellow": (245, 220, 40),
    "magenta": (220, 50, 210),
    "cyan": (40, 215, 225),
}
BACKGROUNDS = {"black": (12, 12, 12), "white": (244, 244, 244), "grey": (128, 128, 128), "blue": COLOURS["blue"]}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # unit steps (x, y); y grows downwards
SPEEDS = {"slowly": 0.25, "": 0.5, "quickly": 0.85}  # pixels per frame; the middle speed has no word


class Attributes(NamedTuple):
    """What a prompt asks for; each field is a key of the table of the same name above."""

    colour: str
    shape: str
    direction: str
    speed: str
    background: str


def to_prompt(attributes: Attributes) -> str:
    """The prompt of these attributes."""
    colour, shape, direction, speed, background = attributes
    motion = f"{direction} {speed}".strip()
    return f"a {colour} {shape} moving {motion} on a {background} background"


def all_attributes() -> list[Attributes]:
    """Every combination except a shape of its background's colour, in a fixed order."""
    combinations = itertools.product(COLOURS, SHAPES, DIRECTIONS, SPEEDS, BACKGROUNDS)
    return [Attributes(*values) for values in combinations if values[0] != values[-1]]


_BY_PROMPT = {to_prompt(attributes): attributes for attributes in all_attributes()}


def parse(prompt: str) -> Attributes:
    """Inverse of `to_prompt`; ValueError with the expected form for anything else."""
    try:
        return _BY_PROMPT[" ".join(prompt.split())]
    except KeyError:
        raise ValueError(
            f"not a prompt of the moving-shapes world: {prompt!r}; expected 'a COLOUR SHAPE moving DIRECTION [SPEED] "
            f"on a BACKGROUND background' with colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}; directions "
            f"{', '.join(DIRECTIONS)}; speeds slowly, quickly or none; backgrounds {', '.join(BACKGROUNDS)}; "
            "shape and background of different colours"
        ) from None


def held_out(attributes: Attributes) -> bool:
    """Whether this combination of colour, shape and background is kept from training.

    A diagonal cut through the cube of combinations: two of each colour, four of each shape, three of each background.
    """
    colour, shape, background = list(COLOURS), list(SHAPES), list(BACKGROUNDS)
    place = colour.index(attributes.colour) + 2 * shape.index(attributes.shape)
    return (place + background.index(attributes.background)) % len(COLOURS) == 0


def prompts(split: str) -> list[str]:
    """All prompts of `train` or `test` (held-out combinations), in a fixed order."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r} of moving_shapes; expected 'train' or 'test'")
    return [prompt for prompt, attributes in _BY_PROMPT.items() if held_out(attributes) == (split == "test")]


def words() -> list[str]:
    """Every word that occurs in a prompt, sorted."""
    return sorted({word for prompt in _BY_PROMPT for word in prompt.split()})
