"""Rows that do not know each other, a few at a time."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def in_chunks(
    function: Callable[..., jax.Array],
    rows: jax.Array | tuple[jax.Array, ...],
    row_bytes: int,
    most: int,
) -> jax.Array:
    """Return function(*rows) [B, N, ...] from as few equal chunks as keep within `most` bytes.

    What a chunk computes on its way is made anew in the backward pass. One chunk is the plain call.

    Args:
      function: makes each row of its result from one row of its arguments alone.
      rows: its arguments, [B or 1, N, ...] each.
      row_bytes: what it holds for each of the N rows, on a device.
      most: bytes that may be held; a single row may take more.
    """
    given = rows if isinstance(rows, tuple) else (rows,)
    count = given[0].shape[1]
    chunks = -(-count * row_bytes // max(most, row_bytes))
    if chunks == 1:
        return function(*given)
    size = -(-count // chunks)
    fill = chunks * size - count

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, fill), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], chunks, size, *x.shape[2:]), 1, 0)

    made = jax.lax.map(jax.checkpoint(lambda parts: function(*parts)), tuple(map(cut, given)))
    made = jnp.moveaxis(made, 0, 1)
    return made.reshape(made.shape[0], chunks * size, *made.shape[3:])[:, :count]
