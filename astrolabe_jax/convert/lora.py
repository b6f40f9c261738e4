"""LoRA adapters: what a file of any dialect changes in a transformer, and the adapter tree
{module: {'a': [layers, in, R], 'b': [layers, R, out]}} that runs train.

    read_changes    everything that is to be added to whole weights: convert merge, sample --lora
    open_lora       the adapter tree, for a file that changes nothing but its ten linears
    save_peft, save_diffusers       an adapter tree as a directory of PEFT or diffusers

See docs/checkpoints.md, LoRA dialects.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax.convert import engine, nets, parts, wan
from astrolabe_jax.convert.engine import LINEAR, ConversionError, Rule
from astrolabe_jax.convert.lora_file import (
    DIFFUSERS_METADATA,
    DIFFUSERS_PREFIX,
    DIFFUSERS_WEIGHTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    Lora,
    find,
    fit,
    layer_of,
    read,
    some,
    within_block,
)
from astrolabe_jax.models.lora import TARGETS, linear_sizes
from astrolabe_jax.models.wan.config import WAN_1_3B, WanConfig
from astrolabe_jax.runtime.files import Lazy, write_atomic, write_safetensors
from astrolabe_jax.runtime.progress import counted

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
PEFT_PREFIX = "base_model.model."
_FORMS = {"original": (), "diffusers": wan.diffusers(WAN_1_3B)}


def table(prefix: str, form: str = "original") -> list[Rule]:
    """Return the rules of an adapter: for each module that of a, then that of b.

    Args:
      prefix: in front of all names.
      form: the format of the module names, 'original' or 'diffusers'.
    """
    rules = []
    for module in TARGETS:
        name = prefix + engine.substituted(f"blocks.{{i}}.{module}", _FORMS[form])
        rules.append(Rule(f"{name}.lora_A.weight", f"{module}.a", LINEAR))
        rules.append(Rule(f"{name}.lora_B.weight", f"{module}.b", LINEAR))
    return rules


PEFT = table(PEFT_PREFIX)
DIFFUSERS = table(DIFFUSERS_PREFIX, "diffusers")


def save_peft(adapter: dict, directory: Path, rank: int, alpha: float) -> Path:
    """Write adapter_model.safetensors and adapter_config.json; return the path of the first.

    Each is replaced atomically, the config last. Leaves of `adapter` may be arrays or engine.Stack.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / PEFT_WEIGHTS[0]
    write_safetensors(path, engine.tensors(_rules(PEFT, adapter), adapter))
    config = _PEFT_FIELDS | {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _module_names(PEFT, PEFT_PREFIX, adapter),
    }
    write_atomic(directory / PEFT_CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())
    return path


def save_diffusers(adapter: dict, to: Path, rank: int, alpha: float) -> Path:
    """Write one file for diffusers' load_lora_weights and load_lora_adapter, and return its path.

    It is `to` where that ends in .safetensors, or pytorch_lora_weights.safetensors in the directory
    `to`, and is replaced atomically. Rank and alpha are in its header, without which diffusers
    takes alpha to be the rank.
    """
    path = to if to.suffix == ".safetensors" else to / DIFFUSERS_WEIGHTS
    path.parent.mkdir(parents=True, exist_ok=True)
    config = {
        f"{DIFFUSERS_PREFIX}r": rank,
        f"{DIFFUSERS_PREFIX}lora_alpha": alpha,
        f"{DIFFUSERS_PREFIX}target_modules": _module_names(DIFFUSERS, DIFFUSERS_PREFIX, adapter),
    }
    metadata = {DIFFUSERS_METADATA: json.dumps(config, indent=2, sort_keys=True)}
    tensors = engine.tensors(_rules(DIFFUSERS, adapter), adapter)
    write_safetensors(path, tensors, metadata)
    return path


SAVERS = {"peft": save_peft, "diffusers": save_diffusers}


def _rules(rules: list[Rule], adapter: dict) -> list[Rule]:
    """Return the rules of the modules that an adapter has."""
    return [rule for rule in rules if rule.target.rpartition(".")[0] in adapter]


def _module_names(rules: list[Rule], prefix: str, adapter: dict) -> list[str]:
    """Return the names, without `prefix`, of the adapted modules of every block."""
    layers = range(next(iter(adapter.values()))["a"].shape[0])
    sources = [rule.source for rule in _rules(rules, adapter)[::2]]
    names = [source.removeprefix(prefix).removesuffix(".lora_A.weight") for source in sources]
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

    The scale is alpha/R. R is the largest rank in the file: smaller pairs are filled up with zeros,
    pairs that are absent are zeros. Where modules have different scales, each is folded into its b,
    and the scale is 1.

    Args:
      path: a file, a directory of PEFT or diffusers, or the working directory of a run.
      net: sizes that the adapter must fit; by default its own, and only modules that it has.
      rank: R that it must have; by default its own.
      dtype: of the leaves; by default the file's, or float32 where scales are folded.

    Raises:
      ValueError: naming a file that cannot be read, or that holds a variant of LoRA which an
        adapter tree cannot hold.
      engine.ConversionError: naming the file and the tensors that do not fit, with the way out.
      FileNotFoundError: there is no such file.
    """
    lora = read(path)
    with nets.naming_files(lora.path):
        fit(lora, net)
        beyond = [name for name in lora.shapes() if not _in_tree(name, lora)]
        if beyond:
            raise ConversionError(
                f"it changes {counted(len(beyond), 'tensor')} that an adapter cannot hold: "
                f"{some(beyond)}; merge it into the base first (convert merge BASE {lora.path} "
                "--to FILE), and train on that (config.transformer)"
            )
        found = max(pair.rank for pair in lora.pairs.values())
        if rank not in (None, found):
            raise ConversionError(
                f"its rank is {found}; expected rank {rank}: set the rank of this run to {found}"
            )
    halves = [half for pair in lora.pairs.values() for half in (pair.down, pair.up)]
    scales = {pair.scale for pair in lora.pairs.values()}
    folded = len(scales) > 1
    # float64 is stored by no adapter tree, and JAX would warn of it
    dtypes = {np.dtype(np.float32) if h.dtype == np.float64 else h.dtype for h in halves}
    own = np.float32 if folded else jnp.result_type(*dtypes)
    dtype = np.dtype(dtype or own)
    layers = net.num_layers if net else 1 + max(map(layer_of, lora.pairs))
    sizes = linear_sizes(net) if net else _linear_sizes(lora)
    tree = {}
    for module, (n_in, n_out) in sizes.items():
        pairs = [lora.pairs.get(f"blocks.{i}.{module}.weight") for i in range(layers)]
        a = [_piece(pair and pair.down, (n_in, found), dtype) for pair in pairs]
        b = [
            _piece(pair and pair.up, (found, n_out), dtype, pair.scale if pair and folded else 1.0)
            for pair in pairs
        ]
        tree[module] = {
            "a": engine.Stack((layers, n_in, found), dtype, True, tuple(a)),
            "b": engine.Stack((layers, found, n_out), dtype, True, tuple(b)),
        }
    return tree, 1.0 if folded else scales.pop()


def _in_tree(name: str, lora: Lora) -> bool:
    """Return whether the change of a tensor is a pair of one of the ten linears of a block."""
    adapted = layer_of(name) >= 0 and within_block(name).removesuffix(".weight") in TARGETS
    return adapted and name not in lora.differences


def _linear_sizes(lora: Lora) -> dict[str, tuple[int, int]]:
    """Return the (in, out) features of the linears that a file adapts."""
    sizes = {within_block(name): (shape[1], shape[0]) for name, shape in lora.shapes().items()}
    return {module: sizes[f"{module}.weight"] for module in TARGETS if f"{module}.weight" in sizes}


def _piece(half: Lazy | None, shape: engine.Shape, dtype: np.dtype, scale: float = 1.0) -> Lazy:
    """Return a layer of a leaf: half of a pair, transposed, times a scale, filled up with zeros."""

    def read() -> np.ndarray:
        piece = np.zeros(shape, dtype)
        if half is not None:
            content = np.asarray(half).T
            if scale != 1.0:
                content = content.astype(np.float32) * np.float32(scale)
            piece[: content.shape[0], : content.shape[1]] = content
        return piece

    return Lazy(shape, dtype, read)


def read_changes(path: Path | str, net: WanConfig) -> dict[str, list[Lazy]]:
    """Return all that an adapter adds to a transformer, by the original names of its tensors.

    Each is float32, of the shape of its tensor, and made anew when it is read. Raises as
    `open_lora`, but for what an adapter tree cannot hold.
    """
    lora = read(path)
    with nets.naming_files(lora.path):
        fit(lora, net)
    changes = {name: [product(*pair)] for name, pair in lora.pairs.items()}
    for name, difference in lora.differences.items():
        changes.setdefault(name, []).append(difference)
    return changes


def product(down: Lazy, up: Lazy, scale: float) -> Lazy:
    """Return scale up down, for down [R, in, ...] and up [out, R, ...], computed in float32."""

    def read() -> np.ndarray:
        a, b = (np.asarray(half, np.float32) for half in (down, up))
        total = b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)
        total *= np.float32(scale)
        return total.reshape(shape)

    shape = (up.shape[0], *down.shape[1:])
    return Lazy(shape, np.dtype(np.float32), read)


def merged(
    weight: Lazy, changes: Sequence[Lazy], dtype: str = "", name: str = "a merged weight"
) -> Lazy:
    """Return a weight with changes (see `read_changes`) added.

    The sum is computed in float32 and rounded once, to `dtype` or to that of the weight. Reading it
    raises ConversionError, with `name`, if it is not finite.
    """
    target = jnp.dtype(dtype) if dtype else weight.dtype
    if not changes:
        return weight.map(lambda w: w.astype(target, copy=False), dtype=target)

    def add(tensor: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # what overflows is refused
            total = _sum(tensor, map(np.asarray, changes)).astype(target)
        if not nets.is_finite(total):
            raise engine.ConversionError(
                f"{name} is not finite in {target}: the LoRA or the base holds numbers "
                "that are too large; take another file, or a wider --dtype"
            )
        return total

    return weight.map(add, dtype=target)


def _sum(weight: np.ndarray, changes: Iterable[np.ndarray]) -> np.ndarray:
    """Return the sum in float32, in place: of a 14B model's largest weight a copy is 0.3 GB."""
    first, *others = changes
    for other in others:
        first += other
    first += weight
    return first


def leaf_changer(changes: Mapping[str, Sequence[Lazy]], net: WanConfig) -> parts.PlaceLeaf:
    """Return what adds `read_changes` to the leaves of a base as they are read, as `merged` does.

    It takes a part, the path of a leaf and the leaf, which may be changed in place, and returns the
    leaf.
    """
    spec = parts.PARTS["transformer"]
    rules = {rule.target: rule for rule in nets.rules(spec, net)}

    def change(part: str, where: tuple, leaf: np.ndarray) -> np.ndarray:
        if part != spec.name:
            return leaf
        source, _, transform = rules[".".join(map(str, where))]
        stacked = "{i}" in source
        layers = np.asarray(leaf if stacked else leaf[None])
        names = [source.format(i=i) for i in range(len(layers))]
        if changes.keys() & set(names) and not layers.flags.writeable:
            layers = layers.copy()
        for i, name in enumerate(names):
            if name in changes:
                read = map(np.asarray, changes[name])
                shape = layers[i].shape
                layers[i] = _sum(layers[i], (transform.forward(x, shape) for x in read))
        return layers if stacked else layers[0]

    return change


def fingerprint(path: Path | str) -> str:
    """Return a hash of the files of an adapter."""
    files = find(path)
    config = [files.config_path] if files.config_path not in (None, files.weights) else []
    digest = hashlib.sha256()
    for file in (*nets.with_shards(files.weights), *config):
        with open(file, "rb") as content:
            hashlib.file_digest(content, lambda: digest)
    return digest.hexdigest()
