"""The block-causal attention of the uncached forward, over a whole video or a window of one.

Block-causal attention is run block by block on static slices of the keys, so that no mask exists
and a fused kernel applies; the result is exact (docs/models.md, Training mask).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax.models.wan.config import Block, Layout
from astrolabe_jax.models.wan.rope import Table, rotate, take_rows


class KeyValues(NamedTuple):
    """Keys and values [B, tokens, A, K], or [layers, B, tokens, A, K] of every layer."""

    k: jax.Array
    v: jax.Array


def block_causal_attention(
    q: jax.Array,
    keys_values: KeyValues,
    blocks: Sequence[Block],
    attend: Callable[..., jax.Array],
    context: KeyValues | None = None,
    sink_tables: Sequence[Table] = (),
) -> jax.Array:
    """Return attention [B, F L, A, K] of each block's queries to the frames that it sees.

    Args:
      q: [B, F L, A, K]; keys_values: two of the same shape.
      blocks: of all F frames.
      attend: attention(q, k, v, mask, length=...) of models/attention.py.
      context: keys and values of the clean stream, same shape. Frames before a block are then read
        from it, and only the block itself from keys_values (docs/models.md, Clean context).
      sink_tables: where the keys of the sink's frames are stored without rotation, the rotary table
        of these frames for each block; else empty.
    """
    frame_tokens = q.shape[1] // blocks[-1].stop
    sink = sink_tables[0][0].shape[0] // frame_tokens if sink_tables else 0
    outputs = []
    for i, block in enumerate(blocks):
        ranges, mask = _ranges_and_mask(block, frame_tokens)
        pieces = []
        for low, high in _cut(ranges, block.start, sink):
            tokens = slice(low * frame_tokens, high * frame_tokens)
            source = context if context is not None and low < block.start else keys_values
            k, v = (part[:, tokens] for part in source)
            if low < sink:
                k = rotate(k, take_rows(sink_tables[i], tokens))
            pieces.append((k, v))
        keys, values = (jnp.concatenate(parts, axis=1) for parts in zip(*pieces, strict=True))
        queries = q[:, block.start * frame_tokens : block.stop * frame_tokens]
        outputs.append(attend(queries, keys, values, mask))
    return jnp.concatenate(outputs, axis=1)


class PastKeys(NamedTuple):
    """Keys and values of one layer that a window sees of the frames before it."""

    keys_values: KeyValues  # [b, (sink + n) L, A, K]: the sink, then the n frames before the window
    start: (
        jax.Array | np.int32
    )  # [] int32, frames before the window; traced, one program serves every window
    frame_tokens: int  # L


def window_attention(
    q: jax.Array,
    keys_values: KeyValues,
    past: PastKeys,
    layout: Layout,
    attend: Callable[..., jax.Array],
    context: KeyValues | None = None,
    sink_tables: Sequence[Table] = (),
) -> jax.Array:
    """Return attention [B, W L, A, K] of the blocks of a window behind a past.

    A block's keys stand in the order sink, then newest frame first, so that those which exist are
    the first ones: the kernel's sequence length leaves out the rest, and no mask is needed
    (docs/streaming.md, Order of keys).

    Args:
      q: [B, W L, A, K]; keys_values: two of the same shape. Keys are rotated but for those of a
        moving sink.
      past: b divides B; row i is the past of samples i B/b to (i + 1) B/b - 1.
      attend: attention(q, k, v, mask, length=...) of models/attention.py.
      context: keys and values of the clean stream, for all but the last block; earlier blocks of
        the window are then read from it.
      sink_tables: where the sink moves, the rotary table of its frames for each block; else empty.
    """
    length = past.frame_tokens
    block = layout.block
    sink = layout.kept
    recent = past.keys_values.k.shape[1] // length - sink
    clean = keys_values if context is None else context
    outputs = []
    for j in range(q.shape[1] // length // block):
        first = j * block
        stop = first + block
        # frames besides the sink, the block itself included
        count = min(layout.capacity - sink, recent + stop)
        visible = jnp.clip(past.start + stop, 1, sink + count)
        # A window without recent frames may begin before frame 0, and its sink lie anywhere in it.
        sink_end = min(first, sink) if recent else first

        def seen(own, clean, before, first=first, stop=stop, count=count, sink_end=sink_end):
            own = _by_frame(own, length)[:, first:stop]
            clean = _by_frame(clean, length)
            before = jnp.repeat(_by_frame(before, length), q.shape[0] // before.shape[0], axis=0)
            frames = jnp.concatenate([before[:, sink:], clean[:, :first], own], axis=1)
            newest_first = frames[:, -count:][:, ::-1]
            if not sink:
                return _by_token(newest_first)
            start = jnp.concatenate([before[:, :sink], clean[:, :sink_end], own], axis=1)
            # the sink's frames are among the past's sink, which the frames from past.start follow
            frame = np.arange(sink)
            places = jnp.where(frame < past.start, frame, sink + frame - past.start)
            places = jnp.minimum(places, start.shape[1] - 1)
            return _by_token(jnp.concatenate([start[:, places], newest_first], axis=1))

        keys, values = map(seen, keys_values, clean, past.keys_values)
        if sink_tables:
            tokens = sink * length
            keys = jnp.concatenate(
                [rotate(keys[:, :tokens], sink_tables[j]), keys[:, tokens:]], axis=1
            )
        queries = q[:, first * length : stop * length]
        outputs.append(attend(queries, keys, values, length=visible * length))
    return jnp.concatenate(outputs, axis=1)


def _by_frame(x, frame_tokens: int):
    return x.reshape(x.shape[0], -1, frame_tokens, *x.shape[2:])


def _by_token(x):
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _ranges_and_mask(block, frame_tokens):
    """Return the frame ranges to read, and a mask where the window is smaller than the block.

    Queries before the window then see the window and their own token (docs/models.md, Training
    mask).
    """
    window_start = block.ranges[0][0] if block.ranges else block.stop
    if window_start <= block.start:
        return block.ranges, None
    token = np.arange((block.stop - block.start) * frame_tokens)
    in_window = token >= (window_start - block.start) * frame_tokens
    return ((block.start, block.stop),), in_window[None, :] | (token[:, None] == token[None, :])


def _cut(ranges, *at):
    """Return the ranges, cut at the given frames."""
    for cut in at:
        ranges = [
            piece
            for lo, hi in ranges
            for piece in ([(lo, cut), (cut, hi)] if lo < cut < hi else [(lo, hi)])
        ]
    return ranges
