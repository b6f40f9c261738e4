"""Rotary positions of the video grid and the timestep sinusoid.

Tables are computed in float64 on the host and stored as float32. Angles grow with the frame number
and the timestep, and float32 loses digits with them. So a large position is split into a coarse and
a fine part, each with its own small table, and the two rotations are combined.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

Table = tuple[jax.Array, jax.Array]  # cosines and sines of the same angles
HostTable = tuple[np.ndarray, np.ndarray]  # the same, computed on the host

_ROWS = 1024  # rows of the coarse and of the fine frame table: positions up to 1024 * 1024 frames


def frequencies(head_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the frequencies of the frame, row and column axis, float64.

    Together they are head_dim / 2 numbers (docs/models.md, Rotary positions).
    """
    side = 2 * (head_dim // 6)
    frame = _axis_frequencies(head_dim - 2 * side)
    return frame, _axis_frequencies(side), _axis_frequencies(side)


def _axis_frequencies(width: int) -> np.ndarray:
    return 10000.0 ** (-np.arange(0, width, 2) / width)


def rope_table(frames, grid: tuple[int, int], head_dim: int) -> Table:
    """Return the table [n * h * w, head_dim / 2], float32, of the tokens of n frames.

    Tokens are in the order frame, row, column.

    Args:
      frames: positions [n] of the frames, integers >= 0; they may be traced.
      grid: patch grid (h, w) of a frame.
      head_dim: width of one head.
    """
    frames = jnp.asarray(frames)
    coarse, fine, row, column = _axis_tables(head_dim, *grid)
    frame = combine(take_rows(coarse, frames // _ROWS), take_rows(fine, frames % _ROWS))
    cos, sin = map(_join_axes, frame, row, column)
    return cos, sin


def rotate(x: jax.Array, table: Table) -> jax.Array:
    """Rotate the pairs (2i, 2i + 1) of each head, in float32.

    Args:
      x: queries or keys [B, N, A, K].
      table: of the N tokens.

    Returns:
      x [B, N, A, K], rotated, in its dtype.
    """
    cos, sin = (part[None, :, None, :] for part in table)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    even = pairs[..., 0]
    odd = pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


def inverse(table: Table) -> Table:
    """Return the table that undoes a rotation."""
    cos, sin = table
    return cos, -sin


def combine(first: Table, second: Table) -> Table:
    """Return the table of two rotations, one after the other."""
    cos_a, sin_a = first
    cos_b, sin_b = second
    return cos_a * cos_b - sin_a * sin_b, sin_a * cos_b + cos_a * sin_b


def sinusoid(t: jax.Array, dim: int) -> jax.Array:
    """Return timestep features [..., dim], float32: cosines, then sines, of t 10000^(-2k/dim).

    t [...] is in [0, 1000].
    """
    t = jnp.asarray(t, jnp.float32)
    whole = jnp.round(t)
    table, frequency = _time_tables(dim)
    angle = (t - whole)[..., None] * frequency.reshape((1,) * t.ndim + (-1,))
    coarse = take_rows(table, whole.astype(jnp.int32))
    return jnp.concatenate(combine(coarse, (jnp.cos(angle), jnp.sin(angle))), axis=-1)


def take_rows(table: Table | HostTable, index) -> Table:
    """Return the rows of a table at indices, or in a slice."""
    cos, sin = table
    return jnp.asarray(cos)[index], jnp.asarray(sin)[index]


@cache
def _axis_tables(head_dim: int, rows: int, columns: int) -> tuple[HostTable, ...]:
    """Return four tables: coarse and fine ones of frames, those of the rows, of the columns."""
    frame, row, column = frequencies(head_dim)
    fine = np.arange(_ROWS)
    return (
        _cos_sin(_ROWS * fine, frame),  # frames 0, 1024, 2048, ...
        _cos_sin(fine, frame),
        _cos_sin(np.arange(rows), row),
        _cos_sin(np.arange(columns), column),
    )


@cache
def _time_tables(dim: int) -> tuple[HostTable, np.ndarray]:
    """Return the table of the whole timesteps 0 .. 1000, and the frequencies."""
    frequency = 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    return _cos_sin(np.arange(1001), frequency), frequency.astype(np.float32)


def _cos_sin(positions: np.ndarray, frequency: np.ndarray) -> HostTable:
    angle = np.outer(positions, frequency)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _join_axes(frame: jax.Array, row: np.ndarray, column: np.ndarray) -> jax.Array:
    """Return [n * h * w, head_dim / 2] from what frames [n, .], rows [h, .] and columns [w, .]
    have.
    """
    shape = (frame.shape[0], row.shape[0], column.shape[0])
    axes = (
        frame[:, None, None, :],
        jnp.asarray(row)[None, :, None, :],
        jnp.asarray(column)[None, None, :, :],
    )
    spread = [jnp.broadcast_to(axis, (*shape, axis.shape[-1])) for axis in axes]
    return jnp.concatenate(spread, axis=-1).reshape(np.prod(shape), -1)
