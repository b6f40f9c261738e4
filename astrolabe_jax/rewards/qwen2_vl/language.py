"""The decoder of Qwen2-VL without its output layer: embeddings -> hidden states."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from astrolabe_jax.models.layers import Embedding, RMSNorm
from astrolabe_jax.models.wan.attention import attention
from astrolabe_jax.rewards.qwen2_vl.config import Qwen2VLConfig
from astrolabe_jax.rewards.qwen2_vl.linear import linear, stacked
from astrolabe_jax.rewards.qwen2_vl.rope import Table, rotate
from astrolabe_jax.sharding import by_sample


class QwenDecoder(nnx.Module):
    """The decoder. Layers are stacked on a leading axis and scanned."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        self.config = config
        param_dtype = jnp.dtype(config.param_dtype)
        self.embedding = Embedding(
            config.vocab_size,
            config.dim,
            0.02,
            dtype=config.dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.blocks = stacked(lambda rngs: QwenDecoderBlock(config, rngs), config.num_layers, rngs)
        self.norm = RMSNorm(config.dim, eps=config.eps, param_dtype=param_dtype)

    def __call__(
        self, ids: jax.Array, vision: jax.Array, where: jax.Array, table: Table
    ) -> jax.Array:
        """Return the hidden states [B, n, D] after the final norm at some tokens.

        What stands behind a token does not change it, so that padding on the right needs no mask.

        Args:
          ids: token ids [B, L].
          vision: tokens of the vision tower [B, V, D]. They take the place of the placeholders
            among the ids, in order, of which each sample has V.
          where: [B, n], the tokens that are asked about.
          table: the rotary table [B or 1, L, K/2] of the positions.
        """
        is_image = ids == self.config.image_token
        is_video = ids == self.config.video_token
        vision = vision.astype(self.config.dtype)
        x = _filled(self.embedding(ids), is_image | is_video, vision)
        x = by_sample(x)
        blockdef, params = nnx.split(self.blocks)

        def layer(x, params):
            return nnx.merge(blockdef, params)(x, table), None

        x, _ = jax.lax.scan(layer, x, params)
        x = jnp.take_along_axis(x, where[..., None], axis=1)
        return self.norm(x)


def _filled(x: jax.Array, is_placeholder: jax.Array, vision: jax.Array) -> jax.Array:
    """Return x [B, L, D] with the rows of vision [B, V, D] in the placeholders [B, L], in order."""
    index = jnp.cumsum(is_placeholder, axis=1) - 1
    rows = jnp.take_along_axis(
        vision,
        index[..., None],
        axis=1,
        mode="clip",
    )
    return jnp.where(is_placeholder[..., None], rows, x)


class QwenDecoderBlock(nnx.Module):
    """x + attention(norm1(x)), then x + down(silu(gate(y)) up(y)) of y = norm2(x)."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        dim = config.dim
        param_dtype = jnp.dtype(config.param_dtype)
        dense = functools.partial(linear, config=config, rngs=rngs)
        self.head_dim = config.head_dim
        self.norm1 = RMSNorm(dim, eps=config.eps, param_dtype=param_dtype)
        self.q = dense(dim, dim)
        self.k = dense(dim, config.dim_kv)
        self.v = dense(dim, config.dim_kv)
        self.o = dense(dim, dim, use_bias=False)
        self.norm2 = RMSNorm(dim, eps=config.eps, param_dtype=param_dtype)
        self.gate = dense(dim, config.dim_ffn, use_bias=False)
        self.up = dense(dim, config.dim_ffn, use_bias=False)
        self.down = dense(config.dim_ffn, dim, use_bias=False)

    def __call__(self, x: jax.Array, table: Table) -> jax.Array:
        """Return x [B, L, D] after the block."""
        y = self.norm1(x)
        q = self._heads(self.q(y))
        k = self._heads(self.k(y))
        v = self._heads(self.v(y))
        q = rotate(q, table)
        k = rotate(k, table)
        y = attention(q, k, v, causal=True)
        x = x + self.o(y.reshape(x.shape))
        y = self.norm2(x)
        gate = jax.nn.silu(self.gate(y))
        return x + self.down(gate * self.up(y))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, self.head_dim)
