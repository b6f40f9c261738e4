"""The vision tower of Qwen2-VL: patches of images or videos of one grid -> tokens (spec/rewards.md
5.3).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from astrolabe_jax.models.layers import LayerNorm
from astrolabe_jax.models.qwen2_vl.config import MERGE, PATCH_VALUES, Qwen2VLConfig
from astrolabe_jax.models.qwen2_vl.linear import linear, stacked
from astrolabe_jax.models.qwen2_vl.rope import Grid, Table, rotate, vision_table
from astrolabe_jax.models.wan.attention import attention
from astrolabe_jax.sharding import by_sample


class Vision(nnx.Module):
    """Blocks that attend within one temporal patch, then the merger of 2 x 2 patches into a
    token.
    """

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        self.config = config
        self.patch_embed = linear(
            PATCH_VALUES, config.vision_dim, config, rngs, use_bias=False, quantised=False
        )
        self.blocks = stacked(lambda rngs: Block(config, rngs), config.vision_layers, rngs)
        self.merger = Merger(config, rngs)

    def __call__(self, patches: jax.Array, grid: Grid) -> jax.Array:
        """Patches [B, t h w, 1176] of the static grid (t, h, w) -> tokens [B, t h w / 4, D].

        A row is a patch in the order channel, frame, row, column; rows are in the order temporal
        patch, row of tokens, column of tokens, row and column in the token. Raises ValueError for
        patches that are not those of the grid.
        """
        t, h, w = grid
        if (
            h % MERGE
            or w % MERGE
            or patches.ndim != 3
            or patches.shape[1:] != (t * h * w, PATCH_VALUES)
        ):
            raise ValueError(
                f"patches have the shape {list(patches.shape)}; expected [B, {t * h * w}, "
                f"{PATCH_VALUES}] for the grid {grid}, with rows and columns that are multiples of "
                f"{MERGE}"
            )
        config, samples = self.config, patches.shape[0]
        x = by_sample(self.patch_embed(patches.astype(config.dtype)))
        x = x.reshape(samples * t, h * w, config.vision_dim)  # each temporal patch on its own
        table = tuple(
            part[None] for part in vision_table(config.vision_dim // config.vision_heads, h, w)
        )
        blockdef, params = nnx.split(self.blocks)

        def layer(x, params):
            return nnx.merge(blockdef, params)(x, table), None

        x = jax.lax.scan(layer, x, params)[0]
        return self.merger(x.reshape(samples, t * h * w, config.vision_dim))


class Block(nnx.Module):
    """x + attention(norm1(x)), then x + fc2(quick_gelu(fc1(norm2(x))))."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        dim, param_dtype = config.vision_dim, jnp.dtype(config.param_dtype)
        self.heads = config.vision_heads
        self.norm1 = LayerNorm(dim, eps=config.vision_eps, param_dtype=param_dtype)
        self.qkv = linear(dim, 3 * dim, config, rngs)
        self.proj = linear(dim, dim, config, rngs)
        self.norm2 = LayerNorm(dim, eps=config.vision_eps, param_dtype=param_dtype)
        self.fc1 = linear(dim, config.vision_ffn, config, rngs)
        self.fc2 = linear(config.vision_ffn, dim, config, rngs)

    def __call__(self, x: jax.Array, table: Table) -> jax.Array:
        q, k, v = jnp.split(
            self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3 * self.heads, -1), 3, axis=2
        )
        x = x + self.proj(attention(rotate(q, table), rotate(k, table), v).reshape(x.shape))
        y = self.fc1(self.norm2(x))
        return x + self.fc2(y * jax.nn.sigmoid(1.702 * y))


class Merger(nnx.Module):
    """Normed patches, four in a row, through two linears: [B, N, vision_dim] -> [B, N / 4, D]."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        wide = MERGE**2 * config.vision_dim
        self.norm = LayerNorm(
            config.vision_dim, eps=config.vision_eps, param_dtype=jnp.dtype(config.param_dtype)
        )
        self.fc1 = linear(wide, wide, config, rngs)
        self.fc2 = linear(wide, config.dim, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(x).reshape(x.shape[0], x.shape[1] // MERGE**2, -1)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))
