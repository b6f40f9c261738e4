"""Wan VAE: original names and layouts <-> the parameter tree of models/wan/vae.py
(spec/checkpoints.md section 3).
"""

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
from astrolabe_jax.models.wan.vae import VaeConfig

# Original -> diffusers, but for the numbers of the upsamplings.
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
    """What diffusers' AutoencoderKLWan calls the same tensors; its decoder counts by stages."""
    blocks = config.num_res_blocks + 1
    numbered = []
    for stage in range(len(config.dim_mult)):
        for j in range(blocks + 1):
            name = f"resnets.{j}" if j < blocks else "upsamplers.0"
            numbered.append(
                (rf"\.upsamples\.{stage * (blocks + 1) + j}\.", f".up_blocks.{stage}.{name}.")
            )
    return (*_DIFFUSERS, *numbered)


def measure(shapes: Shapes) -> dict[str, Any]:
    """Sizes as the tensors of the encoder have them; the statistics of the latents are not in
    them.
    """
    sizes = shapes.sizes(
        {
            "dim": [("encoder.conv1.weight", 0), ("encoder.conv1.bias", 0)],
            "z_dim": [("conv2.weight", 0), ("conv2.bias", 0), ("decoder.conv1.weight", 1)],
        }
    )
    blocks, widths, temporal, index = [0], [None], [], 0
    while True:
        prefix = f"encoder.downsamples.{index}"
        width = shapes.vote(
            *(
                (f"{prefix}.residual.{name}", 0)
                for name in ("2.weight", "2.bias", "6.weight", "6.bias", "3.gamma")
            )
        )
        if width is not None:
            blocks[-1], widths[-1] = blocks[-1] + 1, width
        elif shapes.of(f"{prefix}.resample.1.weight") or shapes.of(f"{prefix}.resample.1.bias"):
            timed = shapes.of(f"{prefix}.time_conv.weight") or shapes.of(f"{prefix}.time_conv.bias")
            blocks, widths, temporal = [*blocks, 0], [*widths, None], [*temporal, bool(timed)]
        else:
            break
        index += 1
    if "dim" in sizes and all(widths):
        sizes["dim_mult"] = tuple(width // sizes["dim"] for width in widths)
        sizes |= {"num_res_blocks": max(blocks), "temporal_downsample": tuple(temporal)}
    return sizes


def table(config: VaeConfig) -> list[Rule]:
    """The rules of one VAE; `downsamples` and `upsamples` number blocks and resamplings of all
    stages in one row.
    """
    widths = [config.dim * m for m in (1, *config.dim_mult)]
    rules = [*_conv("conv1", "conv1", CONV3D), *_conv("conv2", "conv2", CONV3D)]
    for net in ("encoder", "decoder"):
        rules += _conv(f"{net}.conv1", f"{net}.conv_in", CONV3D)
        rules += _residual(f"{net}.middle.0", f"{net}.middle.layers.0", shortcut=False)
        rules += _attention(f"{net}.middle.1", f"{net}.middle.layers.1")
        rules += _residual(f"{net}.middle.2", f"{net}.middle.layers.2", shortcut=False)
        rules.append(Rule(f"{net}.head.0.gamma", f"{net}.norm_out.gamma", GAMMA3D))
        rules += _conv(f"{net}.head.2", f"{net}.conv_out", CONV3D)
    temporal = config.temporal_downsample
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    rules += _stages(
        "encoder.downsamples", "encoder.stages", pairs, config.num_res_blocks, temporal
    )
    # The decoder mirrors the encoder; every upsampling halves the width before the next stage.
    widths = widths[1:][::-1]
    pairs = [(width if j == 0 else widths[j - 1] // 2, width) for j, width in enumerate(widths)]
    return rules + _stages(
        "decoder.upsamples", "decoder.stages", pairs, config.num_res_blocks + 1, temporal[::-1]
    )


def _stages(
    source: str, target: str, widths: list[tuple[int, int]], blocks: int, temporal: tuple[bool, ...]
) -> list[Rule]:
    """`blocks` residual blocks per stage, and between two stages a resampling, with time where
    `temporal` says so.
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
    return [
        Rule(f"{source}.residual.0.gamma", f"{target}.norm1.gamma", GAMMA3D),
        *_conv(f"{source}.residual.2", f"{target}.conv1", CONV3D),
        Rule(f"{source}.residual.3.gamma", f"{target}.norm2.gamma", GAMMA3D),
        *_conv(f"{source}.residual.6", f"{target}.conv2", CONV3D),
        *(_conv(f"{source}.shortcut", f"{target}.shortcut", CONV3D) if shortcut else []),
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
