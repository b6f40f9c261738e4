"""Videos of one shape on a plain background, moving steadily, with antialiased edges.

A shape that comes to the border is reflected there, so that a video may be of any length.
"""

from collections.abc import Sequence
from typing import Any

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
    """Return the smallest and the largest (x, y) in pixels that the centre of a shape may take."""
    side, up, down = EXTENTS[shape]
    low = np.array([side, up]) + MARGIN
    return low, SIZE - np.array([side, down]) - MARGIN


def sample_start(
    attributes: Attributes, rng: np.random.Generator, frames: int = FRAMES, jitter: float = JITTER
) -> np.ndarray:
    """Return the centre (x, y) at frame 0 of a path whose middle is near the frame's centre.

    The middle is uniform around the centre, as far as the path fits between the borders and at most
    `jitter` pixels per axis. Where `frames` do not fit, the path begins as one of FRAMES does.
    """
    step = _step(attributes)
    side, up, down = EXTENTS[attributes.shape]
    extents = np.array([side, (up + down) / 2])

    def room(frames: int) -> np.ndarray:
        """Return how far (x, y) the middle may be from the centre."""
        return SIZE / 2 - extents - MARGIN - np.abs(step) * (frames - 1) / 2

    if not (room(frames) >= 0).all():
        frames = FRAMES
    middle = (
        SIZE / 2
        + np.array([0, (up - down) / 2])
        + rng.uniform(-1, 1, 2) * np.minimum(room(frames), jitter)
    )
    return middle - step * (frames - 1) / 2


def bounce(attributes: Attributes, start: np.ndarray, frames: int) -> np.ndarray:
    """Return centres `[T, 2]` as (x, y): steady from `start`, reflected at the borders."""
    low, high = bounds(attributes.shape)
    straight = start + np.arange(frames)[:, None] * _step(attributes)
    # there and back again
    turn = (straight - low) % (2 * (high - low))
    reflected = low + np.minimum(turn, 2 * (high - low) - turn)
    return np.where((straight < low) | (straight > high), reflected, straight)


def _step(attributes: Attributes) -> np.ndarray:
    """Return the velocity (x, y) in pixels per frame."""
    return (
        np.array(vocabulary.DIRECTIONS[attributes.direction]) * vocabulary.SPEEDS[attributes.speed]
    )


def edge_distance(shape: str, x: Any, y: Any, xp: Any = np) -> Any:
    """Return the signed distance in pixels to the shape's edge, negative inside.

    `x` and `y` are relative to its centre; y grows downwards. `xp` is their array module (numpy or
    jax.numpy), so that rewards measure the very shapes drawn here.
    """
    if shape == "circle":
        return xp.sqrt(x * x + y * y) - RADIUS
    if shape == "square":
        return xp.maximum(xp.abs(x), xp.abs(y)) - (RADIUS - 1)
    # equilateral, one corner up: three half planes at the inscribed circle's radius
    return xp.maximum(y, xp.abs(x) * 3**0.5 / 2 - y / 2) - 0.65 * RADIUS


def render(attributes: Attributes, centres: np.ndarray) -> np.ndarray:
    """Return a video uint8 `[T, SIZE, SIZE, 3]` of the shape at `centres`.

    They are `[T, 2]` as (x, y) in pixels.
    """
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
    """Return a real video uint8 `[T, SIZE, SIZE, 3]` of the prompt at a random position."""
    return sample_scenes([(prompt, frames)], rng, jitter)


def sample_scenes(
    scenes: Sequence[tuple[str, int]], rng: np.random.Generator, jitter: float = JITTER
) -> np.ndarray:
    """Return a real video uint8 `[T, SIZE, SIZE, 3]` of (prompt, pixel frames) after one another.

    The shape begins at a random position, and goes on in each scene from where it is, as that
    scene's prompt says; a bounce before does not count. Raises ValueError for a prompt of another
    world.
    """
    centres = None
    videos = []
    for prompt, frames in scenes:
        attributes = vocabulary.parse(prompt)
        if centres is None:
            start = sample_start(attributes, rng, frames, jitter)
            centres = bounce(attributes, start, frames)
        else:
            start = np.clip(centres[-1], *bounds(attributes.shape))  # a larger one has less room
            centres = bounce(attributes, start, frames + 1)[1:]
        videos.append(render(attributes, centres))
    return np.concatenate(videos)
