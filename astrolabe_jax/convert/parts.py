"""The three nets of a base, and what other programs call their sizes."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from astrolabe_jax.convert import engine, nets, umt5, vae, wan
from astrolabe_jax.convert.nets import Net, NetSpec
from astrolabe_jax.models.umt5 import UMT5, XXL
from astrolabe_jax.models.wan.config import WAN_1_3B, WAN_14B
from astrolabe_jax.models.wan.transformer import WanTransformer
from astrolabe_jax.models.wan.vae import Vae, VaeConfig

_DIFFUSERS = "diffusers"  # the format of a diffusers package

PARTS = {
    "transformer": NetSpec(
        "transformer",
        WanTransformer,
        WAN_1_3B,
        wan.table,
        wan.measure,
        {nets.ORIGINAL: lambda _: (), _DIFFUSERS: wan.diffusers},
        wan.prepare,
    ),
    "vae": NetSpec(
        "vae",
        Vae,
        VaeConfig(),
        vae.table,
        vae.measure,
        {nets.ORIGINAL: lambda _: (), _DIFFUSERS: vae.diffusers},
    ),
    "text_encoder": NetSpec(
        "text_encoder",
        UMT5,
        XXL,
        umt5.table,
        umt5.measure,
        # Of a diffusers package, too, the text encoder has the names of transformers.
        {nets.ORIGINAL: lambda _: (), _DIFFUSERS: umt5.diffusers},
        functools.partial(nets.without_aliases, aliases=umt5.ALIASES),
    ),
}
# Sizes of published models, as config.model.size names them.
SIZES = {
    name: {"transformer": net, "vae": VaeConfig(), "text_encoder": XXL}
    for name, net in {"wan_1.3b": WAN_1_3B, "wan_14b": WAN_14B}.items()
}
# Width and blocks of a published transformer -> the name of its size.
SIZE_NAMES = {
    (size["transformer"].dim, size["transformer"].num_layers): name for name, size in SIZES.items()
}
# (part, path of a leaf, leaf) -> the leaf on its devices.
PlaceLeaf = Callable[[str, tuple, np.ndarray], Any]


class ForeignConfig(NamedTuple):
    """How the config.json of a Wan repository or of a diffusers package describes a part."""

    fields: dict[str, str]  # their name of a size -> ours
    required: dict[str, tuple]  # fields that have one of these values in models that we can build


_SAME_NAMES = (
    "dim",
    "ffn_dim",
    "num_layers",
    "num_heads",
    "freq_dim",
    "text_dim",
    "text_len",
    "patch_size",
    "eps",
    "in_channels",
)
FOREIGN_CONFIGS = {
    "transformer": ForeignConfig(
        {name: name for name in _SAME_NAMES}
        | {"in_dim": "in_channels", "num_attention_heads": "num_heads"},
        {
            "model_type": ("t2v",),
            "qk_norm": (True, "rms_norm_across_heads"),
            "cross_attn_norm": (True,),
            "added_kv_proj_dim": (None,),
            "image_dim": (None,),
            "vace_layers": (None,),
        },
    ),
    "vae": ForeignConfig(
        {
            "base_dim": "dim",
            "z_dim": "z_dim",
            "dim_mult": "dim_mult",
            "num_res_blocks": "num_res_blocks",
            "temperal_downsample": "temporal_downsample",
            "latents_mean": "latent_mean",
            "latents_std": "latent_std",
        },
        {"is_residual": (False,), "patch_size": (None,), "attn_scales": ([],)},
    ),
    "text_encoder": ForeignConfig(
        {
            "vocab_size": "vocab_size",
            "num_heads": "num_heads",
            "num_layers": "num_layers",
            "d_model": "dim",
            "d_ff": "dim_ffn",
            "layer_norm_epsilon": "eps",
            "relative_attention_num_buckets": "num_buckets",
            "relative_attention_max_distance": "max_distance",
        },
        {"model_type": ("umt5",), "feed_forward_proj": ("gated-gelu",)},
    ),
}
_HEAD_WIDTHS = {"attention_head_dim": "dim", "d_kv": "dim_attn"}  # of one head -> of all heads


def shapes(part: str, config: Any) -> Net:
    """Return `nets.shapes` of a part."""
    return nets.shapes(PARTS[part], config)


def described(part: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return our sizes from a config.json of a Wan repository or of a diffusers package.

    Raises:
      ValueError: for a variant of the model that is not ours, such as image to video.
    """
    fields, required = FOREIGN_CONFIGS[part]
    odd = {
        key: content[key]
        for key, values in required.items()
        if key in content and content[key] not in values
    }
    if odd:
        expected = {key: required[key][-1] for key in odd}
        raise ValueError(f"this {part} is of another kind: {odd}; expected {expected}")
    sizes = {ours: content[theirs] for theirs, ours in fields.items() if theirs in content}
    if heads := sizes.get("num_heads"):
        sizes |= {
            ours: content[theirs] * heads
            for theirs, ours in _HEAD_WIDTHS.items()
            if theirs in content
        }
    return sizes


class UnknownError(ValueError):
    """Names of tensors are those of no part."""


def recognise(tensors: Mapping[str, Any]) -> tuple[str, str]:
    """Return (part, format) whose names these are.

    Raises:
      ConversionError: if they are those of a LoRA.
      UnknownError: if less than half of the names are those of one part.
    """
    refuse_lora(tensors)
    counts = {
        (part, form): nets.overlap(spec, form, tensors)
        for part, spec in PARTS.items()
        for form in spec.formats
    }
    best = max(counts, key=lambda key: counts[key])
    if counts[best] < len(tensors) / 2:
        raise UnknownError(
            f"the names are those of no model known here ({', '.join(PARTS)}; reward models are "
            f"for convert reward); it holds {', '.join(list(tensors)[:4])}"
        )
    return best


NO_NET = (
    "it is a LoRA, not a whole net; give the base here and the LoRA where one is asked for, or "
    "merge the two first (convert merge BASE LORA --to FILE)"
)


def refuse_lora(tensors: Mapping[str, Any]) -> None:
    """Raise ConversionError for the tensors of a LoRA, where those of a whole net belong."""
    if any(".lora_" in name for name in tensors):
        raise engine.ConversionError(NO_NET)


def refuse_other(part: str, found: str) -> None:
    """Raise ConversionError for one part in place of another; a part that is not known may be
    any.
    """
    if part and found in PARTS and found != part:
        raise engine.ConversionError(
            f"it is a {found.replace('_', ' ')}; expected a {part.replace('_', ' ')}: give a file "
            "of that"
        )


def check_size(config: Any, measured: Mapping[str, Any]) -> None:
    """Refuse a transformer of another width or number of blocks.

    Raises:
      ConversionError: one sentence in place of hundreds of mismatches.
    """
    found = (measured.get("dim"), measured.get("num_layers"))
    expected = (config.dim, config.num_layers)
    if None not in found and found != expected:
        raise engine.ConversionError(
            f"the transformer has {_size_text(found)}; expected {_size_text(expected)}: choose "
            "config.model.size or the file to match"
        )


def _size_text(size: tuple) -> str:
    text = "width {} and {} blocks".format(*size)
    return f"{text} ({SIZE_NAMES[size]})" if size in SIZE_NAMES else text


def check_net(part: str, tensors: Mapping[str, Any], config: Any) -> None:
    """Raise ConversionError, as `load_net` does, for tensors that are not those of a part.

    Names and shapes tell; nothing is read.
    """
    tensors, form = _prepared(part, tensors, config)
    nets.checked(PARTS[part], config, form, tensors)


def load_net(
    part: str,
    tensors: Mapping[str, Any],
    config: Any,
    place: PlaceLeaf = lambda part, path, leaf: leaf,
) -> Net:
    """Return a part's net from tensors in any of its formats, in config.param_dtype.

    Args:
      part: name of the part.
      tensors: by name.
      config: of the net.
      place: (part, path, leaf) -> leaf on its devices; it is called as each leaf is read.

    Raises:
      ConversionError: listing every missing, unused and misshapen tensor.
    """
    tensors, form = _prepared(part, tensors, config)
    net = shapes(part, config)
    table = nets.rules(PARTS[part], config, form)
    return net._replace(
        params=engine.load(table, tensors, net.params, functools.partial(place, part))
    )


def _prepared(part: str, tensors: Mapping[str, Any], config: Any) -> tuple[Mapping[str, Any], str]:
    """Return the tensors of a part as its table takes them, and their format.

    Raises ConversionError for a LoRA, another part, and a transformer of another size.
    """
    with contextlib.suppress(UnknownError):
        refuse_other(part, recognise(tensors)[0])
    spec = PARTS[part]
    tensors = spec.prepare(tensors)
    form = nets.format_of(spec, tensors)
    if part == "transformer":
        check_size(config, nets.measure(spec, form, tensors))
    return tensors, form
