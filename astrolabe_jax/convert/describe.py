"""What a file or directory of weights is, from its headers alone."""

import collections
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from astrolabe_jax.convert import base, engine, lora, nets, parts, store
from astrolabe_jax.convert.open import config_of, open_part
from astrolabe_jax.convert.weights import CONTAINERS, Weights, open_weights


class Family(NamedTuple):
    """How a published transformer is nested and prefixed (spec/checkpoints.md 1.1), and its
    size.
    """

    name: str
    entry: str
    prefixes: tuple[str, ...]
    size: str


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


def describe(given: Path) -> dict[str, Any]:
    """A JSON-able description of a file, an imported part, a LoRA directory, or a base with all its
    parts.

    Raises ValueError naming a file that cannot be read, or OSError.
    """
    directory = base.SHIPPED.get(str(given), given)
    if not directory.exists():
        raise FileNotFoundError(f"no {given}; expected a file of weights or a directory")
    if directory.is_file() or store.is_store(directory):
        return _describe_file(directory)
    layout = base.layout_of(directory)
    if layout is None:
        return _describe_lora(directory)
    name = next(name for name, known in base.LAYOUTS.items() if known is layout)
    described: dict[str, Any] = {"path": str(given), "kind": "base", "layout": name}
    described["tokenizer"] = any(
        (directory / layout.tokenizer / file).is_file() for file in base.TOKENIZERS
    )
    described["parts"] = {}
    for part in parts.PARTS:
        try:
            described["parts"][part] = _describe_file(base.weights_of(directory, part))
        except FileNotFoundError as error:
            described["parts"][part] = {"complete": False, "faults": [str(error)]}
    whole = [part["complete"] for part in described["parts"].values()]
    return described | {"complete": all(whole) and described["tokenizer"]}


def _describe_file(path: Path) -> dict[str, Any]:
    if path.is_dir():
        source = open_part(path)
        sizes = {
            "part": source.spec.name,
            "format": "import",
            "sizes": nets.sizes_of(source.config),
        }
        return (
            _counts(path, source.tensors) | sizes | {"families": [], "complete": True, "faults": []}
        )
    weights = open_weights(path, containers=(*CONTAINERS, "generator_lora"))
    if any(".lora_" in name for name in weights.tensors):
        return _describe_lora(path)
    described = _counts(path, weights.tensors)
    described |= {
        "entries": list(weights.entries),
        "entry": weights.entry,
        "prefixes": list(weights.prefixes),
    }
    try:
        part, form = parts.recognise(weights.tensors)
    except ValueError as error:
        return described | {"part": "", "families": [], "complete": False, "faults": [str(error)]}
    return described | {"part": part, "format": form} | _fit(part, form, weights)


def _fit(part: str, form: str, weights: Weights) -> dict[str, Any]:
    """Sizes, families, and what is missing or too much."""
    spec = parts.PARTS[part]
    measured = nets.measure(spec, form, weights.tensors)
    names = {
        (net["transformer"].dim, net["transformer"].num_layers): name
        for name, net in parts.SIZES.items()
    }
    size = (
        names.get((measured.get("dim"), measured.get("num_layers")), "")
        if part == "transformer"
        else ""
    )
    found = {"sizes": measured, "size": size, "families": _families(part, weights, size)}
    try:
        tensors = spec.prepare(weights.tensors)
        # The shapes do not depend on the heads, nor on the statistics of latents.
        unseen = {
            "latent_mean": (0.0,) * measured.get("z_dim", 1),
            "latent_std": (1.0,) * measured.get("z_dim", 1),
        }
        config = config_of(part, form, tensors, unseen if part == "vae" else {}, 1)
        faults = engine.mismatches(nets.source_shapes(spec, config, form), tensors)
    except ValueError as error:
        faults = [str(error)]
    return found | {"complete": not faults, "faults": faults}


def _families(part: str, weights: Weights, size: str) -> list[str]:
    """The families with this nesting; a size that is none of theirs (of a test, say) does not
    count.
    """
    if part != "transformer":
        return [{"vae": "Wan VAE", "text_encoder": "UMT5"}[part]]
    found = [
        family
        for family in FAMILIES
        if (family.entry, family.prefixes) == (weights.entry, weights.prefixes)
    ]
    fitting = [family for family in found if not size or family.size == size]
    return list(dict.fromkeys(family.name for family in fitting))


def _describe_lora(path: Path) -> dict[str, Any]:
    file, config, _ = lora.find(path)
    weights = open_weights(file, containers=("generator_lora", *CONTAINERS))
    family = "PEFT" if config else "LongLive LoRA" if weights.entry == "generator_lora" else "LoRA"
    described = _counts(file, weights.tensors) | {
        "part": "lora",
        "format": lora.dialect_of(weights.tensors),
    }
    described |= {
        "entries": list(weights.entries),
        "entry": weights.entry,
        "prefixes": list(weights.prefixes),
    }
    described |= {"families": [family]}
    try:
        adapter, scale = lora.open_lora(path)
    except engine.ConversionError as error:
        return described | {"complete": False, "faults": str(error).splitlines()}
    (layers, dim, rank), (_, _, ffn_dim) = adapter["ffn.0"]["a"].shape, adapter["ffn.0"]["b"].shape
    sizes = {"rank": rank, "scale": scale, "num_layers": layers, "dim": dim, "ffn_dim": ffn_dim}
    return described | {"sizes": sizes, "complete": True, "faults": []}


def _counts(path: Path, tensors: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {name: math.prod(tensor.shape) for name, tensor in tensors.items()}
    return {
        "path": str(path),
        "kind": "file",
        "tensors": len(tensors),
        "parameters": sum(numbers.values()),
        "bytes": sum(numbers[name] * tensor.dtype.itemsize for name, tensor in tensors.items()),
        "dtypes": dict(collections.Counter(str(tensor.dtype) for tensor in tensors.values())),
    }


def text(described: Mapping[str, Any], most: int = 10) -> str:
    """`describe` for people; of many faults the first `most`."""
    if described["kind"] == "base":
        lines = [f"{described['path']}: base, layout {described['layout']}"]
        lines.append("tokenizer: " + ("there" if described["tokenizer"] else "missing"))
        for part, content in described["parts"].items():
            lines += ["", f"[{part}]", text({"kind": "file"} | content, most)]
        return "\n".join(lines)
    shown = {
        key: value
        for key, value in described.items()
        if key not in ("kind", "faults", "complete") and value
    }
    lines = [f"{key}: {_plain(value)}" for key, value in shown.items()]
    faults = described["faults"]
    lines.append(
        "complete: yes" if described["complete"] else f"complete: no, {len(faults)} faults"
    )
    lines += [f"  {fault}" for fault in faults[:most]]
    return "\n".join([*lines, f"  and {len(faults) - most} more"] if len(faults) > most else lines)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(content)}" for key, content in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if type(value) is int else str(value)
