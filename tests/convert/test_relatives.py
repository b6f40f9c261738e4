"""Files of models that are almost ours, and files that are not whole, through the command line:
named in one sentence, never complete and never loaded.
"""

import json
import re
import shutil

import numpy as np
import pytest

from astrolabe_jax.convert import base as bases
from astrolabe_jax.convert import nets, parts
from astrolabe_jax.convert.__main__ import main
from astrolabe_jax.runtime.files import INDEX, read_safetensors, write_safetensors
from tests import tiny_base
from tests.convert.test_layouts import NUMERICS, drawn, flat_torch, write_package
from tests.stand_ins import POINTER


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return tiny_base.write_tiny_base(tmp_path_factory.mktemp("own"))


@pytest.fixture
def directory(own, tmp_path):
    return shutil.copytree(own, tmp_path / "base")


def inspect(capsys, path):
    """What `inspect --json` prints; its text must not say "complete: yes" of what is not, and its
    status be 2.
    """
    told = []
    for options in ([], ["--json"]):
        status = 0
        try:
            main(["inspect", str(path), *options])
        except SystemExit as ended:
            status = ended.code
        told.append(capsys.readouterr())
    text, found = told[0].out, json.loads(told[1].out)
    if found["complete"]:
        assert status == 0 and not told[0].err
    else:
        assert status == 2 and "complete: no" in text
        assert re.fullmatch(f"error: {path} cannot be used as it is: .+[^:]\\n", told[0].err), told[
            0
        ].err
    return found


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def zeros(*shape):
    return np.zeros(shape, np.float32)


DIM, CHANNELS = tiny_base.TRANSFORMER.dim, tiny_base.TRANSFORMER.in_channels
WIDE = {"patch_embedding.weight": zeros(DIM, 36, 1, 2, 2)}
# name -> (format, tensors beside or in place of ours, what they are for)
RELATIVES = {
    "Wan 2.2 I2V": ("original", WIDE, "image-to-video (36 input channels)"),
    "Wan 2.2 I2V of diffusers": ("diffusers", WIDE, "image-to-video (36 input channels)"),
    "Wan 2.1 I2V": (
        "original",
        WIDE
        | {"img_emb.proj.0.weight": zeros(8)}
        | {f"blocks.{i}.cross_attn.k_img.bias": zeros(DIM) for i in range(2)},
        "image-to-video (36 input channels)",
    ),
    "Wan 2.1 I2V of diffusers": (
        "diffusers",
        WIDE | {f"blocks.{i}.attn2.add_k_proj.bias": zeros(DIM) for i in range(2)},
        "image-to-video (36 input channels)",
    ),
    "VACE": (
        "original",
        {"vace_blocks.0.norm3.bias": zeros(DIM), "vace_patch_embedding.bias": zeros(DIM)},
        f"VACE ({CHANNELS} input channels)",
    ),
    "Animate": (
        "original",
        WIDE | {"face_adapter.fuser_blocks.0.k_norm.weight": zeros(8)},
        "Wan-Animate (36 input channels)",
    ),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_a_transformer_of_another_task_is_one_sentence(capsys, directory, tmp_path, name):
    form, more, what = RELATIVES[name]
    path = directory / "other.safetensors"
    write_safetensors(path, drawn("transformer", form) | more)
    sentence = (
        f"a transformer for {what}; this program runs text-to-video ({CHANNELS}): take the weights "
        "of a text-to-video model"
    )
    found = inspect(capsys, path)
    assert (found["faults"], found["families"]) == ([sentence], [])
    assert refusal(capsys, "import", path, "--to", tmp_path / "x") == f"error: {path}: {sentence}\n"
    with pytest.raises(ValueError) as caught:
        bases.load_base(str(directory), transformer=str(path), **NUMERICS)
    assert str(caught.value) == f"{path}: {sentence}"


@pytest.mark.parametrize("second", [["diffusers", "WanTransformer3DModel"], None])
def test_a_package_of_two_transformers_lends_its_other_parts_alone(capsys, own, tmp_path, second):
    package = write_package(tmp_path / "Wan2.2", "diffusers", own)
    index = {"transformer": ["diffusers", "WanTransformer3DModel"], "transformer_2": [None, None]}
    (package / "model_index.json").write_text(json.dumps(index))
    assert inspect(capsys, package)["complete"]
    if second:
        (package / "model_index.json").write_text(json.dumps(index | {"transformer_2": second}))
        names = ("transformer for high noise, transformer_2 for low",)
    else:
        (package / "model_index.json").unlink()
        (package / "low_noise_model").mkdir()
        (package / "Wan2.1_VAE.pth").touch()
        names = ("high_noise_model for high noise, low_noise_model for low",)
    sentence = f"is a Wan 2.2 package with two transformers ({names[0]}), which this program cannot"
    found = inspect(capsys, package)
    assert not found["complete"] and sentence in found["parts"]["transformer"]["faults"][0]
    with pytest.raises(FileNotFoundError) as caught:
        bases.load_base(str(package), **NUMERICS)
    assert sentence in str(caught.value) and "set config.transformer to one of" in str(caught.value)
    if second:
        transformer = str(own / "transformer.safetensors")
        assert bases.load_base(str(package), transformer=transformer, **NUMERICS).vae


def without_last_block(tensors, prefix, last):
    return {name: t for name, t in tensors.items() if not name.startswith(f"{prefix}{last}.")}


def test_a_file_that_lost_its_last_block_is_not_complete(capsys, directory, tmp_path):
    """Where a config.json beside it tells how many there should be, and by the published sizes."""
    for part, count in (("transformer", 27), ("text_encoder", 10)):
        path = directory / f"{part}.safetensors"
        tensors = {name: np.asarray(tensor) for name, tensor in read_safetensors(path).items()}
        last = nets.sizes_of(tiny_base.PARTS[part])["num_layers"] - 1
        write_safetensors(path, without_last_block(tensors, "blocks.", last))
        found = inspect(capsys, path)
        assert not found["complete"] and len(found["faults"]) == count
        assert all(fault.startswith(f"missing tensor: blocks.{last}.") for fault in found["faults"])
        assert not inspect(capsys, directory)["complete"]
        error = refusal(capsys, "import", path, "--to", tmp_path / "x")
        assert f"{path}: {count} mismatches" in error and f"missing tensor: blocks.{last}." in error


@pytest.mark.parametrize("size, last", [("wan_1.3b", 29), ("wan_14b", 39)])
def test_a_published_file_that_lost_its_last_block_is_not_complete(capsys, tmp_path, size, last):
    spec = parts.PARTS["transformer"]
    shapes = nets.source_shapes(spec, parts.SIZES[size]["transformer"])
    kept = {
        name: np.broadcast_to(np.float16(0), shape)
        for name, shape in shapes.items()
        if not name.startswith(f"blocks.{last}.")
    }
    header, stop = {}, 0
    for name, tensor in kept.items():
        start, stop = stop, stop + tensor.nbytes
        header[name] = {"dtype": "F16", "shape": tensor.shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    with open(tmp_path / "a.safetensors", "wb") as file:  # its content is a hole
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + stop)
    found = inspect(capsys, tmp_path / "a.safetensors")
    assert not found["complete"] and len(found["faults"]) == 27
    assert found["faults"][0].startswith(f"missing tensor: blocks.{last}.")


SPOILT = {
    "tokenizer.json": (POINTER, "tokenizer.json is a git-lfs pointer, not the file itself; run"),
    "config.json": ('{"dim": 24}', "config.json: expected objects under the keys transformer, vae"),
    "vae.safetensors": ("<!DOCTYPE html>", "vae.safetensors is a web page, not the file itself"),
    "text_encoder.safetensors": (POINTER, "text_encoder.safetensors is a git-lfs pointer, not"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_base_with_a_file_that_is_none_is_not_complete(capsys, directory, name):
    assert inspect(capsys, directory)["complete"]
    content, expected = SPOILT[name]
    (directory / name).write_text(content)
    found = inspect(capsys, directory)
    faults = [*found["faults"], *(f for part in found["parts"].values() for f in part["faults"])]
    assert not found["complete"] and len(faults) == 1 and expected in faults[0]
    with pytest.raises(ValueError, match=expected):
        bases.load_base(str(directory), **NUMERICS)


def test_a_long_list_of_tensors_is_cut_short(capsys, directory, tmp_path):
    path = directory / "transformer.safetensors"
    more = {f"extra.{i}": zeros(1) for i in range(40)}
    write_safetensors(path, drawn("transformer") | more)
    error = refusal(capsys, "import", path, "--to", tmp_path / "x")
    assert error.startswith(f"error: {path}: 40 mismatches") and len(error.splitlines()) == 12
    assert error.endswith("and 30 more\n")
    assert len(inspect(capsys, path)["faults"]) == 40


@pytest.mark.parametrize("content", [POINTER, "[1]", '{"weight_map": [1]}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_one_line(capsys, directory, content):
    (directory / "vae.safetensors").unlink()
    path = directory / f"vae{INDEX}"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        bases.load_base(str(directory), **NUMERICS)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert not inspect(capsys, directory)["complete"]


def test_a_store_that_lost_content_is_one_line(capsys, own, tmp_path):
    main(["import", str(own / "vae.safetensors"), "--to", str(tmp_path / "x")])
    for path in (tmp_path / "x" / "vae").rglob("d/*"):
        if path.parts[-3].startswith("ocdbt.process"):
            path.unlink()
    target = tmp_path / "a.safetensors"
    error = refusal(capsys, "export", tmp_path / "x" / "vae", "--part", "vae", "--to", target)
    assert "it cannot be read: " in error.splitlines()[-1] and not target.exists()


NASTY = "blocks.\x1b[2J\x1b]0;owned\x07\n\rerror: all is well"


@pytest.mark.parametrize("name", [NASTY, "\u202e", "x" * 100_000], ids=["escapes", "turn", "long"])
@pytest.mark.parametrize("file", ["a.safetensors", "a.pt", f"a{INDEX}"])
def test_names_of_tensors_cannot_speak_to_the_terminal(capsys, directory, tmp_path, name, file):
    path = directory / file
    tensors = drawn("transformer") | {name: zeros(1)}
    if file.endswith(".pt"):
        flat_torch(path, tensors)
    elif file.endswith(INDEX):
        path.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "b.safetensors")}))
    else:
        write_safetensors(path, tensors)
    for command in (["import", path, "--to", tmp_path / "x"], ["inspect", path]):
        error = refusal(capsys, *command)
        assert error.startswith(f"error: {path} names a tensor '") and error[:-1].isprintable()
        assert len(error) < 400


@pytest.mark.parametrize("file", ["config.json", "vae.safetensors"])
def test_a_message_of_a_file_cannot_speak_to_the_terminal(capsys, directory, tmp_path, file):
    """A value, and the header that the library repeats."""
    header = b'{"a": {"dtype": "\x1b[2J' + b"y" * 5000 + b'", "shape": [], "data_offsets": [0, 0]}}'
    text = (directory / "config.json").read_text().replace('"dim": 24', '"dim\\u001b[2J": 24')
    whole = len(header).to_bytes(8, "little") + header
    (directory / file).write_bytes(text.encode() if file == "config.json" else whole)
    with pytest.raises(SystemExit):
        main(["inspect", str(directory)])
    out = "".join(capsys.readouterr())
    assert "complete: no" in out
    if file == "vae.safetensors":
        out += refusal(capsys, "import", directory, "--to", tmp_path / "x")
    assert all(line.isprintable() and len(line) < 1100 for line in out.splitlines())


def test_a_config_of_endless_digits_or_brackets_is_one_line(capsys, directory):
    sizes = (directory / "config.json").read_text()
    for content in (
        sizes.replace('"dim": 24', f'"dim": {"9" * 400}', 1),
        sizes.replace('"dim": 24', f'"dim": {"[" * 100_000}', 1),
    ):
        assert content != sizes
        (directory / "config.json").write_text(content)
        error = refusal(capsys, "import", directory, "--to", directory / "x")
        assert "config.json is not valid JSON: " in error and len(error.splitlines()) == 1
        assert not inspect(capsys, directory)["complete"]
