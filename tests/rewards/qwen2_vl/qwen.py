"""A tiny random Qwen2-VL for tests, its torch twin, and inputs of both."""

import dataclasses
import functools

import numpy as np
import torch
import transformers
from flax import nnx

from astrolabe_jax.convert import nets
from astrolabe_jax.rewards.qwen2_vl import weights
from astrolabe_jax.rewards.qwen2_vl.config import MERGE, PATCH_VALUES, Qwen2VLConfig
from astrolabe_jax.rewards.qwen2_vl.linear import quantise
from tests.models import tiny

IMAGE, VIDEO, PADDING = 41, 42, 43
CONFIG = Qwen2VLConfig(
    vocab_size=50,
    dim=32,
    dim_kv=16,
    dim_ffn=40,
    num_layers=3,
    head_dim=8,
    mrope_section=(1, 1, 2),
    vision_dim=24,
    vision_ffn=48,
    vision_layers=2,
    vision_heads=2,
    image_token=IMAGE,
    video_token=VIDEO,
    dtype="float32",
    param_dtype="float32",
)
HPSV3 = dataclasses.replace(CONFIG, head=(10, 6, 2))
VIDEOALIGN = dataclasses.replace(CONFIG, head=(1,))


def shapes(config: Qwen2VLConfig) -> nets.Net:
    """The net of these sizes, with shapes as its parameters."""
    return nets.shapes(weights.spec_of("qwen2_vl", config), config)


@functools.cache
def net(config: Qwen2VLConfig = CONFIG):
    """Graph definition and random parameters; without a head, of the plain model."""
    graphdef, params, _ = shapes(config)
    return graphdef, tiny.random_params(params, np.random.default_rng(7))


def config_of(params: dict) -> Qwen2VLConfig:
    """HPSV3 or VIDEOALIGN, by the head."""
    return HPSV3 if len(params["head"]["linears"]) == len(HPSV3.head) else VIDEOALIGN


def quantised(params: dict) -> tuple[nnx.GraphDef, dict, dict]:
    """The int8 net of a reward, its parameters, and plain ones with the kernels that these stand
    for.
    """
    graphdef, expected, _ = shapes(dataclasses.replace(config_of(params), quantised=True))

    def fill(expected: dict, given: dict) -> tuple[dict, dict]:
        if "kernel" in given and expected["kernel"].dtype == np.int8:
            whole, scale = quantise(given["kernel"], np)
            return given | {"kernel": whole, "scale": scale}, given | {
                "kernel": whole * scale[..., None, :]
            }
        pairs = {
            key: fill(expected[key], node) if isinstance(node, dict) else (node, node)
            for key, node in given.items()
        }
        return tuple({key: pair[i] for key, pair in pairs.items()} for i in range(2))

    return graphdef, *fill(expected, params)


def oracle(config: Qwen2VLConfig = CONFIG) -> transformers.Qwen2VLForConditionalGeneration:
    """transformers' model of the same sizes, with weights of its own."""
    return transformers.Qwen2VLForConditionalGeneration(oracle_config(config)).eval()


def oracle_config(config: Qwen2VLConfig) -> transformers.Qwen2VLConfig:
    return transformers.Qwen2VLConfig(
        text_config=dict(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.dim_ffn,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.dim // config.head_dim,
            num_key_value_heads=config.dim_kv // config.head_dim,
            rms_norm_eps=config.eps,
            max_position_embeddings=32768,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": config.rope_theta,
                "mrope_section": list(config.mrope_section),
            },
            tie_word_embeddings=False,
        ),
        vision_config=dict(
            depth=config.vision_layers,
            embed_dim=config.vision_dim,
            hidden_size=config.dim,
            mlp_ratio=config.vision_ffn // config.vision_dim,
            num_heads=config.vision_heads,
        ),
        image_token_id=config.image_token,
        video_token_id=config.video_token,
        tie_word_embeddings=False,
    )


def patches(samples: int, grid, seed: int = 0) -> np.ndarray:
    """Normed pixels [B, t h w, 1176]."""
    return tiny.normal(seed, samples, int(np.prod(grid)), PATCH_VALUES)


def ids(
    lengths, grid, placeholder: int = IMAGE, before: int = 3, seed: int = 1, config=CONFIG
) -> np.ndarray:
    """Token ids [B, L]: text, placeholders of the grid, text up to the length of each sample,
    padding.
    """
    rng, vision = np.random.default_rng(seed), int(np.prod(grid)) // MERGE**2
    table = np.full((len(lengths), max(lengths)), PADDING)
    for row, length in zip(table, lengths, strict=True):
        row[:length] = rng.integers(0, IMAGE, length)
        row[before : before + vision] = placeholder
    return table.astype(np.int32)


def random_weights(model: torch.nn.Module, seed: int = 3) -> None:
    """Every parameter normal, times 0.3, around one in norms; 0.1 in LoRA, whose product would
    drown the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = float(parameter.ndim == 1 and name.endswith("weight"))
            scale = 0.1 if ".lora_" in name else 0.3
            parameter.copy_(centre + scale * torch.randn(parameter.shape, generator=generator))
