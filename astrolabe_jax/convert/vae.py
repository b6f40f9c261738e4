"""Wan VAE: names and layouts of Wan's tensors <-> the parameter tree of models/wan/vae.py.

The tensors: docs/checkpoints.md, VAE tensors.
"""

import itertools
from typing import Any, NamedTuple

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
from astrolabe_jax.models.wan.vae import VaeConfig

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
    blocks = config.num_res_blocks + 1
    numbered = []
    index = 0
    for stage in range(len(config.dim_mult)):
        names = [f"resnets.{block}" for block in range(blocks)]
        for name in (*names, "upsamplers.0"):
            numbered.append((rf"\.upsamples\.{index}\.", f".up_blocks.{stage}.{name}."))
            index += 1
    return (*_DIFFUSERS, *numbered)


class _Stage(NamedTuple):
    """One stage of the encoder, as its tensors show it."""

    blocks: int
    width: int | None  # channels; None if no tensor tells
    temporal: bool | None  # whether its downsampling halves the frames; None: it has none


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
    stages = _stages_of(shapes)
    widths = [stage.width for stage in stages if stage.width]
    if "dim" in sizes and len(widths) == len(stages):
        sizes["dim_mult"] = tuple(width // sizes["dim"] for width in widths)
        sizes["num_res_blocks"] = max(stage.blocks for stage in stages)
        sizes["temporal_downsample"] = tuple(
            stage.temporal for stage in stages if stage.temporal is not None
        )
    return sizes


def _stages_of(shapes: Shapes) -> list[_Stage]:
    """Return the stages of the encoder; the last has no downsampling."""
    stages = []
    stage = _Stage(0, None, None)
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
            stage = stage._replace(blocks=stage.blocks + 1, width=width)
        elif _has_conv(shapes, f"{prefix}.resample.1"):
            temporal = _has_conv(shapes, f"{prefix}.time_conv")
            stages.append(stage._replace(temporal=temporal))
            stage = _Stage(0, None, None)
        else:
            break
    return [*stages, stage]


def _has_conv(shapes: Shapes, name: str) -> bool:
    return bool(shapes.of(f"{name}.weight") or shapes.of(f"{name}.bias"))


def table(config: VaeConfig) -> list[Rule]:
    """Return the rules of a VAE.

    `downsamples` and `upsamples` number the blocks and resamplings of all stages in one row.
    """
    rules = [*_conv("conv1", "conv1", CONV3D), *_conv("conv2", "conv2", CONV3D)]
    for net in ("encoder", "decoder"):
        rules += _conv(f"{net}.conv1", f"{net}.conv_in", CONV3D)
        rules += _residual(f"{net}.middle.0", f"{net}.middle.layers.0", shortcut=False)
        rules += _attention(f"{net}.middle.1", f"{net}.middle.layers.1")
        rules += _residual(f"{net}.middle.2", f"{net}.middle.layers.2", shortcut=False)
        rules.append(Rule(f"{net}.head.0.gamma", f"{net}.norm_out.gamma", GAMMA3D))
        rules += _conv(f"{net}.head.2", f"{net}.conv_out", CONV3D)
    blocks = config.num_res_blocks
    temporal = config.temporal_downsample
    widths = [config.dim * multiple for multiple in config.dim_mult]
    pairs = list(zip([config.dim, *widths[:-1]], widths, strict=True))
    rules += _stages("encoder.downsamples", "encoder.stages", pairs, blocks, temporal)
    # The decoder mirrors the encoder; every upsampling halves the width before the next stage.
    widths.reverse()
    halved = [width // 2 for width in widths[:-1]]
    pairs = list(zip([widths[0], *halved], widths, strict=True))
    rules += _stages("decoder.upsamples", "decoder.stages", pairs, blocks + 1, temporal[::-1])
    return rules


def _stages(
    source: str, target: str, widths: list[tuple[int, int]], blocks: int, temporal: tuple[bool, ...]
) -> list[Rule]:
    """Return the rules of all stages: residual blocks, and a resampling between two stages.

    Args:
      source: of the stages, in names of tensors.
      target: of the stages, in paths of leaves.
      widths: channels (in, out) of each stage.
      blocks: residual blocks of each stage.
      temporal: whether each resampling has a convolution in time.
    """
    rules: list[Rule] = []
    index = 0
    for stage, (features_in, features_out) in enumerate(widths):
        for block in range(blocks):
            shortcut = block == 0 and features_in != features_out
            rules += _residual(f"{source}.{index}", f"{target}.{index}", shortcut)
            index += 1
        if stage < len(temporal):
            rules += _conv(f"{source}.{index}.resample.1", f"{target}.{index}.conv", CONV2D)
            if temporal[stage]:
                rules += _conv(f"{source}.{index}.time_conv", f"{target}.{index}.time_conv", CONV3D)
            index += 1
    return rules


def _residual(source: str, target: str, shortcut: bool) -> list[Rule]:
    rules = [
        Rule(f"{source}.residual.0.gamma", f"{target}.norm1.gamma", GAMMA3D),
        *_conv(f"{source}.residual.2", f"{target}.conv1", CONV3D),
        Rule(f"{source}.residual.3.gamma", f"{target}.norm2.gamma", GAMMA3D),
        *_conv(f"{source}.residual.6", f"{target}.conv2", CONV3D),
    ]
    if shortcut:
        rules += _conv(f"{source}.shortcut", f"{target}.shortcut", CONV3D)
    return rules


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
