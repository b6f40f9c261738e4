"""Attention on a TPU, by JAX's Pallas kernel (splash attention) on whole tiles.

On another device the kernel is interpreted, which is slow, and of use to tests.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from astrolabe_jax import sharding

_LANES = 128  # of a TPU: lengths and widths are whole multiples
_TILE = 512  # queries, and keys, that the kernel works on at a time


def splash_attention(q, k, v, length=None, causal: bool = False) -> jax.Array:
    """Return models.attention.attention(q, k, v, length=length, causal=causal).

    Zeros fill the arrays up to whole tiles; nobody sees them.
    """
    rows, _, width = q.shape[1:]
    keys = k.shape[1]
    whole_width = _whole(width, _LANES)
    whole_rows = _whole(rows, _tile(rows))
    whole_keys = _whole(keys, _tile(keys))
    hides = length is not None or (keys < whole_keys and not causal)

    def heads_first(x, tokens):
        fill = ((0, 0), (0, 0), (0, tokens - x.shape[1]), (0, whole_width - width))
        return jnp.pad(jnp.swapaxes(x, 1, 2), fill)

    def on_device(q, k, v, length):
        q = heads_first(q * jnp.asarray(width**-0.5, q.dtype), whole_rows)
        hidden = (jnp.arange(whole_keys) >= length).astype(jnp.int32) if hides else None
        y: Any = _tiles(causal, q, heads_first(k, whole_keys), heads_first(v, whole_keys), hidden)
        return jnp.swapaxes(y, 1, 2)[:, :rows, :, :width]

    length = jnp.asarray(keys if length is None else length)
    return sharding.each_device(on_device)(q, k, v, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tiles(causal: bool, q, k, v, hidden):
    """Return attention [B, A, N, K] of whole tiles, for q that is scaled.

    Only the precision of the kernel, and of its backward pass, is this function's own.

    Args:
      hidden: int32 [M], 1 for keys that no query sees, or None.
    """
    return _precisely(q, _kernel, causal, q, k, v, hidden)


def _tiles_forward(causal: bool, q, k, v, hidden):
    return _precisely(q, jax.vjp, lambda q, k, v: _kernel(causal, q, k, v, hidden), q, k, v)


def _tiles_backward(causal: bool, backward: Callable, gradient):
    del causal
    return (*_precisely(gradient, backward, gradient), None)


_tiles.defvjp(_tiles_forward, _tiles_backward)


def _precisely(like: jax.Array, function: Callable, *arguments) -> Any:
    """Return function(*arguments), traced with products as precise as the numbers of `like`.

    Mosaic compiles no product of 16-bit numbers at the precision of float32, which every program
    asks for (cli.set_up).
    """
    half = like.dtype.itemsize == 2
    with jax.default_matmul_precision("default") if half else contextlib.nullcontext():
        return function(*arguments)


def _kernel(causal: bool, q, k, v, hidden):
    """Run the kernel, video by video."""
    _, heads, rows, _ = q.shape
    keys = k.shape[2]
    tile_q = _tile(rows)
    tile_kv = _tile(keys)
    mask = (splash.CausalMask if causal else splash.FullMask)((rows, keys))
    make = functools.partial(
        splash.make_splash_mha,
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=tile_q,
            block_kv=tile_kv,
            block_q_dkv=tile_q,
            block_kv_dkv=tile_kv,
            block_kv_dkv_compute=tile_kv,
            block_q_dq=tile_q,
            block_kv_dq=tile_kv,
        ),
        head_shards=1,
        q_seq_shards=1,
    )

    def run(interpret: bool, q, k, v, hidden):
        segments = None
        if hidden is not None:
            segments = splash.SegmentIds(jnp.zeros(rows, jnp.int32), hidden)
        one_video = functools.partial(make(interpret=interpret), segment_ids=segments)
        return jax.vmap(one_video)(q, k, v)

    return jax.lax.platform_dependent(
        *(q, k, v, hidden),
        tpu=functools.partial(run, False),
        default=functools.partial(run, True),
    )


def _tile(tokens: int) -> int:
    """Return the tile of so many queries or keys."""
    return min(_TILE, _whole(tokens, _LANES))


def _whole(n: int, unit: int) -> int:
    """Return the least multiple of `unit` that is at least n."""
    return -(-n // unit) * unit
