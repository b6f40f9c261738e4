"""Qwen2-VL and the rewards made of it: published names <-> the tree of rewards/qwen2_vl/net.py.

Names are plain, as convert/weights.py gives them: without `model.` and `base_model.model.` in
front. Newer versions of transformers put `language_model.` before those of the decoder. Where the
files come from: docs/rewards.md, Conversion.
"""

import functools
from typing import Any

from astrolabe_jax.convert import engine, nets
from astrolabe_jax.convert.engine import LINEAR, Rule, Shapes
from astrolabe_jax.convert.nets import NetSpec
from astrolabe_jax.rewards.qwen2_vl import config as sizes
from astrolabe_jax.rewards.qwen2_vl.config import PATCH, QWEN2_VL_7B, Qwen2VLConfig
from astrolabe_jax.rewards.qwen2_vl.net import Qwen2VL, QwenRewardNet

_NEWER = (r"^(embed_tokens|layers|norm)\b", r"language_model.\1")
# by LoRA, in a file that PEFT did not merge
_ADAPTED = (r"(_proj)\.(weight|bias)$", r"\1.base_layer.\2")
# Names of the head's linears by their number; the numbers between are those of ReLU and dropout.
_HEADS = {0: (), 1: ("rm_head",), 3: ("rm_head.0", "rm_head.3", "rm_head.5")}
# Field of Qwen2VLConfig -> tensors that tell it, by an axis of each.
_WITNESSES = {
    "vocab_size": [("embed_tokens.weight", 0)],
    "dim": [
        ("layers.{i}.input_layernorm.weight", 0),
        ("norm.weight", 0),
        ("embed_tokens.weight", 1),
    ],
    "dim_kv": [("layers.{i}.self_attn.k_proj.bias", 0), ("layers.{i}.self_attn.v_proj.bias", 0)],
    "dim_ffn": [("layers.{i}.mlp.gate_proj.weight", 0), ("layers.{i}.mlp.down_proj.weight", 1)],
    "vision_dim": [("visual.blocks.{i}.norm1.weight", 0), ("visual.merger.ln_q.weight", 0)],
    "vision_ffn": [("visual.blocks.{i}.mlp.fc1.bias", 0), ("visual.blocks.{i}.mlp.fc2.weight", 1)],
}


def spec_of(name: str, published: Qwen2VLConfig, adapted: bool = False) -> NetSpec:
    """Return the spec of Qwen2-VL at these sizes, with a reward's head if they have one.

    adapted: its files hold a LoRA beside the weights, under the names that PEFT gives both.
    """
    more = (_ADAPTED,) if adapted else ()
    return NetSpec(
        name,
        QwenRewardNet if published.head else Qwen2VL,
        published,
        table,
        functools.partial(measure, linears=len(published.head)),
        {nets.ORIGINAL: lambda _: more, "newer": lambda _: (_NEWER, *more)},
    )


def measure(shapes: Shapes, linears: int) -> dict[str, Any]:
    """Return fields of Qwen2VLConfig; attention heads cannot be seen in the shapes.

    linears: how many a reward's head has.
    """
    found: dict[str, Any] = dict(shapes.sizes(_WITNESSES))
    for field, prefix in (("num_layers", "layers."), ("vision_layers", "visual.")):
        found[field] = shapes.layers(
            [rule for rule in table(QWEN2_VL_7B) if rule.source.startswith(prefix)]
        )
    widths = tuple(shapes.vote((f"{name}.weight", 0)) for name in _HEADS[linears])
    found["head"] = widths if all(widths) else ()
    return {field: size for field, size in found.items() if size}


def table(config: Qwen2VLConfig) -> list[Rule]:
    """Return the rules of one net; they depend on its head only.

    Kernels are those of a net that is not quantised.
    """
    names = _HEADS[len(config.head)]
    rules = _tower_rules()
    for i, name in enumerate(names):
        rules += _linear(name, f"head.linears.{i}", bias=len(names) > 1)
    return rules


def _tower_rules() -> list[Rule]:
    return [
        Rule(
            "visual.patch_embed.proj.weight",
            "vision.patch_embed.kernel",
            engine.patch_kernel(PATCH),
        ),
        *_norm("visual.blocks.{i}.norm1", "vision.blocks.norm1"),
        *_linear("visual.blocks.{i}.attn.qkv", "vision.blocks.qkv"),
        *_linear("visual.blocks.{i}.attn.proj", "vision.blocks.proj"),
        *_norm("visual.blocks.{i}.norm2", "vision.blocks.norm2"),
        *_linear("visual.blocks.{i}.mlp.fc1", "vision.blocks.fc1"),
        *_linear("visual.blocks.{i}.mlp.fc2", "vision.blocks.fc2"),
        *_norm("visual.merger.ln_q", "vision.merger.norm"),
        *_linear("visual.merger.mlp.0", "vision.merger.fc1"),
        *_linear("visual.merger.mlp.2", "vision.merger.fc2"),
        Rule("embed_tokens.weight", "language.embedding.embedding"),
        Rule("norm.weight", "language.norm.scale"),
        Rule("layers.{i}.input_layernorm.weight", "language.blocks.norm1.scale"),
        Rule("layers.{i}.post_attention_layernorm.weight", "language.blocks.norm2.scale"),
        *_linear("layers.{i}.self_attn.o_proj", "language.blocks.o", bias=False),
        *_linear("layers.{i}.self_attn.q_proj", "language.blocks.q"),
        *_linear("layers.{i}.self_attn.k_proj", "language.blocks.k"),
        *_linear("layers.{i}.self_attn.v_proj", "language.blocks.v"),
        *_linear("layers.{i}.mlp.gate_proj", "language.blocks.gate", bias=False),
        *_linear("layers.{i}.mlp.up_proj", "language.blocks.up", bias=False),
        *_linear("layers.{i}.mlp.down_proj", "language.blocks.down", bias=False),
    ]


def _linear(source: str, target: str, bias: bool = True) -> list[Rule]:
    rules = [
        Rule(f"{source}.weight", f"{target}.kernel", LINEAR),
        Rule(f"{source}.bias", f"{target}.bias"),
    ]
    return rules if bias else rules[:1]


def _norm(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.scale"), Rule(f"{source}.bias", f"{target}.bias")]


HPSV3 = spec_of("hpsv3", sizes.HPSV3)
VIDEOALIGN = spec_of("videoalign", sizes.VIDEOALIGN, adapted=True)
