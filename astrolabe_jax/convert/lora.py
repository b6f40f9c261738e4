"""LoRA adapters: files of every dialect <-> the adapter tree {module: {'a': [layers, in, R], 'b':
[layers, R, out]}}.

Source: spec/checkpoints.md section 5. Read are PEFT directories, LongLive's lora.pt, files with
`diffusion_model.` or diffusers' `transformer.` in front of the names, and what a run of this
program exports; all only if they hold exactly the ten adapted linears of every block. Written are
PEFT (0.10.0 and later) and diffusers.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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

PEFT_CONFIG, PEFT_WEIGHTS = (
    "adapter_config.json",
    ("adapter_model.safetensors", "adapter_model.bin"),
)
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
# entry in the header of diffusers' files: a PEFT config as JSON
DIFFUSERS_METADATA = "lora_adapter_metadata"
_HALVES = (("lora_A", "lora_B"), ("lora_down", "lora_up"))  # names of a and b


def table(
    prefix: str, form: str = "original", halves: tuple[str, str] = _HALVES[0], infix: str = ""
) -> list[Rule]:
    """The rules of an adapter in one dialect; `form` is a format of the transformer (parts.py)."""
    substitutions = {"original": (), "diffusers": wan.diffusers(WAN_1_3B)}[form]
    names = {
        module: engine.substituted(f"blocks.{{i}}.{module}", substitutions) for module in TARGETS
    }
    return [
        Rule(
            f"{prefix}{names[module]}.{spelled}{infix}.weight",
            f"{module}.{half}",
            LINEAR,
        )
        for module in TARGETS
        for half, spelled in zip("ab", halves, strict=True)
    ]


PEFT = table("base_model.model.")
DIFFUSERS = table("transformer.", "diffusers")
# What names can look like when weights.py has taken `base_model.model.` and the like away:
# description -> rules.
DIALECTS = {
    f"{prefix}blocks, {form} names, {halves[0]}{infix}": table(prefix, form, halves, infix)
    for form, halves, infix, prefix in itertools.product(
        ("original", "diffusers"), _HALVES, ("", ".default"), ("", "transformer.")
    )
}


def from_peft(tensors: Mapping[str, Any], expected: dict) -> dict:
    """PEFT state dict (lora_A [R, in], lora_B [out, R]) -> the adapter tree `expected`, in its
    dtypes.

    Raises engine.ConversionError unless the names and shapes match exactly: PEFT itself ignores
    misspelt names.
    """
    return engine.load(PEFT, tensors, expected)


def to_peft(adapter: dict) -> dict[str, np.ndarray]:
    """The exact inverse of `from_peft`."""
    return engine.save(PEFT, adapter)


def save_peft(adapter: dict, directory: Path | str, rank: int, alpha: float) -> None:
    """Write adapter_model.safetensors and adapter_config.json, each replaced atomically, the config
    last.

    adapter: its leaves may be arrays or engine.Stack.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / PEFT_WEIGHTS[0], engine.tensors(PEFT, adapter))
    targets = [name.removeprefix("base_model.model.") for name in _modules(PEFT, adapter)]
    config = json.dumps(peft_config(rank, alpha, targets), indent=2, sort_keys=True)
    write_atomic(directory / PEFT_CONFIG, config.encode())


def save_diffusers(adapter: dict, directory: Path | str, rank: int, alpha: float) -> None:
    """Write pytorch_lora_weights.safetensors as diffusers' load_lora_weights and load_lora_adapter
    read it; atomic.

    Rank and alpha are in the header, without which diffusers takes alpha to be the rank.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    targets = [name.removeprefix("transformer.") for name in _modules(DIFFUSERS, adapter)]
    described = {"r": rank, "lora_alpha": alpha, "target_modules": targets}
    described = {f"transformer.{field}": value for field, value in described.items()}
    metadata = {DIFFUSERS_METADATA: json.dumps(described, indent=2, sort_keys=True)}
    write_safetensors(directory / DIFFUSERS_WEIGHTS, engine.tensors(DIFFUSERS, adapter), metadata)


SAVERS = {"peft": save_peft, "diffusers": save_diffusers}


def _modules(rules: list[Rule], adapter: dict) -> list[str]:
    """Names of the adapted modules of every block."""
    layers = next(iter(adapter.values()))["a"].shape[0]
    halves = [
        rule.source.removesuffix(".lora_A.weight")
        for rule in rules
        if rule.source.endswith(".lora_A.weight")
    ]
    return [name.format(i=i) for i in range(layers) for name in halves]


def load_lora(
    path: Path | str, net: WanConfig | None = None, rank: int | None = None, dtype: Any = np.float32
) -> tuple[dict, float]:
    """Reads an adapter -> (adapter tree in `dtype`, scale alpha/R); see `open_lora`."""
    adapter, scale = open_lora(path, net, rank, dtype)
    return {
        module: {half: np.asarray(leaf) for half, leaf in pair.items()}
        for module, pair in adapter.items()
    }, scale


def open_lora(
    path: Path | str, net: WanConfig | None = None, rank: int | None = None, dtype: Any = None
) -> tuple[dict, float]:
    """Opens an adapter -> (its tree with leaves that are read when they are asked for, scale
    alpha/R).

    path: a file, or a directory: of PEFT, of diffusers, or the working directory of a run. net and
    rank are what it must fit, by default what it has itself; dtype is by default the file's.
    Without any alpha the scale is 1; where the modules have different ones, alpha/R is folded into
    b, and the scale is 1. Raises, naming the file: ValueError for one that cannot be read or holds
    a variant of LoRA that the adapter tree cannot hold, engine.ConversionError for tensors that do
    not fit, and FileNotFoundError.
    """
    weights, config, source = find(Path(path))
    found = open_weights(weights, containers=("generator_lora", *CONTAINERS)).tensors
    if (
        source is None
        and weights.suffix == ".safetensors"
        and DIFFUSERS_METADATA in safetensors_metadata(weights)
    ):
        source, config = weights, _diffusers_config(weights)
    rank, scale = (rank, None) if config is None else _rank_and_scale(config, source, rank)
    try:
        tensors, alphas, rules = _sorted_out(found)
        ranks = [
            tensor.shape[0]
            for name, tensor in tensors.items()
            if _is_a(name) and len(tensor.shape) == 2
        ]
        own = max(set(ranks), key=ranks.count)
        if rank not in (None, own):
            raise engine.ConversionError(
                f"its rank is {own}; expected rank {rank}: set the rank of this run to {own}"
            )
        dtype = next(iter(tensors.values())).dtype if dtype is None else np.dtype(dtype)
        expected = (
            _expected(rules, tensors, own, dtype)
            if net is None
            else adapter_shapes(net, own, dtype)
        )
        adapter = engine.nested(engine.stacks(rules, tensors, expected).items())
        if alphas and scale is None:
            adapter, scale = _with_alphas(
                adapter, rules, {name: float(np.asarray(a)) / own for name, a in alphas.items()}
            )
    except engine.ConversionError as error:
        raise engine.ConversionError(f"{weights}: {error}") from None
    return adapter, 1.0 if scale is None else scale


def find(path: Path) -> tuple[Path, dict | None, Path | None]:
    """(file of weights, PEFT config or None, the config's path) of an adapter."""
    if path.is_file():
        return path, None, None
    for directory in (path, path / "lora"):
        if (directory / DIFFUSERS_WEIGHTS).is_file():
            return directory / DIFFUSERS_WEIGHTS, None, None
    directory = (
        path if (path / PEFT_CONFIG).is_file() or not (path / "lora").is_dir() else path / "lora"
    )
    found = [directory / name for name in PEFT_WEIGHTS if (directory / name).is_file()]
    for file, there in (
        (PEFT_CONFIG, (directory / PEFT_CONFIG).is_file()),
        (PEFT_WEIGHTS[0], found),
    ):
        if not there:
            raise FileNotFoundError(
                f"no {directory / file}; expected a PEFT directory with {PEFT_CONFIG} and "
                f"{PEFT_WEIGHTS[0]} (or .bin), one of diffusers with {DIFFUSERS_WEIGHTS}, the "
                "working directory of a run, or a file"
            )
    return found[0], read_json(directory / PEFT_CONFIG), directory / PEFT_CONFIG


def _diffusers_config(path: Path) -> dict:
    try:
        content = json.loads(safetensors_metadata(path)[DIFFUSERS_METADATA])
        return {"peft_type": "LORA"} | {
            name.removeprefix("transformer."): value for name, value in content.items()
        }
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: {DIFFUSERS_METADATA} in its header is no JSON object: {error}"
        ) from None


def _rank_and_scale(
    config: Mapping[str, Any], source: Path, wanted: int | None
) -> tuple[int, float]:
    """R and alpha/R of a PEFT config; ValueError for what is no plain LoRA of rank `wanted`."""
    plain = {"bias": "none", "use_dora": False, "use_rslora": False, "fan_in_fan_out": False}
    plain |= {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}
    odd = {key: config[key] for key, value in plain.items() if config.get(key, value) != value}
    if config.get("peft_type") != "LORA" or odd:
        raise ValueError(
            f"{source}: not a plain LoRA adapter: peft_type {config.get('peft_type')}, {odd}"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise ValueError(
            f"{source} has r {rank!r} and lora_alpha {alpha!r}; expected the rank, a whole number, "
            "and a number"
        )
    if wanted not in (None, rank):  # one line, where the tensors would give one each
        raise ValueError(
            f"{source} has r {rank}; expected rank {wanted}: set the rank of this run to {rank}"
        )
    return rank, alpha / rank


def _is_a(name: str) -> bool:
    return ".lora_A." in name or ".lora_down." in name


def _sorted_out(found: Mapping[str, Lazy]) -> tuple[dict[str, Lazy], dict[str, Lazy], list[Rule]]:
    """Tensors of a and b, alphas by module, and the rules of the dialect that they are in."""
    if changes := [name for name in found if name.endswith((".diff", ".diff_b"))]:
        raise engine.ConversionError(
            "it holds changes of whole weights, which an adapter cannot hold: "
            f"{', '.join(changes)}; expected pairs of lora_A and lora_B alone"
        )
    rules = DIALECTS[dialect_of(found)]
    modules = {rule.source.partition(".lora_")[0].partition("{i}")[2] for rule in rules}
    alphas = {
        name.removesuffix(".alpha"): tensor
        for name, tensor in found.items()
        if name.endswith(".alpha")
        and any(name.removesuffix(".alpha").endswith(module) for module in modules)
    }
    tensors = {
        name: tensor for name, tensor in found.items() if name.removesuffix(".alpha") not in alphas
    }
    if not any(map(_is_a, tensors)):
        raise engine.ConversionError(
            f"it is no LoRA: expected lora_A and lora_B, it holds {', '.join(list(found)[:4])}"
        )
    return tensors, alphas, rules


def dialect_of(names: Mapping[str, Any]) -> str:
    """The one of DIALECTS that most of the names are in."""
    return max(DIALECTS, key=lambda dialect: engine.overlap(DIALECTS[dialect], names))


def _expected(rules: list[Rule], tensors: Mapping[str, Lazy], rank: int, dtype: np.dtype) -> dict:
    """The adapter's tree as most of its own tensors say it is."""
    shapes, tree = engine.Shapes(tensors, ()), {}
    layers = shapes.layers(rules)
    for a, b in zip(rules[::2], rules[1::2], strict=True):
        n_in, n_out = shapes.vote((a.source, 1)) or 0, shapes.vote((b.source, 0)) or 0
        sizes = {"a": (layers, n_in, rank), "b": (layers, rank, n_out)}
        tree[a.target[:-2]] = {
            half: engine.Stack(shape, dtype, True, ()) for half, shape in sizes.items()
        }
    return tree


def _with_alphas(
    adapter: dict, rules: list[Rule], scales: Mapping[str, float]
) -> tuple[dict, float]:
    """One scale where all modules of all blocks have it, else 1 with each module's own folded into
    its b.
    """
    layers, unknown = next(iter(adapter.values()))["a"].shape[0], set(scales)
    folded = {}
    for rule in rules[::2]:
        names = [rule.source.partition(".lora_")[0].format(i=i) for i in range(layers)]
        folded[rule.target[:-2]] = [scales.get(name, 1.0) for name in names]
        unknown -= set(names)
    if unknown:
        raise engine.ConversionError(
            f"alpha of modules that are not adapted: {', '.join(sorted(unknown))}"
        )
    values = {scale for module in folded.values() for scale in module}
    if len(values) == 1:
        return adapter, values.pop()
    for module, factors in folded.items():
        b = adapter[module]["b"]
        pieces = zip(b.pieces, factors, strict=True)
        pieces = tuple(
            piece.map(lambda x, factor=factor: (x.astype(np.float32) * factor).astype(x.dtype))
            for piece, factor in pieces
        )
        adapter[module]["b"] = engine.Stack(b.shape, b.dtype, True, pieces)
    return adapter, 1.0


def merged(weight: Lazy, a: Lazy, b: Lazy, scale: float, dtype: str = "") -> Lazy:
    """W + scale B A of W [out, in], A [R, in] and B [out, R]: float32, rounded once, to `dtype` or
    that of W.
    """
    target = jnp.dtype(dtype) if dtype else weight.dtype

    def change(w: np.ndarray) -> np.ndarray:
        total = np.asarray(b, np.float32) @ np.asarray(a, np.float32)
        total *= np.float32(scale)
        total += w  # in place: of a 14B model's largest weight, a copy in float32 is 0.3 GB
        return total.astype(target)

    return weight.map(change, dtype=target)


def peft_config(rank: int, alpha: float, target_modules: list[str]) -> dict:
    """The fields of PEFT 0.10.0 and no other: it refuses files with newer ones (spec/checkpoints.md
    5.3).
    """
    return {
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
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": target_modules,
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
