"""CLIP: OpenCLIP's and Hugging Face's names <-> the parameter trees of rewards/clip/net.py.

Where the files come from: docs/rewards.md, Conversion.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from astrolabe_jax.convert.engine import LINEAR, Rule, Shapes, Substitutions, Transform
from astrolabe_jax.convert.nets import NetSpec
from astrolabe_jax.rewards.clip import tokenizer
from astrolabe_jax.rewards.clip.net import CLIP, VIT_H_14, VIT_L_14, AestheticNet, CLIPConfig
from astrolabe_jax.rewards.directory import PublishedFiles, RewardContents, contents_of
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
_UNUSED_BY_HPSV2 = "logit_scale"
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


def prepare_hpsv2(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of HPS_v2.1_compressed.pt as `table` names them.

    A fused in_proj_weight becomes its thirds, in_proj_weight[q], [k] and [v].
    """
    prepared: dict[str, Any] = {}
    for name, tensor in tensors.items():
        rows, rest = divmod(tensor.shape[0] if tensor.shape else 0, 3)
        if _FUSED.fullmatch(name) and rows and not rest:
            for i, part in enumerate("qkv"):
                prepared[f"{name}[{part}]"] = _rows(tensor, i * rows, rows)
        elif name != _UNUSED_BY_HPSV2:
            prepared[name] = tensor
    return prepared


def prepare_aesthetic(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return those tensors of clip-vit-large-patch14 and the predictor that the net uses."""
    return {
        name: tensor for name, tensor in tensors.items() if not _UNUSED_BY_AESTHETIC.fullmatch(name)
    }


def measure_hpsv2(shapes: Shapes) -> dict[str, Any]:
    """Return fields of CLIPConfig; heads are 80 and 64 wide, as in ViT-H/14."""
    sizes = _vision_sizes(shapes, head_dim=80) | shapes.sizes(_TEXT)
    return sizes | _tower_sizes(shapes, "text", head_dim=64)


def measure_aesthetic(shapes: Shapes) -> dict[str, Any]:
    """Return fields of CLIPConfig; heads are 64 wide, as in ViT-L/14."""
    width = shapes.sizes({"embed_dim": [("visual.proj", 0), ("layers.0.weight", 1)]})
    return _vision_sizes(shapes, head_dim=64) | width


def _vision_sizes(shapes: Shapes, head_dim: int) -> dict[str, Any]:
    sizes = shapes.sizes(_VISION) | _tower_sizes(shapes, "vision", head_dim)
    positions = shapes.vote(("visual.positional_embedding", 0))
    if positions and "patch_size" in sizes:
        sizes["image_size"] = math.isqrt(positions - 1) * sizes["patch_size"]
    return sizes


def _tower_sizes(shapes: Shapes, tower: str, head_dim: int) -> dict[str, Any]:
    """Return the numbers of layers and heads; no tensor tells how wide a head is."""
    blocks = [rule for rule in table(VIT_H_14) if rule.target.startswith(f"{tower}.blocks.")]
    layers = shapes.layers(blocks)
    width = shapes.vote(*(_VISION | _TEXT)[f"{tower}_dim"])
    if not layers or not width:
        return {}
    return {f"{tower}_layers": layers, f"{tower}_heads": max(1, width // head_dim)}


def table(config: CLIPConfig) -> list[Rule]:
    """Return the rules of both towers under the names that `prepare_hpsv2` gives."""
    return [
        *_vision(config),
        *_blocks("transformer.resblocks", "text.blocks"),
        Rule("token_embedding.weight", "text.token_embedding.embedding"),
        Rule("positional_embedding", "text.positions"),
        *_norm("ln_final", "text.norm_out"),
        Rule("text_projection", "text.projection.kernel"),
    ]


def aesthetic_table(config: CLIPConfig) -> list[Rule]:
    """Return the rules of the image tower and of the layers behind it.

    The tower has OpenCLIP's names, and the layout that Hugging Face's tensors have.
    """
    rules = hugging_face_layout(_vision(config))
    for i, number in enumerate(_AESTHETIC_LAYERS):
        rules += _linear(f"layers.{number}", f"head.{i}")
    return rules


def hugging_face_layout(rules: list[Rule]) -> list[Rule]:
    """Return the same rules for Hugging Face's tensors, whose projections are [out, in]."""
    return [
        rule._replace(transform=LINEAR) if rule.target.endswith(".projection.kernel") else rule
        for rule in rules
    ]


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
    return [
        *(
            Rule(f"{source}.attn.in_proj_weight[{part}]", f"{target}.attn.{part}.kernel", LINEAR)
            for part in "qkv"
        ),
        *(
            Rule(f"{source}.attn.in_proj_bias[{part}]", f"{target}.attn.{part}.bias")
            for part in "qkv"
        ),
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
    """Return [D, 3, h, w] -> [h*w*3, D], channel fastest, as the image is cut."""
    return Transform(
        axes=(2, 3, 1, 0), unfold=lambda shape: (size, size, shape[0] // size**2, shape[1])
    )


def _rows(tensor: Any, start: int, count: int) -> Lazy:
    """Return some rows of a tensor, which is read whole each time."""
    return Lazy(
        (count, *tensor.shape[1:]),
        np.dtype(tensor.dtype),
        lambda: np.asarray(tensor)[start : start + count],
    )


# HPS_v2.1_compressed.pt
HPSV2 = NetSpec("hpsv2", CLIP, VIT_H_14, table, measure_hpsv2, prepare=prepare_hpsv2)
# The model of openai/clip-vit-large-patch14, and sac+logos+ava1-l14-linearMSE.pth.
AESTHETIC = NetSpec(
    "aesthetic",
    AestheticNet,
    VIT_L_14,
    aesthetic_table,
    measure_aesthetic,
    {"hugging_face": lambda _: HUGGING_FACE},
    prepare_aesthetic,
)


def convert_hpsv2(published: PublishedFiles) -> RewardContents:
    """Return what a reward directory of HPSv2.1 holds, with the files of CLIP's tokenizer.

    Raises ValueError or OSError naming the file or the option at fault.
    """
    published.refuse(HPSV2.name, "template", "quantised")
    folder = published.require(
        HPSV2.name, "tokenizer", "tokenizer.json, or the folder of it, of CLIP"
    )
    tokenizer.load_tokenizer(folder)
    texts = tokenizer.files_of(folder)
    contents = contents_of(HPSV2, published)
    return contents._replace(
        sources=(*contents.sources, *texts),
        texts={path.name: path.read_bytes() for path in texts},
    )


def convert_aesthetic(published: PublishedFiles) -> RewardContents:
    """Return what a reward directory of the aesthetic predictor holds, as `convert_hpsv2` does."""
    published.refuse(AESTHETIC.name, "template", "quantised", "tokenizer")
    return contents_of(AESTHETIC, published)
