"""Rotary positions of both towers (spec/rewards.md 5.2, 5.3): tables from float64 on the host,
stored as float32.

A table is (cosines, sines), one row a token and one column a frequency; frequency j turns the pair
(j, j + K/2).
"""

from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax.models.qwen2_vl.config import MERGE, Qwen2VLConfig

Grid = tuple[int, int, int]  # frames, rows and columns of patches, as of one image or video
Table = tuple[np.ndarray, np.ndarray]


def plain_positions(length: int) -> np.ndarray:
    """Positions [3, 1, L] as the published rewards have them: the token's index in all three rows
    (spec 5.2).
    """
    return np.broadcast_to(np.arange(length), (3, 1, length))


def mrope_positions(
    ids: np.ndarray, grids: Sequence[Sequence[Grid]], config: Qwen2VLConfig
) -> np.ndarray:
    """Genuine M-RoPE positions [3, B, L] (frame, row, column) of token ids [B, L], padded on the
    right or not.

    grids: for each sample those of its images and videos, in order; each is a run of placeholders
    in the ids. Text counts up in all rows, and goes on after the largest position of a vision
    block. Raises ValueError for runs of placeholders that are not those of the grids.
    """
    ids, placeholders = np.asarray(ids), (config.image_token, config.video_token)
    positions = np.zeros((3, *ids.shape), np.int32)
    for b, (row, blocks) in enumerate(zip(ids, grids, strict=True)):
        left, start, i = list(blocks), 0, 0
        while i < len(row):
            if row[i] not in placeholders:
                block = np.zeros((3, 1), np.int32)
            elif left:
                t, h, w = left.pop(0)
                block = np.indices((t, h // MERGE, w // MERGE)).reshape(3, -1)
            else:
                raise ValueError(
                    f"sample {b} has placeholders at {i}, beyond those of its grids {list(blocks)}"
                )
            stop = i + block.shape[1]
            if stop > len(row) or np.any(row[i:stop] != row[i]):
                raise ValueError(
                    f"sample {b} has not the {block.shape[1]} placeholders at {i} that its grid "
                    "asks for"
                )
            positions[:, b, i:stop] = start + block
            start, i = start + int(block.max()) + 1, stop
        if left:
            raise ValueError(f"sample {b} has no placeholders for its grids {left}")
    return positions


def text_table(config: Qwen2VLConfig, positions: np.ndarray) -> Table:
    """The table [B, L, K/2] of positions [3, B, L]: each section of the frequencies turns with its
    own row.
    """
    frequency = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    axis = np.repeat(np.arange(3), config.mrope_section)  # of each frequency
    return _cos_sin(np.moveaxis(np.asarray(positions)[axis], 0, -1) * frequency)


@cache
def vision_table(head_dim: int, rows: int, columns: int) -> Table:
    """The table [rows * columns, K/2] of the patches of one frame, in the order of
    `block_order`.
    """
    frequency = 10000.0 ** (-np.arange(0, head_dim // 2, 2) / (head_dim // 2))
    row, column = block_order(rows, columns)
    return _cos_sin(
        np.concatenate([np.outer(row, frequency), np.outer(column, frequency)], axis=-1)
    )


def block_order(rows: int, columns: int) -> np.ndarray:
    """Row and column [2, rows * columns] of each patch: those that become one token stand together
    (spec 5.3).
    """
    place = np.indices((rows, columns)).reshape(2, rows // MERGE, MERGE, columns // MERGE, MERGE)
    return place.swapaxes(2, 3).reshape(2, -1)


def _cos_sin(angle: np.ndarray) -> Table:
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x: jax.Array, table: Table) -> jax.Array:
    """Turns x [B, N, A, K] by a table [B or 1, N, K/2], in float32; the dtype of x out."""
    cos, sin = (jnp.asarray(part)[:, :, None, :] for part in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
