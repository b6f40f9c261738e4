"""SEA-RAFT: names of its public code <-> the parameter tree of rewards/flow/net.py.

Where the file comes from: docs/rewards.md, Conversion.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from astrolabe_jax.convert.engine import CONV2D, LINEAR, Rule, Shapes, Transform
from astrolabe_jax.convert.nets import NetSpec, without_aliases
from astrolabe_jax.rewards.directory import PublishedFiles, RewardContents, contents_of
from astrolabe_jax.rewards.flow.net import SeaRaft, SeaRaftConfig

_ALIAS = re.compile(r"(.+)\.downsample\.1\.(.+)")  # the module bn3 once more
# Convolutions outside the encoders and the refinement.
_CONVS = {
    "init_conv": "init_conv",
    "flow_head.0": "flow_head.conv1",
    "flow_head.2": "flow_head.conv2",
    "upsample_weight.0": "upsample_weight.conv1",
    "upsample_weight.2": "upsample_weight.conv2",
    "update_block.encoder.convc1": "motion.correlation1",
    "update_block.encoder.convc2": "motion.correlation2",
    "update_block.encoder.convf1": "motion.flow1",
    "update_block.encoder.convf2": "motion.flow2",
    "update_block.encoder.conv": "motion.conv",
}
_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}


def prepare(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of a file under one name each.

    bn3 and downsample.1 are one module, which a file may hold twice.
    """
    aliases = {
        name: f"{alias[1]}.bn3.{alias[2]}" for name in tensors if (alias := _ALIAS.fullmatch(name))
    }
    return without_aliases(tensors, aliases)


def measure(shapes: Shapes) -> dict[str, Any]:
    """Return fields of SeaRaftConfig; there are always 4 levels, and 4 iterations."""
    sizes: dict[str, Any] = dict(shapes.sizes({"initial_dim": [("cnet.conv1.bias", 0)]}))
    if width := shapes.vote(("init_conv.bias", 0)):
        sizes["dim"] = width // 2
    if lookups := shapes.vote(("update_block.encoder.convc1.weight", 1)):
        sizes["radius"] = (math.isqrt(lookups // SeaRaftConfig.levels) - 1) // 2
    stages = [shapes.of(f"fnet.layer{stage}.{{i}}.conv2.bias") for stage in (1, 2, 3)]
    if all(stages):
        sizes["block_dims"] = tuple(stage[0][0] for stage in stages)
        sizes["blocks"] = tuple(map(len, stages))
    if count := len(shapes.of("update_block.refine.{i}.gamma")):
        sizes["num_blocks"] = count
    return sizes


def table(config: SeaRaftConfig) -> list[Rule]:
    """Return the rules of one net."""
    rules = [*_encoder("cnet", "context", config), *_encoder("fnet", "features", config)]
    for source, target in _CONVS.items():
        rules += _layer(source, target)
    for i in range(config.num_blocks):
        source = f"update_block.refine.{i}"
        target = f"refine.{i}"
        rules += [
            *_layer(f"{source}.dwconv", f"{target}.depthwise"),
            Rule(f"{source}.norm.weight", f"{target}.norm.scale"),
            Rule(f"{source}.norm.bias", f"{target}.norm.bias"),
            *_layer(f"{source}.pwconv1", f"{target}.fc1", LINEAR),
            *_layer(f"{source}.pwconv2", f"{target}.fc2", LINEAR),
            Rule(f"{source}.gamma", f"{target}.gamma"),
            *_layer(f"{source}.final", f"{target}.conv_out"),
        ]
    return rules


def _encoder(source: str, target: str, config: SeaRaftConfig) -> list[Rule]:
    rules = [
        *_layer(f"{source}.conv1", f"{target}.conv_in"),
        *_norm(f"{source}.bn1", f"{target}.norm_in"),
        *_layer(f"{source}.final_conv", f"{target}.conv_out"),
    ]
    places = [(stage, i) for stage, count in enumerate(config.blocks) for i in range(count)]
    for index, (stage, i) in enumerate(places):
        theirs = f"{source}.layer{stage + 1}.{i}"
        ours = f"{target}.blocks.{index}"
        for part in (1, 2):
            rules += _layer(f"{theirs}.conv{part}", f"{ours}.conv{part}")
            rules += _norm(f"{theirs}.bn{part}", f"{ours}.norm{part}")
        widens = stage > 0 or config.initial_dim != config.block_dims[0]
        if i == 0 and widens:
            rules += _layer(f"{theirs}.downsample.0", f"{ours}.shortcut")
            rules += _norm(f"{theirs}.bn3", f"{ours}.norm3")
    return rules


def _layer(source: str, target: str, transform: Transform = CONV2D) -> list[Rule]:
    return [
        Rule(f"{source}.weight", f"{target}.kernel", transform),
        Rule(f"{source}.bias", f"{target}.bias"),
    ]


def _norm(source: str, target: str) -> list[Rule]:
    return [Rule(f"{source}.{theirs}", f"{target}.{ours}") for theirs, ours in _NORM.items()]


# Tartan-C-T-TSKH-spring540x960-M
SEA_RAFT = NetSpec("sea_raft", SeaRaft, SeaRaftConfig(), table, measure, prepare=prepare)


def convert(published: PublishedFiles) -> RewardContents:
    """Return what a reward directory of SEA-RAFT holds.

    Raises ValueError or OSError naming the file or the option at fault.
    """
    published.refuse(SEA_RAFT.name, "template", "quantised", "tokenizer")
    return contents_of(SEA_RAFT, published)
