"""Renders moving shapes: one shape on a plain background, moving steadily, with antialiased edges.

A shape that comes to the border is reflected there, so that a video may be of any length.
"""

from collections.abc import Sequence

import numpy as np

from astrolabe_jax.worlds.moving_shapes import vocabulary
from astrolabe_jax.worlds.moving_shapes.vocabulary import Attributes

SIZE = 48  # pixels, height and width
FRAMES = 33  # pixel frames of a short video: 9 latent frames
# a circle's radius and half a square's side plus one; a triangle is inscribed in 1.3 times this
# circle
RADIUS = 9.0
# How far a shape reaches from its centroid: left and right, up, down.
EXTENTS = {
    "circle": (RADIUS, RADIUS, RADIUS),
    "square": (RADIUS - 1, RADIUS - 1, RADIUS - 1),
    "triangle": (0.65 * 3**0.5 * RADIUS, 1.3 * RADIUS, 0.65 * RADIUS),
}
MARGIN = 0.25  # pixels that always remain between a shape and the border
# the middle of a path puts the shape at most this far from the frame's centre, per axis, in pixels
JITTER = 3.0


def bounds(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest (x, y) in pixels that the centre of a shape may take."""
    side, up, down = EXTENTS[shape]
    return np.array([side, up]) + MARGIN, SIZE - np.array([side, down]) - MARGIN


def sample_start(
    attributes: Attributes, rng: np.random.Generator, frames: int = FRAMES, jitter: float = JITTER
) -> np.ndarray:
    """Centre (x, y) at frame 0 of a path whose middle is uniform around the frame's centre, as far
    as it fits.

    Where `frames` do not fit between the borders, the path begins as one of FRAMES does.
    """
    step = _step(attributes)
    side, up, down = EXTENTS[attributes.shape]

    def room(frames):
        return (
            SIZE / 2 - np.array([side, (up + down) / 2]) - MARGIN - np.abs(step) * (frames - 1) / 2
        )

    straight = frames if (room(frames) >= 0).all() else FRAMES
    spread = rng.uniform(-1, 1, 2) * np.minimum(room(straight), jitter)
    return SIZE / 2 + np.array([0, (up - down) / 2]) + spread - step * (straight - 1) / 2


def bounce(attributes: Attributes, start: np.ndarray, frames: int) -> np.ndarray:
    """Centres `[T, 2]` as (x, y): steady from `start` at the asked velocity, reflected at the
    borders.
    """
    low, high = bounds(attributes.shape)
    straight = start + np.arange(frames)[:, None] * _step(attributes)
    turn = (straight - low) % (2 * (high - low))
    reflected = low + np.minimum(turn, 2 * (high - low) - turn)
    return np.where((straight < low) | (straight > high), reflected, straight)


def _step(attributes: Attributes) -> np.ndarray:
    """Pixels per frame (x, y)."""
    return (
        np.array(vocabulary.DIRECTIONS[attributes.direction]) * vocabulary.SPEEDS[attributes.speed]
    )


def edge_distance(shape: str, x, y, xp=np):
    """Signed distance in pixels to the shape's edge (negative inside), relative to its centre; y
    grows downwards.

    `xp` is the array module of `x` and `y` (numpy or jax.numpy), so that rewards measure the very
    shapes drawn here.
    """
    if shape == "circle":
        return xp.sqrt(x * x + y * y) - RADIUS
    if shape == "square":
        return xp.maximum(xp.abs(x), xp.abs(y)) - (RADIUS - 1)
    # equilateral, one corner up: three half planes at the inscribed circle's radius
    inner = 0.65 * RADIUS
    slope = xp.abs(x) * 3**0.5 / 2 - y / 2
    return xp.maximum(y, slope) - inner


def render(attributes: Attributes, centres: np.ndarray) -> np.ndarray:
    """Video uint8 `[T, SIZE, SIZE, 3]` of the shape at `centres`, `[T, 2]` as (x, y) in pixels."""
    pixel = np.arange(SIZE) + 0.5
    x, y = centres.T[:, :, None, None]
    distance = edge_distance(attributes.shape, pixel[None, None, :] - x, pixel[None, :, None] - y)
    coverage = np.clip(0.5 - distance, 0, 1)[..., None]
    colour = np.array(vocabulary.COLOURS[attributes.colour], float)
    background = np.array(vocabulary.BACKGROUNDS[attributes.background], float)
    return np.rint(coverage * colour + (1 - coverage) * background).astype(np.uint8)


def sample(
    prompt: str, rng: np.random.Generator, frames: int = FRAMES, jitter: float = JITTER
) -> np.ndarray:
    """A ground-truth video uint8 `[T, SIZE, SIZE, 3]` of the prompt at a random position."""
    return sample_scenes([(prompt, frames)], rng, jitter)


def sample_scenes(
    scenes: Sequence[tuple[str, int]], rng: np.random.Generator, jitter: float = JITTER
) -> np.ndarray:
    """A ground-truth video uint8 `[T, SIZE, SIZE, 3]` of (prompt, pixel frames) after one another.

    The shape begins at a random position, and goes on in each scene from where it is, as that
    scene's prompt says; a bounce before does not count. ValueError for a prompt of another world.
    """
    centres, parts = None, []
    for prompt, frames in scenes:
        attributes = vocabulary.parse(prompt)
        if centres is None:
            centres = bounce(attributes, sample_start(attributes, rng, frames, jitter), frames)
        else:
            place = np.clip(centres[-1], *bounds(attributes.shape))  # a larger shape has less room
            centres = bounce(attributes, place, frames + 1)[1:]
        parts.append(render(attributes, centres))
    return np.concatenate(parts)
