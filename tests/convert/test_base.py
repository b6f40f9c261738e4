"""Base directories: what is written is read, and whatever is wrong is named."""

import json
import shutil

import jax
import numpy as np
import pytest

from astrolabe_jax.convert import commands
from astrolabe_jax.convert.base import check_net, configs, load_base, weights_of
from astrolabe_jax.convert.engine import ConversionError
from experiments.moving_shapes_base.bases import save_base
from tests.tiny_base import write_tiny_base

FLOAT32 = {"dtype": "float32", "param_dtype": "float32", "remat": False, "attention": "xla"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def directory(written, tmp_path):
    return shutil.copytree(written, tmp_path / "base")


def test_a_base_written_again_is_the_same(directory, tmp_path):
    base = load_base(str(directory), **FLOAT32)
    save_base(
        tmp_path / "again",
        base.transformer,
        base.vae,
        base.text,
        (directory / "tokenizer.json").read_text(),
        np.float32,
    )
    again = load_base(str(tmp_path / "again"), **FLOAT32)
    assert again.fingerprint == base.fingerprint
    for net, other in zip(base[:3], again[:3], strict=True):
        assert net.config == other.config
        jax.tree.map(np.testing.assert_array_equal, net.params, other.params)


def set_size(directory, part, field, value):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config[part][field] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["tokenizer.json", "vae.safetensors", "config.json"])
def test_every_file_is_part_of_the_identity(directory, name):
    before = load_base(str(directory), **FLOAT32).fingerprint
    path = directory / name
    if name.endswith(".json"):
        path.write_text(path.read_text() + "\n")
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    assert load_base(str(directory), **FLOAT32).fingerprint != before


def test_faults_name_the_file_and_the_field(directory):
    config = json.loads((directory / "config.json").read_text())

    def rewrite(change):
        changed = json.loads(json.dumps(config))
        change(changed)
        (directory / "config.json").write_text(json.dumps(changed))

    rewrite(lambda c: c["transformer"].pop("dim"))
    with pytest.raises(ValueError, match="config.json, transformer: .*dim"):
        load_base(str(directory), **FLOAT32)
    rewrite(lambda c: c["vae"].update(colour=1))
    with pytest.raises(
        ValueError, match="config.json: .*\n  vae.colour is unknown; expected dim, z_dim"
    ):
        load_base(str(directory), **FLOAT32)
    rewrite(lambda c: c["transformer"].update(num_layers=3))
    with pytest.raises(
        ConversionError,
        match="transformer.safetensors: .* has width 24 and 2 blocks; expected width 24 and 3 ",
    ):
        load_base(str(directory), **FLOAT32)
    rewrite(lambda c: None)
    path = directory / "vae.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="vae.safetensors is cut short, 100 bytes"):
        load_base(str(directory), **FLOAT32)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="vae.safetensors"):
        load_base(str(directory), **FLOAT32)
    with pytest.raises(
        FileNotFoundError, match="expected a shipped base .moving_shapes. or a directory"
    ):
        load_base("no_such_base", **FLOAT32)


@pytest.mark.parametrize(
    ("part", "field", "value", "expected"),
    [
        ("transformer", "in_channels", 8, "transformer.in_channels is 8; expected vae.z_dim, 4"),
        (
            "transformer",
            "text_dim",
            32,
            "transformer.text_dim is 32; expected text_encoder.dim, 16",
        ),
        (
            "transformer",
            "text_len",
            8,
            "transformer.text_len is 8; expected at least text_encoder.text_len, 16",
        ),
        (
            "text_encoder",
            "vocab_size",
            9,
            "text_encoder.vocab_size is 9, but the tokenizer in .* has ids up to",
        ),
    ],
)
def test_parts_that_do_not_fit_each_other_are_named(directory, part, field, value, expected):
    """Before any weights are read: here there are none."""
    for path in directory.glob("*.safetensors"):
        path.unlink()
    set_size(directory, part, field, value)
    with pytest.raises(ValueError, match=f"(?s)config.json: .*{expected}"):
        load_base(str(directory), **FLOAT32)


@pytest.mark.parametrize(
    ("part", "field", "value", "expected"),
    [
        ("transformer", "dim", 128.0, "a whole number"),
        ("transformer", "num_heads", 0, "a whole number, at least 1"),
        ("transformer", "num_layers", True, "a whole number"),
        ("transformer", "eps", "x", "a finite number"),
        ("transformer", "dim", 10**300, "a whole number, at least 1 and below 2 to the 31"),
        ("transformer", "patch_size", 2, "a list, each entry a whole number"),
        ("transformer", "patch_size", [1, 2], r"\(1, rows, columns\)"),
        ("transformer", "dtype", "float32", "dim, ffn_dim"),
        ("vae", "dim", 8.5, "a whole number"),
        ("vae", "dim", 0, "a whole number, at least 1"),
        ("vae", "dim_mult", [1, None], "a list, each entry a whole number"),
        ("vae", "temporal_downsample", [0, 1, 1], "a list, each entry true or false"),
        ("vae", "latent_mean", [0, 0, 0, "x"], "a list, each entry a finite number"),
        ("vae", "latent_std", [1, 1, 1, 0], "above 0"),
        ("text_encoder", "vocab_size", "a", "a whole number"),
        ("text_encoder", "num_buckets", 0, "a whole number, at least 1"),
        ("text_encoder", "max_distance", 7, "at least a quarter of num_buckets, 8"),
        ("text_encoder", "text_len", [16], "a whole number"),
    ],
)
def test_a_size_that_makes_no_sense_is_named(directory, part, field, value, expected):
    set_size(directory, part, field, value)
    with pytest.raises(
        ValueError, match=f"(?s)config.json.*{part}.*{field} is .*expected {expected}"
    ):
        configs(str(directory), **FLOAT32)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "text_encoder.safetensors",
            "text_encoder.safetensors: it is a text encoder; expected a t",
        ),
        ("vae.safetensors", "vae.safetensors: it is a vae; expected a transformer: give a file of"),
        ("tokenizer.json", "tokenizer.json is a tokenizer; expected a file of weights of a transf"),
        ("imported/vae", "imported/vae: it is a vae; expected a transformer"),
    ],
)
def test_another_part_is_named(directory, name, expected):
    """By its header alone, as by its content."""
    net = configs(str(directory), **FLOAT32)["transformer"]
    if name.startswith("imported"):
        commands.import_(directory / "vae.safetensors", directory / "imported")
    given = str(directory / name)
    with pytest.raises(ValueError, match=expected):
        check_net("transformer", weights_of(given, "transformer"), net)
    with pytest.raises(ValueError, match=expected):
        load_base(str(directory), transformer=given, **FLOAT32)


def test_a_transformer_may_take_longer_prompts_than_the_encoder_gives(directory):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["transformer"]["text_len"] = 32
    path.write_text(json.dumps(config))
    assert load_base(str(directory), **FLOAT32).transformer.config.text_len == 32


def test_a_part_that_is_no_object_is_named(directory):
    (directory / "config.json").write_text('{"transformer": 1, "vae": {}, "text_encoder": {}}')
    with pytest.raises(
        ValueError,
        match="config.json: expected objects under the keys transformer, vae, text_encoder",
    ):
        load_base(str(directory), **FLOAT32)
