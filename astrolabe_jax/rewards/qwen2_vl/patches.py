"""Frames -> the patches that the vision tower of Qwen2-VL takes."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax.rewards.images import normalised, resize
from astrolabe_jax.rewards.qwen2_vl.config import MERGE, PATCH

PATCH_FRAMES, PATCH_SIDE, _ = PATCH
FACTOR = PATCH_SIDE * MERGE  # pixels of a token's side
MAX_PIXELS = 256 * FACTOR**2  # of a frame, in both published language-model rewards
MAX_ASPECT = 200
SMALLEST_VIDEO = 128 * FACTOR**2  # smaller frames of a video are enlarged to so many pixels


class Preparation(NamedTuple):
    """How frames are prepared, see `prepared`; static in a jitted function."""

    size: tuple[int, int]  # height and width, multiples of 28
    rounding: str = "pil"  # of images.resize
    gray: bool = False  # without colours


def smart_resize(
    height: int, width: int, *, min_pixels: int = MAX_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Return (height, width), multiples of 28, near the aspect ratio and within the limits.

    An image between the limits is rounded to multiples. One that rounds to more than max_pixels
    gets at most so many, one that rounds to fewer than min_pixels at least so many.

    Raises:
      ValueError: for a side without pixels, or one that is more than 200 times the other.
    """
    short, long = sorted((height, width))
    if short < 1 or long > MAX_ASPECT * short:
        raise ValueError(
            f"frames of {height} x {width} pixels; expected an aspect ratio of at most {MAX_ASPECT}"
        )
    sides = (height, width)
    rounded = [max(FACTOR, round(side / FACTOR) * FACTOR) for side in sides]
    if math.prod(rounded) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rounded = [max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in sides]
    elif math.prod(rounded) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rounded = [math.ceil(side * grow / FACTOR) * FACTOR for side in sides]
    return rounded[0], rounded[1]


def grayscale(frames: jax.Array) -> jax.Array:
    """Return uint8 [..., 3] with floor(0.2989 R + 0.587 G + 0.114 B) in all three channels.

    In integers: where that sum is whole, float arithmetic may come out one level lower, and not
    alike everywhere.
    """
    red, green, blue = (frames[..., i].astype(jnp.int32) for i in range(3))
    gray = (2989 * red + 5870 * green + 1140 * blue) // 10000
    return jnp.broadcast_to(gray.astype(jnp.uint8)[..., None], frames.shape)


def grid_of(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Return the grid (t, rows, columns) of patches that so many frames of this size make.

    There are t * rows * columns / 4 tokens.
    """
    return -(-frames // PATCH_FRAMES), height // PATCH_SIDE, width // PATCH_SIDE


def patches(images: jax.Array) -> jax.Array:
    """Return the patches [B, t * rows * columns, 1176] of videos [B, T, h, w, 3].

    h and w are multiples of 28, as of `smart_resize`. Order of the rows: time, row and column of
    the token, row and column of the patch in it. Within a row: channel, frame, y, x. An odd last
    frame, as a picture is, is repeated to fill its patch.
    """
    batch, frames, height, width, channels = images.shape
    time, rows, columns = grid_of(frames, height, width)
    if frames % PATCH_FRAMES:
        images = jnp.concatenate([images, images[:, -1:]], axis=1)
    grid = (rows // MERGE, MERGE, PATCH_SIDE, columns // MERGE, MERGE, PATCH_SIDE)
    x = images.reshape(batch, time, PATCH_FRAMES, *grid, channels)
    x = x.transpose(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
    return x.reshape(batch, time * rows * columns, -1)


def prepared(frames: jax.Array, preparation: Preparation, devices: int = 1) -> jax.Array:
    """Return the patches float32 [N, rows, 1176] of samples uint8 [N, T, height, width, 3].

    devices: the samples are split over so many; each resizes a picture at a time, which its caches
    hold.
    """
    size, rounding, gray = preparation
    samples, count = frames.shape[:2]

    def resized(pictures: jax.Array) -> jax.Array:
        return resize(grayscale(pictures) if gray else pictures, size, rounding)

    pictures = frames.reshape(devices, -1, *frames.shape[2:])
    pictures = jax.lax.map(resized, pictures.swapaxes(0, 1)).swapaxes(0, 1)
    # The order is changed while it is 8 bits.
    rows = patches(pictures.reshape(samples, count, *size, 3))
    by_channel = rows.reshape(*rows.shape[:-1], 3, -1)
    return normalised(by_channel, axis=-2).reshape(rows.shape)


def sampled_count(frames: int, fps: float, rate: float) -> int:
    """Return how many frames the published VideoAlign takes of a video.

    That is `rate` a second, rounded to an even number, at least 4 and at most 768, but never more
    than there are.

    Raises:
      ValueError: for a video of one frame.
    """
    if frames < PATCH_FRAMES:
        raise ValueError(f"a video of one frame; expected at least {PATCH_FRAMES}")
    largest = min(768, frames) // PATCH_FRAMES * PATCH_FRAMES
    count = min(max(frames / fps * rate, 4), largest)
    return round(count / PATCH_FRAMES) * PATCH_FRAMES


def frame_indices(frames: int, count: int) -> tuple[int, ...]:
    """Return `count` frames from the first to the last, evenly spaced and rounded half to even.

    In float32 from both ends, as torch.linspace computes them: it decides where a frame lies half
    way.

    Raises:
      ValueError: if there are fewer frames, or none are asked for.
    """
    if not 1 <= count <= frames:
        raise ValueError(
            f"a video of {frames} frames; expected at least the {count} that are sampled, and at "
            "least 1"
        )
    if count == 1:
        return (0,)
    last = np.float32(frames - 1)
    numbers = np.arange(count, dtype=np.float32)
    step = last / np.float32(count - 1)
    places = np.where(
        numbers < count // 2,
        step * numbers,
        last - step * numbers[::-1],
    )
    return tuple(np.rint(places).astype(int).tolist())
