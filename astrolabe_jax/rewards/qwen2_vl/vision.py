"""The vision tower of Qwen2-VL: patches of images or videos of one grid -> tokens."""

import jax
import jax.numpy as jnp
from flax import nnx

from astrolabe_jax.models.attention import attention
from astrolabe_jax.models.layers import LayerNorm, Linear, scanned, stacked
from astrolabe_jax.rewards.qwen2_vl.config import MERGE, PATCH_VALUES, Qwen2VLConfig
from astrolabe_jax.rewards.qwen2_vl.linear import INIT, linear
from astrolabe_jax.rewards.qwen2_vl.rope import Grid, Table, rotate, vision_table
from astrolabe_jax.sharding import by_sample


class QwenVision(nnx.Module):
    """Blocks that attend within one temporal patch, then the merger of 2 x 2 patches to a token."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        self.config = config
        self.patch_embed = Linear(
            PATCH_VALUES,
            config.vision_dim,
            use_bias=False,
            param_dtype=config.param_dtype,
            kernel_init=INIT,
            rngs=rngs,
        )
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
        fits = patches.ndim == 3 and patches.shape[1:] == (t * h * w, PATCH_VALUES)
        if not fits or h % MERGE or w % MERGE:
            raise ValueError(
                f"patches have the shape {list(patches.shape)}; expected [B, {t * h * w}, "
                f"{PATCH_VALUES}] for the grid {grid}, with rows and columns that are multiples of "
                f"{MERGE}"
            )
        config = self.config
        samples = patches.shape[0]
        x = by_sample(self.patch_embed(patches.astype(config.dtype)))
        x = x.reshape(samples * t, h * w, config.vision_dim)  # each temporal patch on its own
        table = vision_table(config.vision_dim // config.vision_heads, h, w)
        x = scanned(self.blocks, x, table)
        return self.merger(x.reshape(samples, t * h * w, config.vision_dim))


class QwenVisionBlock(nnx.Module):
    """x + attention(norm1(x)), then x + fc2(quick_gelu(fc1(norm2(x))))."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        dim = config.vision_dim
        self.heads = config.vision_heads
        self.norm1 = LayerNorm(dim, eps=config.vision_eps, param_dtype=config.param_dtype)
        self.qkv = linear(dim, 3 * dim, config, rngs)
        self.proj = linear(dim, dim, config, rngs)
        self.norm2 = LayerNorm(dim, eps=config.vision_eps, param_dtype=config.param_dtype)
        self.fc1 = linear(dim, config.vision_ffn, config, rngs)
        self.fc2 = linear(config.vision_ffn, dim, config, rngs)

    def __call__(self, x: jax.Array, table: Table) -> jax.Array:
        """Return x [N, patches, vision_dim] after the block."""
        qkv = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3 * self.heads, -1)
        q, k, v = jnp.split(qkv, 3, axis=2)
        y = attention(
            rotate(q, table),
            rotate(k, table),
            v,
        )
        x = x + self.proj(y.reshape(x.shape))
        y = self.fc1(self.norm2(x))
        return x + self.fc2(y * jax.nn.sigmoid(1.702 * y))


class QwenMerger(nnx.Module):
    """Normed patches, four in a row, through two linears: [B, N, vision_dim] -> [B, N / 4, D]."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        dim = config.vision_dim
        wide = MERGE**2 * dim
        self.norm = LayerNorm(dim, eps=config.vision_eps, param_dtype=config.param_dtype)
        self.fc1 = linear(wide, wide, config, rngs)
        self.fc2 = linear(wide, config.dim, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return tokens [B, N / 4, D] of patches [B, N, vision_dim]."""
        x = self.norm(x).reshape(x.shape[0], x.shape[1] // MERGE**2, -1)
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))
