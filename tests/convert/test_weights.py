"""Every published nesting and prefix gives the very parameters of the plain file, and nothing is
guessed.
"""

import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from astrolabe_jax.convert import base as bases
from astrolabe_jax.convert.weights import read_weights
from astrolabe_jax.runtime import files
from tests.convert import torch_files
from tests.stand_ins import POINTER
from tests.tiny_base import write_tiny_base

NUMERICS = {"dtype": "float32", "param_dtype": "float32", "remat": False, "attention": "xla"}
FSDP = "model._fsdp_wrapped_module."
REMAT = "_checkpoint_wrapped_module."


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return a base with plain safetensors, and what load_base returns for it."""
    directory = write_tiny_base(tmp_path_factory.mktemp("plain"))
    return directory, bases.load_base(str(directory), **NUMERICS)


def read_safetensors(path):
    return {name: np.asarray(tensor) for name, tensor in files.read_safetensors(path).items()}


def renamed(tensors, prefix, inner=""):
    """Return the tensors under names as training leaves them; `inner` wraps every block, too."""
    result = {}
    for name, tensor in tensors.items():
        if name.startswith("blocks."):
            name = name.replace(".", f".{inner}", 2)
        result[prefix + name] = tensor
    return result


def torch_tree(tensors):
    return {name: torch_files.whole(tensor) for name, tensor in tensors.items()}


LAYOUTS = {
    "self_forcing": lambda tensors: {"generator_ema": torch_tree(renamed(tensors, "model."))},
    "causal_forcing_chunkwise": lambda tensors: {
        "generator": torch_tree(renamed(tensors, "model."))
    },
    "causal_forcing_framewise": lambda tensors: {
        "generator_ema": torch_tree(renamed(tensors, FSDP))
    },
    "wrapped_blocks": lambda tensors: {"generator_ema": torch_tree(renamed(tensors, FSDP, REMAT))},
    "longlive_base": lambda tensors: {
        "generator": torch_tree(renamed(tensors | {"freqs": np.ones(2)}, "model."))
    },
    "compiled": lambda tensors: {"state_dict": torch_tree(renamed(tensors, "module._orig_mod."))},
    "flat": torch_tree,
}


def assert_same_transformer(directory, want):
    got = bases.load_base(str(directory), **NUMERICS).transformer.params
    jax.tree.map(np.testing.assert_array_equal, got, want.transformer.params)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_published_layouts_of_torch_files(plain, tmp_path, layout, suffix):
    directory, want = plain
    directory = shutil.copytree(directory, tmp_path / "base")
    tensors = read_safetensors(directory / "transformer.safetensors")
    (directory / "transformer.safetensors").unlink()
    torch_files.write(directory / f"transformer{suffix}", LAYOUTS[layout](tensors))
    assert_same_transformer(directory, want)


def test_krea_is_safetensors_with_a_prefix(plain, tmp_path):
    directory, want = plain
    directory = shutil.copytree(directory, tmp_path / "base")
    path = directory / "transformer.safetensors"
    path.write_bytes(
        safetensors.numpy.save(renamed(read_safetensors(path), "model.diffusion_model."))
    )
    assert_same_transformer(directory, want)


def test_a_whole_base_of_torch_files(plain, tmp_path):
    """Wan2.1_VAE.pth and the text encoder's .pth are flat; the identity is that of the files, not
    of the numbers in them.
    """
    directory, want = plain
    directory = shutil.copytree(directory, tmp_path / "base")
    for part in ("transformer", "vae", "text_encoder"):
        path = directory / f"{part}.safetensors"
        torch_files.write(directory / f"{part}.pth", torch_tree(read_safetensors(path)))
        path.unlink()
    got = bases.load_base(str(directory), **NUMERICS)
    for name in ("transformer", "vae", "text"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(got, name).params, getattr(want, name).params
        )
    assert got.fingerprint != want.fingerprint
    shutil.copy(plain[0] / "vae.safetensors", directory)
    with pytest.raises(
        FileNotFoundError, match="base has 2 files of the vae; expected one of vae.safetensors, "
    ):
        bases.load_base(str(directory), **NUMERICS)


def test_the_average_is_read_where_there_are_several(tmp_path, caplog):
    tree = {
        name: torch_tree({"model.w": np.full(2, value)})
        for name, value in (("generator", 1.0), ("generator_ema", 2.0))
    }
    path = torch_files.write(
        tmp_path / "a.pt", tree | {"critic": torch_tree({"w": np.zeros(2)}), "step": 7}
    )
    np.testing.assert_array_equal(read_weights(path)["w"], [2, 2])
    assert "a.pt holds generator_ema and generator: generator_ema is read" in caplog.text


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"generator": {"model.w": 1, "w": 2}}, "holds the same weight twice: model.w and w"),
        (
            {"critic": {"w": 1}, "step": 3},
            "'critic' is no tensor; expected one state dict, or one under generator_ema",
        ),
        ([1], "holds a list; expected a state dict"),
        ({}, "holds nothing; expected a state dict"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, tree, message):
    def tensors(node):
        if isinstance(node, dict):
            return {name: tensors(value) for name, value in node.items()}
        return torch_files.whole(np.full(1, float(node))) if node in (1, 2) else node

    with pytest.raises(ValueError, match=f"a.pt.* {message}"):
        read_weights(torch_files.write(tmp_path / "a.pt", tensors(tree)))


def eight_bits(**more):
    """Tensors as ComfyUI stores them: w and v in float8, b not; w has one scale, v one a row."""
    rng = np.random.default_rng(0)
    e4m3 = ml_dtypes.float8_e4m3fn
    return {
        "w": rng.normal(size=(4, 3)).astype(e4m3),
        "v": rng.normal(size=(3, 5)).astype(e4m3),
        "b": rng.normal(size=4).astype(np.float16),
    } | more


SCALES = {"w": np.array(0.03, np.float32), "v": np.array([[2.0], [0.5], [3.0]], np.float32)}
MARKS = {
    "scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn),
    "spiece_model": np.arange(7, dtype=np.uint8),
    "l.scale_input": np.ones((), np.float32),
}


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_weights_of_float8_are_read_with_their_scales(tmp_path, scale, prefix):
    stored = eight_bits()
    named = {f"{name}.weight": tensor for name, tensor in stored.items()} | MARKS
    named |= {f"{name}.{scale}": number for name, number in SCALES.items()}
    files.write_safetensors(
        tmp_path / "a.safetensors", {prefix + name: tensor for name, tensor in named.items()}
    )
    got = read_weights(tmp_path / "a.safetensors")
    assert set(got) == {"w.weight", "v.weight", "b.weight"}
    for name, scale in (SCALES | {"b": np.float32(1)}).items():
        want = stored[name].astype(np.float32) * scale
        np.testing.assert_array_equal(np.asarray(got[f"{name}.weight"], np.float32), want)


def test_weights_of_float8_without_scales_are_read_as_they_are(tmp_path):
    stored = eight_bits()
    files.write_safetensors(tmp_path / "a.safetensors", stored)
    got = read_weights(tmp_path / "a.safetensors")
    assert [str(got[name].dtype) for name in "wvb"] == ["bfloat16", "bfloat16", "float16"]
    for name, tensor in stored.items():
        np.testing.assert_array_equal(
            np.asarray(got[name]).astype(np.float32), tensor.astype(np.float32)
        )


@pytest.mark.parametrize(
    "more, fault",
    [
        ({"scaled_fp8": MARKS["scaled_fp8"]}, "[wv].weight is of float8_e4m3fn, and its scale is"),
        ({"w.scale_weight": SCALES["w"]}, "v.weight is of float8_e4m3fn, and its scale is missing"),
        (
            {"w.scale_weight": np.ones((2, 2), np.float32), "v.scale_weight": SCALES["v"]},
            "w.weight has a scale of shape .2, 2.;",
        ),
        ({"q.weight": np.ones(4, np.int8)}, "a tensor of dtype int8, q.weight; expected float"),
    ],
)
def test_weights_that_would_be_wrong_without_a_scale_are_refused(tmp_path, more, fault):
    stored = {f"{name}.weight": tensor for name, tensor in eight_bits().items()} | more
    files.write_safetensors(tmp_path / "a.safetensors", stored)
    with pytest.raises(ValueError, match=f"{fault}.* take the file in bfloat16 or float16"):
        read_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", f"a{files.INDEX}"])
def test_a_pointer_in_place_of_weights_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_text(POINTER)
    with pytest.raises(ValueError, match=f"{name} is a git-lfs pointer, not the file itself"):
        read_weights(path)
