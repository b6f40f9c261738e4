"""The engine on a table with every transform: bytes survive the round trip, and every kind of
misfit is named.
"""

from typing import Any

import numpy as np
import pytest

from astrolabe_jax.convert import engine
from astrolabe_jax.convert.engine import Rule

TABLE = [
    Rule("embed.weight", "embed.kernel", engine.patch_kernel((1, 2, 2))),
    Rule("blocks.{i}.q.weight", "blocks.q.kernel", engine.LINEAR),
    Rule("blocks.{i}.scale", "blocks.scale"),
    Rule("ups.0.conv.weight", "ups.0.conv", engine.CONV3D),
    Rule("ups.0.gamma", "ups.0.gamma", engine.GAMMA3D),
    Rule("ups.1.conv.weight", "ups.1.conv", engine.CONV2D),
    Rule("ups.1.gamma", "ups.1.gamma", engine.GAMMA2D),
]
SHAPES = {
    "embed.weight": (5, 3, 1, 2, 2),
    "blocks.0.q.weight": (4, 6),
    "blocks.1.q.weight": (4, 6),
    "blocks.0.scale": (1, 2, 4),
    "blocks.1.scale": (1, 2, 4),
    "ups.0.conv.weight": (2, 3, 3, 1, 2),
    "ups.0.gamma": (7, 1, 1, 1),
    "ups.1.conv.weight": (2, 3, 1, 3),
    "ups.1.gamma": (7, 1, 1),
}


def expected(dtype: Any = np.float32):
    def leaf(*shape):
        return np.zeros(shape, dtype)

    return {
        "embed": {"kernel": leaf(12, 5)},
        "blocks": {"q": {"kernel": leaf(2, 6, 4)}, "scale": leaf(2, 1, 2, 4)},
        "ups": {
            0: {"conv": leaf(3, 1, 2, 3, 2), "gamma": leaf(7)},
            1: {"conv": leaf(1, 3, 3, 2), "gamma": leaf(7)},
        },
    }


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def test_round_trip_is_byte_exact(tensors):
    back = engine.save(TABLE, engine.load(TABLE, tensors, expected()))
    assert {k: (v.shape, v.dtype, v.tobytes()) for k, v in back.items()} == {
        k: (v.shape, v.dtype, v.tobytes()) for k, v in tensors.items()
    }


def test_leaves_take_the_layout_the_model_expects(tensors):
    tree = engine.load(TABLE, tensors, expected())
    # one patch, channel slowest
    x = np.random.default_rng(1).normal(size=(3, 1, 2, 2)).astype(np.float32)
    np.testing.assert_allclose(
        x.ravel() @ tree["embed"]["kernel"],
        np.einsum("dcthw,cthw->d", tensors["embed.weight"], x),
        rtol=1e-5,
    )
    np.testing.assert_array_equal(tree["blocks"]["q"]["kernel"][1], tensors["blocks.1.q.weight"].T)
    np.testing.assert_array_equal(
        tree["ups"][0]["conv"][2, 0, 1], tensors["ups.0.conv.weight"][:, :, 2, 0, 1].T
    )
    np.testing.assert_array_equal(
        tree["ups"][1]["conv"][0, 2], tensors["ups.1.conv.weight"][:, :, 0, 2].T
    )


def test_leaves_take_the_dtype_the_model_expects(tensors):
    tree = engine.load(TABLE, tensors, expected(np.float16))
    assert {leaf.dtype for leaf in engine.flatten(tree).values()} == {np.dtype(np.float16)}


@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_is_required_by_name(tensors, name):
    del tensors[name]
    with pytest.raises(engine.ConversionError, match=f"missing tensor: {name}"):
        engine.load(TABLE, tensors, expected())


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_checked_by_name(tensors, name):
    tensors[name] = tensors[name][None]
    with pytest.raises(engine.ConversionError, match=f"changed shape: {name} is "):
        engine.load(TABLE, tensors, expected())


def test_one_error_lists_every_culprit(tensors):
    tensors["blocks.2.scale"] = tensors["blocks.1.scale"]  # one layer too many
    tensors["renamed.weight"] = tensors.pop("embed.weight")
    tensors["ups.1.gamma"] = tensors["ups.1.gamma"][:, 0]
    with pytest.raises(engine.ConversionError) as error:
        engine.load(TABLE, tensors, expected())
    for culprit in (
        "4 mismatches",
        "unused tensor: blocks.2.scale [1, 2, 4]",
        "unused tensor: renamed.weight",
        "missing tensor: embed.weight [5, 3, 1, 2, 2]",
        "changed shape: ups.1.gamma is [7, 1], the model expects [7, 1, 1]",
    ):
        assert culprit in str(error.value)


def test_a_table_must_cover_the_tree_exactly_once(tensors):
    tree = expected()
    tree["extra"] = {"bias": np.zeros(3)}
    with pytest.raises(engine.ConversionError, match="no rule of the table fills: extra.bias"):
        engine.load(TABLE, tensors, tree)
    with pytest.raises(engine.ConversionError, match="the model does not have: gone"):
        engine.save([*TABLE, Rule("gone", "gone")], expected())
    with pytest.raises(engine.ConversionError, match="filled twice: blocks.scale"):
        engine.save([*TABLE, Rule("again.{i}", "blocks.scale")], expected())


def test_leaves_are_read_one_at_a_time(tensors):
    class Lazy(dict):
        read = 0

        def __getitem__(self, name):
            type(self).read += 1
            return super().__getitem__(name)

    reads = []
    engine.load(TABLE, Lazy(tensors), expected(), lambda *_: reads.append(Lazy.read))
    assert reads[1] - reads[0] == 2  # the two layers of the second leaf, and nothing else
    assert reads[-1] - reads[0] == len(tensors) - 1  # the first leaf is one tensor
