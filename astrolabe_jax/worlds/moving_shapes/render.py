"""Renders moving shapes: one shape on a plain background, moving steadily, with antialiased edges."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from astrolabe_jax.worlds.moving_shapes import vocabulary
from astrolabe_jax.worlds.moving_shapes.vocabulary import Attributes

SIZE = 48  # pixels, height and width
FRAMES = 33  # pixel frames of a short video: 9 latent frames
RADIUS = 9.0  # a circle's radius and half a square's side plus one; a triangle is inscribed in 1.3 times this circle
# How far a shape reaches from its centroid: left and right, up, down.
EXTENTS = {
    "circle": (RADIUS, RADIUS, RADIUS),
    "square": (RADIUS - 1, RADIUS - 1, RADIUS - 1),
    "triangle": (0.65 * 3**0.5 * RADIUS, 1.3 * RADIUS, 0.65 * RADIUS),
}
MARGIN = 0.25  # pixels that always remain between a shape and the border
JITTER = 3.0  # the middle of a path puts the shape at most this far from the frame's centre, per axis, in pixels


class Path(NamedTuple):
    """Where a shape is: centre (x, y) in pixels at frame 0 and step (x, y) in pixels per frame."""

    start: np.ndarray
    step: np.ndarray

    def centres(self, frames: int) -> np.ndarray:
        """Centres `[T, 2]` as (x, y)."""
        return self.start + np.arange(frames)[:, None] * self.step


def sample_path(attributes: Attributes, rng: np.random.Generator, frames: int = FRAMES, jitter: float = JITTER) -> Path:
    """A straight path at the asked speed whose middle is uniform around the centre, as far as the border allows."""
    step = np.array(vocabulary.DIRECTIONS[attributes.direction]) * vocabulary.SPEEDS[attributes.speed]
    travel = np.abs(step) * (frames - 1)
    side, up, down = EXTENTS[attributes.shape]
    room = SIZE / 2 - np.array([side, (up + down) / 2]) - MARGIN - travel / 2
    if (room < 0).any():
        raise ValueError(f"{frames} frames of {attributes.speed or 'medium'} motion leave a {SIZE}-pixel frame")
    middle = SIZE / 2 + np.array([0, (up - down) / 2]) + rng.uniform(-1, 1, 2) * np.minimum(room, jitter)
    return Path(middle - step * (frames - 1) / 2, step)


def check_frames(prompts: Iterable[str], frames: int) -> None:
    """Raises ValueError, saying how many frames there may be, unless `sample` can show every prompt for `frames`."""
    wanted = [vocabulary.parse(prompt) for prompt in prompts]
    rng = np.random.default_rng(0)

    def stay(frames: int) -> bool:
        try:
            for attributes in wanted:
                sample_path(attributes, rng, frames)
        except ValueError:
            return False
        return True

    if not stay(frames):
        most = next(filter(stay, range(frames, 0, -1)))
        raise ValueError(f"in {frames} frames some shapes leave the picture; real videos have at most {most}")


def edge_distance(shape: str, x, y, xp=np):
    """Signed distance in pixels to the shape's edge (negative inside), relative to its centre; y grows downwards.

    `xp` is the array module of `x` and `y` (numpy or jax.numpy), so that rewards measure the very shapes drawn here.
    """
    if shape == "circle":
        return xp.sqrt(x * x + y * y) - RADIUS
    if shape == "square":
        return xp.maximum(xp.abs(x), xp.abs(y)) - (RADIUS - 1)
    # equilateral, one corner up: three half planes at the inscribed circle's radius
    inner = 0.65 * RADIUS
    slope = xp.abs(x) * 3**0.5 / 2 - y / 2
    return xp.maximum(y, slope) - inner


def render(attributes: Attributes, path: Path, frames: int = FRAMES) -> np.ndarray:
    """Video uint8 `[T, SIZE, SIZE, 3]` of the shape on the path."""
    pixel = np.arange(SIZE) + 0.5
    centres = path.centres(frames)[:, :, None, None]
    distance = edge_distance(
        attributes.shape, pixel[None, None, :] - centres[:, 0], pixel[None, :, None] - centres[:, 1]
    )
    coverage = np.clip(0.5 - distance, 0, 1)[..., None]
    colour = np.array(vocabulary.COLOURS[attributes.colour], float)
    background = np.array(vocabulary.BACKGROUNDS[attributes.background], float)
    return np.rint(coverage * colour + (1 - coverage) * background).astype(np.uint8)


def sample(prompt: str, rng: np.random.Generator, frames: int = FRAMES, jitter: float = JITTER) -> np.ndarray:
    """A ground-truth video uint8 `[T, SIZE, SIZE, 3]` of the prompt at a random position."""
    attributes = vocabulary.parse(prompt)
    return render(attributes, sample_path(attributes, rng, frames, jitter), frames)
