"""The vision tower of Qwen2-VL: patches of images or videos of one grid -> tokens."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from astrolabe_jax.models.layers import LayerNorm
from astrolabe_jax.models.wan.attention import attention
from astrolabe_jax.rewards.qwen2_vl.config import MERGE, PATCH_VALUES, Qwen2VLConfig
from astrolabe_jax.rewards.qwen2_vl.linear import linear, stacked
from astrolabe_jax.rewards.qwen2_vl.rope import Grid, Table, rotate, vision_table
from astrolabe_jax.sharding import by_sample


class QwenVision(nnx.Module):
    """Blocks that attend within one temporal patch, then the merger of 2 x 2 patches to a token."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        self.config = config
        dense = functools.partial(linear, config=config, rngs=rngs)
        self.patch_embed = dense(PATCH_VALUES, config.vision_dim, use_bias=False, quantised=False)
        self.blocks = stacked(
            lambda rngs: QwenVisionBlock(config, rngs), config.vision_layers, rngs
        )
        self.merger = QwenMerger(config, rngs)

    def __call__(self, patches: jax.Array, grid: Grid) -> jax.Array:
        """Return tokens [B, t h w / 4, D] of patches [B, t h w, 1176] of the static grid (t, h, w).

        A row is a patch in the order channel, frame, row, column; rows are in the order temporal
        patch, row of tokens, column of tokens, row and column in the token. Raises ValueError for
        patches that are not those of the grid.
        """
        t, h, w = grid
        expected = (t * h * w, PATCH_VALUES)
        fits = patches.ndim == 3 and patches.shape[1:] == expected
        if not fits or h % MERGE or w % MERGE:
            raise ValueError(
                f"patches have the shape {list(patches.shape)}; expected [B, {t * h * w}, "
                f"{PATCH_VALUES}] for the grid {grid}, with rows and columns that are multiples of "
                f"{MERGE}"
            )
        config = self.config
        samples = patches.shape[0]
        x = self.patch_embed(patches.astype(config.dtype))
        x = by_sample(x)
        x = x.reshape(samples * t, h * w, config.vision_dim)  # each temporal patch on its own
        head_dim = config.vision_dim // config.vision_heads
        cos, sin = vision_table(head_dim, h, w)
        table = (cos[None], sin[None])
        blockdef, params = nnx.split(self.blocks)

        def layer(x, params):
            return nnx.merge(blockdef, params)(x, table), None

        x, _ = jax.lax.scan(layer, x, params)
        x = x.reshape(samples, t * h * w, config.vision_dim)
        return self.merger(x)


class QwenVisionBlock(nnx.Module):
    """x + attention(norm1(x)), then x + fc2(quick_gelu(fc1(norm2(x))))."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        dim = config.vision_dim
        param_dtype = jnp.dtype(config.param_dtype)
        dense = functools.partial(linear, config=config, rngs=rngs)
        self.heads = config.vision_heads
        self.norm1 = LayerNorm(dim, eps=config.vision_eps, param_dtype=param_dtype)
        self.qkv = dense(dim, 3 * dim)
        self.proj = dense(dim, dim)
        self.norm2 = LayerNorm(dim, eps=config.vision_eps, param_dtype=param_dtype)
        self.fc1 = dense(dim, config.vision_ffn)
        self.fc2 = dense(config.vision_ffn, dim)

    def __call__(self, x: jax.Array, table: Table) -> jax.Array:
        """Return x [N, patches, vision_dim] after the block."""
        qkv = self.qkv(self.norm1(x))
        qkv = qkv.reshape(*x.shape[:2], 3 * self.heads, -1)
        q, k, v = jnp.split(qkv, 3, axis=2)
        q = rotate(q, table)
        k = rotate(k, table)
        y = attention(q, k, v)
        x = x + self.proj(y.reshape(x.shape))
        y = self.fc1(self.norm2(x))
        return x + self.fc2(y * jax.nn.sigmoid(1.702 * y))


class QwenMerger(nnx.Module):
    """Normed patches, four in a row, through two linears: [B, N, vision_dim] -> [B, N / 4, D]."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        wide = MERGE**2 * config.vision_dim
        param_dtype = jnp.dtype(config.param_dtype)
        dense = functools.partial(linear, config=config, rngs=rngs)
        self.norm = LayerNorm(config.vision_dim, eps=config.vision_eps, param_dtype=param_dtype)
        self.fc1 = dense(wide, wide)
        self.fc2 = dense(wide, config.dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return tokens [B, N / 4, D] of patches [B, N, vision_dim]."""
        samples, rows, _ = x.shape
        x = self.norm(x).reshape(samples, rows // MERGE**2, -1)
        x = jax.nn.gelu(self.fc1(x), approximate=False)
        return self.fc2(x)
