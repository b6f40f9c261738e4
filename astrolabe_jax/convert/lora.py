"""LoRA adapters: files of every dialect <-> the adapter tree {module: {'a': [layers, in, R], 'b':
[layers, R, out]}}.

Read are PEFT directories, LongLive's lora.pt, files with `diffusion_model.` or diffusers'
`transformer.` in front of the names, and what a run of this program exports. They must hold exactly
the ten adapted linears of every block. Written are PEFT (0.10.0 and later) and diffusers. See
docs/checkpoints.md, LoRA dialects.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax.convert import engine, wan
from astrolabe_jax.convert.engine import LINEAR, Rule
from astrolabe_jax.convert.weights import CONTAINERS, open_weights
from astrolabe_jax.models.lora import TARGETS, adapter_shapes
from astrolabe_jax.models.wan.config import WAN_1_3B, WanConfig
from astrolabe_jax.runtime.files import (
    Lazy,
    read_json,
    safetensors_metadata,
    write_atomic,
    write_safetensors,
)

PEFT_CONFIG = "adapter_config.json"
# All fields of PEFT 0.10.0 and no other: it refuses files with newer ones (docs/checkpoints.md,
# PEFT config).
_PEFT_FIELDS = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": False,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": None,
    "lora_dropout": 0.0,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": None,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "task_type": None,
    "use_dora": False,
    "use_rslora": False,
}
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PEFT_PREFIX = "base_model.model."
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
# Entry in the header of diffusers' files: a PEFT config as JSON.
DIFFUSERS_METADATA = "lora_adapter_metadata"
DIFFUSERS_PREFIX = "transformer."
_HALVES = (("lora_A", "lora_B"), ("lora_down", "lora_up"))  # names of a and b


def table(
    prefix: str, form: str = "original", halves: tuple[str, str] = _HALVES[0], infix: str = ""
) -> list[Rule]:
    """Return the rules of an adapter in one dialect: for each module that of a, then that of b.

    Args:
      prefix: in front of all names.
      form: the format of the module names, 'original' or 'diffusers'.
      halves: names of a and b.
      infix: between these and '.weight'.
    """
    substitutions = {"original": (), "diffusers": wan.diffusers(WAN_1_3B)}[form]
    name_a, name_b = halves
    rules = []
    for module in TARGETS:
        name = prefix + engine.substituted(f"blocks.{{i}}.{module}", substitutions)
        rules.append(Rule(f"{name}.{name_a}{infix}.weight", f"{module}.a", LINEAR))
        rules.append(Rule(f"{name}.{name_b}{infix}.weight", f"{module}.b", LINEAR))
    return rules


PEFT = table(PEFT_PREFIX)
DIFFUSERS = table(DIFFUSERS_PREFIX, "diffusers")
# Description of a dialect -> its rules, for names from which weights.py has removed
# `base_model.model.` and the like.
DIALECTS = {
    f"{prefix}blocks, {form} names, {halves[0]}{infix}": table(prefix, form, halves, infix)
    for form, halves, infix, prefix in itertools.product(
        ("original", "diffusers"), _HALVES, ("", ".default"), ("", DIFFUSERS_PREFIX)
    )
}


def save_peft(adapter: dict, directory: Path, rank: int, alpha: float) -> None:
    """Write adapter_model.safetensors and adapter_config.json.

    Each is replaced atomically, the config last. Leaves of `adapter` may be arrays or engine.Stack.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / PEFT_WEIGHTS[0], engine.tensors(PEFT, adapter))
    config = _PEFT_FIELDS | {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _module_names(PEFT, PEFT_PREFIX, adapter),
    }
    write_atomic(directory / PEFT_CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())


def save_diffusers(adapter: dict, directory: Path, rank: int, alpha: float) -> None:
    """Write pytorch_lora_weights.safetensors for diffusers' load_lora_weights and
    load_lora_adapter; atomic.

    Rank and alpha are in its header, without which diffusers takes alpha to be the rank.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        f"{DIFFUSERS_PREFIX}r": rank,
        f"{DIFFUSERS_PREFIX}lora_alpha": alpha,
        f"{DIFFUSERS_PREFIX}target_modules": _module_names(DIFFUSERS, DIFFUSERS_PREFIX, adapter),
    }
    metadata = {DIFFUSERS_METADATA: json.dumps(config, indent=2, sort_keys=True)}
    write_safetensors(directory / DIFFUSERS_WEIGHTS, engine.tensors(DIFFUSERS, adapter), metadata)


SAVERS = {"peft": save_peft, "diffusers": save_diffusers}


def _module_names(rules: list[Rule], prefix: str, adapter: dict) -> list[str]:
    """Return the names, without `prefix`, of the adapted modules of every block."""
    layers = range(adapter["ffn.0"]["a"].shape[0])
    names = [_module_of(rule).removeprefix(prefix) for rule in rules[::2]]
    return [name.format(i=i) for i in layers for name in names]


def load_lora(
    path: Path | str, net: WanConfig | None = None, rank: int | None = None, dtype: Any = np.float32
) -> tuple[dict, float]:
    """Read an adapter; return its tree of arrays in `dtype`, and its scale alpha/R.

    See `open_lora`.
    """
    opened, scale = open_lora(path, net, rank, dtype)
    return jax.tree.map(np.asarray, opened), scale


def open_lora(
    path: Path | str, net: WanConfig | None = None, rank: int | None = None, dtype: Any = None
) -> tuple[dict, float]:
    """Open an adapter; return its tree of engine.Stack, which are not read yet, and its scale.

    The scale is alpha/R, or 1 without any alpha. Where modules have different ones, each is folded
    into its b, and the scale is 1.

    Args:
      path: a file, a directory of PEFT or diffusers, or the working directory of a run.
      net: sizes that the adapter must fit; by default its own.
      rank: R that it must have; by default its own.
      dtype: of the leaves; by default the file's.

    Raises:
      ValueError: naming a file that cannot be read, or that holds a variant of LoRA which an
        adapter tree cannot hold.
      engine.ConversionError: naming the file and the tensors that do not fit.
      FileNotFoundError: there is no such file.
    """
    files = find(Path(path))
    stored = open_weights(files.weights, containers=("generator_lora", *CONTAINERS)).tensors
    scale = None
    config = _diffusers_config(files.weights) if files.config is None else files.config
    if config is not None:
        rank, scale = _rank_and_scale(config, files.config_path, rank)
    try:
        halves, alphas, rules = _recognise(stored)
        stored_rank = _most_frequent_rank(halves)
        if rank not in (None, stored_rank):
            raise engine.ConversionError(
                f"its rank is {stored_rank}; expected rank {rank}: set the rank of this run to "
                f"{stored_rank}"
            )
        if dtype is None:
            dtype = next(iter(halves.values())).dtype
        expected = (
            _measured_shapes(halves, rules, stored_rank, np.dtype(dtype))
            if net is None
            else adapter_shapes(net, stored_rank, dtype)
        )
        adapter = engine.nested(engine.stacks(rules, halves, expected).items())
        if alphas and scale is None:
            scales = {
                name: float(np.asarray(alpha)) / stored_rank for name, alpha in alphas.items()
            }
            adapter, scale = _with_scales(adapter, rules, scales)
    except engine.ConversionError as error:
        raise engine.ConversionError(f"{files.weights}: {error}") from None
    return adapter, 1.0 if scale is None else scale


class LoraFiles(NamedTuple):
    """Where an adapter is stored."""

    weights: Path
    config: dict | None  # of PEFT, where it has a file of its own
    config_path: Path  # where a config would be: that file, or `weights` for one in its header


def find(path: Path) -> LoraFiles:
    """Return the files of an adapter, given what `open_lora` takes.

    Raises FileNotFoundError, which says what is expected, and ValueError for a config that is no
    JSON object.
    """
    for weights in (path, path / DIFFUSERS_WEIGHTS, path / "lora" / DIFFUSERS_WEIGHTS):
        if weights.is_file():
            return LoraFiles(weights, None, weights)
    in_run = (path / "lora").is_dir() and not (path / PEFT_CONFIG).is_file()
    directory = path / "lora" if in_run else path
    config_path = directory / PEFT_CONFIG
    for weights in map(directory.joinpath, PEFT_WEIGHTS):
        if config_path.is_file() and weights.is_file():
            return LoraFiles(weights, read_json(config_path), config_path)
    missing = directory / PEFT_WEIGHTS[0] if config_path.is_file() else config_path
    raise FileNotFoundError(
        f"no {missing}; expected a PEFT directory with {PEFT_CONFIG} and {PEFT_WEIGHTS[0]} (or "
        f".bin), one of diffusers with {DIFFUSERS_WEIGHTS}, the working directory of a run, or a "
        "file"
    )


def _diffusers_config(path: Path) -> dict | None:
    """Return the PEFT config in the header of a file that diffusers wrote, or None."""
    if path.suffix != ".safetensors":
        return None
    content = safetensors_metadata(path).get(DIFFUSERS_METADATA)
    if content is None:
        return None
    try:
        fields = json.loads(content).items()
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: {DIFFUSERS_METADATA} in its header is no JSON object: {error}"
        ) from None
    config = {name.removeprefix(DIFFUSERS_PREFIX): value for name, value in fields}
    return {"peft_type": "LORA"} | config


# Fields of a PEFT config that must have these values, or be left out.
_PLAIN_LORA = {
    "bias": "none",
    "use_dora": False,
    "use_rslora": False,
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}


def _rank_and_scale(
    config: Mapping[str, Any], path: Path, expected_rank: int | None
) -> tuple[int, float]:
    """Return R and alpha/R of a PEFT config.

    Raises ValueError, naming `path`, for what is no plain LoRA, or not of the expected rank.
    """
    odd = {
        key: config[key]
        for key, value in _PLAIN_LORA.items()
        if key in config and config[key] != value
    }
    if config.get("peft_type") != "LORA" or odd:
        raise ValueError(
            f"{path}: not a plain LoRA adapter: peft_type {config.get('peft_type')}, {odd}"
        )
    rank = config.get("r")
    alpha = config.get("lora_alpha")
    # The types are compared, as True would pass for a whole number.
    if type(rank) is not int or rank < 1 or (type(alpha) is not int and type(alpha) is not float):
        raise ValueError(
            f"{path} has r {rank!r} and lora_alpha {alpha!r}; expected the rank, a whole number, "
            "and a number"
        )
    if expected_rank not in (None, rank):  # one line, where the tensors would give one each
        raise ValueError(
            f"{path} has r {rank}; expected rank {expected_rank}: set the rank of this run to "
            f"{rank}"
        )
    return rank, alpha / rank


def _recognise(
    stored: Mapping[str, Lazy],
) -> tuple[dict[str, Lazy], dict[str, Lazy], list[Rule]]:
    """Return all a and b by name, the alphas by module, and the rules of the names' dialect.

    Raises ConversionError for a file that is no LoRA, or more than one.
    """
    changes = [name for name in stored if name.endswith((".diff", ".diff_b"))]
    if changes:
        raise engine.ConversionError(
            "it holds changes of whole weights, which an adapter cannot hold: "
            f"{', '.join(changes)}; expected pairs of lora_A and lora_B alone"
        )
    rules = DIALECTS[dialect_of(stored)]
    ends = tuple(f"{_module_of(rule).partition('{i}')[2]}.alpha" for rule in rules)
    halves = {name: tensor for name, tensor in stored.items() if not name.endswith(ends)}
    alphas = {name.removesuffix(".alpha"): stored[name] for name in stored if name.endswith(ends)}
    if not any(map(_is_a, halves)):
        raise engine.ConversionError(
            f"it is no LoRA: expected lora_A and lora_B, it holds {', '.join(list(stored)[:4])}"
        )
    return halves, alphas, rules


def dialect_of(names: Mapping[str, Any]) -> str:
    """Return the one of DIALECTS that most of the names are in."""
    return max(DIALECTS, key=lambda dialect: engine.overlap(DIALECTS[dialect], names))


def _module_of(rule: Rule) -> str:
    """Return the name, with `{i}`, of the module that a rule is for."""
    return rule.source.partition(".lora_")[0]


def _is_a(name: str) -> bool:
    return ".lora_A." in name or ".lora_down." in name


def _most_frequent_rank(halves: Mapping[str, Lazy]) -> int:
    ranks = [
        tensor.shape[0] for name, tensor in halves.items() if _is_a(name) and len(tensor.shape) == 2
    ]
    return max(set(ranks), key=ranks.count)


def _measured_shapes(
    halves: Mapping[str, Lazy], rules: list[Rule], rank: int, dtype: np.dtype
) -> dict:
    """Return an adapter's tree, with shapes alone, as most of its own tensors have them."""
    shapes = engine.Shapes(halves, ())
    layers = shapes.layers(rules) or 0
    tree = {}
    for rule_a, rule_b in zip(rules[::2], rules[1::2], strict=True):
        n_in = shapes.vote((rule_a.source, 1)) or 0
        n_out = shapes.vote((rule_b.source, 0)) or 0
        tree[rule_a.target.removesuffix(".a")] = {
            "a": engine.Stack((layers, n_in, rank), dtype, True, ()),
            "b": engine.Stack((layers, rank, n_out), dtype, True, ()),
        }
    return tree


def _with_scales(
    adapter: dict, rules: list[Rule], scales: Mapping[str, float]
) -> tuple[dict, float]:
    """Return an adapter and its scale, given alpha/R of each module of each block.

    A module without one has scale 1. Where the scales differ, the adapter that comes back has them
    folded into b, and its scale is 1.
    """
    layers = range(adapter["ffn.0"]["a"].shape[0])
    names = {
        rule.target.removesuffix(".a"): [_module_of(rule).format(i=i) for i in layers]
        for rule in rules[::2]
    }
    if unknown := set(scales).difference(*names.values()):
        raise engine.ConversionError(
            f"alpha of modules that are not adapted: {', '.join(sorted(unknown))}"
        )
    by_module = {
        module: [scales.get(name, 1.0) for name in layer_names]
        for module, layer_names in names.items()
    }
    distinct = set(itertools.chain.from_iterable(by_module.values()))
    if len(distinct) == 1:
        return adapter, distinct.pop()
    folded = {}
    for module, pair in adapter.items():
        b = pair["b"]
        pieces = map(_scaled_piece, b.pieces, by_module[module])
        folded[module] = pair | {"b": engine.Stack(b.shape, b.dtype, True, tuple(pieces))}
    return folded, 1.0


def _scaled_piece(piece: Lazy, scale: float) -> Lazy:
    """Return a tensor times `scale`, multiplied in float32 and rounded to its dtype."""
    return piece.map(lambda x: (x.astype(np.float32) * scale).astype(x.dtype))


def merged(weight: Lazy, a: Lazy, b: Lazy, scale: float, dtype: str = "") -> Lazy:
    """Return W + scale B A, for W [out, in], A [R, in] and B [out, R].

    It is computed in float32 and rounded once, to `dtype` or to that of W.
    """
    target = jnp.dtype(dtype) if dtype else weight.dtype

    def merge(w: np.ndarray) -> np.ndarray:
        total = np.asarray(b, np.float32) @ np.asarray(a, np.float32)
        total *= np.float32(scale)
        total += w  # in place: of a 14B model's largest weight, a copy in float32 is 0.3 GB
        return total.astype(target)

    return weight.map(merge, dtype=target)
