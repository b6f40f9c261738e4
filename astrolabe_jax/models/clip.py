"""CLIP (spec/rewards.md 7, 8): OpenCLIP ViT-H/14 and OpenAI's ViT-L/14, and a predictor of
aesthetic scores on it.

Two pre-norm transformers with learnt positions. The image tower gives its class token, the text
tower, which is causal, its first end token; each is normalised and projected to the same space.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from astrolabe_jax.models.layers import Embedding, LayerNorm, Linear
from astrolabe_jax.models.wan.attention import attention
from astrolabe_jax.sharding import by_sample

AESTHETIC_WIDTHS = (1024, 128, 64, 16, 1)  # of the layers behind the image features


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers; the defaults are OpenCLIP ViT-H/14. `embed_dim` is the space that they
    share.
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
            dim, heads = getattr(self, f"{name}_dim"), getattr(self, f"{name}_heads")
            if dim % heads:
                raise ValueError(
                    f"CLIPConfig.{name}_dim {dim} is not divisible by {name}_heads {heads}"
                )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"CLIPConfig.image_size {self.image_size} is not divisible by patch_size "
                f"{self.patch_size}"
            )

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2


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
        self.vision = VisionTower(config, rngs)
        self.text = TextTower(config, rngs)


class VisionTower(nnx.Module):
    """Images to their features."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        self.config = config
        dim, param_dtype = config.vision_dim, jnp.dtype(config.param_dtype)
        self.patch_embedding = Linear(
            3 * config.patch_size**2, dim, use_bias=False, param_dtype=param_dtype, rngs=rngs
        )
        self.class_embedding = _normal((dim,), dim**-0.5, param_dtype, rngs)
        self.positions = _normal((config.patches + 1, dim), dim**-0.5, param_dtype, rngs)
        self.norm_in = LayerNorm(dim, eps=config.eps, param_dtype=param_dtype)
        self.blocks = _blocks(
            dim, config.vision_ffn, config.vision_heads, config.vision_layers, config, rngs
        )
        self.norm_out = LayerNorm(dim, eps=config.eps, param_dtype=param_dtype)
        self.projection = Linear(
            dim, config.embed_dim, use_bias=False, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Normalised images [B, image_size, image_size, 3] -> features [B, embed_dim] float32, not
        normalised.
        """
        dtype, size = self.config.dtype, self.config.patch_size
        batch, side = images.shape[0], self.config.image_size // size
        patches = (
            images.astype(dtype)
            .reshape(batch, side, size, side, size, 3)
            .transpose(0, 1, 3, 2, 4, 5)
        )
        x = self.patch_embedding(by_sample(patches.reshape(batch, side * side, -1)))
        first = jnp.broadcast_to(self.class_embedding[...].astype(dtype), (batch, 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + self.positions[...].astype(dtype)[None]
        x = _scanned(self.blocks, self.norm_in(x), causal=False)
        return self.projection(self.norm_out(x[:, 0])).astype(jnp.float32)


class TextTower(nnx.Module):
    """Texts to their features."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        self.config = config
        dim, param_dtype = config.text_dim, jnp.dtype(config.param_dtype)
        self.token_embedding = Embedding(
            config.vocab_size, dim, 0.02, dtype=config.dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.positions = _normal((config.text_len, dim), 0.01, param_dtype, rngs)
        self.blocks = _blocks(
            dim, config.text_ffn, config.text_heads, config.text_layers, config, rngs
        )
        self.norm_out = LayerNorm(dim, eps=config.eps, param_dtype=param_dtype)
        self.projection = Linear(
            dim, config.embed_dim, use_bias=False, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Token ids [B, at most text_len] -> features [B, embed_dim] float32, not normalised.

        A text ends at its first token with the largest id, which is the end token: what stands
        behind it, zeros in OpenCLIP and more end tokens in OpenAI's, does not matter.
        """
        positions = self.positions[...][: ids.shape[1]].astype(self.config.dtype)
        x = _scanned(
            self.blocks, by_sample(self.token_embedding(ids)) + positions[None], causal=True
        )
        ends = jnp.take_along_axis(x, jnp.argmax(ids, axis=1)[:, None, None], axis=1)[:, 0]
        return self.projection(self.norm_out(ends)).astype(jnp.float32)


class Aesthetic(nnx.Module):
    """Linear layers without activations on normalised image features (section 8)."""

    def __init__(self, config: CLIPConfig, rngs: nnx.Rngs):
        self.vision = VisionTower(config, rngs)
        widths = (config.embed_dim, *AESTHETIC_WIDTHS)
        self.head = nnx.List(
            [
                Linear(a, b, param_dtype=jnp.float32, rngs=rngs)
                for a, b in zip(widths, widths[1:], strict=False)
            ]
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Normalised images [B, image_size, image_size, 3] -> scores [B] float32, usually 4 to
        7.
        """
        x = normalised(self.vision(images))
        for layer in self.head:
            x = layer(x)
        return x[:, 0]


class Block(nnx.Module):
    """x + Attention(norm1(x)), then x + FFN(norm2(x))."""

    def __init__(self, dim: int, ffn: int, heads: int, config: CLIPConfig, rngs: nnx.Rngs):
        param_dtype = jnp.dtype(config.param_dtype)
        self.norm1 = LayerNorm(dim, eps=config.eps, param_dtype=param_dtype)
        self.attn = Attention(dim, heads, param_dtype, rngs)
        self.norm2 = LayerNorm(dim, eps=config.eps, param_dtype=param_dtype)
        self.fc1 = Linear(dim, ffn, param_dtype=param_dtype, rngs=rngs)
        self.fc2 = Linear(ffn, dim, param_dtype=param_dtype, rngs=rngs)
        self.quick = config.quick_gelu

    def __call__(self, x: jax.Array, causal: bool) -> jax.Array:
        x = x + self.attn(self.norm1(x), causal)
        y = self.fc1(self.norm2(x))
        y = y * jax.nn.sigmoid(1.702 * y) if self.quick else jax.nn.gelu(y, approximate=False)
        return x + self.fc2(y)


class Attention(nnx.Module):
    """Self-attention with biases; the softmax is float32."""

    def __init__(self, dim: int, heads: int, param_dtype, rngs: nnx.Rngs):
        self.heads = heads
        self.q, self.k, self.v, self.o = (
            Linear(dim, dim, param_dtype=param_dtype, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: jax.Array, causal: bool) -> jax.Array:
        q, k, v = (
            part(x).reshape(*x.shape[:2], self.heads, -1) for part in (self.q, self.k, self.v)
        )
        return self.o(attention(q, k, v, causal=causal).reshape(x.shape))


def normalised(features: jax.Array) -> jax.Array:
    """Features [..., E] at length one, in float32."""
    features = features.astype(jnp.float32)
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)


def _blocks(
    dim: int, ffn: int, heads: int, count: int, config: CLIPConfig, rngs: nnx.Rngs
) -> Block:
    """`count` blocks, stacked on a leading axis."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap
    def make(rngs):
        return Block(dim, ffn, heads, config, rngs)

    return make(rngs)


def _scanned(blocks: Block, x: jax.Array, causal: bool) -> jax.Array:
    blockdef, stacked = nnx.split(blocks)

    def layer(x, params):
        return nnx.merge(blockdef, params)(x, causal), None

    return jax.lax.scan(layer, x, stacked)[0]


def _normal(shape: tuple[int, ...], std: float, dtype, rngs: nnx.Rngs) -> nnx.Param:
    return nnx.Param((std * jax.random.normal(rngs.params(), shape)).astype(dtype))
