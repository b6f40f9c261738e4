"""Tiny CLIPs of transformers, and their weights as OpenCLIP stores them."""

import json
import re
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPConfig as TorchConfig
from transformers import CLIPModel

from astrolabe_jax.rewards.clip.net import CLIPConfig

SIZES = {
    "image_size": 12,
    "patch_size": 4,
    "vocab_size": 60,
    "text_len": 9,
    "vision_layers": 3,
    "text_layers": 2,
}
# Heads are as wide as in the published models: no tensor tells that.
OPEN = CLIPConfig(
    vision_dim=160,
    vision_ffn=24,
    vision_heads=2,
    text_dim=128,
    text_ffn=16,
    text_heads=2,
    embed_dim=24,
    **SIZES,
)
OPENAI = CLIPConfig(
    vision_dim=128,
    vision_ffn=24,
    vision_heads=2,
    text_dim=64,
    text_ffn=16,
    text_heads=1,
    embed_dim=24,
    quick_gelu=True,
    **SIZES,
)


def model(config: CLIPConfig, seed: int = 0) -> CLIPModel:
    """Every weight random, norms around one."""

    def tower(name):
        return {
            "hidden_size": getattr(config, f"{name}_dim"),
            "intermediate_size": getattr(config, f"{name}_ffn"),
            "num_hidden_layers": getattr(config, f"{name}_layers"),
            "num_attention_heads": getattr(config, f"{name}_heads"),
            "hidden_act": "quick_gelu" if config.quick_gelu else "gelu",
            "layer_norm_eps": config.eps,
        }

    given = TorchConfig(
        vision_config=tower("vision")
        | {"image_size": config.image_size, "patch_size": config.patch_size},
        text_config=tower("text")
        | {
            "vocab_size": config.vocab_size,
            "max_position_embeddings": config.text_len,
            "eos_token_id": 2,
        },
        projection_dim=config.embed_dim,
    )
    net = CLIPModel(given).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            width = tensor.shape[-1] if tensor.ndim > 1 else 10
            tensor.normal_(0.0, 1.0 / width**0.5, generator=generator)
            if "norm" in name and name.endswith("weight"):
                tensor.add_(1.0)
    return net


def tensors(net: torch.nn.Module) -> dict[str, np.ndarray]:
    """The weights under their own names."""
    return {name: tensor.detach().numpy() for name, tensor in net.state_dict().items()}


def open_clip(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Weights under Hugging Face's names as OpenCLIP stores the same model."""
    plain = {
        "logit_scale": "logit_scale",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
    }
    norms = {
        "vision_model.pre_layrnorm": "visual.ln_pre",
        "vision_model.post_layernorm": "visual.ln_post",
    }
    norms |= {"text_model.final_layer_norm": "ln_final"}
    inner = {"self_attn.out_proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    inner |= {"layer_norm1": "ln_1", "layer_norm2": "ln_2"}
    found = {plain[name]: tensor for name, tensor in given.items() if name in plain}
    found["visual.proj"] = given["visual_projection.weight"].T
    found["text_projection"] = given["text_projection.weight"].T
    for name, tensor in given.items():
        stem, _, kind = name.rpartition(".")
        if stem in norms:
            found[f"{norms[stem]}.{kind}"] = tensor
        if match := re.fullmatch(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)", stem):
            prefix = "visual." if match[1] == "vision" else ""
            block = f"{prefix}transformer.resblocks.{match[2]}"
            if match[3] in inner:
                found[f"{block}.{inner[match[3]]}.{kind}"] = tensor
            elif match[3] == "self_attn.q_proj":
                parts = [given[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
                found[f"{block}.attn.in_proj_{kind}"] = np.concatenate(parts)
    return found


START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = [("a", "b"), ("a", "c</w>"), ("a", "b</w>"), ("ab", "c</w>"), ("c", "ab</w>")]
_LETTERS = "abc1!,'"


def vocabulary() -> dict[str, int]:
    """A small byte-level vocabulary in CLIP's order: symbols, symbols that end a word, merges,
    special tokens.
    """
    words = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), *map("".join, MERGES)]
    words += [f"<filler{i}>" for i in range(SIZES["vocab_size"] - 2 - len(words))]
    return {word: i for i, word in enumerate([*words, START, END])}


def write_vocabulary(directory: Path) -> Path:
    """vocab.json and merges.txt."""
    (directory / "vocab.json").write_text(json.dumps(vocabulary()))
    lines = ["#version: 0.2", *map(" ".join, MERGES)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n")
    return directory
