"""Qwen2-VL as one module, and the reward models made of it: a head at tokens of its own."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from astrolabe_jax.models.layers import Linear
from astrolabe_jax.rewards.qwen2_vl.config import Qwen2VLConfig
from astrolabe_jax.rewards.qwen2_vl.language import QwenDecoder
from astrolabe_jax.rewards.qwen2_vl.rope import Grid
from astrolabe_jax.rewards.qwen2_vl.vision import QwenVision


class Qwen2VL(nnx.Module):
    """Both towers."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        self.vision = QwenVision(config, rngs)
        self.language = QwenDecoder(config, rngs)

    def hidden(self, patches: jax.Array, grid: Grid, ids: jax.Array, where: jax.Array) -> jax.Array:
        """Return the hidden states [B, n, D] at some tokens.

        Args:
          patches: [B, t h w, 1176], see QwenVision; each sample has t h w / 4 placeholders among
            its ids.
          grid: (t, h, w), static.
          ids: token ids [B, L], padded on the right or not.
          where: [B, n], the tokens that are asked about.
        """
        return self.language(ids, self.vision(patches, grid), where)


class QwenRewardNet(Qwen2VL):
    """Qwen2-VL with a head at given tokens."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        if not config.head:
            raise ValueError(
                "Qwen2VLConfig.head is empty; expected the widths of a reward's linears"
            )
        super().__init__(config, rngs)
        self.head = QwenRewardHead(config, rngs)

    def __call__(
        self, patches: jax.Array, grid: Grid, ids: jax.Array, where: jax.Array
    ) -> jax.Array:
        """Return the head's outputs float32 [B, n * config.head[-1]] at the `hidden` states.

        HPSv3 has one token: the score and the raw uncertainty, the logarithm of a standard
        deviation. VideoAlign has three tokens: VQ, MQ and TA before their normalisation.
        """
        hidden = self.hidden(patches, grid, ids, where)
        return self.head(hidden).reshape(ids.shape[0], -1)


class QwenRewardHead(nnx.Module):
    """Linears with ReLU between them, in float32."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        self.linears = nnx.List(
            [
                Linear(n_in, n_out, use_bias=len(config.head) > 1, rngs=rngs)
                for n_in, n_out in itertools.pairwise((config.dim, *config.head))
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return float32 [B, n, outputs] of x [B, n, D] of any dtype."""
        with jax.default_matmul_precision("float32"):  # accelerators take fewer bits by default
            x = self.linears[0](x.astype(jnp.float32))
            for linear in self.linears[1:]:
                x = linear(jax.nn.relu(x))
        return x
