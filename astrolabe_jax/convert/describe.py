"""Says what a file or directory of weights is, from its headers alone."""

import collections
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from astrolabe_jax.convert import base, engine, lora_file, nets, parts, store
from astrolabe_jax.convert.open import (
    POLICIES,
    config_beside,
    config_of,
    find_checkpoint,
    open_part,
    open_policy,
)
from astrolabe_jax.convert.weights import CONTAINERS, READERS, Weights, open_weights
from astrolabe_jax.models.lora import TARGETS
from astrolabe_jax.runtime.files import read_json, what_is_at


class Family(NamedTuple):
    """A published transformer: how its file is nested and prefixed, and its size.

    See docs/checkpoints.md, Nesting and prefixes.
    """

    name: str
    entry: str  # of a nested file; '' of a flat one
    prefixes: tuple[str, ...]  # of the names
    size: str  # a name of parts.SIZES


FAMILIES = (
    Family("Self-Forcing", "generator_ema", ("model.",), "wan_1.3b"),
    Family(
        "Causal-Forcing framewise", "generator_ema", ("model.", "_fsdp_wrapped_module"), "wan_1.3b"
    ),
    Family("Causal-Forcing chunkwise", "generator", ("model.",), "wan_1.3b"),
    Family("LongLive base", "generator", ("model.",), "wan_1.3b"),
    Family("Krea", "", ("model.",), "wan_14b"),
    Family("Wan base", "", (), "wan_1.3b"),
    Family("Wan base", "", (), "wan_14b"),
)


def describe(path: Path) -> dict[str, Any]:
    """Return a description, as JSON has it, of a file, or of a directory of any kind that is known.

    Raises:
      ValueError: naming a file that cannot be read.
      OSError: there is nothing at `path`, or a directory of no known kind.
    """
    directory = base.place_of(path)
    if directory.is_file() or store.is_store(directory):
        return _describe_file(directory)
    if _is_reward(directory):
        return _describe_reward(directory)
    layout = base.layout_of(directory)
    if layout is not None and not _is_foreign(directory, layout):
        return _describe_base(path, directory, layout)
    if lora_file.is_adapter(directory):
        return _describe_lora(directory)
    if checkpoint := find_checkpoint(directory):
        return _describe_checkpoint(checkpoint)
    raise FileNotFoundError(
        f"{what_is_at(directory)}; expected a file of weights or of a LoRA ({', '.join(READERS)}), "
        f"a base (a directory with {base.marks()}), a part of one that import made, a LoRA (with "
        f"{lora_file.PEFT_CONFIG} or {lora_file.DIFFUSERS_WEIGHTS}), a run (with lora/ or "
        "checkpoints/), or a reward model that convert reward made"
    )


def faults_of(described: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with what was described, a line each, with the names of parts."""
    inner = described.get("parts", {}).items()
    of_parts = [f"{part}: {fault}" for part, content in inner for fault in content["faults"]]
    return [*described["faults"], *of_parts]


def _is_foreign(directory: Path, layout: base.BaseLayout) -> bool:
    """Return whether a config.json is that of another model, with none of our parts beside it."""
    names = [name for part in layout.weights.values() for name in part]
    is_own = layout is base.LAYOUTS["own"]
    return is_own and not any((directory / name).exists() for name in names)


def _describe_base(path: Path, directory: Path, layout: base.BaseLayout) -> dict[str, Any]:
    has_tokenizer = any((directory / layout.tokenizer / name).is_file() for name in base.TOKENIZERS)
    faults = base.faults_of(str(directory))
    described = {}
    for part in parts.PARTS:
        try:
            described[part] = _describe_file(base.weights_of(directory, part))
        except (ValueError, OSError) as error:
            described[part] = {"complete": False, "faults": str(error).splitlines()}
    return {
        "path": str(path),
        "kind": "base",
        "layout": next(name for name, known in base.LAYOUTS.items() if known is layout),
        "tokenizer": has_tokenizer,
        "parts": described,
        "complete": not faults and all(part["complete"] for part in described.values()),
        "faults": faults,
    }


def _describe_file(path: Path) -> dict[str, Any]:
    if path.is_dir():
        return _describe_store(path)
    weights = open_weights(path, containers=(*CONTAINERS, "generator_lora"))
    if lora_file.is_lora(weights.tensors):
        return _describe_lora(path)
    described = _counts(path, weights.tensors) | _nesting(weights)
    try:
        part, form = parts.recognise(weights.tensors)
    except ValueError as error:
        return described | {"part": "", "families": [], "complete": False, "faults": [str(error)]}
    return described | {"part": part, "format": form} | _fit(path, part, form, weights)


def _describe_store(path: Path) -> dict[str, Any]:
    """Return the description of a part that import made."""
    net = open_part(path)
    return _counts(path, net.tensors) | {
        "part": net.spec.name,
        "format": "import",
        "sizes": nets.sizes_of(net.config),
        "families": [],
        "complete": True,
        "faults": [],
    }


def _is_reward(directory: Path) -> bool:
    return store.is_store(directory / "weights") and (directory / "config.json").is_file()


def _describe_reward(directory: Path) -> dict[str, Any]:
    """Return the description of what convert reward made."""
    content = read_json(directory / "config.json")
    weights = directory / "weights"
    with nets.naming_files(weights):
        leaves = store.open_leaves(weights)
    return _counts(directory, leaves) | {
        "part": "reward model",
        "families": [str(content.get("kind"))],
        "sizes": content.get("net"),
        "complete": True,
        "faults": [],
    }


def _describe_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Return the description of an epoch of a run."""
    adapters = {name: open_policy(checkpoint, name) for name in POLICIES}
    averaged = adapters["ema"]
    return _counts(checkpoint, store.open_leaves(checkpoint / "state")) | {
        "part": "checkpoint of a run",
        "policies": list(adapters),
        "sizes": {"rank": averaged.rank, "scale": averaged.alpha / averaged.rank},
        "families": [],
        "complete": True,
        "faults": [],
    }


def _fit(path: Path, part: str, form: str, weights: Weights) -> dict[str, Any]:
    """Return sizes and families of a part, and what it lacks or has too much."""
    spec = parts.PARTS[part]
    measured = nets.measure(spec, form, weights.tensors)
    found = (measured.get("dim"), measured.get("num_layers"))
    size = parts.SIZE_NAMES.get(found, "") if part == "transformer" else ""
    families = []
    try:
        tensors = spec.prepare(weights.tensors)
        families = _families(part, weights, size)
        # Placeholders: shapes depend neither on the statistics of latents nor on the heads.
        channels = measured.get("z_dim", 1)
        statistics = {"latent_mean": (0.0,) * channels, "latent_std": (1.0,) * channels}
        config = config_of(part, form, tensors, statistics | config_beside(path, part), num_heads=1)
        faults = engine.mismatches(nets.source_shapes(spec, config, form), tensors)
    except ValueError as error:
        faults = str(error).splitlines()
    return {
        "sizes": measured,
        "size": size,
        "families": families,
        "complete": not faults,
        "faults": faults,
    }


def _families(part: str, weights: Weights, size: str) -> list[str]:
    """Return the families whose files are nested and prefixed so.

    They must be of this size too, unless it is '', which no published transformer has.
    """
    if part != "transformer":
        return [{"vae": "Wan VAE", "text_encoder": "UMT5"}[part]]
    names = [
        family.name
        for family in FAMILIES
        if (family.entry, family.prefixes) == (weights.entry, weights.prefixes)
        and size in ("", family.size)
    ]
    return list(dict.fromkeys(names))


def _describe_lora(path: Path) -> dict[str, Any]:
    files = lora_file.find(path)
    weights = open_weights(files.weights, containers=("generator_lora", *CONTAINERS))
    family = "LongLive LoRA" if weights.entry == "generator_lora" else "LoRA"
    if files.config_path not in (None, files.weights):
        family = "PEFT"
    described = _counts(files.weights, weights.tensors) | {
        "part": "lora",
        **_nesting(weights),
        "families": [family],
    }
    try:
        adapter = lora_file.read(path)
        lora_file.fit(adapter)
    except engine.ConversionError as error:
        return described | {"complete": False, "faults": str(error).splitlines()}
    return described | {
        "format": adapter.form,
        "sizes": _lora_sizes(adapter),
        **_modules(adapter),
        "complete": True,
        "faults": [],
    }


def _lora_sizes(adapter: lora_file.Lora) -> dict[str, Any]:
    """Return rank, scale and number of blocks, and the widths that the modules tell."""
    pairs = adapter.pairs.values()
    sizes = {
        "rank": _span({pair.rank for pair in pairs}),
        "scale": _span({pair.scale for pair in pairs}),
        "num_layers": 1 + max(map(lora_file.layer_of, adapter.shapes())),
        "dim": lora_file.width_of(adapter),
    }
    shapes = adapter.shapes().items()
    ffn = [shape[0] for name, shape in shapes if name.endswith(".ffn.0.weight")]
    sizes["ffn_dim"] = ffn[0] if ffn else None
    return {field: size for field, size in sizes.items() if size is not None}


def _span(values: set) -> Any:
    """Return the only value, or the least and the largest."""
    if len(values) < 2:
        return next(iter(values), None)
    return f"{min(values):g} to {max(values):g}"


def _modules(adapter: lora_file.Lora) -> dict[str, list]:
    """Return what is changed and what is not, each name once for all blocks."""
    adapted = {lora_file.within_block(name).removesuffix(".weight") for name in adapter.pairs}
    whole = sorted({lora_file.within_block(name) for name in adapter.differences})
    blocks = sorted({lora_file.layer_of(name) for name in adapter.shapes()} - {-1})
    inside = [module for module in TARGETS if module in adapted]
    return {
        "modules": [*inside, *sorted(adapted.difference(TARGETS))],
        "not adapted": [module for module in TARGETS if module not in adapted],
        "differences": whole,
        "blocks": blocks if blocks != list(range(len(blocks))) else [],
    }


def _nesting(weights: Weights) -> dict[str, Any]:
    return {
        "entries": list(weights.entries),
        "entry": weights.entry,
        "prefixes": list(weights.prefixes),
    }


def _counts(path: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    counts = {name: math.prod(tensor.shape) for name, tensor in tensors.items()}
    return {
        "path": str(path),
        "kind": "file",
        "tensors": len(tensors),
        "parameters": sum(counts.values()),
        "bytes": sum(counts[name] * tensor.dtype.itemsize for name, tensor in tensors.items()),
        "dtypes": dict(collections.Counter(str(tensor.dtype) for tensor in tensors.values())),
    }


def text(described: Mapping[str, Any], most: int = 10) -> str:
    """Return `describe` as text for people, with at most `most` faults of each part."""
    if described["kind"] == "base":
        lines = [
            f"{described['path']}: base, layout {described['layout']}",
            f"tokenizer: {'there' if described['tokenizer'] else 'missing'}",
            *_verdict(described, most),
        ]
        for part, content in described["parts"].items():
            lines += ["", f"[{part}]", text({"kind": "file"} | content, most)]
        return "\n".join(lines)
    lines = [
        f"{key}: {_plain(value)}"
        for key, value in described.items()
        if value and key not in ("kind", "faults", "complete")
    ]
    return "\n".join(lines + _verdict(described, most))


def _verdict(described: Mapping[str, Any], most: int) -> list[str]:
    """Return lines that say whether it is complete, and at most `most` faults."""
    faults = described["faults"]
    if described["complete"]:
        return ["complete: yes"]
    count = {0: "", 1: ", 1 fault"}.get(len(faults), f", {len(faults)} faults")
    more = [f"  and {len(faults) - most} more"] if len(faults) > most else []
    return [f"complete: no{count}", *(f"  {fault}" for fault in faults[:most]), *more]


def _plain(value: Any) -> str:
    """Return a value of a description without brackets and quotes."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(content)}" for key, content in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if type(value) is int:
        return f"{value:,}"
    return str(value)
