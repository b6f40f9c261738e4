"""Rotary positions of the video grid and the timestep sinusoid: tables from float64 on the host,
stored as float32.

Angles grow with the frame number and the timestep, and float32 loses digits with them. So a large
position is split into a coarse and a fine part, each with its own small table, and the two
rotations are combined.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

_ROWS = 1024  # rows of the coarse and of the fine frame table: positions up to 1024 * 1024 frames


def frequencies(head_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Frequencies of the frame, row and column axis, float64 (spec/model.md 5); pairs in total
    head_dim / 2.
    """
    side = 2 * (head_dim // 6)
    return tuple(10000.0 ** (-np.arange(0, d, 2) / d) for d in (head_dim - 2 * side, side, side))


def rope_table(frames, grid: tuple[int, int], head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [n * L, head_dim / 2], float32, of the tokens of frames at positions
    `frames` [n].

    frames: integers >= 0, may be traced. grid: patch grid (h, w). Token order: frame, row, column.
    """
    frames = jnp.asarray(frames)
    (n,), (h, w) = frames.shape, grid
    coarse, fine, rows, cols = _axis_tables(head_dim, h, w)
    parts = []
    for frame, row, col in zip(
        _add_angles(coarse, fine, frames // _ROWS, frames % _ROWS), rows, cols, strict=True
    ):
        axes = (
            frame[:, None, None, :],
            jnp.asarray(row)[None, :, None, :],
            jnp.asarray(col)[None, None, :, :],
        )
        parts.append(
            jnp.concatenate([jnp.broadcast_to(a, (n, h, w, a.shape[-1])) for a in axes], axis=-1)
        )
    return tuple(part.reshape(n * h * w, head_dim // 2) for part in parts)


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate pairs (2i, 2i + 1) of each head. x [B, N, A, K], table of N tokens; float32 inside,
    dtype of x out.
    """
    cos, sin = (t[None, :, None, :] for t in table)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return (
        jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
        .reshape(x.shape)
        .astype(x.dtype)
    )


def inverse(table: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The table that undoes a rotation."""
    cos, sin = table
    return cos, -sin


def combine(
    first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """The table of two rotations, one after the other."""
    (cos_a, sin_a), (cos_b, sin_b) = first, second
    return cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b


def sinusoid(t: jax.Array, dim: int) -> jax.Array:
    """Timestep features [..., dim], float32: cosines then sines of t 10000^(-2k/dim). t in [0,
    1000], any shape.
    """
    t = jnp.asarray(t, jnp.float32)
    whole = jnp.round(t)
    (coarse_cos, coarse_sin), frequency = _time_tables(dim)
    angle = (t - whole)[..., None] * frequency.reshape((1,) * t.ndim + (-1,))
    index = whole.astype(jnp.int32)
    cos, sin = jnp.asarray(coarse_cos)[index], jnp.asarray(coarse_sin)[index]
    return jnp.concatenate(combine((cos, sin), (jnp.cos(angle), jnp.sin(angle))), axis=-1)


@cache
def _axis_tables(head_dim, h, w):
    frame, row, col = frequencies(head_dim)
    fine = _cos_sin(np.arange(_ROWS), frame)
    coarse = _cos_sin(_ROWS * np.arange(_ROWS), frame)
    return coarse, fine, _cos_sin(np.arange(h), row), _cos_sin(np.arange(w), col)


@cache
def _time_tables(dim):
    frequency = 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    return _cos_sin(np.arange(1001), frequency), frequency.astype(np.float32)


def _cos_sin(positions, frequency):
    angle = np.outer(positions, frequency)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _add_angles(coarse, fine, i, j):
    """Cosines and sines of angle i of the coarse table plus angle j of the fine one."""
    return combine(
        *(tuple(jnp.asarray(part)[at] for part in table) for table, at in ((coarse, i), (fine, j)))
    )
