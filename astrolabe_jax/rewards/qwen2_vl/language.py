"""The decoder of Qwen2-VL without its output layer: embeddings -> hidden states."""

import jax
import jax.numpy as jnp
from flax import nnx

from astrolabe_jax.models.attention import attention
from astrolabe_jax.models.layers import Embedding, RMSNorm, scanned, stacked
from astrolabe_jax.rewards.qwen2_vl.config import Qwen2VLConfig
from astrolabe_jax.rewards.qwen2_vl.linear import linear
from astrolabe_jax.rewards.qwen2_vl.rope import Table, rotate, text_table
from astrolabe_jax.sharding import by_sample


class QwenDecoder(nnx.Module):
    """The decoder. Layers are stacked on a leading axis and scanned."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(
            config.vocab_size,
            config.dim,
            0.02,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.blocks = stacked(lambda rngs: QwenDecoderBlock(config, rngs), config.num_layers, rngs)
        self.norm = RMSNorm(config.dim, eps=config.eps, param_dtype=config.param_dtype)

    def __call__(self, ids: jax.Array, vision: jax.Array, where: jax.Array) -> jax.Array:
        """Return the hidden states [B, n, D] after the final norm at some tokens.

        What stands behind a token does not change it, so that padding on the right needs no mask.

        Args:
          ids: token ids [B, L].
          vision: tokens of the vision tower [B, V, D]. They take the place of the placeholders
            among the ids, in order, of which each sample has V.
          where: [B, n], the tokens that are asked about.
        """
        config = self.config
        is_placeholder = (ids == config.image_token) | (ids == config.video_token)
        index = jnp.cumsum(is_placeholder, axis=1) - 1
        vision = vision.astype(config.dtype)
        tokens = jnp.take_along_axis(
            vision,
            index[..., None],
            axis=1,
            mode="clip",
        )
        x = jnp.where(is_placeholder[..., None], tokens, self.embedding(ids))
        x = scanned(self.blocks, by_sample(x), text_table(config, ids.shape[1]))
        return self.norm(jnp.take_along_axis(x, where[..., None], axis=1))


class QwenDecoderBlock(nnx.Module):
    """x + attention(norm1(x)), then x + down(silu(gate(y)) up(y)) of y = norm2(x)."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        dim = config.dim
        self.head_dim = config.head_dim
        self.norm1 = RMSNorm(dim, eps=config.eps, param_dtype=config.param_dtype)
        self.q = linear(dim, dim, config, rngs)
        self.k = linear(dim, config.dim_kv, config, rngs)
        self.v = linear(dim, config.dim_kv, config, rngs)
        self.o = linear(dim, dim, config, rngs, use_bias=False)
        self.norm2 = RMSNorm(dim, eps=config.eps, param_dtype=config.param_dtype)
        self.gate = linear(dim, config.dim_ffn, config, rngs, use_bias=False)
        self.up = linear(dim, config.dim_ffn, config, rngs, use_bias=False)
        self.down = linear(config.dim_ffn, dim, config, rngs, use_bias=False)

    def __call__(self, x: jax.Array, table: Table) -> jax.Array:
        """Return x [B, L, D] after the block."""
        y = self.norm1(x)
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (project(y).reshape(heads) for project in (self.q, self.k, self.v))
        y = attention(
            rotate(q, table),
            rotate(k, table),
            v,
            causal=True,
        )
        x = x + self.o(y.reshape(x.shape))
        y = self.norm2(x)
        gate = jax.nn.silu(self.gate(y))
        return x + self.down(gate * self.up(y))
