"""Rotary positions of both towers: tables from float64 on the host, stored as float32.

A table is (cosines, sines), one row a token and one column a frequency; frequency j turns the pair
(j, j + K/2).
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax.rewards.qwen2_vl.config import MERGE, Qwen2VLConfig

Grid = tuple[int, int, int]  # frames, rows and columns of patches, as of one image or video
Table = tuple[np.ndarray, np.ndarray]
VISION_THETA = 10000.0


def text_table(config: Qwen2VLConfig, length: int) -> Table:
    """Return the table [1, L, K/2] of the published rewards, which give pictures no positions.

    A token's index counts as its frame, row and column alike, so that the sections of M-RoPE come
    to one.
    """
    frequency = _frequencies(config.rope_theta, config.head_dim)
    return _cos_sin(np.outer(np.arange(length), frequency)[None])


@cache
def vision_table(head_dim: int, rows: int, columns: int) -> Table:
    """Return the table [1, rows * columns, K/2] of one frame's patches, a token's together."""
    frequency = _frequencies(VISION_THETA, head_dim // 2)
    place = np.indices((rows, columns)).reshape(2, rows // MERGE, MERGE, columns // MERGE, MERGE)
    row, column = place.swapaxes(2, 3).reshape(2, -1)
    angles = [np.outer(row, frequency), np.outer(column, frequency)]
    return _cos_sin(np.concatenate(angles, axis=-1)[None])


def _frequencies(theta: float, dim: int) -> np.ndarray:
    """Return [dim / 2], from 1 down to almost 1 / theta."""
    return theta ** (-np.arange(0, dim, 2) / dim)


def _cos_sin(angle: np.ndarray) -> Table:
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x: jax.Array, table: Table) -> jax.Array:
    """Return x [B, N, A, K], turned by a table [1, N, K/2] in float32, in the dtype of x."""
    cos, sin = (jnp.asarray(part)[:, :, None, :] for part in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [
        first * cos - second * sin,
        second * cos + first * sin,
    ]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
