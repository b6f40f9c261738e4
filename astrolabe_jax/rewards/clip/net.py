"""CLIP: OpenCLIP ViT-H/14 and OpenAI's ViT-L/14, and a predictor of aesthetic scores on it.

Two pre-norm transformers with learnt positions. The image tower gives its class token, the text
tower, which is causal, its first end token; each is normalised and projected to the same space.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from astrolabe_jax.models.attention import attention
from astrolabe_jax.models.layers import Embedding, LayerNorm, Linear, row, scanned, stacked
from astrolabe_jax.sharding import by_sample

AESTHETIC_WIDTHS = (1024, 128, 64, 16, 1)  # of the layers behind the image features


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers; the defaults are OpenCLIP ViT-H/14.

    `embed_dim` is the space that they share.
    """

    vision_dim: int = 1280
    vision_ffn: int = 5120
    vision_layers: int = 32
    vision_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    text_dim: int = 1024
    text_ffn: int = 4096
    text_layers: int = 24
    text_heads: int = 16
    vocab_size: int = 49408
    text_len: int = 77
    embed_dim: int = 1024
    quick_gelu: bool = False  # x sigmoid(1.702 x) in place of the exact GELU
    eps: float = 1e-5
    dtype: str = "float32"  # of the activations
    param_dtype: str = "float32"

    def __post_init__(self):
        for name in ("vision", "text"):
            dim = getattr(self, f"{name}_dim")
            heads = getattr(self, f"{name}_heads")
            if dim % heads:
                raise ValueError(
                    f"CLIPConfig.{name}_dim {dim} is not divisible by {name}_heads {heads}"
                )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"CLIPConfig.image_size {self.image_size} is not divisible by patch_size "
                f"{self.patch_size}"
            )


VIT_H_14 = CLIPConfig()
VIT_L_14 = CLIPConfig(
    vision_dim=1024,
    vision_ffn=4096,
    vision_layers=24,
    text_dim=768,
    text_ffn=3072,
    text_layers=12,
    text_heads=12,
    embed_dim=768,
    quick_gelu=True,
)


class CLIP(nnx.Module):
    """Both towers."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        self.vision = CLIPVision(config, rngs)
        self.text = CLIPText(config, rngs)


class CLIPVision(nnx.Module):
    """Images to their features."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        self.config = config
        dim = config.vision_dim
        dense = functools.partial(
            Linear,
            use_bias=False,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.patch_embedding = dense(3 * config.patch_size**2, dim)
        self.class_embedding = _normal((dim,), dim**-0.5, config, rngs)
        patches = (config.image_size // config.patch_size) ** 2
        self.positions = _normal((patches + 1, dim), dim**-0.5, config, rngs)
        self.norm_in = LayerNorm(
            dim,
            eps=config.eps,
            param_dtype=config.param_dtype,
        )
        self.blocks = stacked(
            lambda rngs: CLIPBlock("vision", config, rngs), config.vision_layers, rngs
        )
        self.norm_out = LayerNorm(
            dim,
            eps=config.eps,
            param_dtype=config.param_dtype,
        )
        self.projection = dense(dim, config.embed_dim)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return features [B, embed_dim] float32, not normalised.

        images: standardised, [B, image_size, image_size, 3].
        """
        size = self.config.patch_size
        side = self.config.image_size // size
        batch = images.shape[0]
        patches = images.astype(self.config.dtype).reshape(batch, side, size, side, size, 3)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side * side, -1)
        x = self.patch_embedding(by_sample(patches))
        first = jnp.broadcast_to(row(self.class_embedding, x), (batch, 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1)
        x = self.norm_in(x + self.positions[...].astype(x.dtype)[None])
        x = scanned(self.blocks, x, False)
        return self.projection(self.norm_out(x[:, 0])).astype(jnp.float32)


class CLIPText(nnx.Module):
    """Texts to their features."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        self.config = config
        dim = config.text_dim
        self.token_embedding = Embedding(
            config.vocab_size,
            dim,
            0.02,
            dtype=config.dtype,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.positions = _normal((config.text_len, dim), 0.01, config, rngs)
        self.blocks = stacked(
            lambda rngs: CLIPBlock("text", config, rngs), config.text_layers, rngs
        )
        self.norm_out = LayerNorm(
            dim,
            eps=config.eps,
            param_dtype=config.param_dtype,
        )
        self.projection = Linear(
            dim, config.embed_dim, use_bias=False, param_dtype=config.param_dtype, rngs=rngs
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Return features [B, embed_dim] float32, not normalised, of ids [B, at most text_len].

        A text ends at its first token with the largest id, which is the end token: what stands
        behind it, zeros in OpenCLIP and more end tokens in OpenAI's, does not matter.
        """
        x = by_sample(self.token_embedding(ids))
        x = x + self.positions[: ids.shape[1]].astype(x.dtype)[None]
        x = scanned(self.blocks, x, True)
        ends = jnp.argmax(ids, axis=1)
        x = jnp.take_along_axis(x, ends[:, None, None], axis=1)
        return self.projection(self.norm_out(x[:, 0])).astype(jnp.float32)


class AestheticNet(nnx.Module):
    """Linear layers without activations on normalised image features."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        self.vision = CLIPVision(config, rngs)
        self.head = nnx.List(
            [
                Linear(
                    n_in,
                    n_out,
                    rngs=rngs,
                )
                for n_in, n_out in itertools.pairwise((config.embed_dim, *AESTHETIC_WIDTHS))
            ]
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return scores [B] float32, usually 4 to 7.

        images: standardised, [B, image_size, image_size, 3].
        """
        x = normalised(self.vision(images))
        for layer in self.head:
            x = layer(x)
        return x[:, 0]


class CLIPBlock(nnx.Module):
    """x + Attention(norm1(x)), then x + FFN(norm2(x)), of one tower, "vision" or "text"."""

    def __init__(self, tower: str, config: CLIPConfig, rngs: nnx.Rngs):
        dim = getattr(config, f"{tower}_dim")
        ffn = getattr(config, f"{tower}_ffn")
        dense = functools.partial(Linear, param_dtype=config.param_dtype, rngs=rngs)
        self.norm1 = LayerNorm(
            dim,
            eps=config.eps,
            param_dtype=config.param_dtype,
        )
        self.attn = CLIPAttention(
            functools.partial(dense, dim, dim), getattr(config, f"{tower}_heads")
        )
        self.norm2 = LayerNorm(
            dim,
            eps=config.eps,
            param_dtype=config.param_dtype,
        )
        self.fc1 = dense(dim, ffn)
        self.fc2 = dense(ffn, dim)
        self.quick_gelu = config.quick_gelu

    def __call__(self, x: jax.Array, causal: bool) -> jax.Array:
        """Return x [B, N, D] after the block."""
        x = x + self.attn(self.norm1(x), causal)
        y = self.fc1(self.norm2(x))
        y = y * jax.nn.sigmoid(1.702 * y) if self.quick_gelu else jax.nn.gelu(y, approximate=False)
        return x + self.fc2(y)


class CLIPAttention(nnx.Module):
    """Self-attention with biases; the softmax is float32."""

    def __init__(self, dense: Callable[[], Linear], heads: int):
        self.heads = heads
        self.q = dense()
        self.k = dense()
        self.v = dense()
        self.o = dense()

    def __call__(self, x: jax.Array, causal: bool) -> jax.Array:
        """Return what x [B, N, D] reads of itself."""
        shape = (*x.shape[:2], self.heads, -1)
        q = self.q(x).reshape(shape)
        k = self.k(x).reshape(shape)
        v = self.v(x).reshape(shape)
        return self.o(attention(q, k, v, causal=causal).reshape(x.shape))


def normalised(features: jax.Array) -> jax.Array:
    """Return features [..., E] at length one, in float32."""
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def _normal(shape: tuple[int, ...], std: float, config: CLIPConfig, rngs: nnx.Rngs) -> nnx.Param:
    values = std * jax.random.normal(rngs.params(), shape)
    return nnx.Param(values.astype(config.param_dtype))
