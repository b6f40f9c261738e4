"""UMT5: names of models_t5_umt5-xxl-enc-bf16.pth <-> the parameter tree of models/umt5.py (spec/checkpoints.md 4)."""

from astrolabe_jax.convert.engine import LINEAR, Rule
from astrolabe_jax.models.umt5 import UMT5Config


def table(_: UMT5Config) -> list[Rule]:
    """The rules of one encoder; they are the same at every size."""
    return [
        Rule("token_embedding.weight", "token_embedding.embedding"),
        Rule("blocks.{i}.norm1.weight", "blocks.norm1.scale"),
        *(Rule(f"blocks.{{i}}.attn.{part}.weight", f"blocks.attn.{part}.kernel", LINEAR) for part in "qkvo"),
        Rule("blocks.{i}.pos_embedding.embedding.weight", "blocks.position_bias.embedding"),
        Rule("blocks.{i}.norm2.weight", "blocks.norm2.scale"),
        Rule("blocks.{i}.ffn.gate.0.weight", "blocks.ffn.gate.kernel", LINEAR),
        Rule("blocks.{i}.ffn.fc1.weight", "blocks.ffn.fc1.kernel", LINEAR),
        Rule("blocks.{i}.ffn.fc2.weight", "blocks.ffn.fc2.kernel", LINEAR),
        Rule("norm.weight", "norm.scale"),
    ]
