"""Causal Wan DiT: names and layouts of Wan's tensors <-> the parameter tree of
models/wan/transformer.py.

There are 15 tensors, and 27 in each block: docs/checkpoints.md, Transformer tensors. What diffusers
calls them: docs/checkpoints.md, Diffusers names.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from astrolabe_jax.convert import engine
from astrolabe_jax.convert.engine import IDENTITY, LINEAR, Rule, Shapes, Substitutions
from astrolabe_jax.models.wan.config import WAN_1_3B, WanConfig

# Original names -> those of diffusers. They hold for the modules of adapters, too.
_DIFFUSERS = (
    (r"^(time|text)_embedding\.0\b", r"condition_embedder.\1_embedder.linear_1"),
    (r"^(time|text)_embedding\.2\b", r"condition_embedder.\1_embedder.linear_2"),
    (r"^time_projection\.1\b", "condition_embedder.time_proj"),
    (r"^head\.head\b", "proj_out"),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.self_attn\b", ".attn1"),
    (r"\.cross_attn\b", ".attn2"),
    (r"(\.attn[12])\.([qkv])\b", r"\1.to_\2"),
    (r"(\.attn[12])\.o\b", r"\1.to_out.0"),
    (r"\.norm3\b", ".norm2"),
    (r"\.ffn\.0\b", ".ffn.net.0.proj"),
    (r"\.ffn\.2\b", ".ffn.net.2"),
)

# Field of WanConfig -> tensors that tell it, with an axis of each.
_WITNESSES = {
    "dim": [
        ("blocks.{i}.self_attn.k.bias", 0),
        ("blocks.{i}.norm3.weight", 0),
        ("patch_embedding.bias", 0),
    ],
    "ffn_dim": [("blocks.{i}.ffn.0.bias", 0), ("blocks.{i}.ffn.2.weight", 1)],
    "freq_dim": [("time_embedding.0.weight", 1)],
    "text_dim": [("text_embedding.0.weight", 1)],
    "in_channels": [("patch_embedding.weight", 1)],
}

# How names begin that transformers of relatives have besides ours, in either format, and for what
# these are made.
_RELATIVES = (
    (r"vace_(blocks|patch_embedding)\b", "VACE"),
    (r"(motion_encoder|face_adapter|face_encoder|pose_patch_embedding)\b", "Wan-Animate"),
    (r"(casual_audio_encoder|audio_injector|audio_proj)\b|.+\baudio_cross_attn\b", "speech"),
    (r"(control_adapter|ref_conv)\b", "Wan-Fun control"),
    (
        r"(img_emb|condition_embedder\.image_embedder)\b|.+\.(k_img|v_img|add_k_proj|add_v_proj)\b",
        "image-to-video",
    ),
)


def prepare(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of a transformer as they are.

    Raises ConversionError, in one sentence, for a transformer of another task than text-to-video.
    """
    kinds = [kind for names, kind in _RELATIVES if any(map(re.compile(names).match, tensors))]
    patches = tuple(getattr(tensors.get("patch_embedding.weight"), "shape", ()))
    head = tensors.get("head.head.bias", tensors.get("proj_out.bias"))
    channels = made = 0
    if len(patches) == 5 and head is not None:
        channels = patches[1]
        made = math.prod(head.shape) // max(1, math.prod(patches[2:]))
        if channels > made:  # those of an image and its mask beside those of the video
            kinds.append("image-to-video")
        if patches[:2] == (3072, 48):
            kinds.append("Wan 2.2 TI2V-5B, whose VAE is another,")
    if kinds:
        raise engine.ConversionError(
            f"a transformer for {kinds[0]} ({channels} input channels); this program runs "
            f"text-to-video ({made}): take the weights of a text-to-video model"
        )
    return dict(tensors)


def diffusers(_: WanConfig) -> Substitutions:
    """Return the substitutions to the names of diffusers' WanTransformer3DModel."""
    return _DIFFUSERS


def measure(shapes: Shapes) -> dict[str, Any]:
    """Return the sizes that the tensors tell, by field of WanConfig.

    The number of heads is not among them: no shape depends on it.
    """
    sizes: dict[str, Any] = shapes.sizes(_WITNESSES)
    sizes["num_layers"] = shapes.layers(table(WAN_1_3B))
    for shape in shapes.of("patch_embedding.weight"):
        if len(shape) == 5:
            sizes["patch_size"] = shape[2:]
    return sizes


def table(config: WanConfig) -> list[Rule]:
    """Return the rules of a DiT; all but that of its patches are the same at every size."""
    return [
        Rule(
            "patch_embedding.weight",
            "patch_embedding.kernel",
            engine.patch_kernel(config.patch_size),
        ),
        Rule("patch_embedding.bias", "patch_embedding.bias"),
        *_linear("text_embedding.0", "text_embedding.fc1"),
        *_linear("text_embedding.2", "text_embedding.fc2"),
        *_linear("time_embedding.0", "time_embedding.fc1"),
        *_linear("time_embedding.2", "time_embedding.fc2"),
        *_linear("time_projection.1", "time_projection"),
        *_linear("head.head", "head.linear"),
        Rule("head.modulation", "head.modulation"),
        Rule("blocks.{i}.modulation", "blocks.modulation"),
        *_attention("self_attn"),
        *_attention("cross_attn"),
        Rule("blocks.{i}.norm3.weight", "blocks.norm3.scale"),
        Rule("blocks.{i}.norm3.bias", "blocks.norm3.bias"),
        *_linear("blocks.{i}.ffn.0", "blocks.ffn.fc1"),
        *_linear("blocks.{i}.ffn.2", "blocks.ffn.fc2"),
    ]


def _linear(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}.kernel", LINEAR),
        Rule(f"{source}.bias", f"{target}.bias", IDENTITY),
    ]


def _attention(name: str) -> list[Rule]:
    source = f"blocks.{{i}}.{name}"
    target = f"blocks.{name}"
    return [
        *_linear(f"{source}.q", f"{target}.q"),
        *_linear(f"{source}.k", f"{target}.k"),
        *_linear(f"{source}.v", f"{target}.v"),
        *_linear(f"{source}.o", f"{target}.o"),
        Rule(f"{source}.norm_q.weight", f"{target}.norm_q.scale"),
        Rule(f"{source}.norm_k.weight", f"{target}.norm_k.scale"),
    ]
