"""The three nets of a base: their classes, tables, and sizes, whoever wrote the file.

A format is what names the tensors have: `original` (the Wan repositories) or `diffusers` (a
diffusers package, whose text encoder is Hugging Face's). It is told from the names themselves, by
the largest overlap, so that a name that is missing or misspelt is reported in the format of the
file.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

import numpy as np
from flax import nnx

from astrolabe_jax.convert import engine, umt5, vae, wan
from astrolabe_jax.models import layers
from astrolabe_jax.models.umt5 import UMT5, XXL, UMT5Config
from astrolabe_jax.models.wan.config import WAN_1_3B, WAN_14B, WanConfig
from astrolabe_jax.models.wan.transformer import WanTransformer
from astrolabe_jax.models.wan.vae import Vae, VaeConfig


class Net(NamedTuple):
    """A frozen net: graph definition (static), parameters (nested dict of arrays), and its sizes
    and numerics.
    """

    graphdef: nnx.GraphDef
    params: dict
    config: Any


class Part(NamedTuple):
    """What a part is made of, and how its files are read."""

    module: Any
    config: Any
    published: Any  # a config at the published sizes
    table: Callable[[Any], list[engine.Rule]]
    formats: dict[str, Callable[[Any], engine.Substitutions]]
    measure: Callable[[engine.Shapes], dict[str, Any]]
    fields: dict[str, str]  # of the config.json of others -> of ours
    # fields of theirs that have only these values in models that we can build
    required: dict[str, tuple]
    aliases: Mapping[str, str] = {}


def _original(_: Any) -> engine.Substitutions:
    return ()


_SAME = (
    "dim",
    "ffn_dim",
    "num_layers",
    "num_heads",
    "freq_dim",
    "text_dim",
    "text_len",
    "patch_size",
    "eps",
)
PARTS = {
    "transformer": Part(
        WanTransformer,
        WanConfig,
        WAN_1_3B,
        wan.table,
        {"original": _original, "diffusers": wan.diffusers},
        wan.measure,
        {name: name for name in (*_SAME, "in_channels")}
        | {"in_dim": "in_channels", "num_attention_heads": "num_heads"},
        {
            "model_type": ("t2v",),
            "qk_norm": (True, "rms_norm_across_heads"),
            "cross_attn_norm": (True,),
            "added_kv_proj_dim": (None,),
            "image_dim": (None,),
        },
    ),
    "vae": Part(
        Vae,
        VaeConfig,
        VaeConfig(),
        vae.table,
        {"original": _original, "diffusers": vae.diffusers},
        vae.measure,
        {name: name for name in ("z_dim", "dim_mult", "num_res_blocks")}
        | {"base_dim": "dim", "temperal_downsample": "temporal_downsample"}
        | {"latents_mean": "latent_mean", "latents_std": "latent_std"},
        {"is_residual": (False,), "patch_size": (None,), "attn_scales": ([],)},
    ),
    "text_encoder": Part(
        UMT5,
        UMT5Config,
        XXL,
        umt5.table,
        {"original": _original, "diffusers": umt5.diffusers},
        umt5.measure,
        {name: name for name in ("vocab_size", "num_heads", "num_layers")}
        | {"d_model": "dim", "d_ff": "dim_ffn", "layer_norm_epsilon": "eps"}
        | {
            "relative_attention_num_buckets": "num_buckets",
            "relative_attention_max_distance": "max_distance",
        },
        {"model_type": ("umt5",), "feed_forward_proj": ("gated-gelu",)},
        umt5.ALIASES,
    ),
}
# Sizes of published models, as config.model.size names them.
SIZES = {
    name: {"transformer": net, "vae": VaeConfig(), "text_encoder": XXL}
    for name, net in {"wan_1.3b": WAN_1_3B, "wan_14b": WAN_14B}.items()
}
# A run chooses these; the others are the sizes that config.json must give.
NUMERICS = ("dtype", "param_dtype", "remat", "attention")
# By the annotation of a size: what to expect of its value in JSON, and whether it is so (1 is a
# float there, too).
_KINDS = {
    int: ("a whole number, at least 1", lambda value: type(value) is int and value >= 1),
    float: (
        "a finite number",
        lambda value: type(value) in (int, float) and -math.inf < value < math.inf,
    ),
    bool: ("true or false", lambda value: type(value) is bool),
}


def sizes_of(config: Any) -> dict[str, Any]:
    """The fields of a part's config that config.json gives."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in NUMERICS}


def field_faults(part: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Every value must be of its field's annotated type; what else a config asks of it, the config
    checks itself.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(PARTS[part].config)}
    known = [name for name in kinds if name not in NUMERICS]
    for name, value in values.items():
        if name not in known:
            yield f"{part}.{name} is unknown; expected {', '.join(known)}"
            continue
        # tuple[int, ...] has arguments, int has none
        kind, *more = get_args(kinds[name]) or (kinds[name],)
        expected, fits = _KINDS[kind]
        if more and not (isinstance(value, list | tuple) and all(map(fits, value))):
            yield f"{part}.{name} is {value!r}; expected a list, each entry {expected}"
        elif not more and not fits(value):
            yield f"{part}.{name} is {value!r}; expected {expected}"


def make_config(part: str, values: Mapping[str, Any], **numerics) -> Any:
    """A part's config from the content of a config.json; ValueError for a field that is missing or
    makes no sense.
    """
    if faults := list(field_faults(part, values)):
        raise ValueError("\n  ".join(["fields that do not make sense:", *faults]))
    config = PARTS[part].config
    chosen = {
        field.name: numerics[field.name]
        for field in dataclasses.fields(config)
        if field.name in numerics
    }
    values = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    try:
        return config(**values, **chosen)
    except (TypeError, ValueError) as error:  # TypeError: a field is missing
        raise ValueError(f"{part}: {error}") from None


def described(part: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Our sizes from a config.json of others: that of a Wan repository, or of a folder of a
    diffusers package.

    Raises ValueError for a variant of the model that is not ours, such as image to video.
    """
    fields, required = PARTS[part].fields, PARTS[part].required
    if odd := {
        key: content[key]
        for key, values in required.items()
        if key in content and content[key] not in values
    }:
        expected = {key: required[key][-1] for key in odd}
        raise ValueError(f"this {part} is of another kind: {odd}; expected {expected}")
    found = {ours: content[theirs] for theirs, ours in fields.items() if theirs in content}
    heads = found.get("num_heads")
    widths = {"attention_head_dim": "dim", "d_kv": "dim_attn"}  # of one head -> of all
    return found | {
        ours: content[name] * heads for name, ours in widths.items() if name in content and heads
    }


@functools.cache
def shapes(part: str, config: Any) -> Net:
    """A part's net of these sizes, with shapes and dtypes in place of its parameters: none is
    allocated.
    """
    return Net(*layers.graphdef_of(lambda: PARTS[part].module(config, rngs=nnx.Rngs(0))), config)


@functools.cache
def rules(part: str, config: Any, form: str = "original") -> list[engine.Rule]:
    """The conversion table of a part for one of its formats."""
    return engine.renamed(PARTS[part].table(config), PARTS[part].formats[form](config))


def recognise(tensors: Mapping[str, Any]) -> tuple[str, str]:
    """(part, format) whose names these are; ValueError if they are those of none."""
    overlaps = {
        (part, form): engine.overlap(rules(part, entry.published, form), tensors)
        for part, entry in PARTS.items()
        for form in entry.formats
    }
    best = max(overlaps, key=overlaps.get)
    if overlaps[best] < len(tensors) / 2:
        raise ValueError(
            f"the names are those of no model known here ({', '.join(PARTS)}); it holds "
            f"{', '.join(list(tensors)[:4])}"
        )
    return best


def format_of(part: str, tensors: Mapping[str, Any]) -> str:
    """The format of a part whose names these are, most of them."""
    entry = PARTS[part]
    overlaps = {
        form: engine.overlap(rules(part, entry.published, form), tensors) for form in entry.formats
    }
    return max(overlaps, key=overlaps.get)


def without_aliases(part: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Every tensor under one name; ValueError for one that is there under two with different
    values.
    """
    found = dict(tensors)
    for alias, name in PARTS[part].aliases.items():
        if alias in found:
            tensor = found.pop(alias)
            if name in found and _digest(tensor) != _digest(found[name]):
                raise ValueError(
                    f"{alias} and {name} must be the same tensor, but their values differ"
                )
            found.setdefault(name, tensor)
    return found


def _digest(tensor: Any) -> tuple:
    content = np.ascontiguousarray(np.asarray(tensor))
    return (
        content.shape,
        content.dtype,
        hashlib.sha256(content.reshape(-1).view(np.uint8).data).digest(),
    )


def measure(part: str, form: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Those sizes of a part that the shapes of its tensors tell."""
    entry = PARTS[part]
    return entry.measure(engine.Shapes(tensors, entry.formats[form](entry.published)))


def check_size(config: Any, measured: Mapping[str, Any]) -> None:
    """One sentence in place of hundreds of mismatches, for a DiT of another width or number of
    blocks.
    """
    expected, found = (
        (config.dim, config.num_layers),
        (measured.get("dim"), measured.get("num_layers")),
    )
    if None not in found and expected != found:
        known = {
            (net["transformer"].dim, net["transformer"].num_layers): name
            for name, net in SIZES.items()
        }
        raise engine.ConversionError(
            "the transformer has width {} and {} blocks{}; expected width {} and {} blocks{}: "
            "choose config.model.size "
            "or the file to match".format(
                *found, _named(known.get(found)), *expected, _named(known.get(expected))
            )
        )


def _named(size: str | None) -> str:
    return f" ({size})" if size else ""


def load_net(
    part: str,
    tensors: Mapping[str, Any],
    config: Any,
    place: Callable[[str, tuple, np.ndarray], Any] = lambda part, path, leaf: leaf,
) -> Net:
    """A part's net from tensors in any of its formats, in config.param_dtype; `place` takes each
    leaf as it is read.

    Raises engine.ConversionError, listing every missing, unused and misshapen tensor.
    """
    net, tensors, form = (
        shapes(part, config),
        without_aliases(part, tensors),
        format_of(part, tensors),
    )
    if part == "transformer":
        check_size(config, measure(part, form, tensors))
    return net._replace(
        params=engine.load(
            rules(part, config, form),
            tensors,
            net.params,
            lambda path, leaf: place(part, path, leaf),
        )
    )


def save_net(part: str, params: dict, config: Any, form: str = "original") -> dict[str, np.ndarray]:
    """The exact inverse of `load_net`, in the dtype of the params."""
    return engine.save(rules(part, config, form), params)
