"""SEA-RAFT: names of its public code <-> the parameter tree of models/sea_raft.py (spec/rewards.md
10.2).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from astrolabe_jax.convert.engine import CONV2D, LINEAR, ConversionError, Rule, Shapes
from astrolabe_jax.convert.reward_store import Kind
from astrolabe_jax.models.sea_raft import SeaRaft, SeaRaftConfig

_ALIAS = re.compile(r"(.+)\.downsample\.1\.(.+)")  # the module bn3 once more
_ENCODERS = {"cnet": "context", "fnet": "features"}


def opened(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a file as `table` names them: bn3 and downsample.1 are one module, which a
    file may hold twice.

    Raises ConversionError naming two that differ.
    """
    found = {name: tensor for name, tensor in tensors.items() if not _ALIAS.fullmatch(name)}
    for name, tensor in tensors.items():
        if alias := _ALIAS.fullmatch(name):
            plain = f"{alias[1]}.bn3.{alias[2]}"
            if plain in found and not np.array_equal(np.asarray(found[plain]), np.asarray(tensor)):
                raise ConversionError(
                    f"{name} and {plain} must be the same tensor; download the file again"
                )
            found[plain] = tensor
    return found


def sizes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of SeaRaftConfig as the tensors of `opened` have them; there are 4 levels, and 4
    iterations.
    """
    seen, found = Shapes(tensors, ()), {}
    for field, witness, divisor in (
        ("dim", "init_conv.bias", 2),
        ("initial_dim", "cnet.conv1.bias", 1),
    ):
        if size := seen.vote((witness, 0)):
            found[field] = size // divisor
    if lookups := seen.vote(("update_block.encoder.convc1.weight", 1)):
        found["radius"] = (math.isqrt(lookups // SeaRaftConfig.levels) - 1) // 2
    stages = [seen.of(f"fnet.layer{stage}.{{i}}.conv2.bias") for stage in (1, 2, 3)]
    if all(stages):
        found["block_dims"] = tuple(stage[0][0] for stage in stages)
        found["blocks"] = tuple(map(len, stages))
    if count := len(seen.of("update_block.refine.{i}.gamma")):
        found["num_blocks"] = count
    return found


def table(config: SeaRaftConfig) -> list[Rule]:
    """The rules of one net."""
    rules = []
    for source, target in _ENCODERS.items():
        rules += _encoder(source, target, config)
    rules += _conv("init_conv", "init_conv")
    for head in ("flow_head", "upsample_weight"):
        rules += [*_conv(f"{head}.0", f"{head}.conv1"), *_conv(f"{head}.2", f"{head}.conv2")]
    motion = {
        "convc1": "correlation1",
        "convc2": "correlation2",
        "convf1": "flow1",
        "convf2": "flow2",
        "conv": "conv",
    }
    for source, target in motion.items():
        rules += _conv(f"update_block.encoder.{source}", f"motion.{target}")
    for i in range(config.num_blocks):
        source, target = f"update_block.refine.{i}", f"refine.{i}"
        rules += [
            *_conv(f"{source}.dwconv", f"{target}.depthwise"),
            Rule(f"{source}.norm.weight", f"{target}.norm.scale"),
            Rule(f"{source}.norm.bias", f"{target}.norm.bias"),
            *_linear(f"{source}.pwconv1", f"{target}.fc1"),
            *_linear(f"{source}.pwconv2", f"{target}.fc2"),
            Rule(f"{source}.gamma", f"{target}.gamma"),
            *_conv(f"{source}.final", f"{target}.conv_out"),
        ]
    return rules


def _encoder(source: str, target: str, config: SeaRaftConfig) -> list[Rule]:
    rules = [
        *_conv(f"{source}.conv1", f"{target}.conv_in"),
        *_norm(f"{source}.bn1", f"{target}.norm_in"),
        *_conv(f"{source}.final_conv", f"{target}.conv_out"),
    ]
    widths, index = (config.initial_dim, *config.block_dims), 0
    for stage, count in enumerate(config.blocks):
        for i in range(count):
            theirs, mine = f"{source}.layer{stage + 1}.{i}", f"{target}.blocks.{index}"
            for part in (1, 2):
                rules += _conv(f"{theirs}.conv{part}", f"{mine}.conv{part}")
                rules += _norm(f"{theirs}.bn{part}", f"{mine}.norm{part}")
            if i == 0 and (stage > 0 or widths[0] != widths[1]):
                rules += _conv(f"{theirs}.downsample.0", f"{mine}.shortcut")
                rules += _norm(f"{theirs}.bn3", f"{mine}.norm3")
            index += 1
    return rules


def _conv(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}.kernel", CONV2D),
        Rule(f"{source}.bias", f"{target}.bias"),
    ]


def _linear(source: str, target: str) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}.kernel", LINEAR),
        Rule(f"{source}.bias", f"{target}.bias"),
    ]


def _norm(source: str, target: str) -> list[Rule]:
    pairs = (
        ("weight", "scale"),
        ("bias", "bias"),
        ("running_mean", "mean"),
        ("running_var", "var"),
    )
    return [Rule(f"{source}.{theirs}", f"{target}.{mine}") for theirs, mine in pairs]


# Tartan-C-T-TSKH-spring540x960-M
SEA_RAFT = Kind("sea_raft", SeaRaft, SeaRaftConfig(), opened, sizes, table)
