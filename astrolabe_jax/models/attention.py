"""Softmax attention behind one function, with a back end for every kind of device.

`xla` runs on any device and dtype. It holds the scores of a few queries at a time where those of
all would be many, and makes them anew in the backward pass. `cudnn` (NVIDIA) and `splash` (TPU,
JAX's Pallas kernel) never hold them (docs/models.md, Attention back ends).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax import sharding
from astrolabe_jax.models.chunks import in_chunks
from astrolabe_jax.runtime import backend as devices

BACKENDS = ("auto", "xla", "cudnn", "splash")
# Bytes of float32 scores that `xla` holds of one call on a device; enough for a demo's whole
# blocks, and near what a CPU's caches hold, where few are as fast as all.
_MOST_SCORES = 64 * 2**20
# Scores of keys that a query does not see; finite, so that a row without any gives no NaN.
_UNSEEN = float(np.finfo(np.float32).min) / 2


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask=None,
    backend: str = "auto",
    length=None,
    causal: bool = False,
) -> jax.Array:
    """Return softmax attention [B, N, A, K] with scale 1/sqrt(K), in the dtype of q.

    Args:
      q: queries [B, N, A, K].
      k, v: [B, M, A, K]. They may have fewer heads, each of which then serves as many consecutive
        heads of q.
      mask: bool [N, M], or None.
      backend: 'xla', 'cudnn' (GPU, 16 bit, no mask), 'splash' (TPU, no mask) or 'auto'.
      length: see the first `length` keys only; a traced scalar, or None for all.
      causal: token i of q sees the first i + 1 keys.

    Raises:
      ValueError: for cudnn or splash with a mask, or cudnn with numbers that are not of 16 bits.
    """
    name = choose_backend(backend, q, mask)
    if name == "xla":
        return _xla(q, k, v, mask, length, causal)
    if name == "cudnn":
        return _cudnn(q, k, v, length, causal)
    # it is heavy to import, and of use on a TPU alone
    from astrolabe_jax.models.splash import splash_attention

    return splash_attention(q, k, v, length, causal)


def choose_backend(backend: str, q: jax.Array, mask) -> str:
    """Return the back end that runs: 'auto' takes the fused kernel of the device where it can."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    width = q.shape[-1]
    if backend == "auto" and mask is None:
        device = devices.current()
        for_cudnn = device == "gpu" and half and width % 8 == 0 and width <= 128
        return "cudnn" if for_cudnn else "splash" if device == "tpu" else "xla"
    if backend == "auto":
        return "xla"
    if backend == "cudnn" and not half:
        raise ValueError(
            f"cudnn attention needs 16-bit inputs, got {q.dtype}; use attention='auto' or 'xla'"
        )
    if backend != "xla" and mask is not None:
        raise ValueError(f"{backend} attention takes no mask; use attention='auto' or 'xla'")
    return backend


def _cudnn(q, k, v, length, causal: bool) -> jax.Array:
    if length is not None:
        length = jnp.broadcast_to(jnp.asarray(length, jnp.int32), q.shape[:1])
    return jax.nn.dot_product_attention(
        q, k, v, implementation="cudnn", is_causal=causal, key_value_seq_lengths=length
    )


def _xla(q, k, v, mask, length, causal: bool) -> jax.Array:
    """Run the queries in as few equal chunks as keep the scores within bounds."""
    batch, rows, heads, _ = q.shape
    keys = k.shape[1]
    row_bytes = 4 * sharding.per_device(batch) * heads * keys
    seen = _visible(rows, keys, mask, length, causal)
    if seen is None or seen.shape[0] == 1:
        return in_chunks(lambda q: _dense(q, k, v, seen), q, row_bytes, _MOST_SCORES)
    both = (q, seen[None])
    return in_chunks(lambda q, seen: _dense(q, k, v, seen[0]), both, row_bytes, _MOST_SCORES)


def _visible(rows: int, keys: int, mask, length, causal: bool):
    """Return which keys a query sees: bool [N or 1, M], or None for all."""
    key = jnp.arange(keys)[None]
    parts = [
        None if mask is None else jnp.asarray(mask),
        None if length is None else key < length,
        key <= jnp.arange(rows)[:, None] if causal else None,
    ]
    given = [part for part in parts if part is not None]
    return functools.reduce(jnp.logical_and, given) if given else None


def _dense(q, k, v, seen) -> jax.Array:
    """Return attention with all scores at once; sums and softmax in float32.

    Heads come first and the sum divides last: on a CPU that takes about half of the time of
    jax.nn.dot_product_attention, whose backward pass copies and transposes the weights.
    """
    batch, rows, heads, width = q.shape
    q = jnp.moveaxis(q.reshape(batch, rows, k.shape[2], -1, width), 1, 3)  # [B, A of k, n, N, K]
    k = jnp.swapaxes(k, 1, 2)
    v = jnp.swapaxes(v, 1, 2)
    scores = jnp.einsum("banqk,bamk->banqm", q, k, preferred_element_type=jnp.float32)
    scores = scores * width**-0.5
    if seen is not None:
        scores = jnp.where(seen[None, None, None], scores, _UNSEEN)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    y = jnp.einsum(
        "banqm,bamk->banqk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return jnp.moveaxis(y / total, 3, 1).reshape(batch, rows, heads, width).astype(q.dtype)
