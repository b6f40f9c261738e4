"""UMT5 text encoder (docs/models.md, Text encoder): the published XXL size, and tiny ones for the
embedded world.

Unlike T5, every layer has its own table of relative position biases. There are no other positions,
no biases in the linears, and no 1/sqrt(d) in the scores.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from astrolabe_jax.models.layers import Embedding, Linear, RMSNorm, scanned, stacked
from astrolabe_jax.sharding import by_sample


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Sizes of the encoder; the defaults are UMT5-XXL as shipped with Wan 2.1."""

    vocab_size: int = 256384
    dim: int = 4096  # E, width of the hidden states
    dim_attn: int = 4096  # width of all heads together
    dim_ffn: int = 10240
    num_heads: int = 64  # A
    num_layers: int = 24
    num_buckets: int = 32  # of relative positions, both directions together
    max_distance: int = 128  # tokens; all larger distances share a bucket
    text_len: int = 512  # S, tokens of a padded prompt
    eps: float = 1e-6  # of every norm
    dtype: str = "bfloat16"  # of the activations
    param_dtype: str = "bfloat16"

    def __post_init__(self):
        if self.dim_attn % self.num_heads:
            raise ValueError(
                f"UMT5Config.dim_attn {self.dim_attn} is not divisible by num_heads "
                f"{self.num_heads}"
            )
        if self.num_buckets % 4:
            raise ValueError(
                f"UMT5Config.num_buckets is {self.num_buckets}; it must be a multiple of 4"
            )
        if self.max_distance < self.num_buckets // 4:
            raise ValueError(
                f"UMT5Config.max_distance is {self.max_distance}; expected at least a quarter of "
                f"num_buckets, {self.num_buckets // 4}: that many distances have a bucket of their "
                "own"
            )


XXL = UMT5Config()


class UMT5(nnx.Module):
    """The encoder. Its layers are stacked on a leading axis and scanned."""

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = Embedding(
            config.vocab_size,
            config.dim,
            1.0,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.blocks = stacked(lambda rngs: UMT5Block(config, rngs), config.num_layers, rngs)
        self.norm = RMSNorm(
            config.dim,
            eps=config.eps,
            param_dtype=config.param_dtype,
        )

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the hidden states [B, S, E] of every position.

        Masked positions are never attended to; their own hidden states mean nothing.

        Args:
          ids: token ids [B, S].
          mask: [B, S], 1 up to the end token and 0 beyond.
        """
        x = by_sample(self.token_embedding(ids))
        buckets = jnp.asarray(relative_buckets(self.config, ids.shape[1]))
        return self.norm(
            scanned(
                self.blocks,
                x,
                mask,
                buckets,
            )
        )

    def embed(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Return the text embeddings [B, S, E] that the DiT takes: the hidden states, with rows of
        zeros beyond each prompt. `ids` and `mask` are those of `__call__`.
        """
        return jnp.where(mask[:, :, None] == 1, self(ids, mask), 0)


class UMT5Block(nnx.Module):
    """One layer: x + attention(norm1(x)), then x + ffn(norm2(x))."""

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(
            config.dim,
            eps=config.eps,
            param_dtype=config.param_dtype,
        )
        self.attn = UMT5Attention(config, rngs)
        self.position_bias = Embedding(
            config.num_buckets,
            config.num_heads,
            (2 * config.num_buckets * config.num_heads) ** -0.5,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.norm2 = RMSNorm(
            config.dim,
            eps=config.eps,
            param_dtype=config.param_dtype,
        )
        self.ffn = UMT5FeedForward(config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, buckets: jax.Array) -> jax.Array:
        """Return hidden states [B, S, E] for x [B, S, E], mask [B, S] and buckets [S, S]."""
        bias = self.position_bias(buckets).transpose(2, 0, 1)[None]  # [1, A, S, S]
        # Replaced, not added: a masked key gets the lowest finite score whatever its bias.
        bias = jnp.where(mask[:, None, None, :] == 1, bias, jnp.finfo(bias.dtype).min)
        x = x + self.attn(self.norm1(x), bias)
        return x + self.ffn(self.norm2(x))


class UMT5Attention(nnx.Module):
    """Full self-attention with an additive bias and unscaled scores."""

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs):
        dim = config.dim
        inner = config.dim_attn
        self.heads = config.num_heads
        # Small queries take the place of the missing 1/sqrt(d).
        self.q = _linear(dim, inner, dim * inner / config.num_heads, config, rngs)
        self.k = _linear(dim, inner, dim, config, rngs)
        self.v = _linear(dim, inner, dim, config, rngs)
        self.o = _linear(inner, dim, inner, config, rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """Return the attended x [B, S, E], for a bias [B, A, S, S]."""
        by_head = (*x.shape[:2], self.heads, -1)
        q = self.q(x).reshape(by_head)
        k = self.k(x).reshape(by_head)
        v = self.v(x).reshape(by_head)
        # The scores are rounded to the compute dtype before the softmax, as published.
        scores = (
            jnp.einsum(
                "bqak,bsak->baqs",
                q,
                k,
            )
            + bias
        )
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(x.dtype)
        attended = jnp.einsum(
            "baqs,bsak->bqak",
            weights,
            v,
        )
        return self.o(attended.reshape(*x.shape[:2], -1))


class UMT5FeedForward(nnx.Module):
    """The gated feed-forward fc2(fc1(x) * gelu(gate(x))), with the tanh form of gelu."""

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs):
        self.gate = _linear(config.dim, config.dim_ffn, config.dim, config, rngs)
        self.fc1 = _linear(config.dim, config.dim_ffn, config.dim, config, rngs)
        self.fc2 = _linear(config.dim_ffn, config.dim, config.dim_ffn, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [B, S, E] for x [B, S, E]."""
        gate = jax.nn.gelu(self.gate(x), approximate=True)
        return self.fc2(self.fc1(x) * gate)


def relative_buckets(config: UMT5Config, length: int) -> np.ndarray:
    """Return the bucket of every (query, key) pair: [length, length] int32 in [0, num_buckets).

    Half of the buckets are for keys after the query. In each half, the first half of the buckets
    holds one distance each; the others grow geometrically up to `max_distance`. Bucket first + j
    starts at the smallest n with n^first >= first^(first - j) max_distance^j. Whole numbers decide
    this, so the boundaries are exact (docs/models.md, Relative position bias).
    """
    first = config.num_buckets // 4
    starts = list(range(first))
    for j in range(first):
        bound = first ** (first - j) * config.max_distance**j
        starts.append(next(n for n in itertools.count(first) if n**first >= bound))
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]  # key - query
    offset = np.searchsorted(starts, np.abs(relative), side="right") - 1
    return (offset + 2 * first * (relative > 0)).astype(np.int32)


def _linear(n_in: int, n_out: int, scale: float, config: UMT5Config, rngs: nnx.Rngs) -> Linear:
    """Return a linear layer without bias, drawn with standard deviation 1 / sqrt(scale)."""
    return Linear(
        n_in,
        n_out,
        use_bias=False,
        param_dtype=config.param_dtype,
        kernel_init=nnx.initializers.normal(scale**-0.5),
        rngs=rngs,
    )
