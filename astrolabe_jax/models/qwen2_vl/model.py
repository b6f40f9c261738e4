"""Qwen2-VL as one module, and the reward models made of it: a head at tokens of its own
(spec/rewards.md 3.4, 4.3).
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from astrolabe_jax.models.layers import Linear
from astrolabe_jax.models.qwen2_vl.config import Qwen2VLConfig
from astrolabe_jax.models.qwen2_vl.language import Language
from astrolabe_jax.models.qwen2_vl.rope import Grid, Table, plain_positions, text_table
from astrolabe_jax.models.qwen2_vl.vision import Vision


class Qwen2VL(nnx.Module):
    """Both towers."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        self.config = config
        self.vision = Vision(config, rngs)
        self.language = Language(config, rngs)

    def hidden(
        self,
        patches: jax.Array,
        grid: Grid,
        ids: jax.Array,
        where: jax.Array,
        table: Table | None = None,
    ) -> jax.Array:
        """Hidden states [B, n, D] at the tokens `where` [B, n] of the ids [B, L], padded on the
        right or not.

        patches [B, t h w, 1176]: see Vision; each sample has t h w / 4 placeholders among its ids.
        table: of other positions than 0 to L - 1 in all three rows, from rope.text_table; an
        argument of the jitted function.
        """
        table = text_table(self.config, plain_positions(ids.shape[1])) if table is None else table
        return self.language(ids, self.vision(patches, grid), where, table)


class RewardNet(Qwen2VL):
    """Qwen2-VL with a head at given tokens."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        if not config.head:
            raise ValueError(
                "Qwen2VLConfig.head is empty; expected the widths of a reward's linears"
            )
        super().__init__(config, rngs)
        self.head = RewardHead(config, rngs)

    def __call__(
        self, patches: jax.Array, grid: Grid, ids: jax.Array, where: jax.Array
    ) -> jax.Array:
        """`hidden`, then the head: float32 [B, n * config.head[-1]].

        HPSv3, one token: the score and the raw uncertainty, the logarithm of a standard deviation.
        VideoAlign, three tokens: VQ, MQ and TA before their normalisation.
        """
        outputs = self.head(self.hidden(patches, grid, ids, where))
        return outputs.reshape(outputs.shape[0], -1)


class RewardHead(nnx.Module):
    """Linears with ReLU between them, in float32."""

    def __init__(self, config: Qwen2VLConfig, rngs: nnx.Rngs):
        self.linears = nnx.List(
            [
                Linear(n_in, n_out, use_bias=len(config.head) > 1, rngs=rngs)
                for n_in, n_out in itertools.pairwise((config.dim, *config.head))
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, n, D] of any dtype -> float32 [B, n, outputs]."""
        with jax.default_matmul_precision("float32"):  # accelerators take fewer bits by default
            x = self.linears[0](x.astype(jnp.float32))
            for linear in self.linears[1:]:
                x = linear(jax.nn.relu(x))
        return x
