"""Qwen2-VL and the rewards made of it: published names <-> the tree of models/qwen2_vl
(spec/rewards.md 3.5, 4.6, 5).

Names are plain, as convert/weights.py gives them: without `model.` and `base_model.model.` in
front. Newer versions of transformers put `language_model.` before those of the decoder.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from astrolabe_jax.convert import engine, reward_store
from astrolabe_jax.convert.engine import LINEAR, Rule, Shapes, Stack
from astrolabe_jax.convert.lora import merged
from astrolabe_jax.convert.parts import Net
from astrolabe_jax.convert.reward_store import Checkpoint
from astrolabe_jax.convert.weights import open_weights
from astrolabe_jax.models.qwen2_vl.config import PATCH, QWEN2_VL_7B, Qwen2VLConfig
from astrolabe_jax.models.qwen2_vl.linear import quantise
from astrolabe_jax.models.qwen2_vl.model import Qwen2VL, RewardNet
from astrolabe_jax.runtime.files import Lazy, read_json

OUTPUT = "lm_head.weight"  # [vocabulary, D]: published, and of no use where no token is predicted
_NEWER = (r"^(embed_tokens|layers|norm)\b", r"language_model.\1")
# by LoRA, in a file that PEFT did not merge
_ADAPTED = (r"(_proj)\.(weight|bias)$", r"\1.base_layer.\2")
_A, _B = "lora_A.default.weight", "lora_B.default.weight"
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


class Adapter(NamedTuple):
    """What a LoRA is merged with."""

    rank: int
    scale: float  # alpha / rank


def shapes(config: Qwen2VLConfig) -> Net:
    """The net of these sizes, with shapes and dtypes in place of its parameters: none is
    allocated.
    """
    return reward_store.shapes(RewardNet if config.head else Qwen2VL, config)


def open_checkpoint(
    path: Path,
    published: Qwen2VLConfig,
    adapter: Adapter | None = None,
    dtype: str = "",
    quantised: bool = False,
) -> Checkpoint:
    """Opens HPSv3.safetensors, VideoReward's model.pth, or model.safetensors.index.json of
    Qwen2-VL-Instruct.

    published: HPSV3, VIDEOALIGN, QWEN2_VL_2B or QWEN2_VL_7B; see `assemble` for the rest. Raises
    ValueError, naming the file, for one that cannot be read, engine.ConversionError that lists
    every tensor at fault, or OSError.
    """
    tensors = open_weights(path).tensors
    try:
        return assemble(tensors, published, adapter, dtype, quantised)
    except ValueError as error:
        raise type(error)(f"{path}: {error}") from None


def assemble(
    tensors: Mapping[str, Any],
    published: Qwen2VLConfig,
    adapter: Adapter | None = None,
    dtype: str = "",
    quantised: bool = False,
) -> Checkpoint:
    """A checkpoint from its tensors by plain name.

    Sizes are those of the tensors; what these do not tell, such as the width of an attention head,
    is as in `published`. adapter: the LoRA that all linears of the decoder must have, merged as W +
    scale B A in float32. dtype: of the leaves but for the head, which is then float32; by default
    all are as in the file. quantised: int8 kernels. Every tensor must be used but `lm_head.weight`,
    which is dropped, and every leaf filled: else engine.ConversionError lists the culprits.
    """
    substitutions = (_NEWER,) if any(name.startswith("language_model.") for name in tensors) else ()
    substitutions += (_ADAPTED,) if adapter else ()
    config = dataclasses.replace(
        published, **measure(Shapes(tensors, substitutions), len(published.head))
    )
    config = dataclasses.replace(
        config, quantised=False, **({"param_dtype": dtype} if dtype else {})
    )
    rules, expected = engine.renamed(table(config), substitutions), shapes(config).params
    sources = engine.source_shapes(rules, expected)
    pairs = _pairs(sources, adapter.rank) if adapter else {}
    unused = {OUTPUT: (config.vocab_size, config.dim)} if OUTPUT in tensors else {}
    engine.check(
        sources | unused | {name: shape for pair in pairs.values() for name, shape in pair}, tensors
    )
    used = {name: tensors[name] for name in sources}
    for name, ((a, _), (b, _)) in pairs.items():
        used[name] = merged(used[name], tensors[a], tensors[b], adapter.scale, dtype)
    stacks = engine.stacks(
        rules, used, expected if dtype else engine.with_dtypes(rules, used, expected)
    )
    config = dataclasses.replace(config, quantised=quantised)
    return Checkpoint(config, _quantised(stacks, shapes(config).params) if quantised else stacks)


def _pairs(
    sources: Mapping[str, engine.Shape], rank: int
) -> dict[str, list[tuple[str, engine.Shape]]]:
    """Names and shapes of A and B for every adapted weight."""
    base, pairs = ".base_layer.weight", {}
    for name, shape in sources.items():
        if name.endswith(base):
            module = name.removesuffix(base)
            pairs[name] = [
                (f"{module}.{_A}", (rank, shape[1])),
                (f"{module}.{_B}", (shape[0], rank)),
            ]
    return pairs


def _quantised(stacks: Mapping[tuple, Stack], expected: dict) -> dict[tuple, Stack]:
    """The leaves of `expected`, in which a kernel became an int8 kernel and its scale."""
    found = {}
    for path, leaf in engine.flatten(expected).items():
        kernel = (*path[:-1], "kernel")
        if leaf.dtype == jnp.int8 or (path not in stacks and kernel in stacks):
            part = 0 if path == kernel else 1
            dtype, shape = (
                np.dtype(leaf.dtype),
                leaf.shape[1:] if stacks[kernel].stacked else leaf.shape,
            )
            pieces = [_part(piece, part, shape, dtype) for piece in stacks[kernel].pieces]
            found[path] = Stack(leaf.shape, dtype, stacks[kernel].stacked, tuple(pieces))
        else:
            found[path] = stacks[path]
    return found


def _part(kernel: Lazy, part: int, shape: engine.Shape, dtype: np.dtype) -> Lazy:
    return kernel.map(lambda content: quantise(content, np)[part], shape, dtype)


def read_adapter(path: Path) -> Adapter:
    """The LoRA that VideoReward's model_config.json describes (spec/rewards.md 4.5).

    Raises ValueError naming the file and the field for one that is not plain, FileNotFoundError, or
    OSError.
    """
    described = read_json(path).get("peft_lora_config")
    described = described if isinstance(described, dict) else {}
    rank, alpha = described.get("lora_r"), described.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise ValueError(
            f"{path}: peft_lora_config has lora_r {rank!r} and lora_alpha {alpha!r}; expected the "
            "rank, a whole number, and a number"
        )
    # what the names and shapes of the tensors do not tell
    plain = {"lora_enable": True, "use_rslora": False}
    if odd := {
        field: described[field]
        for field, value in plain.items()
        if described.get(field, value) != value
    }:
        raise ValueError(
            f"{path}: peft_lora_config is not of a plain LoRA: {odd}; expected {plain}"
        )
    return Adapter(rank, alpha / rank)


def measure(shapes: Shapes, linears: int) -> dict[str, Any]:
    """Sizes as the tensors have them, with a reward's head of so many linears; attention heads
    cannot be seen there.
    """
    sizes = shapes.sizes(_WITNESSES)
    for field, prefix in (("num_layers", "layers."), ("vision_layers", "visual.")):
        sizes[field] = shapes.layers(
            [rule for rule in table(QWEN2_VL_7B) if rule.source.startswith(prefix)]
        )
    widths = tuple(shapes.vote((f"{name}.weight", 0)) for name in _HEADS[linears])
    sizes["head"] = widths if all(widths) else ()
    return {field: size for field, size in sizes.items() if size}


def table(config: Qwen2VLConfig) -> list[Rule]:
    """The rules of one net; they depend on its head only. Kernels are those of a net that is not
    quantised.
    """
    layer, vision = "layers.{i}", "visual.blocks.{i}"
    decoder, tower = "language.blocks", "vision.blocks"
    heads = [(name, f"head.linears.{i}") for i, name in enumerate(_HEADS[len(config.head)])]
    return [
        Rule(
            "visual.patch_embed.proj.weight",
            "vision.patch_embed.kernel",
            engine.patch_kernel(PATCH),
        ),
        *_norm(f"{vision}.norm1", f"{tower}.norm1"),
        *_linear(f"{vision}.attn.qkv", f"{tower}.qkv"),
        *_linear(f"{vision}.attn.proj", f"{tower}.proj"),
        *_norm(f"{vision}.norm2", f"{tower}.norm2"),
        *_linear(f"{vision}.mlp.fc1", f"{tower}.fc1"),
        *_linear(f"{vision}.mlp.fc2", f"{tower}.fc2"),
        *_norm("visual.merger.ln_q", "vision.merger.norm"),
        *_linear("visual.merger.mlp.0", "vision.merger.fc1"),
        *_linear("visual.merger.mlp.2", "vision.merger.fc2"),
        Rule("embed_tokens.weight", "language.embedding.embedding"),
        Rule(f"{layer}.input_layernorm.weight", f"{decoder}.norm1.scale"),
        *(rule for p in "qkv" for rule in _linear(f"{layer}.self_attn.{p}_proj", f"{decoder}.{p}")),
        *_linear(f"{layer}.self_attn.o_proj", f"{decoder}.o", bias=False),
        Rule(f"{layer}.post_attention_layernorm.weight", f"{decoder}.norm2.scale"),
        *(
            rule
            for p in ("gate", "up", "down")
            for rule in _linear(f"{layer}.mlp.{p}_proj", f"{decoder}.{p}", bias=False)
        ),
        Rule("norm.weight", "language.norm.scale"),
        *(rule for pair in heads for rule in _linear(*pair, bias=len(heads) > 1)),
    ]


def _linear(source: str, target: str, bias: bool = True) -> list[Rule]:
    rules = [
        Rule(f"{source}.weight", f"{target}.kernel", LINEAR),
        Rule(f"{source}.bias", f"{target}.bias"),
    ]
    return rules if bias else rules[:1]


def _norm(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.weight", f"{target}.scale"), Rule(f"{source}.bias", f"{target}.bias")]
