"""Dense attention behind one function, and the block-causal attention of the uncached forward.

Block-causal attention is run block by block on static slices of the keys, so that no mask exists
and a fused kernel applies; the result is exact (spec/model.md 7).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax.models.wan.config import Block, Layout
from astrolabe_jax.models.wan.rope import rotate


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask=None,
    backend: str = "auto",
    length=None,
    remat: bool = False,
    causal: bool = False,
) -> jax.Array:
    """Softmax attention, scale 1/sqrt(K). q [B, N, A, K], k and v [B, M, A, K], mask bool [N, M] or
    None.

    k and v may have fewer heads, each of which then serves as many consecutive heads of q. causal:
    token i of q sees the first i + 1 keys. length: see the first `length` keys only; a traced
    scalar, or None for all. remat: make the scores [B, A, N, M] anew in the backward pass, where
    'xla' would keep those of all calls of a layer at once; cudnn never does.

    backend: 'xla' (any device, any dtype), 'cudnn' (GPU, 16 bit, no mask) or 'auto', which takes
    cudnn where it can.
    """
    fused = q.dtype in (jnp.bfloat16, jnp.float16) and mask is None
    if backend == "auto":
        on_gpu = jax.default_backend() == "gpu" and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
        backend = "cudnn" if on_gpu and fused else "xla"
    if backend == "cudnn" and not fused:
        raise ValueError(
            f"cudnn attention needs 16-bit inputs and no mask, got {q.dtype}"
            f"{' with a mask' if mask is not None else ''}; use attention='auto' or 'xla'"
        )
    mask = None if mask is None else jnp.asarray(mask)[None, None]
    length = (
        None if length is None else jnp.broadcast_to(jnp.asarray(length, jnp.int32), q.shape[:1])
    )
    run = functools.partial(jax.nn.dot_product_attention, implementation=backend, is_causal=causal)
    if remat and backend == "xla":
        run = jax.checkpoint(run)
    return run(q, k, v, mask=mask, key_value_seq_lengths=length)


def block_causal_attention(
    q,
    k,
    v,
    blocks: Sequence[Block],
    frame_tokens: int,
    *,
    context=None,
    sink: int = 0,
    sink_tables=None,
    backend: str = "auto",
    remat: bool = False,
) -> jax.Array:
    """Attention of each block's queries to the frames it sees. q, k, v [B, F L, A, K] -> [B, F L,
    A, K].

    context: (k, v) of the clean stream, same shape; frames before a block are then read from it,
    and only the block itself from k and v (spec/model.md 7.3). sink_tables: where the keys of the
    first `sink` frames are un-rotated, one rotary table of those frames for each block; else None.
    """
    own, outputs = (k, v), []
    for i, block in enumerate(blocks):
        ranges, mask = _ranges_and_mask(block, frame_tokens)
        keys, values = [], []
        for lo, hi in _cut(ranges, block.start, sink if sink_tables else 0):
            tokens = slice(lo * frame_tokens, hi * frame_tokens)
            k_source, v_source = context if context is not None and lo < block.start else own
            piece = k_source[:, tokens]
            if sink_tables and lo < sink:
                piece = rotate(piece, tuple(table[tokens] for table in sink_tables[i]))
            keys.append(piece)
            values.append(v_source[:, tokens])
        queries = q[:, block.start * frame_tokens : block.stop * frame_tokens]
        keys, values = jnp.concatenate(keys, axis=1), jnp.concatenate(values, axis=1)
        outputs.append(attention(queries, keys, values, mask, backend, remat=remat))
    return jnp.concatenate(outputs, axis=1)


def window_attention(
    q,
    k,
    v,
    past,
    start,
    layout: Layout,
    frame_tokens: int,
    *,
    context=None,
    sink_tables=None,
    backend: str = "auto",
    remat: bool = False,
) -> jax.Array:
    """Attention of the blocks of a window that begins at frame `start` of a video
    (spec/streaming.md 6.1).

    q, k, v [B, W L, A, K]; past: keys and values [b, (kept + n) L, A, K] of the sink and of the n
    frames before the window, as cache.past_frames gives them, where b divides B: row i is the past
    of samples i B/b to (i + 1) B/b - 1. start: traced, so that one program serves every window.
    Keys are rotated but for those of a moving sink, for which sink_tables has the rotary table of
    each block. context: keys and values of the clean stream, for all but the last block; earlier
    blocks of the window are then read from it.

    A block's keys stand in the order sink, then newest frame first, so that those which exist are
    the first ones: the kernel's sequence length leaves out the rest, and no mask is needed.
    """
    block, kept = layout.block, layout.kept
    frames, recent = q.shape[1] // frame_tokens, past[0].shape[1] // frame_tokens - kept
    own, clean, before = (
        [_by_frame(part, frame_tokens) for part in pair]
        for pair in ((k, v), context or (k, v), past)
    )
    before = [jnp.repeat(part, q.shape[0] // part.shape[0], axis=0) for part in before]
    outputs = []
    for j in range(frames // block):
        first, stop = j * block, (j + 1) * block
        # frames besides the sink, own block included
        count = min(layout.capacity - kept, recent + stop)
        visible = jnp.clip(start + stop, 1, kept + count)

        def keys_of(own, clean, before, first=first, stop=stop, count=count):
            seen = [before[:, kept:], clean[:, :first], own[:, first:stop]]
            pieces = [jnp.concatenate(seen, axis=1)[:, -count:][:, ::-1]]
            if kept:
                started = jnp.concatenate(
                    [before[:, :kept], clean[:, : min(first, kept)], own[:, first:stop]], axis=1
                )
                pieces.insert(0, started[:, _sink_places(start, kept, started.shape[1])])
            return _by_token(jnp.concatenate(pieces, axis=1))

        keys, values = (keys_of(*parts) for parts in zip(own, clean, before, strict=True))
        if sink_tables:
            sink = kept * frame_tokens
            keys = jnp.concatenate([rotate(keys[:, :sink], sink_tables[j]), keys[:, sink:]], axis=1)
        queries = q[:, first * frame_tokens : stop * frame_tokens]
        outputs.append(
            attention(queries, keys, values, None, backend, visible * frame_tokens, remat)
        )
    return jnp.concatenate(outputs, axis=1)


def _sink_places(start, kept: int, most: int):
    """Where the frames of the sink stand among: the past's sink, then the frames from `start`
    on.
    """
    frame = np.arange(kept)
    return jnp.minimum(jnp.where(frame < start, frame, kept + frame - start), most - 1)


def _by_frame(x, frame_tokens: int):
    return x.reshape(x.shape[0], -1, frame_tokens, *x.shape[2:])


def _by_token(x):
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _ranges_and_mask(block, frame_tokens):
    """Frame ranges to read and the mask, which exists only where the window is smaller than the
    block.

    Queries before the window then see the window and their own token (spec/model.md 7.1: "or i =
    j").
    """
    window_start = block.ranges[0][0] if block.ranges else block.stop
    if window_start <= block.start:
        return block.ranges, None
    token = np.arange((block.stop - block.start) * frame_tokens)
    in_window = token >= (window_start - block.start) * frame_tokens
    return ((block.start, block.stop),), in_window[None, :] | (token[:, None] == token[None, :])


def _cut(ranges, *at):
    """The ranges, cut at the given frames."""
    for cut in at:
        ranges = [
            piece
            for lo, hi in ranges
            for piece in ([(lo, cut), (cut, hi)] if lo < cut < hi else [(lo, hi)])
        ]
    return ranges
