"""Dense attention behind one function, and the block-causal attention of the uncached forward.

Block-causal attention is run block by block on static slices of the keys, so that no mask exists and a fused kernel
applies; the result is exact (spec/model.md 7).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax.models.wan.config import Block
from astrolabe_jax.models.wan.rope import rotate


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask=None, backend: str = "auto") -> jax.Array:
    """Softmax attention, scale 1/sqrt(K). q [B, N, A, K], k and v [B, M, A, K], mask bool [N, M] or None.

    backend: 'xla' (any device, any dtype), 'cudnn' (GPU, 16 bit, no mask) or 'auto', which takes cudnn where it can.
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
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=backend)


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
) -> jax.Array:
    """Attention of each block's queries to the frames it sees. q, k, v [B, F L, A, K] -> [B, F L, A, K].

    context: (k, v) of the clean stream, same shape; frames before a block are then read from it, and only the block
    itself from k and v (spec/model.md 7.3). sink_tables: where the keys of the first `sink` frames are un-rotated, one
    rotary table of those frames for each block; else None.
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
        outputs.append(attention(queries, keys, values, mask, backend))
    return jnp.concatenate(outputs, axis=1)


def _ranges_and_mask(block, frame_tokens):
    """Frame ranges to read and the mask, which exists only where the window is smaller than the block.

    Queries before the window then see the window and their own token (spec/model.md 7.1: "or i = j").
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
        ranges = [piece for lo, hi in ranges for piece in ([(lo, cut), (cut, hi)] if lo < cut < hi else [(lo, hi)])]
    return ranges
