"""CLIP: OpenCLIP's and Hugging Face's names <-> the parameter trees of models/clip.py
(spec/rewards.md 7, 8).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from astrolabe_jax.convert.engine import LINEAR, Rule, Shapes, Substitutions, Transform, renamed
from astrolabe_jax.convert.reward_store import Kind
from astrolabe_jax.models.clip import CLIP, VIT_H_14, VIT_L_14, Aesthetic, CLIPConfig
from astrolabe_jax.runtime.files import Lazy

# OpenCLIP -> Hugging Face.
HUGGING_FACE: Substitutions = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\b", "vision_model.embeddings.patch_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\b", "vision_model.pre_layrnorm"),  # so misspelt
    (r"^visual\.ln_post\b", "vision_model.post_layernorm"),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\b", "vision_model.encoder.layers"),
    (r"^token_embedding\b", "text_model.embeddings.token_embedding"),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\b", "text_model.final_layer_norm"),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\b", "text_model.encoder.layers"),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.in_proj_(weight|bias)\[([qkv])\]$", r".self_attn.\2_proj.\1"),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
# Not read: the scale of logits, which the scores do without, and the text tower, which has no part
# in aesthetics.
_UNUSED_BY_HPSV2 = re.compile(r"logit_scale")
_UNUSED_BY_AESTHETIC = re.compile(r"logit_scale|text_projection\.weight|text_model\..+")
_AESTHETIC_LAYERS = (0, 2, 4, 6, 7)  # those between are dropouts
_FUSED = re.compile(r".+\.in_proj_(weight|bias)")

# Field of CLIPConfig -> tensors that tell it, by an axis of each.
_VISION = {
    "vision_dim": [
        ("visual.ln_pre.weight", 0),
        ("visual.ln_post.weight", 0),
        ("visual.class_embedding", 0),
    ],
    "vision_ffn": [("visual.transformer.resblocks.{i}.mlp.c_fc.bias", 0)],
    "patch_size": [("visual.conv1.weight", 2), ("visual.conv1.weight", 3)],
}
_TEXT = {
    "text_dim": [("ln_final.weight", 0), ("token_embedding.weight", 1)],
    "text_ffn": [("transformer.resblocks.{i}.mlp.c_fc.bias", 0)],
    "vocab_size": [("token_embedding.weight", 0)],
    "text_len": [("positional_embedding", 0)],
    "embed_dim": [("visual.proj", 1), ("text_projection", 1)],
}


def hpsv2(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of HPS_v2.1_compressed.pt as `table` names them: in_proj_weight as its thirds
    [q], [k], [v].
    """
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if _UNUSED_BY_HPSV2.fullmatch(name):
            continue
        rows, rest = divmod(tensor.shape[0] if tensor.shape else 0, 3)
        if _FUSED.fullmatch(name) and rows and not rest:
            found |= {
                f"{name}[{part}]": _rows(tensor, i * rows, rows) for i, part in enumerate("qkv")
            }
        else:
            found[name] = tensor
    return found


def aesthetic(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of clip-vit-large-patch14 and the predictor, together, that `aesthetic_table`
    names.
    """
    return {
        name: tensor for name, tensor in tensors.items() if not _UNUSED_BY_AESTHETIC.fullmatch(name)
    }


def hpsv2_sizes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of CLIPConfig as the tensors of `hpsv2` have them; heads are 80 and 64 wide, as in
    ViT-H/14.
    """
    found = Shapes(tensors, ())
    return _measured(found, 80) | found.sizes(_TEXT) | _counts(found, "text", 64)


def aesthetic_sizes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of CLIPConfig as the tensors of `aesthetic` have them; heads are 64 wide, as in
    ViT-L/14.
    """
    found = Shapes(tensors, HUGGING_FACE)
    return _measured(found, 64) | found.sizes(
        {"embed_dim": [("visual.proj", 0), ("layers.0.weight", 1)]}
    )


def _measured(found: Shapes, head_dim: int) -> dict[str, Any]:
    sizes = found.sizes(_VISION) | _counts(found, "vision", head_dim)
    if (positions := found.vote(("visual.positional_embedding", 0))) and "patch_size" in sizes:
        sizes["image_size"] = math.isqrt(positions - 1) * sizes["patch_size"]
    return sizes


def _counts(found: Shapes, tower: str, head_dim: int) -> dict[str, Any]:
    """Layers and heads; no tensor tells how wide a head is."""
    count = found.layers(
        [rule for rule in table(VIT_H_14) if rule.target.startswith(f"{tower}.blocks.")]
    )
    dim = found.sizes({"dim": (_VISION | _TEXT)[f"{tower}_dim"]}).get("dim")
    return (
        {f"{tower}_layers": count, f"{tower}_heads": max(1, dim // head_dim)}
        if count and dim
        else {}
    )


def table(config: CLIPConfig) -> list[Rule]:
    """The rules of both towers under OpenCLIP's names, the fused projections apart (`hpsv2`)."""
    text = [
        *_blocks("transformer.resblocks", "text.blocks"),
        Rule("token_embedding.weight", "text.token_embedding.embedding"),
        Rule("positional_embedding", "text.positions"),
        *_norm("ln_final", "text.norm_out"),
        Rule("text_projection", "text.projection.kernel"),
    ]
    return [*_vision(config), *text]


def aesthetic_table(config: CLIPConfig) -> list[Rule]:
    """The rules of the image tower, under Hugging Face's names, and of the layers behind it."""
    rules = hugging_face(_vision(config))
    for i, number in enumerate(_AESTHETIC_LAYERS):
        rules += _linear(f"layers.{number}", f"head.{i}")
    return rules


def hugging_face(rules: list[Rule]) -> list[Rule]:
    """The same under Hugging Face's names, whose projections are [out, in]."""
    transposed = [
        rule._replace(transform=LINEAR) if rule.target.endswith(".projection.kernel") else rule
        for rule in rules
    ]
    return renamed(transposed, HUGGING_FACE)


def _vision(config: CLIPConfig) -> list[Rule]:
    return [
        Rule("visual.conv1.weight", "vision.patch_embedding.kernel", _patches(config.patch_size)),
        Rule("visual.class_embedding", "vision.class_embedding"),
        Rule("visual.positional_embedding", "vision.positions"),
        *_norm("visual.ln_pre", "vision.norm_in"),
        *_blocks("visual.transformer.resblocks", "vision.blocks"),
        *_norm("visual.ln_post", "vision.norm_out"),
        Rule("visual.proj", "vision.projection.kernel"),
    ]


def _blocks(source: str, target: str) -> list[Rule]:
    source = f"{source}.{{i}}"
    rules = []
    for part in "qkv":
        rules.append(
            Rule(f"{source}.attn.in_proj_weight[{part}]", f"{target}.attn.{part}.kernel", LINEAR)
        )
        rules.append(Rule(f"{source}.attn.in_proj_bias[{part}]", f"{target}.attn.{part}.bias"))
    return [
        *rules,
        *_linear(f"{source}.attn.out_proj", f"{target}.attn.o"),
        *_norm(f"{source}.ln_1", f"{target}.norm1"),
        *_norm(f"{source}.ln_2", f"{target}.norm2"),
        *_linear(f"{source}.mlp.c_fc", f"{target}.fc1"),
        *_linear(f"{source}.mlp.c_proj", f"{target}.fc2"),
    ]


def _linear(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}.kernel", LINEAR),
        Rule(f"{source}.bias", f"{target}.bias"),
    ]


def _norm(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.scale"), Rule(f"{source}.bias", f"{target}.bias")]


def _patches(size: int) -> Transform:
    """[D, 3, h, w] -> [h*w*3, D], channel fastest, as the image is cut."""
    return Transform(
        axes=(2, 3, 1, 0), unfold=lambda shape: (size, size, shape[0] // size**2, shape[1])
    )


def _rows(tensor: Any, start: int, count: int) -> Lazy:
    """Some rows of a tensor; it is read whole each time."""
    return Lazy(
        (count, *tensor.shape[1:]),
        np.dtype(tensor.dtype),
        lambda: np.asarray(tensor)[start : start + count],
    )


HPSV2 = Kind("hpsv2", CLIP, VIT_H_14, hpsv2, hpsv2_sizes, table)  # HPS_v2.1_compressed.pt
# The model of openai/clip-vit-large-patch14, and sac+logos+ava1-l14-linearMSE.pth.
AESTHETIC = Kind("aesthetic", Aesthetic, VIT_L_14, aesthetic, aesthetic_sizes, aesthetic_table)
