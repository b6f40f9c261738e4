"""Wan VAE: names and layouts of Wan's tensors <-> the parameter tree of models/wan/vae.py.

The tensors: docs/checkpoints.md, VAE tensors.
"""

import itertools
from typing import Any

from astrolabe_jax.convert.engine import (
    CONV2D,
    CONV3D,
    GAMMA2D,
    GAMMA3D,
    Rule,
    Shapes,
    Substitutions,
    Transform,
)
from astrolabe_jax.models.wan.vae import StageLayer, VaeConfig

# Original names -> those of diffusers, except for the numbers in decoder.upsamples.
_DIFFUSERS = (
    (r"^conv1\b", "quant_conv"),
    (r"^conv2\b", "post_quant_conv"),
    (r"^(encoder|decoder)\.conv1\b", r"\1.conv_in"),
    (r"\.head\.0\b", ".norm_out"),
    (r"\.head\.2\b", ".conv_out"),
    (r"\.middle\.0\b", ".mid_block.resnets.0"),
    (r"\.middle\.1\b", ".mid_block.attentions.0"),
    (r"\.middle\.2\b", ".mid_block.resnets.1"),
    (r"\.residual\.0\b", ".norm1"),
    (r"\.residual\.2\b", ".conv1"),
    (r"\.residual\.3\b", ".norm2"),
    (r"\.residual\.6\b", ".conv2"),
    (r"\.shortcut\b", ".conv_shortcut"),
    (r"\.downsamples\b", ".down_blocks"),
)


def diffusers(config: VaeConfig) -> Substitutions:
    """Return the substitutions to the names of diffusers' AutoencoderKLWan.

    Its decoder numbers the blocks of each stage anew.
    """
    names = [f"resnets.{block}" for block in range(config.num_res_blocks + 1)]
    layers = itertools.product(range(len(config.dim_mult)), [*names, "upsamplers.0"])
    numbered = [
        (rf"\.upsamples\.{i}\.", f".up_blocks.{stage}.{name}.")
        for i, (stage, name) in enumerate(layers)
    ]
    return (*_DIFFUSERS, *numbered)


def measure(shapes: Shapes) -> dict[str, Any]:
    """Return the sizes that the tensors of the encoder tell, by field of VaeConfig.

    The statistics of the latents are not among them.
    """
    sizes: dict[str, Any] = shapes.sizes(
        {
            "dim": [("encoder.conv1.weight", 0), ("encoder.conv1.bias", 0)],
            "z_dim": [("conv2.weight", 0), ("conv2.bias", 0), ("decoder.conv1.weight", 1)],
        }
    )
    stages, temporal = _stages_of(shapes)
    if "dim" in sizes and all(stages):
        sizes["dim_mult"] = tuple(widths[-1] // sizes["dim"] for widths in stages)
        sizes["num_res_blocks"] = max(map(len, stages))
        sizes["temporal_downsample"] = tuple(temporal)
    return sizes


def _stages_of(shapes: Shapes) -> tuple[list[list[int]], list[bool]]:
    """Return the widths of the blocks of each stage of the encoder, and whether each downsampling
    halves the frames.
    """
    stages: list[list[int]] = [[]]
    temporal = []
    for index in itertools.count():
        prefix = f"encoder.downsamples.{index}"
        width = shapes.vote(
            (f"{prefix}.residual.2.weight", 0),
            (f"{prefix}.residual.2.bias", 0),
            (f"{prefix}.residual.6.weight", 0),
            (f"{prefix}.residual.6.bias", 0),
            (f"{prefix}.residual.3.gamma", 0),
        )
        if width is not None:
            stages[-1].append(width)
        elif _has_conv(shapes, f"{prefix}.resample.1"):
            temporal.append(_has_conv(shapes, f"{prefix}.time_conv"))
            stages.append([])
        else:
            break
    return stages, temporal


def _has_conv(shapes: Shapes, name: str) -> bool:
    return bool(shapes.of(f"{name}.weight") or shapes.of(f"{name}.bias"))


def table(config: VaeConfig) -> list[Rule]:
    """Return the rules of a VAE.

    `downsamples` and `upsamples` number the blocks and resamplings of all stages in one row.
    """
    rules = [*_conv("conv1", "conv1", CONV3D), *_conv("conv2", "conv2", CONV3D)]
    for net in ("encoder", "decoder"):
        rules += [
            *_conv(f"{net}.conv1", f"{net}.conv_in", CONV3D),
            *_residual(f"{net}.middle.0", f"{net}.middle.layers.0", shortcut=False),
            *_attention(f"{net}.middle.1", f"{net}.middle.layers.1"),
            *_residual(f"{net}.middle.2", f"{net}.middle.layers.2", shortcut=False),
            Rule(f"{net}.head.0.gamma", f"{net}.norm_out.gamma", GAMMA3D),
            *_conv(f"{net}.head.2", f"{net}.conv_out", CONV3D),
        ]
    for source, target, layers in (
        ("encoder.downsamples", "encoder.stages", config.encoder_stages()),
        ("decoder.upsamples", "decoder.stages", config.decoder_stages()),
    ):
        for i, layer in enumerate(layers):
            rules += _stage_layer(f"{source}.{i}", f"{target}.{i}", layer)
    return rules


def _stage_layer(source: str, target: str, layer: StageLayer) -> list[Rule]:
    if layer.temporal is None:
        return _residual(source, target, layer.features_in != layer.features_out)
    return [
        *_conv(f"{source}.resample.1", f"{target}.conv", CONV2D),
        *(_conv(f"{source}.time_conv", f"{target}.time_conv", CONV3D) if layer.temporal else ()),
    ]


def _residual(source: str, target: str, shortcut: bool) -> list[Rule]:
    return [
        Rule(f"{source}.residual.0.gamma", f"{target}.norm1.gamma", GAMMA3D),
        *_conv(f"{source}.residual.2", f"{target}.conv1", CONV3D),
        Rule(f"{source}.residual.3.gamma", f"{target}.norm2.gamma", GAMMA3D),
        *_conv(f"{source}.residual.6", f"{target}.conv2", CONV3D),
        *(_conv(f"{source}.shortcut", f"{target}.shortcut", CONV3D) if shortcut else ()),
    ]


def _attention(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.norm.gamma", f"{target}.norm.gamma", GAMMA2D),
        *_conv(f"{source}.to_qkv", f"{target}.to_qkv", CONV2D),
        *_conv(f"{source}.proj", f"{target}.proj", CONV2D),
    ]


def _conv(source: str, target: str, transform: Transform) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}.kernel", transform),
        Rule(f"{source}.bias", f"{target}.bias"),
    ]
