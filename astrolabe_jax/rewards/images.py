"""Resize and normalise 8-bit frames as the published reward models do.

Published scores depend on the last bit of the preparation, so `resize` computes what PIL and torch
do, as products with banded matrices that are built on the host in float64. All of it runs inside
the jit of a scorer. Integers are exact on every device; nothing here depends on the rest of a
batch. See docs/rewards.md, Image preparation.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_BITS = 22  # of PIL's fixed-point weights
# of which so many are multiplied apart: both products and their sums are exact in float32
_LOW = 11
# pixels that are computed from one window of the source: fewer are less work, but more products
_BLOCK = 14


class _Bands(NamedTuple):
    """A banded matrix: block b of _BLOCK outputs is made of the inputs from starts[b] on."""

    starts: tuple[int, ...]
    weights: np.ndarray  # [blocks, _BLOCK, window] float64, zero for outputs beyond the last


def resize(images: jax.Array, size: tuple[int, int], rounding: str = "pil") -> jax.Array:
    """Return images uint8 [N, *size, C] of images uint8 [N, h, w, C]: antialiased bicubic resizing.

    Args:
      images: levels in 0..255.
      size: height and width.
      rounding: "pil" is PIL.Image.resize(BICUBIC), bit for bit down to a sixteenth of the size:
        fixed-point weights, the width first, and 8 bits between the passes (Pillow 13 does the
        height first for some sizes, as when a tall picture loses more of its height). "torch" is
        torchvision's resize of tensors, to within a level: float32, rounded once.
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
    if width != size[1]:
        x = one_pass(x, size[1])
    x = x.reshape(-1, count * height).T.reshape(count, height, -1)
    if height != size[0]:
        x = one_pass(x, size[0])
    if rounding == "torch":
        x = jnp.clip(jnp.round(x), 0, 255).astype(jnp.uint8)
    return x.reshape(count, *size, channels)


def _fixed_point(x: jax.Array, size: int) -> jax.Array:
    """Return levels uint8 [..., size, m] of levels uint8 [..., from, m], with PIL's rounding."""
    bands = _bands(x.shape[-2], size)
    half = np.copysign(0.5, bands.weights)
    fixed = np.trunc(bands.weights * 2.0**_BITS + half).astype(np.int64)
    high = (fixed + (1 << _LOW - 1)) >> _LOW
    low = fixed - (high << _LOW)

    def rounded(product: jax.Array) -> jax.Array:
        high, low = jnp.split(product.astype(jnp.int32), 2, axis=-2)
        whole = (high << _LOW) + low + (1 << _BITS - 1)
        return jnp.clip(whole >> _BITS, 0, 255).astype(jnp.uint8)

    both = _Bands(bands.starts, np.concatenate([high, low], axis=1))
    return _product(x, size, both, rounded)


def _floating(x: jax.Array, size: int) -> jax.Array:
    """Return float32 [..., size, m] of [..., from, m], not rounded."""
    return _product(x, size, _bands(x.shape[-2], size), lambda product: product)


def _product(
    x: jax.Array, size: int, bands: _Bands, finish: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Return [..., size, m]: what `finish` makes of each block of weights times its window of x."""
    x = x.astype(jnp.float32)
    weights = bands.weights.astype(np.float32)
    blocks = []
    for start, block in zip(bands.starts, weights, strict=True):
        window = jax.lax.slice_in_dim(
            x,
            start,
            start + block.shape[1],
            axis=x.ndim - 2,
        )
        product = jnp.matmul(block, window, precision=jax.lax.Precision.HIGHEST)
        blocks.append(finish(product))
    return jnp.concatenate(blocks, axis=-2)[..., :size, :]


@functools.lru_cache(maxsize=64)
def _bands(source: int, size: int) -> _Bands:
    """Return the bicubic kernel, widened by the factor of a reduction and cut at the borders.

    The weights of each output add up to one.
    """
    scale = source / size
    widened = max(scale, 1.0)
    centre = (np.arange(size) + 0.5) * scale
    first = np.maximum((centre - 2 * widened + 0.5).astype(np.int64), 0)
    stop = np.minimum((centre + 2 * widened + 0.5).astype(np.int64), source)
    inputs = first[:, None] + np.arange((stop - first).max())
    distance = (inputs - centre[:, None] + 0.5) * (1 / widened)
    taps = np.where(
        inputs < stop[:, None],
        _bicubic(distance),
        0.0,
    )
    taps /= taps.sum(axis=1, keepdims=True)

    begins = range(0, size, _BLOCK)
    ends = [stop[begin : begin + _BLOCK].max() for begin in begins]
    window = max(ends - first[::_BLOCK])
    starts = np.minimum(first[::_BLOCK], source - window).tolist()
    matrix = np.zeros((len(begins) * _BLOCK, source + inputs.shape[1]))
    matrix[np.arange(size)[:, None], inputs] = taps
    blocks = np.split(matrix, len(begins))
    windows = [
        block[:, start : start + window] for start, block in zip(starts, blocks, strict=True)
    ]
    return _Bands(tuple(starts), np.stack(windows))


def _bicubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Return Keys' kernel at the distances x."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.select([x < 1, x < 2], [near, far])


def normalised(images: jax.Array, axis: int = -1) -> jax.Array:
    """Return float32 images of uint8 ones, standardised with CLIP's mean and deviation.

    axis: of the channels. The levels are taken to [0, 1] first.
    """
    shape = [1] * images.ndim
    shape[axis] = 3
    mean, std = (jnp.asarray(of, jnp.float32).reshape(shape) for of in (CLIP_MEAN, CLIP_STD))
    return (images.astype(jnp.float32) * jnp.float32(1 / 255) - mean) / std
