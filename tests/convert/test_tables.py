"""The tables of the three checkpoints: published totals at full size, exact round trips at tiny
size.
"""

import math

import jax
import numpy as np
import pytest

from astrolabe_jax.convert import base, engine, umt5, vae, wan
from astrolabe_jax.models.umt5 import XXL
from astrolabe_jax.models.wan.config import WAN_1_3B, WAN_14B
from astrolabe_jax.models.wan.vae import VaeConfig
from experiments.moving_shapes_base.bases import save_net
from tests.models import tiny

CONFIGS = {
    "transformer": tiny.CONFIG,
    "vae": VaeConfig(
        dim=2, z_dim=3, num_res_blocks=1, latent_mean=(0.0,) * 3, latent_std=(1.0,) * 3
    ),
    "text_encoder": tiny.TEXT,
}


@pytest.fixture(params=CONFIGS, scope="module")
def drawn(request):
    """Return (part, net, tensors), all random, so that no two tensors can be exchanged unseen."""
    net = base.shapes(request.param, CONFIGS[request.param])
    net = net._replace(params=tiny.random_params(net.params, np.random.default_rng(0)))
    return request.param, net, save_net(request.param, net.params, net.config)


@pytest.mark.parametrize(
    ("part", "config", "table", "tensors", "parameters", "some"),
    [
        (
            "transformer",
            WAN_1_3B,
            wan.table,
            825,
            1_418_996_800,
            {
                "patch_embedding.weight": (1536, 16, 1, 2, 2),
                "text_embedding.0.weight": (1536, 4096),
                "time_projection.1.weight": (9216, 1536),
                "head.head.weight": (64, 1536),
                "head.modulation": (1, 2, 1536),
                "blocks.29.modulation": (1, 6, 1536),
                "blocks.0.cross_attn.norm_k.weight": (1536,),
                "blocks.7.ffn.0.weight": (8960, 1536),
            },
        ),
        (
            "transformer",
            WAN_14B,
            wan.table,
            1095,
            14_288_491_584,
            {
                "patch_embedding.weight": (5120, 16, 1, 2, 2),
                "blocks.39.ffn.2.weight": (5120, 13824),
            },
        ),
        (
            "text_encoder",
            XXL,
            umt5.table,
            242,
            5_680_910_336,
            {
                "token_embedding.weight": (256384, 4096),
                "blocks.23.pos_embedding.embedding.weight": (32, 64),
                "blocks.0.ffn.gate.0.weight": (10240, 4096),
                "blocks.0.ffn.fc2.weight": (4096, 10240),
            },
        ),
        (
            "vae",
            VaeConfig(),
            vae.table,
            194,
            126_892_531,
            {
                "encoder.downsamples.3.shortcut.weight": (192, 96, 1, 1, 1),
                "encoder.downsamples.8.time_conv.weight": (384, 384, 3, 1, 1),
                "encoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
                "decoder.upsamples.4.residual.0.gamma": (192, 1, 1, 1),
                "decoder.upsamples.7.time_conv.weight": (768, 384, 3, 1, 1),
                "decoder.upsamples.11.resample.1.weight": (96, 192, 3, 3),
                "decoder.head.2.weight": (3, 96, 3, 3, 3),
            },
        ),
    ],
    ids=["wan-1.3B", "wan-14B", "umt5-xxl", "vae"],
)
def test_published_tensors(part, config, table, tensors, parameters, some):
    shapes = engine.source_shapes(table(config), base.shapes(part, config).params)
    assert len(shapes) == tensors
    assert sum(map(math.prod, shapes.values())) == parameters
    assert {name: shapes[name] for name in some} == some


def test_round_trip_is_byte_exact(drawn):
    part, net, tensors = drawn
    back = base.load_net(part, tensors, net.config)
    assert back.graphdef == net.graphdef
    assert jax.tree.structure(back.params) == jax.tree.structure(net.params)
    for a, b in zip(jax.tree.leaves(back.params), jax.tree.leaves(net.params), strict=True):
        assert a.tobytes() == b.tobytes()
    again = save_net(part, back.params, net.config)
    assert {k: v.tobytes() for k, v in again.items()} == {
        k: v.tobytes() for k, v in tensors.items()
    }


def test_every_tensor_is_required_and_no_other_accepted(drawn):
    part, net, tensors = drawn

    def refused(tensors, culprit):
        with pytest.raises(engine.ConversionError, match=culprit):
            base.load_net(part, tensors, net.config)

    names = list(tensors)
    for name in (names[0], names[len(names) // 2], names[-1]):
        refused({k: v for k, v in tensors.items() if k != name}, f"missing tensor: {name} ")
        refused(tensors | {f"{name}.extra": tensors[name]}, f"unused tensor: {name}.extra ")
        refused(tensors | {name: tensors[name][None]}, f"changed shape: {name} is ")
