"""Published files of HPSv3 and VideoAlign -> what their reward directories hold.

Both are a net on Qwen2-VL, its tokenizer with tokens of the reward, and the template of the
question that they stand in.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from astrolabe_jax.convert import engine, nets
from astrolabe_jax.convert.lora import merged, product
from astrolabe_jax.rewards.directory import PublishedFiles, RewardContents
from astrolabe_jax.rewards.qwen2_vl import chat
from astrolabe_jax.rewards.qwen2_vl.config import Qwen2VLConfig
from astrolabe_jax.rewards.qwen2_vl.linear import quantise
from astrolabe_jax.rewards.qwen2_vl.weights import HPSV3, VIDEOALIGN, spec_of
from astrolabe_jax.rewards.templates import PublishedText, read_template, sha256
from astrolabe_jax.runtime.files import INDEX, read_json

OUTPUT = "lm_head.weight"  # [vocabulary, D]: published, and of no use where no token is predicted
# The ends of the names that PEFT gives an adapted weight and its LoRA.
_BASE = ".base_layer.weight"
_A = ".lora_A.default.weight"
_B = ".lora_B.default.weight"

# What VideoAlign's training leaves in a folder: the whole model, or a LoRA and all else that it
# trained; and the base that these belong to. The first line of which a file is there is read.
_IN_FOLDER = (
    ("model.pth",),
    ("adapter_model.safetensors", "non_lora_state_dict.pth"),
    (f"model{INDEX}",),
    ("model.safetensors",),
)
# What PEFT and newer versions of transformers put into the names of a base.
_ADDED = re.compile(r"^language_model\.|\.base_layer(?=\.)|\.default(?=\.weight$)")
_HEAD = "rm_head.weight"
_DECODER = "layers.0.self_attn.q_proj.weight"  # is in every base
_PLAIN_A = ".lora_A.weight"
_PLAIN_B = ".lora_B.weight"
MODEL_CONFIG = "model_config.json"  # that VideoReward has beside its weights
HPSV3_TEXT = PublishedText(
    "data_collator_qwen.py",  # hpsv3 1.0.0
    {
        "INSTRUCTION": "0393599dad45a971903d1d62a3acf9bad3ccccdafa7f40f680523419e1f68b7a",
        "prompt_with_special_token": (
            "2471faca094ae5bd6fe17b71dce20c3d7583625545e235889f7e74e7eeb69d0a"
        ),
    },
)
VIDEOALIGN_TEXT = PublishedText(
    "prompt_template.py",  # VideoAlign
    {
        "DETAILED_PROMPT_WITH_SPECIAL_TOKEN": (
            "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
        )
    },
)
# What VideoAlign's model_config.json says of its input: which template has the tokens, and that
# frames are taken evenly.
_INPUT = {"prompt_template_type": "detailed_special", "sample_type": "uniform", "num_frames": None}
# What its LoRA must be, which the names and shapes of the tensors do not tell.
_PLAIN_LORA = {"lora_enable": True, "use_rslora": False}


class Adapter(NamedTuple):
    """The LoRA that the linears of a decoder are merged with."""

    rank: int
    scale: float  # alpha / rank


NO_ADAPTER = Adapter(0, 0.0)  # of specs without adapted weights


def convert_hpsv3(published: PublishedFiles) -> RewardContents:
    """Return the contents for HPSv3.safetensors.

    Raises ValueError or OSError naming the file or the option at fault.
    """
    tensors = nets.read_tensors([_only(published.weights)])
    return _contents(HPSV3, published, chat.HPSV3_TOKENS, HPSV3_TEXT, tensors)


def convert_videoalign(published: PublishedFiles) -> RewardContents:
    """Return the contents for VideoReward's checkpoint-N/model.pth, or for a VideoReward that was
    trained as a LoRA: its adapter_model.safetensors, its non_lora_state_dict.pth and its base.

    A folder stands for such files in it. Its model_config.json lies beside the weights or above
    them, and its tokenizer beside them. Raises ValueError or OSError naming the file or the option
    at fault.
    """
    weights = tuple(file for path in published.weights for file in _files_of(path))
    published = published._replace(weights=weights)
    opened = {path: nets.read_tensors([path]) for path in weights}
    path = next((path for path in weights if _is_lora(opened[path])), weights[0])
    places = [folder / MODEL_CONFIG for folder in (path.parent, path.parent.parent)]
    model_config = next((place for place in places if place.is_file()), None)
    if model_config is None:
        raise FileNotFoundError(
            f"no {' or '.join(map(str, places))}, which VideoReward has beside its weights"
        )
    facts = read_facts(model_config)
    adapter = read_adapter(model_config)
    if published.tokenizer is None and (path.parent / "tokenizer").is_dir():
        published = published._replace(tokenizer=path.parent / "tokenizer")
    spec = VIDEOALIGN
    tensors = opened[path]
    if _is_lora(tensors):
        spec = spec_of(VIDEOALIGN.name, VIDEOALIGN.published)
        tensors = _on_base(opened, path, adapter, published.dtype)
        adapter = NO_ADAPTER
    else:
        _only(weights)
    contents = _contents(spec, published, chat.VIDEOALIGN_TOKENS, VIDEOALIGN_TEXT, tensors, adapter)
    return contents._replace(
        sources=(*contents.sources, model_config), facts={**contents.facts, **facts}
    )


def _files_of(path: Path) -> list[Path]:
    """Return a file, or those of _IN_FOLDER in a folder."""
    if not path.is_dir():
        return [path]
    for names in _IN_FOLDER:
        if found := [path / name for name in names if (path / name).is_file()]:
            return found
    known = ", ".join(name for names in _IN_FOLDER for name in names)
    raise FileNotFoundError(f"{path} holds none of {known}; give the files of the weights")


def _is_lora(tensors: Mapping[str, Any]) -> bool:
    """Return whether this is a LoRA without its base."""
    return any(".lora_A." in name for name in tensors) and not any(
        ".base_layer." in name for name in tensors
    )


def _on_base(
    opened: Mapping[Path, Mapping[str, Any]], path: Path, adapter: Adapter, dtype: str
) -> dict[str, Any]:
    """Return the tensors of a whole model, given a LoRA, what was trained beside it, and the base.

    Of a tensor in two files that one counts which was trained, not the base's.

    Args:
      opened: tensors by plain name, of each file.
      path: of the LoRA.
      adapter: that model_config.json describes.
      dtype: of merged weights; by default the base's.

    Raises:
      ValueError: if a file is missing or too much.
      ConversionError: for a pair that does not fit its weight.
    """
    files = [
        {_ADDED.sub("", name): tensor for name, tensor in tensors.items()}
        for file, tensors in opened.items()
        if file != path
    ]
    # With the head comes what was trained, or all but the LoRA; the base is without.
    files.sort(key=lambda tensors: _HEAD in tensors)
    tensors = {name: tensor for content in files for name, tensor in content.items()}
    has_head = [_HEAD in content for content in files]
    if has_head not in ([True], [False, True]) or _DECODER not in tensors:
        raise ValueError(
            f"{path} is the LoRA of a VideoReward that was trained anew; give --weights "
            f"{' '.join(_IN_FOLDER[1])} BASE, where BASE is the model{INDEX} of the "
            "Qwen2-VL-2B-Instruct that it was trained on; or train with save_full_model, and give "
            "its model.pth"
        )
    tensors.pop(OUTPUT, None)  # of as many words as the base knows
    pairs = {_ADDED.sub("", name): tensor for name, tensor in opened[path].items()}
    modules = [name.removesuffix(_PLAIN_A) for name in pairs if name.endswith(_PLAIN_A)]
    expected = {}
    for module in modules:
        weight = tensors.get(f"{module}.weight")
        if weight is not None and len(weight.shape) == 2:
            rows, columns = weight.shape
            expected[module + _PLAIN_A] = (adapter.rank, columns)
            expected[module + _PLAIN_B] = (rows, adapter.rank)
    with nets.naming_files(path):
        engine.check(expected, pairs)
    for module in modules:
        name = f"{module}.weight"
        change = product(pairs[module + _PLAIN_A], pairs[module + _PLAIN_B], adapter.scale)
        tensors[name] = merged(tensors[name], [change], dtype)
    return tensors


def _contents(
    spec: nets.NetSpec,
    published: PublishedFiles,
    tokens: tuple[str, ...],
    text: PublishedText,
    tensors: Mapping[str, Any],
    adapter: Adapter = NO_ADAPTER,
) -> RewardContents:
    """Return a net on Qwen2-VL, of tensors by plain name, with its tokenizer and its template."""
    tokenizer_path = published.require(
        spec.name,
        "tokenizer",
        "the tokenizer.json of the Qwen2-VL-Instruct that it is made of, or the folder that holds "
        "it",
    )
    package = published.require(
        spec.name, "template", f"the folder of its official package, or {text.file} of it"
    )
    template = read_template(package, text)
    chat.check_template(template, tokens, package)
    if tokenizer_path.is_dir():
        tokenizer_path = tokenizer_path / chat.TOKENIZER
    tokenizer = chat.read_tokenizer(tokenizer_path, tokens)
    with nets.naming_files(*published.weights):
        config, stacks = assemble(tensors, spec, adapter, published.dtype, published.quantised)
    chat.ids_of(tokenizer, tokens, config.vocab_size, tokenizer_path)
    return RewardContents(
        spec,
        dataclasses.replace(
            config,
            image_token=tokenizer.token_to_id(chat.IMAGE),
            video_token=tokenizer.token_to_id(chat.VIDEO),
        ),
        stacks,
        (
            *(file for path in published.weights for file in nets.with_shards(path)),
            tokenizer_path,
        ),
        {chat.TOKENIZER: tokenizer.to_str().encode(), chat.TEMPLATE: template.encode()},
        {"template": sha256(template)},
    )


def _only(weights: tuple[Path, ...]) -> Path:
    if len(weights) != 1:
        raise ValueError(
            f"--weights has {len(weights)} files; expected one, for shards their {INDEX[1:]}"
        )
    return weights[0]


def read_adapter(path: Path) -> Adapter:
    """Return the LoRA that VideoReward's model_config.json describes.

    Raises:
      ValueError: naming the file and the field, for a LoRA that is not plain.
      OSError: for a file that is not there.
    """
    described = read_json(path).get("peft_lora_config")
    described = described if isinstance(described, dict) else {}
    rank = described.get("lora_r")
    alpha = described.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise ValueError(
            f"{path}: peft_lora_config has lora_r {rank!r} and lora_alpha {alpha!r}; expected the "
            "rank, a whole number, and a number"
        )
    if odd := _other_values(described, _PLAIN_LORA):
        raise ValueError(
            f"{path}: peft_lora_config is not of a plain LoRA: {odd}; expected {_PLAIN_LORA}"
        )
    return Adapter(rank, alpha / rank)


def read_facts(path: Path) -> dict[str, float]:
    """Return what VideoReward's model_config.json says of its input and its scores.

    Raises:
      ValueError: naming the file and the field that is missing or makes no sense.
      OSError: for a file that is not there.
    """
    content = read_json(path)
    for name in ("data_config", "inference_config"):
        if not isinstance(content.get(name), Mapping):
            raise ValueError(f"{path} has no {name}; expected that of VideoReward")
    data = content["data_config"]
    if odd := _other_values(data, _INPUT):
        raise ValueError(f"{path}: data_config is of another model: {odd}; expected {_INPUT}")
    facts: dict[str, Any] = {name: data.get(name) for name in ("fps", "max_frame_pixels")}
    for name in chat.VIDEOALIGN_SCALES:
        facts[name] = content["inference_config"].get(name)
    for name, value in facts.items():
        is_number = type(value) in (int, float) and math.isfinite(value)
        if not is_number or (value <= 0 and not name.endswith("_mean")):
            raise ValueError(
                f"{path}: {name} is {value!r}; expected a number, positive unless it is a mean"
            )
    return facts


def _other_values(section: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that have another value than the expected one; a missing one has none."""
    return {
        name: section[name] for name, value in expected.items() if section.get(name, value) != value
    }


def assemble(
    tensors: Mapping[str, Any],
    spec: nets.NetSpec,
    adapter: Adapter = NO_ADAPTER,
    dtype: str = "",
    quantised: bool = False,
) -> tuple[Qwen2VLConfig, dict[tuple, engine.Stack]]:
    """Return the config and the leaves, by their paths, that tensors make; none is read.

    Sizes are those of the tensors; what these do not tell, such as the width of an attention head,
    is as published.

    Args:
      tensors: by plain name. Every one must be used, but for `lm_head.weight`, which is dropped.
      spec: of `spec_of`, and adapted if there is an adapter.
      adapter: the LoRA that all linears of the decoder must have, if the spec is adapted;
        W + scale B A is computed in float32.
      dtype: of the leaves but for the head, which is then float32; by default all are as in the
        file.
      quantised: make int8 kernels.

    Raises:
      ConversionError: listing every tensor that is missing, unused or of another shape.
    """
    form = nets.format_of(spec, tensors)
    config = dataclasses.replace(spec.published, **nets.measure(spec, form, tensors))
    sources = nets.source_shapes(spec, config, form)
    pairs = {  # adapted weight -> its A and B
        name: (name.replace(_BASE, _A), name.replace(_BASE, _B))
        for name in sources
        if name.endswith(_BASE)
    }
    expected = dict(sources)
    if OUTPUT in tensors:
        expected[OUTPUT] = (config.vocab_size, config.dim)
    for name, (a, b) in pairs.items():
        rows, columns = sources[name]
        expected |= {a: (adapter.rank, columns), b: (rows, adapter.rank)}
    engine.check(expected, tensors)
    used = {name: tensors[name] for name in sources}
    for name, (a, b) in pairs.items():
        change = product(tensors[a], tensors[b], adapter.scale)
        used[name] = merged(used[name], [change], dtype)
    checkpoint = nets.checked(spec, config, form, used)
    stacks = nets.stacks(checkpoint, dtype)
    if dtype:
        whole = nets.stacks(checkpoint, "float32")
        stacks |= {path: stack for path, stack in whole.items() if path[0] == "head"}
    if quantised:
        config = dataclasses.replace(config, quantised=True)
        leaves = engine.flatten(nets.shapes(spec, config).params)
        stacks |= {
            path: _part_of_kernel(stacks[*path[:-1], "kernel"], leaf)
            for path, leaf in leaves.items()
            if leaf.dtype == np.int8 or path not in stacks  # a kernel, or the scale of one
        }
    return config, stacks


def _part_of_kernel(kernel: engine.Stack, leaf: Any) -> engine.Stack:
    """Return the leaf that `quantise` makes of a kernel: the int8 kernel, or else the scale."""
    part = 0 if leaf.dtype == np.int8 else 1
    shape = leaf.shape[1:] if kernel.stacked else leaf.shape
    pieces = [
        piece.map(lambda content: quantise(content, np)[part], shape, leaf.dtype)
        for piece in kernel.pieces
    ]
    return engine.Stack(leaf.shape, np.dtype(leaf.dtype), kernel.stacked, tuple(pieces))
