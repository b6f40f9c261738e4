"""The tables of the three checkpoints: published totals at full size, exact round trips at tiny size."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

from astrolabe_jax.convert import engine, umt5, vae, wan
from astrolabe_jax.models import layers
from astrolabe_jax.models.umt5 import UMT5, XXL, UMT5Config
from astrolabe_jax.models.wan.config import WAN_1_3B, WAN_14B, WanConfig
from astrolabe_jax.models.wan.transformer import WanTransformer
from astrolabe_jax.models.wan.vae import Vae, VaeConfig

TINY_WAN = WanConfig(
    dim=12, ffn_dim=20, num_layers=2, num_heads=2, freq_dim=8, text_dim=6, text_len=4, in_channels=4,
    dtype="float32", param_dtype="float32",
)  # fmt: skip
TINY_UMT5 = UMT5Config(
    vocab_size=11, dim=8, dim_attn=8, dim_ffn=12, num_heads=2, num_layers=2, text_len=6,
    dtype="float32", param_dtype="float32",
)  # fmt: skip
TINY_VAE = VaeConfig(dim=2, z_dim=3, num_res_blocks=1, latent_mean=(0.0,) * 3, latent_std=(1.0,) * 3)

# name: (module, load, save)
FAMILIES = {
    "wan": (
        lambda: WanTransformer(TINY_WAN, rngs=nnx.Rngs(0)),
        lambda tensors: wan.load_transformer(tensors, TINY_WAN),
        lambda params: wan.save_transformer(params, TINY_WAN),
    ),
    "umt5": (
        lambda: UMT5(TINY_UMT5, nnx.Rngs(0)),
        lambda tensors: umt5.load_umt5(tensors, TINY_UMT5),
        umt5.save_umt5,
    ),
    "vae": (
        lambda: Vae(TINY_VAE, nnx.Rngs(0)),
        lambda tensors: vae.load_vae(tensors, TINY_VAE),
        lambda params: vae.save_vae(params, TINY_VAE),
    ),
}


@pytest.fixture(params=FAMILIES, scope="module")
def family(request):
    make, load, save = FAMILIES[request.param]
    params = layers.graphdef_of(make)[1]
    rng = np.random.default_rng(0)  # every leaf random, so that no two tensors can be exchanged unseen
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), params)
    return params, load, save


@pytest.mark.parametrize(
    ("table", "expected", "tensors", "parameters"),
    [
        (wan.table(WAN_1_3B.patch_size), wan.expected_params(WAN_1_3B), 825, 1_418_996_800),
        (wan.table(WAN_14B.patch_size), wan.expected_params(WAN_14B), 1095, 14_288_491_584),
        (umt5.TABLE, umt5.expected_params(XXL), 242, 5_680_910_336),
        (vae.table(VaeConfig()), vae.expected_params(VaeConfig()), 194, 126_892_531),
    ],
    ids=["wan-1.3B", "wan-14B", "umt5-xxl", "vae"],
)
def test_published_totals(table, expected, tensors, parameters):
    shapes = engine.source_shapes(table, expected)
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == parameters


@pytest.mark.parametrize(
    ("config", "expected", "table", "shapes"),
    [
        (WAN_1_3B, wan.expected_params, lambda c: wan.table(c.patch_size), {
            "patch_embedding.weight": (1536, 16, 1, 2, 2),
            "text_embedding.0.weight": (1536, 4096),
            "time_projection.1.weight": (9216, 1536),
            "head.head.weight": (64, 1536),
            "head.modulation": (1, 2, 1536),
            "blocks.29.modulation": (1, 6, 1536),
            "blocks.0.cross_attn.norm_k.weight": (1536,),
            "blocks.7.ffn.0.weight": (8960, 1536),
        }),
        (XXL, umt5.expected_params, lambda c: umt5.TABLE, {
            "token_embedding.weight": (256384, 4096),
            "blocks.23.pos_embedding.embedding.weight": (32, 64),
            "blocks.0.ffn.gate.0.weight": (10240, 4096),
            "blocks.0.ffn.fc2.weight": (4096, 10240),
        }),
        (VaeConfig(), vae.expected_params, vae.table, {
            "encoder.downsamples.3.shortcut.weight": (192, 96, 1, 1, 1),
            "encoder.downsamples.8.time_conv.weight": (384, 384, 3, 1, 1),
            "encoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
            "decoder.upsamples.4.residual.0.gamma": (192, 1, 1, 1),
            "decoder.upsamples.7.time_conv.weight": (768, 384, 3, 1, 1),
            "decoder.upsamples.11.resample.1.weight": (96, 192, 3, 3),
            "decoder.head.2.weight": (3, 96, 3, 3, 3),
        }),
    ],
    ids=["wan", "umt5", "vae"],
)  # fmt: skip
def test_published_shapes(config, expected, table, shapes):
    found = engine.source_shapes(table(config), expected(config))
    assert {name: found[name] for name in shapes} == shapes


def test_round_trip_is_byte_exact(family):
    params, load, save = family
    tensors = save(params)
    back = load(tensors)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True))
    again = save(back)
    assert tensors.keys() == again.keys()
    assert all(tensors[name].tobytes() == again[name].tobytes() for name in tensors)


def test_every_tensor_is_required_and_no_other_accepted(family):
    params, load, save = family
    tensors = save(params)
    names = list(tensors)
    for name in (names[0], names[len(names) // 2], names[-1]):
        with pytest.raises(engine.ConversionError, match=f"missing tensor: {name} "):
            load({k: v for k, v in tensors.items() if k != name})
        with pytest.raises(engine.ConversionError, match=f"unused tensor: {name}.extra "):
            load(tensors | {f"{name}.extra": tensors[name]})
        with pytest.raises(engine.ConversionError, match=f"changed shape: {name} is "):
            load(tensors | {name: tensors[name][None]})
