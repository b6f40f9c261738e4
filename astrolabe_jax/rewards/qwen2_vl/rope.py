"""Rotary positions of both towers: tables from float64 on the host, stored as float32.

A table is (cosines, sines), one row a token and one column a frequency; frequency j turns the pair
(j, j + K/2).
"""

from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax.rewards.qwen2_vl.config import MERGE, Qwen2VLConfig

Grid = tuple[int, int, int]  # frames, rows and columns of patches, as of one image or video
Table = tuple[np.ndarray, np.ndarray]
VISION_THETA = 10000.0


def plain_positions(length: int) -> np.ndarray:
    """Return the positions [3, 1, L] of the published rewards: the token's index in all rows."""
    return np.broadcast_to(np.arange(length), (3, 1, length))


def mrope_positions(
    ids: np.ndarray, grids: Sequence[Sequence[Grid]], config: Qwen2VLConfig
) -> np.ndarray:
    """Return genuine M-RoPE positions [3, B, L], of frame, row and column.

    Text counts up in all rows, and goes on after the largest position of a vision block.

    Args:
      ids: token ids [B, L], padded on the right or not.
      grids: for each sample those of its images and videos, in order; each is a run of placeholders
        in the ids.
      config: of the net.

    Raises:
      ValueError: for runs of placeholders that are not those of the grids.
    """
    ids = np.asarray(ids)
    positions = np.zeros((3, *ids.shape), np.int32)
    for b, (row, blocks) in enumerate(zip(ids, grids, strict=True)):
        try:
            positions[:, b] = _row_positions(row, blocks, config)
        except ValueError as error:
            raise ValueError(f"sample {b} {error}") from None
    return positions


def _row_positions(row: np.ndarray, grids: Sequence[Grid], config: Qwen2VLConfig) -> np.ndarray:
    """Return the positions [3, L] of one sample."""
    placeholders = (config.image_token, config.video_token)
    positions = np.zeros((3, len(row)), np.int32)
    remaining = list(grids)
    first = 0  # the position at which the next block begins
    i = 0
    while i < len(row):
        if row[i] not in placeholders:
            block = np.zeros((3, 1), np.int32)
        elif remaining:
            t, h, w = remaining.pop(0)
            block = np.indices((t, h // MERGE, w // MERGE))
            block = block.reshape(3, -1)
        else:
            raise ValueError(f"has placeholders at {i}, beyond those of its grids {list(grids)}")
        stop = i + block.shape[1]
        if stop > len(row) or np.any(row[i:stop] != row[i]):
            raise ValueError(
                f"has not the {block.shape[1]} placeholders at {i} that its grid asks for"
            )
        positions[:, i:stop] = first + block
        first += int(block.max()) + 1
        i = stop
    if remaining:
        raise ValueError(f"has no placeholders for its grids {remaining}")
    return positions


def text_table(config: Qwen2VLConfig, positions: np.ndarray) -> Table:
    """Return the table [B, L, K/2] of positions [3, B, L].

    Each section of the frequencies turns with its own row of the positions.
    """
    frequency = _frequencies(config.rope_theta, config.head_dim)
    axis = np.repeat(np.arange(3), config.mrope_section)  # of each frequency
    positions = np.asarray(positions)[axis]
    return _cos_sin(np.moveaxis(positions, 0, -1) * frequency)


@cache
def vision_table(head_dim: int, rows: int, columns: int) -> Table:
    """Return the table [rows * columns, K/2] of one frame's patches, in order of `block_order`."""
    frequency = _frequencies(VISION_THETA, head_dim // 2)
    row, column = block_order(rows, columns)
    angles = [np.outer(row, frequency), np.outer(column, frequency)]
    return _cos_sin(np.concatenate(angles, axis=-1))


def _frequencies(theta: float, dim: int) -> np.ndarray:
    """Return [dim / 2], from 1 down to almost 1 / theta."""
    return theta ** (-np.arange(0, dim, 2) / dim)


def block_order(rows: int, columns: int) -> np.ndarray:
    """Return row and column [2, rows * columns] of each patch, those of one token together."""
    place = np.indices((rows, columns))
    place = place.reshape(2, rows // MERGE, MERGE, columns // MERGE, MERGE)
    return place.swapaxes(2, 3).reshape(2, -1)


def _cos_sin(angle: np.ndarray) -> Table:
    cos = np.cos(angle).astype(np.float32)
    sin = np.sin(angle).astype(np.float32)
    return cos, sin


def rotate(x: jax.Array, table: Table) -> jax.Array:
    """Return x [B, N, A, K], turned by a table [B or 1, N, K/2] in float32, in the dtype of x."""
    cos, sin = (jnp.asarray(part)[:, :, None, :] for part in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [
        first * cos - second * sin,
        second * cos + first * sin,
    ]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
