"""Causal Wan DiT: original Wan tensor names and layouts <-> the parameter tree of models/wan/transformer.py.

Source: spec/checkpoints.md section 2 (15 top-level tensors and 27 per block) and section 6 (layouts).
"""

from astrolabe_jax.convert import engine
from astrolabe_jax.convert.engine import IDENTITY, LINEAR, Rule
from astrolabe_jax.models.wan.config import WanConfig


def table(config: WanConfig) -> list[Rule]:
    """The rules of one DiT; all but that of its patches are the same at every size."""
    return [
        Rule("patch_embedding.weight", "patch_embedding.kernel", engine.patch_kernel(config.patch_size)),
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
    return rules + [Rule(f"{source}.{norm}.weight", f"{target}.{norm}.scale") for norm in ("norm_q", "norm_k")]
