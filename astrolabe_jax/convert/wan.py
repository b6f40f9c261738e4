"""Causal Wan DiT: original Wan tensor names and layouts <-> the parameter tree of
models/wan/transformer.py.

Source: spec/checkpoints.md section 2 (15 top-level tensors and 27 per block), 2.1 (diffusers) and 6
(layouts).
"""

from typing import Any

from astrolabe_jax.convert import engine
from astrolabe_jax.convert.engine import IDENTITY, LINEAR, Rule, Shapes, Substitutions
from astrolabe_jax.models.wan.config import WAN_1_3B, WanConfig

# Original -> diffusers. They hold for modules of adapters, too.
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

# Field of WanConfig -> tensors that tell it, by an axis of each.
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


def diffusers(_: WanConfig) -> Substitutions:
    """What diffusers' WanTransformer3DModel calls the same tensors."""
    return _DIFFUSERS


def measure(shapes: Shapes) -> dict[str, Any]:
    """Sizes as the tensors have them; the number of heads cannot be seen in them."""
    sizes = shapes.sizes(_WITNESSES) | {"num_layers": shapes.layers(table(WAN_1_3B))}
    patches = [shape[2:] for shape in shapes.of("patch_embedding.weight") if len(shape) == 5]
    return sizes | ({"patch_size": patches[0]} if patches else {})


def table(config: WanConfig) -> list[Rule]:
    """The rules of one DiT; all but that of its patches are the same at every size."""
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
    source, target = f"blocks.{{i}}.{name}", f"blocks.{name}"
    rules = [rule for part in "qkvo" for rule in _linear(f"{source}.{part}", f"{target}.{part}")]
    return rules + [
        Rule(f"{source}.{norm}.weight", f"{target}.{norm}.scale") for norm in ("norm_q", "norm_k")
    ]
