"""Tartan-C-T-TSKH-spring540x960-M, generated as it is published."""

import math

import numpy as np
import pytest
from flax import nnx

from astrolabe_jax.convert import engine, nets
from astrolabe_jax.convert.weights import read_weights
from astrolabe_jax.models import layers
from astrolabe_jax.rewards.flow.net import SeaRaft, SeaRaftConfig
from astrolabe_jax.rewards.flow.weights import SEA_RAFT, prepare, table
from astrolabe_jax.runtime.files import write_safetensors
from tests.convert import torch_files
from tests.rewards.flow import rafts


def expected(config):
    return layers.graphdef_of(lambda: SeaRaft(config, nnx.Rngs(0)))[1]


def as_published(given, both):
    """With the counters of the norms, and, as in .pth files, the second name of bn3."""
    found = dict(given)
    for name in given:
        if name.endswith("running_mean"):
            found[name.replace("running_mean", "num_batches_tracked")] = np.int64(120000)
    if both:
        found |= {
            name.replace("bn3", "downsample.1"): tensor
            for name, tensor in found.items()
            if "bn3" in name
        }
    return found


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_published_files(tmp_path, suffix):
    config, given = rafts.TINY, rafts.weights(rafts.TINY)
    path = tmp_path / f"model.{suffix}"
    if suffix == "pth":
        tensors = as_published(given, True)
        torch_files.write(
            path, {f"module.{name}": torch_files.whole(tensor) for name, tensor in tensors.items()}
        )
    else:
        write_safetensors(path, as_published(given, False))
    tensors = prepare(read_weights(path))
    assert SeaRaftConfig(**nets.measure(SEA_RAFT, "original", tensors), iterations=3) == config
    params = engine.load(table(config), tensors, expected(config))
    back = engine.save(table(config), params)
    assert {name: tensor.tobytes() for name, tensor in back.items()} == {
        n: t.tobytes() for n, t in given.items()
    }


def test_the_two_names_of_a_norm_are_one():
    given = as_published(rafts.weights(rafts.TINY), True)
    name = "cnet.layer2.0.downsample.1.running_var"
    alone = {other: tensor for other, tensor in given.items() if ".bn3." not in other}
    assert set(prepare(alone)) == set(prepare(given))
    with pytest.raises(
        engine.ConversionError, match=f"{name} and cnet.layer2.0.bn3.running_var must be the same"
    ):
        prepare(given | {name: 1 + given[name]})


def test_every_tensor_is_required_and_no_other_accepted():
    config, given = rafts.TINY, rafts.weights(rafts.TINY)
    tree = expected(config)
    for name in sorted(given)[::9]:
        for tensors, culprit in (
            (
                {other: tensor for other, tensor in given.items() if other != name},
                f"missing tensor: {name} ",
            ),
            (given | {f"{name}.extra": given[name]}, f"unused tensor: {name}.extra "),
            (given | {name: given[name][None]}, f"changed shape: {name} is "),
        ):
            with pytest.raises(engine.ConversionError, match=culprit):
                engine.stacks(table(config), prepare(tensors), tree)


def test_published_names_and_shapes():
    config = SeaRaftConfig()
    shapes = engine.source_shapes(table(config), expected(config))
    assert shapes == rafts.published(config)
    lazy = {name: engine.Lazy(shape, np.dtype(np.float32), list) for name, shape in shapes.items()}
    assert SeaRaftConfig(**nets.measure(SEA_RAFT, "original", lazy)) == config
    trained = {name: shape for name, shape in shapes.items() if ".running_" not in name}
    assert sum(map(math.prod, trained.values())) == 19_663_876
