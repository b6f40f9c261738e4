"""Frames -> what the vision towers of reward models take: 8-bit resizing, normalisation, patches
(spec/rewards.md 3.2, 4.1, 5.3).

Published scores depend on the last bit of the preparation, so `resize` computes what PIL and torch
do, as products with banded matrices that are built on the host in float64. Everything else is
pointwise or a change of layout: all of it runs inside the jit of a scorer. Integers are exact on
every device; nothing here depends on the rest of a batch.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# a patch is 14 x 14 pixels of two frames; 2 x 2 patches make a token
PATCH, PATCH_FRAMES, MERGE = 14, 2, 2
FACTOR = PATCH * MERGE  # pixels of a token's side
MAX_PIXELS = 256 * FACTOR**2  # of a frame, in both published language-model rewards
MAX_ASPECT = 200
SMALLEST_VIDEO = 128 * FACTOR**2  # smaller frames of a video are enlarged to so many pixels

_BITS = 22  # of PIL's fixed-point weights
# of which so many are multiplied apart: both products and their sums are exact in float32
_LOW = 11
# pixels that are computed from one window of the source: fewer are less work, but more products
_BLOCK = 14


def _levels(x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)


def smart_resize(
    height: int,
    width: int,
    factor: int = FACTOR,
    min_pixels: int = MAX_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[int, int]:
    """(height, width), multiples of `factor`, that keep the aspect ratio and come near the limits
    (spec 3.2).

    An image between the limits is rounded to multiples. One that rounds to more than max_pixels
    gets at most so many, one that rounds to fewer than min_pixels at least so many. Raises
    ValueError for a side without pixels or one that is more than 200 times the other.
    """
    short, long = sorted((height, width))
    if short < 1 or long > MAX_ASPECT * short:
        raise ValueError(
            f"frames of {height} x {width} pixels; expected an aspect ratio of at most {MAX_ASPECT}"
        )
    rounded = [max(factor, round(side / factor) * factor) for side in (height, width)]
    if math.prod(rounded) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rounded = [
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        ]
    elif math.prod(rounded) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rounded = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return rounded[0], rounded[1]


def resize(images: jax.Array, size: tuple[int, int], rounding: str = "pil") -> jax.Array:
    """Antialiased bicubic resizing: uint8 [N, h, w, C] -> uint8 [N, *size, C].

    rounding: "pil" is PIL.Image.resize(BICUBIC), bit for bit down to a sixteenth of the size:
    fixed-point weights, the width first, and 8 bits between the passes (Pillow 13 does the height
    first for some sizes, as when a tall picture loses more of its height). "torch" is torchvision's
    resize of tensors, to within a level: float32, rounded once.
    """
    if rounding not in ("pil", "torch"):
        raise ValueError(f"rounding is {rounding!r}; expected 'pil' or 'torch'")
    if images.dtype != jnp.uint8:
        raise ValueError(f"images are {images.dtype}; expected uint8")
    one_pass = _fixed_point if rounding == "pil" else _floating
    count, height, width, channels = images.shape
    # What shrinks becomes the rows of a matrix, which lie whole in memory; it is transposed while
    # it has 8 bits.
    x = images.reshape(count * height, width * channels).T.reshape(width, -1)
    x = one_pass(x, size[1]) if width != size[1] else x
    x = x.reshape(-1, count * height).T.reshape(count, height, -1)
    x = one_pass(x, size[0]) if height != size[0] else x
    return (x if rounding == "pil" else _levels(x)).reshape(count, *size, channels)


def _fixed_point(x: jax.Array, size: int) -> jax.Array:
    """Levels uint8 [..., from, m] -> [..., size, m], with the rounding of PIL."""
    bands = _bands(x.shape[-2], size)
    fixed = np.trunc(bands.weights * 2.0**_BITS + np.copysign(0.5, bands.weights)).astype(np.int64)
    high = (fixed + (1 << _LOW - 1)) >> _LOW
    low = fixed - (high << _LOW)

    def rounded(product: jax.Array) -> jax.Array:
        high, low = jnp.split(product.astype(jnp.int32), 2, axis=-2)
        return jnp.clip(((high << _LOW) + low + (1 << _BITS - 1)) >> _BITS, 0, 255).astype(
            jnp.uint8
        )

    return _product(x, size, bands.starts, np.concatenate([high, low], axis=1), rounded)


def _floating(x: jax.Array, size: int) -> jax.Array:
    """[..., from, m] -> float32 [..., size, m], not rounded."""
    bands = _bands(x.shape[-2], size)
    return _product(x, size, bands.starts, bands.weights, lambda product: product)


def _product(
    x: jax.Array,
    size: int,
    starts: tuple[int, ...],
    weights: np.ndarray,
    finish: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """[..., from, m] -> [..., size, m]: what `finish` makes of weights[b] [n, window] times the
    window of block b.
    """
    x, weights = x.astype(jnp.float32), weights.astype(np.float32)
    blocks = []
    for start, block in zip(starts, weights, strict=True):
        window = jax.lax.slice_in_dim(x, start, start + block.shape[1], axis=x.ndim - 2)
        blocks.append(finish(jnp.matmul(block, window, precision=jax.lax.Precision.HIGHEST)))
    return jnp.concatenate(blocks, axis=-2)[..., :size, :]


class _Bands(NamedTuple):
    """A banded matrix: block b of _BLOCK outputs is made of the inputs from starts[b] on."""

    starts: tuple[int, ...]
    weights: np.ndarray  # [blocks, _BLOCK, window] float64, zero for outputs beyond the last


@functools.lru_cache(maxsize=64)
def _bands(source: int, size: int) -> _Bands:
    """The bicubic kernel (a = -0.5), widened by the factor of a reduction, cut at the borders and
    normalised.
    """
    scale = source / size
    widened = max(scale, 1.0)
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - 2 * widened + 0.5).astype(np.int64), 0)
    stop = np.minimum((centre + 2 * widened + 0.5).astype(np.int64), source)
    inputs = first[:, None] + np.arange((stop - first).max())
    taps = np.where(
        inputs < stop[:, None], _bicubic((inputs - centre[:, None] + 0.5) * (1 / widened)), 0.0
    )
    taps /= taps.sum(axis=1, keepdims=True)

    begins = range(0, size, _BLOCK)
    window = max(stop[begin : begin + _BLOCK].max() - first[begin] for begin in begins)
    starts = np.minimum(first[::_BLOCK], source - window)
    weights = np.zeros((len(begins), _BLOCK, window))
    outputs, taken = np.nonzero(taps)
    block, row = np.divmod(outputs, _BLOCK)
    weights[block, row, inputs[outputs, taken] - starts[block]] = taps[outputs, taken]
    return _Bands(tuple(starts.tolist()), weights)


def _bicubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    x = np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def grayscale(frames: jax.Array) -> jax.Array:
    """uint8 [..., 3] -> uint8 [..., 3], all three floor(0.2989 R + 0.587 G + 0.114 B) (spec 4.1.2).

    In integers: where that sum is whole, float arithmetic may come out one level lower, and not
    alike everywhere.
    """
    red, green, blue = (frames[..., i].astype(jnp.int32) for i in range(3))
    gray = (2989 * red + 5870 * green + 1140 * blue) // 10000
    return jnp.broadcast_to(gray.astype(jnp.uint8)[..., None], frames.shape)


def normalised(images: jax.Array, axis: int = -1) -> jax.Array:
    """uint8 -> float32: levels in [0, 1], standardised with CLIP's mean and deviation of the
    channels along `axis`.
    """
    shape = [1] * images.ndim
    shape[axis] = 3
    mean, std = (jnp.asarray(of, jnp.float32).reshape(shape) for of in (CLIP_MEAN, CLIP_STD))
    return (images.astype(jnp.float32) * jnp.float32(1 / 255) - mean) / std


def grid_of(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """The grid (t, rows, columns) of patches that so many frames make; t * rows * columns / 4
    tokens.
    """
    return -(-frames // PATCH_FRAMES), height // PATCH, width // PATCH


def patches(images: jax.Array) -> jax.Array:
    """Videos [B, T, h, w, 3] -> [B, t * rows * columns, 1176] of the grid (spec 5.3); h and w are
    multiples of 28.

    Order of the rows: time, row and column of the token, row and column of the patch in it. Within
    a row: channel, frame, y, x. An odd last frame, as a picture is, is repeated to fill its patch.
    """
    batch, frames, height, width, channels = images.shape
    if height % FACTOR or width % FACTOR:
        raise ValueError(
            f"frames of {height} x {width} pixels; expected multiples of {FACTOR}, as of "
            "smart_resize"
        )
    time, rows, columns = grid_of(frames, height, width)
    both = min(frames, PATCH_FRAMES)
    if frames % both:
        images = jnp.concatenate([images, images[:, -1:]], axis=1)
    grid = (rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    x = images.reshape(batch, time, both, *grid, channels).transpose(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
    x = jnp.concatenate([x] * (PATCH_FRAMES // both), axis=7)
    return x.reshape(batch, time * rows * columns, channels * PATCH_FRAMES * PATCH**2)


def normalised_patches(images: jax.Array) -> jax.Array:
    """`patches` of `normalised` videos, uint8 [B, T, h, w, 3] -> float32; the order is changed
    while it is 8 bits.
    """
    rows = patches(images)
    return normalised(rows.reshape(*rows.shape[:-1], 3, -1), axis=-2).reshape(rows.shape)


def prepared(
    frames: jax.Array,
    size: tuple[int, int],
    rounding: str = "pil",
    gray: bool = False,
    devices: int = 1,
) -> jax.Array:
    """Samples of frames uint8 [N, T, height, width, 3] -> their patches float32 [N, rows, 1176].

    gray: without colours. devices: the samples are split over so many; each resizes a picture at a
    time, which its caches hold.
    """
    samples, count = frames.shape[:2]
    pictures = frames.reshape(devices, -1, *frames.shape[2:]).swapaxes(0, 1)
    resized = jax.lax.map(lambda x: resize(grayscale(x) if gray else x, size, rounding), pictures)
    return normalised_patches(resized.swapaxes(0, 1).reshape(samples, count, *size, 3))


def sampled_count(
    frames: int, fps: float, rate: float = 2.0, least: int = 4, most: int = 768
) -> int:
    """How many frames the published VideoAlign takes of a video: `rate` a second, rounded to an
    even number.

    At least `least` and at most `most`, but never more than there are. Raises ValueError for a
    video of one frame, or a rate that is no positive number.
    """
    if not 0 < fps < math.inf:
        raise ValueError(f"{fps} frames a second; expected a positive number")
    if frames < PATCH_FRAMES:
        raise ValueError(f"a video of {frames} frames; expected at least {PATCH_FRAMES}")
    wanted = min(max(frames / fps * rate, least), min(most, frames) // PATCH_FRAMES * PATCH_FRAMES)
    return round(wanted / PATCH_FRAMES) * PATCH_FRAMES


def frame_indices(frames: int, count: int) -> tuple[int, ...]:
    """`count` frames from the first to the last, evenly spaced and rounded half to even (spec
    4.1.3).

    In float32 from both ends, as torch.linspace computes them: it decides where a frame lies half
    way. Raises ValueError if there are fewer frames, or none are asked for.
    """
    if not 1 <= count <= frames:
        raise ValueError(
            f"a video of {frames} frames; expected at least the {count} that are sampled, and at "
            "least 1"
        )
    last, numbers = np.float32(frames - 1), np.arange(count, dtype=np.float32)
    step = last / np.float32(max(count - 1, 1))
    places = np.where(numbers < count // 2, step * numbers, last - step * numbers[::-1])
    return tuple(np.rint(places).astype(int).tolist()) if count > 1 else (0,)
