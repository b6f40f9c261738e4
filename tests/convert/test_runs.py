"""A run takes its base and its first adapter from files of any dialect; their content is in its
fingerprint.
"""

import shutil

import jax
import numpy as np
import pytest

from astrolabe_jax.convert import commands, lora, parts
from astrolabe_jax.models.lora import adapter_shapes
from astrolabe_jax.run import prepare
from astrolabe_jax.runtime.files import read_safetensors, write_safetensors
from experiments.moving_shapes_base.bases import save_net
from tests import tiny_base
from tests.convert import torch_files
from tests.e2e import runs
from tests.models import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base.write_tiny_base(tmp_path_factory.mktemp("base"))


def prepared(workdir, base, **changes):
    return prepare(runs.small_config(base, **changes), workdir)


def framewise(path, seed):
    """Write weights nested and prefixed as Causal-Forcing's are; return path and parameters."""
    net = tiny.random_params(
        parts.shapes("transformer", tiny_base.TRANSFORMER).params, np.random.default_rng(seed)
    )
    tensors = save_net("transformer", net, tiny_base.TRANSFORMER)
    tree = {
        f"model._fsdp_wrapped_module.{name}": torch_files.whole(tensor)
        for name, tensor in tensors.items()
    }
    return torch_files.write(path, {"generator_ema": tree}), net


def test_another_transformer_takes_the_place_of_the_bases(base, tmp_path, caplog):
    plain = prepared(tmp_path / "plain", base)
    path, want = framewise(tmp_path / "a.pt", 9)
    run = prepared(tmp_path / "other", base, transformer=str(path))
    jax.tree.map(np.testing.assert_array_equal, run.base.transformer.params, want)
    jax.tree.map(np.testing.assert_array_equal, run.base.vae.params, plain.base.vae.params)
    shutil.move(path, tmp_path / "moved.pt")
    prepared(tmp_path / "other", base, transformer=str(tmp_path / "moved.pt"))  # the same run
    assert "Wan 2.2" not in caplog.text
    path, _ = framewise(tmp_path / "high_noise_model.pt", 10)
    with pytest.raises(ValueError, match="belongs to another run"):
        prepared(tmp_path / "other", base, transformer=str(path))
    assert "high_noise_model.pt is by its name one of the two transformers of Wan" in caplog.text


def test_an_imported_base_is_placed_as_any_other(base, tmp_path):
    commands.import_(base, tmp_path / "imported")
    run, want = prepared(tmp_path / "a", tmp_path / "imported"), prepared(tmp_path / "b", base)
    for got, net in zip(run.base[:3], want.base[:3], strict=True):
        jax.tree.map(np.testing.assert_array_equal, got.params, net.params)
        for ours, theirs in zip(
            jax.tree.leaves(got.params), jax.tree.leaves(net.params), strict=True
        ):
            assert ours.sharding == theirs.sharding


def test_the_large_nets_are_split_and_the_vae_is_not(base, tmp_path):
    run = prepared(tmp_path / "run", base, **{"mesh.fsdp": 2, "mesh.data": 4})
    kernel = run.base.transformer.params["blocks"]["ffn"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 2
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(run.base.vae.params))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"transformer": "nowhere.pt"}, "config.transformer: .*nowhere.pt"),
        (
            {"transformer": "{tmp}/cut.safetensors"},
            "config.transformer: .*cut.safetensors is cut short, 5 bytes",
        ),
        (
            {"model.size": "wan_14b"},
            "config.base.*text_encoder.vocab_size|config.base.* has width 24 and 2 blocks",
        ),
        (
            {"model.size": "wan_2b"},
            "config.model.size is 'wan_2b'; expected one of '', wan_1.3b, wan_14b",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(base, tmp_path, changes, expected):
    write_safetensors(
        tmp_path / "cut.safetensors", read_safetensors(base / "transformer.safetensors")
    )
    content = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-5])
    changes = {field: value.format(tmp=tmp_path) for field, value in changes.items()}
    with pytest.raises((ValueError, OSError), match=expected):
        prepared(tmp_path / "run", base, **changes)
    assert not (tmp_path / "run").exists()


def test_the_first_adapter_may_be_of_any_dialect(base, tmp_path):
    rng = np.random.default_rng(0)
    shapes = adapter_shapes(tiny_base.TRANSFORMER, 2)
    adapter = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)
    lora.save_diffusers(adapter, tmp_path / "lora", 2, 3.0)
    run = prepared(
        tmp_path / "run",
        base,
        **{"lora.init": str(tmp_path / "lora"), "lora.rank": 2, "lora.alpha": 3.0},
    )
    jax.tree.map(np.testing.assert_array_equal, run.adapter, adapter)
