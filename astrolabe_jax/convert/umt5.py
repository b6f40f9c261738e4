"""UMT5: names of models_t5_umt5-xxl-enc-bf16.pth <-> the parameter tree of models/umt5.py.

The tensors: docs/checkpoints.md, Text encoder tensors.
"""

from typing import Any

from astrolabe_jax.convert.engine import LINEAR, Rule, Shapes, Substitutions
from astrolabe_jax.models.umt5 import XXL, UMT5Config

_ATTENTION = "encoder.block.{i}.layer.0.SelfAttention"
_FFN = "encoder.block.{i}.layer.1.DenseReluDense"
# Original names -> those of Hugging Face, which diffusers packages have.
_DIFFUSERS = (
    (r"^token_embedding\b", "shared"),
    (r"^norm\b", "encoder.final_layer_norm"),
    (r"^blocks\.\{i\}\.norm1\b", "encoder.block.{i}.layer.0.layer_norm"),
    (r"^blocks\.\{i\}\.norm2\b", "encoder.block.{i}.layer.1.layer_norm"),
    (r"^blocks\.\{i\}\.attn\b", _ATTENTION),
    (r"^blocks\.\{i\}\.pos_embedding\.embedding\b", f"{_ATTENTION}.relative_attention_bias"),
    (r"^blocks\.\{i\}\.ffn\.gate\.0\b", f"{_FFN}.wi_0"),
    (r"^blocks\.\{i\}\.ffn\.fc1\b", f"{_FFN}.wi_1"),
    (r"^blocks\.\{i\}\.ffn\.fc2\b", f"{_FFN}.wo"),
)
# Second names of Hugging Face for the same tensor -> the first.
ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}

# Field of UMT5Config -> tensors that tell it, with an axis of each.
_WITNESSES = {
    "vocab_size": [("token_embedding.weight", 0)],
    "dim": [("blocks.{i}.norm1.weight", 0), ("norm.weight", 0), ("token_embedding.weight", 1)],
    "dim_attn": [("blocks.{i}.attn.q.weight", 0), ("blocks.{i}.attn.k.weight", 0)],
    "dim_ffn": [("blocks.{i}.ffn.fc1.weight", 0), ("blocks.{i}.ffn.fc2.weight", 1)],
    "num_heads": [("blocks.{i}.pos_embedding.embedding.weight", 1)],
    "num_buckets": [("blocks.{i}.pos_embedding.embedding.weight", 0)],
}


def diffusers(_: UMT5Config) -> Substitutions:
    """Return the substitutions to the names of transformers' UMT5EncoderModel."""
    return _DIFFUSERS


def measure(shapes: Shapes) -> dict[str, Any]:
    """Return the sizes that the tensors tell, by field of UMT5Config."""
    return shapes.sizes(_WITNESSES) | {"num_layers": shapes.layers(table(XXL))}


def table(_: UMT5Config) -> list[Rule]:
    """Return the rules of an encoder, which are the same at every size."""
    return [
        Rule("token_embedding.weight", "token_embedding.embedding"),
        Rule("blocks.{i}.norm1.weight", "blocks.norm1.scale"),
        *(
            Rule(f"blocks.{{i}}.attn.{part}.weight", f"blocks.attn.{part}.kernel", LINEAR)
            for part in "qkvo"
        ),
        Rule("blocks.{i}.pos_embedding.embedding.weight", "blocks.position_bias.embedding"),
        Rule("blocks.{i}.norm2.weight", "blocks.norm2.scale"),
        Rule("blocks.{i}.ffn.gate.0.weight", "blocks.ffn.gate.kernel", LINEAR),
        Rule("blocks.{i}.ffn.fc1.weight", "blocks.ffn.fc1.kernel", LINEAR),
        Rule("blocks.{i}.ffn.fc2.weight", "blocks.ffn.fc2.kernel", LINEAR),
        Rule("norm.weight", "norm.scale"),
    ]
