"""Files of LoRA adapters in every dialect -> what they change in a transformer.

Names may be original or those of diffusers, with dots or underscores, and with any prefix; alpha
may be among the tensors, in a PEFT config or in a header. See docs/checkpoints.md, LoRA dialects.
"""

import collections
import logging
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from astrolabe_jax.convert import engine, nets, parts, wan
from astrolabe_jax.convert.engine import ConversionError
from astrolabe_jax.convert.weights import CONTAINERS, open_weights, suffix_of
from astrolabe_jax.models.wan.config import WAN_1_3B, WanConfig
from astrolabe_jax.runtime.files import (
    Lazy,
    local_directory,
    parse_json,
    read_json,
    safetensors_metadata,
    what_is_at,
)
from astrolabe_jax.runtime.progress import counted

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
# Entry in the header of diffusers' files: a PEFT config as JSON.
DIFFUSERS_METADATA = "lora_adapter_metadata"
DIFFUSERS_PREFIX = "transformer."


class LoraFiles(NamedTuple):
    """Where an adapter is stored, and what tells its strength besides its tensors."""

    weights: Path
    config: Mapping[str, Any] | None = None  # of PEFT: a file beside the weights, or their header
    config_path: Path | None = None  # where it was read
    alpha: Any = None  # in the header of other programs


def is_adapter(path: Path) -> bool:
    """Return whether `find` knows a path, or would if no file were missing."""
    return any(
        (directory / name).is_file()
        for directory in (path, path / "lora")
        for name in (DIFFUSERS_WEIGHTS, PEFT_CONFIG, *PEFT_WEIGHTS)
    )


def find(path: Path | str) -> LoraFiles:
    """Return the files of an adapter, given what `open_lora` takes.

    Raises FileNotFoundError, which says what is expected, and ValueError for a config that is no
    JSON object.
    """
    path = local_directory(path)
    for weights in (path, path / DIFFUSERS_WEIGHTS, path / "lora" / DIFFUSERS_WEIGHTS):
        if weights.is_file():
            return _with_strength(weights)
    in_run = (path / "lora").is_dir() and not (path / PEFT_CONFIG).is_file()
    directory = path / "lora" if in_run else path
    config_path = directory / PEFT_CONFIG
    present = [weights for name in PEFT_WEIGHTS if (weights := directory / name).is_file()]
    if present and config_path.is_file():
        return _with_strength(present[0])
    if present:
        raise _missing(f"no {config_path}")
    raise _missing(
        f"no {directory / PEFT_WEIGHTS[0]}" if config_path.is_file() else what_is_at(path)
    )


def _missing(found: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{found}; expected a PEFT directory with {PEFT_CONFIG} and {PEFT_WEIGHTS[0]} (or "
        f".bin), one of diffusers with {DIFFUSERS_WEIGHTS}, the working directory of a run, or a "
        "file"
    )


def _with_strength(weights: Path) -> LoraFiles:
    """Return what tells the strength of a file: its header, or the PEFT config beside it."""
    header = safetensors_metadata(weights) if suffix_of(weights) == ".safetensors" else {}
    if DIFFUSERS_METADATA in header:
        config = _diffusers_config(weights, header[DIFFUSERS_METADATA])
        return LoraFiles(weights, config, weights)
    beside = weights.with_name(PEFT_CONFIG)
    if beside.is_file():
        return LoraFiles(weights, read_json(beside), beside)
    alphas = [header[name] for name in _HEADER_ALPHAS if name in header]
    return LoraFiles(weights, alpha=alphas[0] if alphas else None)


def _diffusers_config(path: Path, content: str) -> dict:
    """Return the PEFT config in the header of a file that diffusers wrote."""
    try:
        fields = parse_json(content).items()
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: {DIFFUSERS_METADATA} in its header is no JSON object: {error}"
        ) from None
    config = {name.removeprefix(DIFFUSERS_PREFIX): value for name, value in fields}
    return {"peft_type": "LORA"} | config


# Where the header of a safetensors file may tell alpha: kohya's and musubi's name, and plain ones.
_HEADER_ALPHAS = ("ss_network_alpha", "network_alpha", "lora_alpha", "alpha")
# Fields of a PEFT config that ask for more than pairs that are added to the base.
_BEYOND_LORA = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "modules_to_save",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
)
# Fields of a PEFT config that are true or false.
_SWITCHES = ("use_rslora", "use_dora", "use_qalora", "fan_in_fan_out")
_ALPHA = "a number between -1e9 and 1e9"
# Initialisations that leave the weights of the base as they are. Others (PiSSA, OLoRA, CorDA,
# LoftQ, LoRA-GA) take their part out of it, so that B A is no change of the published base.
_PLAIN_STARTS = (True, False, None, "default", "gaussian", "eva", "orthogonal", "mica")


def _check_config(config: Mapping[str, Any], path: Path) -> None:
    """Refuse a PEFT config of another method, or without rank and alpha."""
    for field in _SWITCHES:
        if not isinstance(config.get(field), bool | None):
            raise ValueError(
                f"{path}: {field} is {config[field]!r:.40}; expected true or false, without quotes"
            )
    odd = {key: config[key] for key in _BEYOND_LORA if config.get(key)}
    if config.get("bias", "none") != "none":
        odd["bias"] = config["bias"]
    if config.get("peft_type") != "LORA" or odd:
        raise ValueError(
            f"{path}: not a plain LoRA adapter: peft_type {config.get('peft_type')!s:.40}, "
            f"{odd!s:.200}; merge it into its base with PEFT (merge_and_unload), and give the "
            "result as config.transformer"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(field) or {}
        # A group that is repeated may take for ever to match.
        if not isinstance(patterns, dict) or any(re.search(r"\)[*+{]", key) for key in patterns):
            raise ValueError(f"{path}: {field} {patterns!r:.80}; expected names of modules")
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise ValueError(
            f"{path}: init_lora_weights is {start!r:.40}, which changes the weights of the base, "
            "too; convert the adapter in PEFT first: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), or merge_and_unload and give the "
            "result as config.transformer"
        )
    # The types are compared, as True would pass for a whole number.
    for field, fits, expected in (
        ("r", type(config.get("r")) is int and config["r"] >= 1, "the rank, a whole number"),
        ("lora_alpha", _number(config.get("lora_alpha")) is not None, _ALPHA),
    ):
        if not fits:
            state = f"{field} is {config[field]!r:.40}" if field in config else f"no {field}"
            raise ValueError(f"{path}: {state}; expected {expected}")


def _number(value: Any) -> float | None:
    """Return a value as a float, or None for what is no number, not finite, or absurdly large."""
    is_number = type(value) in (int, float) and abs(value) < 1e9
    return float(value) if is_number else None


class Pair(NamedTuple):
    """A change of low rank: scale up down, in the shape of its weight."""

    down: Lazy  # lora_A, [R, in, ...]
    up: Lazy  # lora_B, [out, R, ...]
    scale: float  # alpha / R

    @property
    def rank(self) -> int:
        """Return R."""
        return self.down.shape[0]


class Lora(NamedTuple):
    """What a file changes in a transformer, by the original names of the tensors."""

    path: Path
    form: str  # of its names, for people
    pairs: dict[str, Pair]
    differences: dict[str, Lazy]  # float32, of the shape of what they are added to
    names: dict[str, dict[str, str]]  # tensor -> role -> name in the file
    told: bool = True  # whether the file tells the strength of its pairs

    def shapes(self) -> dict[str, engine.Shape]:
        """Return the shape of every change, which must be that of the tensor."""
        shapes = {name: tensor.shape for name, tensor in self.differences.items()}
        for name, pair in self.pairs.items():
            shapes[name] = (pair.up.shape[0], *pair.down.shape[1:])
        return shapes


# End of a name in a file -> its role, and the end of what it changes. LyCORIS writes w_norm.
_ROLES = {
    "lora_A.weight": ("down", ""),
    "lora_B.weight": ("up", ""),
    "lora_B.bias": ("difference", "_bias"),  # times the scale of its pair, as nothing else is
    "lora_down.weight": ("down", ""),
    "lora_up.weight": ("up", ""),
    "lora_up.bias": ("difference", "_bias"),
    "alpha": ("alpha", ""),
    "diff": ("difference", ""),
    "diff_b": ("difference", "_bias"),
    "diff_m": ("difference", "_modulation"),
    "w_norm": ("difference", ""),
    "b_norm": ("difference", "_bias"),
}
# The name of an adapter may stand between its half and `weight`.
_NAME = re.compile(
    r"(?P<module>.+?)\.(?:(?P<half>lora_(?:A|B|down|up))(?:\.\w+)?(?P<kind>\.(?:weight|bias))"
    r"|(?P<whole>alpha|diff|diff_b|diff_m|w_norm|b_norm))"
)
_PREFIX = re.compile(r"(transformer\.|pipe\.|dit\.|lora_unet_+|lora_transformer_|lycoris_)+")
_LAYER = re.compile(r"blocks_(\d{1,4})(?=_|$)")
_PARTNERS = {"lora_A": "lora_B", "lora_down": "lora_up"}
_MERGE_ELSEWHERE = (
    "merge it into its base with the program that made it, and give the result as "
    "config.transformer"
)
# In names that no transformer of ours has -> what such a file is, and what would do.
_RELATIVES = {
    r"dora_scale|lora_magnitude_vector": f"it is a DoRA ({{}}); {_MERGE_ELSEWHERE}",
    r"lokr_\w+": f"it is a LoKr ({{}}); {_MERGE_ELSEWHERE}",
    r"hada_\w+": f"it is a LoHa ({{}}); {_MERGE_ELSEWHERE}",
    r"oft_\w+": f"it is an OFT ({{}}); {_MERGE_ELSEWHERE}",
    r"lora_mid": f"it is a LoRA with a Tucker core ({{}}); {_MERGE_ELSEWHERE}",
    r"[kv]_img|img_emb|add_[kv]_proj|image_embedder": (
        "it is for image-to-video ({}), whose attention sees a picture; give one that was made for "
        "text-to-video"
    ),
    r"vace\w*": "it is for VACE ({}); give one that was made for text-to-video",
    r"transformer_2": (
        "it is for the second transformer of Wan 2.2 ({}); give one for a single transformer"
    ),
    r"text_encoder\w*|lora_te\w*": (
        "it changes the text encoder, too ({}); give the part for the transformer alone"
    ),
}
_ORIGINAL = wan.table(WAN_1_3B)
# Names in either form without `.weight`, with underscores in place of dots -> original names.
_TENSORS = {
    spelled.source.removesuffix(".weight").replace(".", "_"): rule.source
    for form in (_ORIGINAL, engine.renamed(_ORIGINAL, wan.diffusers(WAN_1_3B)))
    for spelled, rule in zip(form, _ORIGINAL, strict=True)
}


def is_lora(names: Iterable[str]) -> bool:
    """Return whether names are those of an adapter, of any kind and for any model."""
    return any(
        _NAME.fullmatch(name) or re.search(r"\.(lora|lokr|hada|oft)_", name) for name in names
    )


def read(path: Path | str) -> Lora:
    """Open an adapter: what `find` takes, in any dialect; no tensor but alphas is read.

    Raises:
      ValueError: naming a file that cannot be read, or that needs more than additions to a base.
      ConversionError: naming the file, and what it is or which tensors make no sense.
      FileNotFoundError: there is no such file.
    """
    files = find(path)
    weights = open_weights(files.weights, containers=("generator_lora", *CONTAINERS))
    if files.config is not None:
        _check_config(files.config, files.config_path or files.weights)
    with nets.naming_files(files.weights):
        lora = parse(nets.finite(weights.tensors, files.weights), files)
        alphas = any("alpha" in roles for roles in lora.names.values())
        told = alphas or files.config or files.alpha or weights.entry == "generator_lora"
    if lora.pairs and not told and files.weights.name in PEFT_WEIGHTS:
        raise _missing(f"no {files.weights.with_name(PEFT_CONFIG)}")
    return lora._replace(told=bool(told or not lora.pairs))


def parse(stored: Mapping[str, Lazy], files: LoraFiles) -> Lora:
    """Return what the tensors of a file change.

    Raises ConversionError, which says what it is, for what is no LoRA of a transformer of ours.
    """
    found, unknown = _recognise(stored)
    if unknown:
        _refuse_relatives(unknown, found, stored)
    faults = _list_faults("unused tensor", unknown, stored)
    for roles in found.values():
        faults += _half_faults(roles, stored)
    orphans = [
        roles["alpha"] for roles in found.values() if "alpha" in roles and "down" not in roles
    ]
    if orphans:
        faults.append(f"alpha of modules that are not adapted: {some(orphans)}")
    refuse(faults)
    scales = _scales(stored, found, files)
    pairs = {
        name: Pair(stored[roles["down"]], stored[roles["up"]], scales[name])
        for name, roles in found.items()
        if "down" in roles
    }
    differences = {}
    for name, roles in found.items():
        if stored_name := roles.get("difference"):
            weight = name.removesuffix("bias") + "weight"
            scaled = stored_name.endswith(".bias")
            if scaled and weight not in scales:
                raise ConversionError(f"{stored_name} is of no module that is adapted")
            differences[name] = _times(stored[stored_name], scales[weight] if scaled else 1.0)
    return Lora(files.weights, _form_of(found), pairs, differences, found)


def _recognise(stored: Mapping[str, Lazy]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return {tensor of a transformer: {role: name in the file}}, and the names of nothing known.

    Raises ConversionError for two names of the same thing, and for a file without any adapter.
    """
    found: dict[str, dict[str, str]] = collections.defaultdict(dict)
    unknown = []
    for name in stored:
        match = _NAME.fullmatch(name)
        end = (match["whole"] or match["half"] + match["kind"]) if match else ""
        role, ending = _ROLES.get(end, ("", ""))
        tensor = _tensor_of(match["module"], ending) if match and role else None
        if tensor is None:
            unknown.append(name)
        elif role in found[tensor]:
            raise ConversionError(f"it holds two adapters: {found[tensor][role]} and {name}")
        else:
            found[tensor][role] = name
    if not is_lora(stored):
        raise ConversionError(
            f"it is no LoRA: expected lora_A and lora_B, it holds {some(list(stored))}; whole "
            "weights are given as the base or its transformer"
        )
    return dict(found), unknown


def _tensor_of(module: str, ending: str) -> str | None:
    """Return the original name of what a module's adapter changes, or None if there is none."""
    flat = _PREFIX.sub("", module, count=1).replace(".", "_")
    layer = _LAYER.match(flat)
    source = _TENSORS.get((_LAYER.sub("blocks_{i}", flat, count=1) if layer else flat) + ending)
    return source and source.format(i=int(layer[1]) if layer else 0)


def _refuse_relatives(unknown: list[str], found: Mapping, stored: Mapping[str, Lazy]) -> None:
    """Say in one sentence what a file is that has names of another model or method."""
    for pattern, sentence in _RELATIVES.items():
        hits = [
            match[0] for name in unknown if (match := re.search(rf"(?<![a-z])(?:{pattern})", name))
        ]
        if hits:
            raise ConversionError(sentence.format(some(list(dict.fromkeys(hits)), 2)))
    if len(unknown) > len(stored) / 2:
        raise ConversionError(
            f"it is not for Wan's transformer: it holds {some(unknown, 2)}; expected modules such "
            "as blocks.0.self_attn.q"
        )


def _half_faults(roles: Mapping[str, str], stored: Mapping[str, Lazy]) -> list[str]:
    """Return a line for a half of a pair that is missing or does not fit the other."""
    halves = [roles[role] for role in ("down", "up") if role in roles]
    if len(halves) == 1:
        there = halves[0]
        spelling = dict(_PARTNERS) | {up: down for down, up in _PARTNERS.items()}
        half = next(half for half in spelling if f".{half}." in there)
        return [f"missing tensor: {there.replace(f'.{half}.', f'.{spelling[half]}.')}"]
    if halves:
        down, up = (stored[name].shape for name in halves)
        if (
            min(len(down), len(up)) < 2
            or down[0] != up[1]
            or 0 in down
            or any(size != 1 for size in up[2:])
        ):
            return [
                f"changed shape: {halves[0]} is {list(down)}, {halves[1]} is {list(up)}; expected "
                "[rank, in] and [out, rank]"
            ]
    return []


def _scales(
    stored: Mapping[str, Lazy], found: Mapping[str, Mapping[str, str]], files: LoraFiles
) -> dict[str, float]:
    """Return alpha/R of each pair, by tensor.

    It is told by a PEFT config, an alpha among the tensors or one in the header; a pair without any
    has scale 1. Raises ConversionError where config and tensors tell different ones.
    """
    scales = {}
    for name, roles in found.items():
        if "down" not in roles:
            continue
        rank = stored[roles["down"]].shape[0]
        alpha = _stored_alpha(stored, roles["alpha"]) if "alpha" in roles else None
        if files.config is not None:
            scale = _config_scale(files, roles["down"].partition(".lora_")[0], rank)
            if alpha is not None and not math.isclose(alpha / rank, scale, rel_tol=1e-3):
                raise ConversionError(
                    f"{roles['alpha']} is {alpha:g}, which is scale {alpha / rank:g}, but "
                    f"{files.config_path} gives scale {scale:g}; remove the one that is wrong"
                )
        else:
            if alpha is None and files.alpha is not None:
                alpha = _header_alpha(files.alpha)
            scale = 1.0 if alpha is None else alpha / rank
        scales[name] = scale
    return scales


def _stored_alpha(stored: Mapping[str, Lazy], name: str) -> float:
    """Return the alpha of a module; other programs store it as a number or a vector of one."""
    content = np.asarray(stored[name]).reshape(-1)
    if content.size != 1:
        raise ConversionError(
            f"{name} has shape {list(stored[name].shape)}; expected one finite number"
        )
    alpha = _number(float(content[0]))
    if alpha is None:
        raise ConversionError(f"{name} is {content[0]:g}; expected {_ALPHA}")
    return alpha


def _header_alpha(content: str) -> float:
    try:
        alpha = _number(float(content))
    except ValueError:
        alpha = None
    if alpha is None:
        raise ConversionError(f"alpha is {content!r:.40} in its header; expected {_ALPHA}")
    return alpha


def _config_scale(files: LoraFiles, module: str, rank: int) -> float:
    """Return the scale that a PEFT config gives a module.

    Raises ConversionError if it gives the module another rank than its tensors have.
    """
    config = files.config or {}
    name = _PREFIX.sub("", module, count=1)
    where = (files.config_path or files.weights).name
    expected = _by_pattern(config.get("rank_pattern"), name, config["r"])
    if expected != rank:
        raise ConversionError(
            f"{module} has rank {rank}; expected rank {expected!r:.40}, as {where} says"
        )
    alpha = _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    number = _number(alpha)
    if number is None:
        raise ConversionError(
            f"{files.config_path} has alpha_pattern {alpha!r:.40}; expected {_ALPHA}"
        )
    return number / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Return the value of the first pattern that ends a module's name, as PEFT matches.

    A pattern may be bound (^) to the beginning of the name in the program that trained it.
    """
    names = [f"{prefix}{module}" for prefix in ("", "model.", "transformer.", "dit.", "pipe.dit.")]
    for pattern, value in (patterns or {}).items():
        try:
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                return value
        except re.error as error:
            raise ConversionError(f"pattern {pattern!r:.80} makes no sense: {error}") from None
    return default


def _form_of(found: Mapping[str, Mapping[str, str]]) -> str:
    """Return a description of the names in a file, from one of them."""
    names = [name for roles in found.values() for name in roles.values()]
    theirs = re.compile("attn[12]|ffn.net|condition_embedder|proj_out")
    form = "diffusers" if any(map(theirs.search, names)) else "original"
    underscores = any(re.search(r"blocks_\d", name) for name in names)
    ends = [match["half"] for name in names if (match := _NAME.fullmatch(name))]
    half = next(filter(None, ends), "differences")
    return f"{form} names{' with underscores' if underscores else ''}, {half}"


def _times(tensor: Lazy, scale: float) -> Lazy:
    return tensor.map(lambda x: x.astype(np.float32) * np.float32(scale), dtype=np.float32)


def _list_faults(what: str, names: Sequence[str], stored: Mapping[str, Lazy]) -> list[str]:
    return [f"{what}: {name} {list(stored[name].shape)}" for name in names]


def some(names: Sequence[str], most: int = 4) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"{name:.120}" for name in names[:most]) + more


def refuse(faults: Sequence[str], most: int = 8) -> None:
    if faults:
        more = [f"and {len(faults) - most} more"] if len(faults) > most else []
        count = counted(len(faults), "tensor that does not fit", "tensors that do not fit")
        head = f"{count}; check that the LoRA is for this model:"
        raise ConversionError("\n  ".join([head, *faults[:most], *more]))


def fit(lora: Lora, net: WanConfig | None = None) -> None:
    """Check that a transformer has what a file changes, by default one of the file's own sizes.

    Raises ConversionError, which says in one sentence that it is for another width or depth, or
    lists the tensors that do not fit.
    """
    given = lora.shapes()
    width = width_of(lora)
    if net is None:
        expected = _usual_shapes(given)
    else:
        if width not in (None, net.dim):
            raise ConversionError(
                f"it is made for a transformer of {_width_text(width)}; this one has "
                f"{_width_text(net.dim)}: choose the LoRA or the base to match"
            )
        depth = 1 + max(map(layer_of, given), default=0)
        if depth > net.num_layers:
            raise ConversionError(
                f"it changes block {depth - 1}, the transformer has blocks 0 to "
                f"{net.num_layers - 1}: choose the LoRA or the base to match"
            )
        expected = nets.source_shapes(parts.PARTS["transformer"], net)
    faults = []
    for name, shape in given.items():
        if shape != expected[name]:
            files = ", ".join(
                stored for role, stored in lora.names[name].items() if role != "alpha"
            )
            faults.append(
                f"changed shape: {files} is for {list(shape)}, the model expects "
                f"{list(expected[name])}"
            )
    refuse(faults)
    if not lora.told:
        logging.warning("%s tells no alpha; scale 1 is taken, as other programs do", lora.path)


def width_of(lora: Lora) -> int | None:
    """Return the width that most pairs of blocks tell, or None if there are none."""
    widths = [
        pair.down.shape[1] for name, pair in lora.pairs.items() if re.search("attn|ffn.0", name)
    ]
    return statistics.mode(widths) if widths else None


def _usual_shapes(given: Mapping[str, engine.Shape]) -> dict[str, engine.Shape]:
    """Return for each tensor the shape that most blocks have."""
    votes = collections.defaultdict(list)
    for name, shape in given.items():
        votes[within_block(name)].append(shape)
    return {name: statistics.mode(votes[within_block(name)]) for name in given}


def within_block(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "", name)


def layer_of(name: str) -> int:
    """Return the number of the block that a tensor is in, or -1 outside of all blocks."""
    match = re.match(r"blocks\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _width_text(width: int) -> str:
    names = {dim: name for (dim, _), name in parts.SIZE_NAMES.items()}
    return f"width {width} ({names[width]})" if width in names else f"width {width}"
