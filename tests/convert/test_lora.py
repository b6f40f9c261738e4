"""PEFT adapters: exact round trips, the pinned config fields, and strict names."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from astrolabe_jax.convert import engine, lora
from astrolabe_jax.models.lora import TARGETS
from astrolabe_jax.models.wan.config import WanConfig
from tests.adapters import from_peft, to_peft

LAYERS = 2
DIM = 6
FFN = 10
RANK = 3
NET = WanConfig(dim=DIM, ffn_dim=FFN, num_layers=LAYERS, num_heads=1)
PINNED_FIELDS = (
    "alpha_pattern auto_mapping base_model_name_or_path bias fan_in_fan_out inference_mode "
    "init_lora_weights layer_replication layers_pattern layers_to_transform loftq_config "
    "lora_alpha lora_dropout megatron_config megatron_core modules_to_save peft_type r "
    "rank_pattern revision target_modules task_type use_dora use_rslora"
).split()


@pytest.fixture
def adapter():
    rng = np.random.default_rng(0)
    widths = {"ffn.0": (DIM, FFN), "ffn.2": (FFN, DIM)}
    tree = {}
    for module in TARGETS:
        inputs, outputs = widths.get(module, (DIM, DIM))
        shapes = {"a": (LAYERS, inputs, RANK), "b": (LAYERS, RANK, outputs)}
        tree[module] = {
            half: rng.normal(size=shape).astype(np.float32) for half, shape in shapes.items()
        }
    return tree


def assert_same_bytes(left, right):
    left, right = engine.flatten(left), engine.flatten(right)
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].tobytes() == right[path].tobytes(), path


def test_names_and_orientation(adapter):
    tensors = to_peft(adapter)
    assert len(tensors) == LAYERS * 20
    product = (
        tensors["base_model.model.blocks.1.ffn.0.lora_B.weight"]
        @ tensors["base_model.model.blocks.1.ffn.0.lora_A.weight"]
    )  # [out, in], as PEFT adds it to a torch weight
    np.testing.assert_allclose(
        product.T, adapter["ffn.0"]["a"][1] @ adapter["ffn.0"]["b"][1], rtol=1e-5
    )


def test_directory_round_trip_is_byte_exact(adapter, tmp_path):
    lora.save_peft(adapter, tmp_path / "lora", RANK, alpha=6)
    lora.save_peft(adapter, tmp_path / "lora", RANK, alpha=6)  # replaces an existing export
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    back, scale = lora.load_lora(tmp_path / "lora", NET, RANK)
    assert scale == 2.0
    assert_same_bytes(back, adapter)


def test_config_holds_exactly_the_pinned_fields_in_order(adapter, tmp_path):
    lora.save_peft(adapter, tmp_path, RANK, alpha=RANK)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert list(config) == PINNED_FIELDS
    assert config["r"] == config["lora_alpha"] == RANK
    assert len(set(config["target_modules"])) == LAYERS * 10
    assert "blocks.1.cross_attn.o" in config["target_modules"]


def test_a_misspelt_name_is_refused(adapter):
    tensors = to_peft(adapter)
    tensors["base_model.model.blocks.0.ffn.3.lora_A.weight"] = tensors.pop(
        "base_model.model.blocks.0.ffn.2.lora_A.weight"
    )
    with pytest.raises(engine.ConversionError) as error:
        from_peft(tensors, adapter)
    assert "unused tensor: base_model.model.blocks.0.ffn.3.lora_A.weight" in str(error.value)
    assert "missing tensor: base_model.model.blocks.0.ffn.2.lora_A.weight" in str(error.value)


def test_another_rank_is_refused(adapter):
    smaller = {
        module: {"a": pair["a"][..., :2], "b": pair["b"][:, :2]} for module, pair in adapter.items()
    }
    with pytest.raises(engine.ConversionError, match="changed shape"):
        from_peft(to_peft(smaller), adapter)


def test_variants_of_lora_are_refused(adapter, tmp_path):
    lora.save_peft(adapter, tmp_path, RANK, alpha=RANK)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    with pytest.raises(ValueError, match="use_dora"):
        lora.load_lora(tmp_path, NET, RANK)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"r": None}, "adapter_config.json: no r; expected the rank, a whole number$"),
        ({"r": 0}, "adapter_config.json: r is 0; expected the rank"),
        ({"r": 2.0}, "adapter_config.json: r is 2.0; expected the rank"),
        ({"lora_alpha": "3"}, "adapter_config.json: lora_alpha is '3'; expected a number between"),
        ({"lora_alpha": 1e30}, "adapter_config.json: lora_alpha is 1e.30; expected a number betw"),
        ({"lora_alpha": None}, "adapter_config.json: no lora_alpha; expected a number between"),
        ({"use_rslora": "false"}, "adapter_config.json: use_rslora is 'false'; expected true or f"),
        ({"fan_in_fan_out": 1}, "adapter_config.json: fan_in_fan_out is 1; expected true or false"),
    ],
)
def test_a_config_without_a_scale_is_named(adapter, tmp_path, change, expected):
    lora.save_peft(adapter, tmp_path, RANK, alpha=RANK)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    with pytest.raises(ValueError, match=expected):
        lora.load_lora(tmp_path, NET, RANK)


def cut(content):
    return content[:-10]


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        ("adapter_config.json", cut, "adapter_config.json is not valid JSON"),
        (
            "adapter_config.json",
            lambda _: b"[1]",
            "adapter_config.json holds a JSON list; expected an object",
        ),
        ("adapter_model.safetensors", cut, "adapter_model.safetensors is cut short, 10 bytes"),
        ("adapter_model.safetensors", lambda _: b"", "adapter_model.safetensors is an empty file"),
    ],
)
def test_a_broken_file_is_named(adapter, tmp_path, name, damage, expected):
    lora.save_peft(adapter, tmp_path, RANK, alpha=RANK)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=expected):
        lora.load_lora(tmp_path, NET, RANK)


def test_an_adapter_of_bfloat16_is_read_exactly(adapter, tmp_path):
    """Runs with lora.dtype bfloat16 export such files."""
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapter)
    lora.save_peft(rounded, tmp_path, RANK, alpha=RANK)
    assert_same_bytes(lora.load_lora(tmp_path, NET, RANK, jnp.bfloat16)[0], rounded)
    exact = jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded)
    assert_same_bytes(lora.load_lora(tmp_path, NET, RANK)[0], exact)


def test_a_dtype_that_no_weights_have_is_named(adapter, tmp_path):
    lora.save_peft(adapter, tmp_path, RANK, alpha=RANK)
    tensors = {name: tensor.astype(np.int8) for name, tensor in to_peft(adapter).items()}
    safetensors.numpy.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        ValueError,
        match="adapter_model.safetensors holds a tensor of dtype int8, .*; expected float weights",
    ):
        lora.load_lora(tmp_path, NET, RANK)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(adapter, tmp_path, name):
    lora.save_peft(adapter, tmp_path, RANK, alpha=RANK)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no .*{name}; expected a PEFT directory with"):
        lora.load_lora(tmp_path, NET, RANK)


def test_another_rank_is_named_and_tensors_that_do_not_fit_with_their_file(adapter, tmp_path):
    smaller = {
        module: {"a": pair["a"][..., :2], "b": pair["b"][:, :2]} for module, pair in adapter.items()
    }
    lora.save_peft(smaller, tmp_path, 2, alpha=2)
    with pytest.raises(
        ValueError,
        match="adapter_model.safetensors: its rank is 2; expected rank 3: set the rank of this run",
    ):
        lora.load_lora(tmp_path, NET, RANK)
    path = tmp_path / "adapter_config.json"
    # the config does not tell the truth
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": RANK}))
    with pytest.raises(
        engine.ConversionError,
        match="cross_attn.k has rank 2; expected rank 3, as adapter_config",
    ):
        lora.load_lora(tmp_path, NET, RANK)
