"""UMT5 text encoder (spec/vae_and_text.md part B): the published XXL size, and tiny ones for the
embedded world.

Unlike T5, every layer has its own table of relative position biases. There are no other positions,
no biases in the linears, and no 1/sqrt(d) in the scores.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from astrolabe_jax.models.layers import Embedding, Linear, RMSNorm
from astrolabe_jax.sharding import by_sample


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """Sizes of the encoder; the defaults are UMT5-XXL as shipped with Wan 2.1. `dim` is E,
    `text_len` is S.
    """

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    text_len: int = 512
    eps: float = 1e-6
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
    """The encoder. Layers are stacked on a leading axis and scanned."""

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs):
        self.config = config
        self.token_embedding = _embedding(config.vocab_size, config.dim, 1.0, config, rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def make_blocks(rngs):
            return Block(config, rngs)

        self.blocks = make_blocks(rngs)
        self.norm = RMSNorm(config.dim, eps=config.eps, param_dtype=jnp.dtype(config.param_dtype))

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Token ids [B, S] and mask [B, S] (1 up to the end token) -> hidden states [B, S, E] of
        every position.

        Masked positions are never attended to; what is returned for them means nothing.
        """
        x = by_sample(self.token_embedding(ids))
        buckets = jnp.asarray(relative_buckets(self.config, ids.shape[1]))
        blockdef, stacked = nnx.split(self.blocks)

        def layer(x, params):
            return nnx.merge(blockdef, params)(x, mask, buckets), None

        return self.norm(jax.lax.scan(layer, x, stacked)[0])

    def embed(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Text embeddings [B, S, E] as the DiT takes them: the hidden states with zero rows beyond
        each prompt.
        """
        return jnp.where(mask[:, :, None] == 1, self(ids, mask), 0)


class Block(nnx.Module):
    """x + Attention(norm1(x)), then x + FFN(norm2(x))."""

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs):
        param_dtype = jnp.dtype(config.param_dtype)
        self.norm1 = RMSNorm(config.dim, eps=config.eps, param_dtype=param_dtype)
        self.attn = Attention(config, rngs)
        std = (2 * config.num_buckets * config.num_heads) ** -0.5
        self.position_bias = _embedding(config.num_buckets, config.num_heads, std, config, rngs)
        self.norm2 = RMSNorm(config.dim, eps=config.eps, param_dtype=param_dtype)
        self.ffn = FeedForward(config, rngs)

    def __call__(self, x: jax.Array, mask: jax.Array, buckets: jax.Array) -> jax.Array:
        bias = self.position_bias(buckets).transpose(2, 0, 1)[None]  # [1, A, S, S]
        # Replaced, not added: a masked key gets the lowest finite score whatever its bias.
        bias = jnp.where(mask[:, None, None, :] == 1, bias, jnp.finfo(bias.dtype).min)
        x = x + self.attn(self.norm1(x), bias)
        return x + self.ffn(self.norm2(x))


class Attention(nnx.Module):
    """Full self-attention with an additive bias [B, A, S, S] and unscaled scores."""

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs):
        dim, inner = config.dim, config.dim_attn
        self.heads = config.num_heads
        # Small queries take the place of the missing 1/sqrt(d).
        self.q = _linear(dim, inner, (dim * inner / config.num_heads) ** -0.5, config, rngs)
        self.k = _linear(dim, inner, dim**-0.5, config, rngs)
        self.v = _linear(dim, inner, dim**-0.5, config, rngs)
        self.o = _linear(inner, dim, inner**-0.5, config, rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        q, k, v = (
            part(x).reshape(*x.shape[:2], self.heads, -1) for part in (self.q, self.k, self.v)
        )
        # rounded to the compute dtype before the softmax (B5)
        scores = jnp.einsum("bqak,bsak->baqs", q, k) + bias
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(x.dtype)
        return self.o(jnp.einsum("baqs,bsak->bqak", weights, v).reshape(*x.shape[:2], -1))


class FeedForward(nnx.Module):
    """fc2(fc1(x) * gelu(gate(x))), the tanh form of gelu."""

    def __init__(self, config: UMT5Config, rngs: nnx.Rngs):
        self.gate = _linear(config.dim, config.dim_ffn, config.dim**-0.5, config, rngs)
        self.fc1 = _linear(config.dim, config.dim_ffn, config.dim**-0.5, config, rngs)
        self.fc2 = _linear(config.dim_ffn, config.dim, config.dim_ffn**-0.5, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.fc1(x) * jax.nn.gelu(self.gate(x), approximate=True))


def relative_buckets(config: UMT5Config, length: int) -> np.ndarray:
    """Bucket of every (query, key) pair: [length, length] int32 in [0, num_buckets), exact at the
    boundaries (B3).

    Half of the buckets are for keys after the query. Of each half, the first half holds one
    distance each, and the rest grow geometrically up to `max_distance`. Bucket first + j starts at
    the smallest n with n^span >= first^(span - j) max_distance^j, which whole numbers decide
    without rounding.
    """
    half = config.num_buckets // 2
    first = half // 2
    span = half - first
    starts = list(range(first))
    for j in range(span):
        bound = first ** (span - j) * config.max_distance**j
        starts.append(next(n for n in range(first, config.max_distance + 1) if n**span >= bound))
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]  # key - query
    offset = np.searchsorted(starts, np.abs(relative), side="right") - 1
    return (offset + half * (relative > 0)).astype(np.int32)


def _linear(n_in: int, n_out: int, std: float, config: UMT5Config, rngs: nnx.Rngs) -> Linear:
    init = nnx.initializers.normal(std)
    return Linear(
        n_in,
        n_out,
        use_bias=False,
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=init,
        rngs=rngs,
    )


def _embedding(rows: int, width: int, std: float, config: UMT5Config, rngs: nnx.Rngs) -> Embedding:
    return Embedding(
        rows, width, std, dtype=config.dtype, param_dtype=jnp.dtype(config.param_dtype), rngs=rngs
    )
