"""One adapter in every dialect gives the same tree and scale; every key at fault is named."""

import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from astrolabe_jax.convert import commands, engine, lora, wan
from astrolabe_jax.convert.engine import ConversionError, substituted
from astrolabe_jax.models.lora import TARGETS
from astrolabe_jax.models.wan.config import WanConfig
from astrolabe_jax.runtime.files import safetensors_metadata
from tests.adapters import to_peft
from tests.convert import torch_files
from tests.models import tiny

NET = tiny.CONFIG
RANK = 2


@pytest.fixture(scope="module")
def adapter():
    return tiny.adapter(RANK)


def spelled(adapter, prefix="", form="original", halves=("lora_A", "lora_B"), infix=""):
    """Return the tensors of an adapter under the names of a dialect."""
    tensors = engine.save(lora.table(prefix, form), adapter)
    a, b = (f".{half}{infix}." for half in halves)
    return {
        name.replace(".lora_A.", a).replace(".lora_B.", b): tensor
        for name, tensor in tensors.items()
    }


def underscored(tensors, prefix="lora_unet_"):
    """Return tensors under the names of kohya, musubi and LyCORIS."""
    split = {name: re.fullmatch(r"(.+?)\.(lora_.+|alpha)", name) for name in tensors}
    return {
        f"{prefix}{parts[1].replace('.', '_')}.{parts[2]}": tensors[name]
        for name, parts in split.items()
    }


def alphas(value, prefix="", form="original"):
    names = {
        substituted(f"blocks.{{i}}.{module}", wan.diffusers(NET) if form == "diffusers" else ())
        for module in TARGETS
    }
    return {
        f"{prefix}{name.format(i=i)}.alpha": np.array(value, getattr(value, "dtype", np.float32))
        for i in range(NET.num_layers)
        for name in names
    }


def torch_tree(tensors):
    return {name: torch_files.whole(tensor) for name, tensor in tensors.items()}


def save(path, tensors, metadata=None):
    safetensors.numpy.save_file(tensors, path, metadata)
    return path


def peft_bin(directory, adapter):
    lora.save_peft(adapter, directory, RANK, 3.0)
    (directory / "adapter_model.safetensors").unlink()
    torch_files.write(directory / "adapter_model.bin", torch_tree(to_peft(adapter)))
    return directory


def workdir(directory, adapter):
    lora.save_peft(adapter, directory / "lora", RANK, 3.0)
    return directory


def exported_to_diffusers(directory, adapter):
    lora.save_diffusers(adapter, directory, RANK, 3.0)
    return directory


# name -> (writer, scale); alpha is 3 wherever the dialect can tell
DIALECTS = {
    "peft_bin": (peft_bin, 1.5),
    "workdir": (workdir, 1.5),
    "diffusers_directory": (exported_to_diffusers, 1.5),
    "diffusers_file": (lambda d, a: exported_to_diffusers(d, a) / lora.DIFFUSERS_WEIGHTS, 1.5),
    "diffusers_without_metadata": (
        lambda d, a: save(d / "a.safetensors", spelled(a, "transformer.", "diffusers")),
        1.0,
    ),
    "default": (
        lambda d, a: torch_files.write(
            d / "a.pt", torch_tree(spelled(a, "base_model.model.", infix=".default"))
        ),
        1.0,
    ),
    "longlive": (
        lambda d, a: torch_files.write(
            d / "lora.pt",
            {
                "generator_lora": torch_tree(spelled(a, "base_model.model.")),
                "critic_lora": torch_tree(
                    spelled(jax.tree.map(np.zeros_like, a), "base_model.model.")
                ),
                "step": 7,
            },
        ),
        1.0,
    ),
    "longlive_flat": (
        lambda d, a: torch_files.write(
            d / "lora.pt", torch_tree(spelled(a, "base_model.model.model."))
        ),
        1.0,
    ),
    "comfy": (lambda d, a: save(d / "a.safetensors", spelled(a, "diffusion_model.")), 1.0),
    "comfy_alpha": (
        lambda d, a: save(
            d / "a.safetensors", spelled(a, "diffusion_model.") | alphas(3.0, "diffusion_model.")
        ),
        1.5,
    ),
    "down_up_alpha": (
        lambda d, a: save(
            d / "a.safetensors",
            spelled(a, "diffusion_model.", halves=("lora_down", "lora_up"))
            | alphas(3.0, "diffusion_model."),
        ),
        1.5,
    ),
    "underscores": (
        lambda d, a: save(
            d / "a.safetensors",
            underscored(spelled(a, halves=("lora_down", "lora_up")) | alphas(np.int64(3))),
        ),
        1.5,
    ),
    "underscores_of_diffusers": (
        lambda d, a: save(
            d / "a.safetensors",
            underscored(spelled(a, form="diffusers") | alphas([3.0], form="diffusers"), "lycoris_"),
        ),
        1.5,
    ),
    "alpha_in_the_header": (
        lambda d, a: save(
            d / "a.safetensors", underscored(spelled(a)), {"ss_network_alpha": "3.0"}
        ),
        1.5,
    ),
    "peft_file_beside_its_config": (
        lambda d, a: workdir(d, a) / "lora" / "adapter_model.safetensors",
        1.5,
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_the_same_adapter(tmp_path, adapter, dialect):
    writer, scale = DIALECTS[dialect]
    path = writer(tmp_path, adapter)
    for net, rank in ((NET, RANK), (NET, None), (None, None)):
        got, got_scale = lora.load_lora(path, net, rank)
        assert got_scale == scale
        jax.tree.map(np.testing.assert_array_equal, got, adapter)


@pytest.mark.parametrize("form", lora.SAVERS)
@pytest.mark.parametrize("dialect", ["comfy_alpha", "longlive"])
def test_what_is_exported_is_the_same_adapter(tmp_path, adapter, dialect, form):
    (tmp_path / "from").mkdir()
    writer, scale = DIALECTS[dialect]
    commands.export_lora(writer(tmp_path / "from", adapter), tmp_path / "to", form)
    got, got_scale = lora.load_lora(tmp_path / "to", NET)
    assert got_scale == scale
    jax.tree.map(np.testing.assert_array_equal, got, adapter)


def test_alphas_that_differ_are_folded(tmp_path, adapter):
    by_module = alphas(3.0)
    by_module["blocks.1.ffn.2.alpha"] = np.array(1.0, np.float32)
    del by_module["blocks.0.ffn.0.alpha"]  # without one: alpha is the rank
    path = save(tmp_path / "a.safetensors", spelled(adapter) | by_module)
    got, scale = lora.load_lora(path, NET)
    assert scale == 1.0
    np.testing.assert_array_equal(got["self_attn.q"]["b"], 1.5 * adapter["self_attn.q"]["b"])
    np.testing.assert_array_equal(got["ffn.2"]["b"][1], 0.5 * adapter["ffn.2"]["b"][1])
    np.testing.assert_array_equal(got["ffn.0"]["b"][0], adapter["ffn.0"]["b"][0])
    np.testing.assert_array_equal(got["ffn.2"]["a"], adapter["ffn.2"]["a"])


@pytest.mark.parametrize("form", ["original", "diffusers"])
@pytest.mark.parametrize("prefix", ["base_model.model.", "transformer.", ""])
def test_any_key_at_fault_is_named(tmp_path, adapter, form, prefix):
    """Half pairs, misspelt and unknown keys, mixed ranks: every key is named as it is in the
    file.
    """
    tensors, path = spelled(adapter, prefix, form), tmp_path / "a.safetensors"

    def refused(changed, *culprits):
        with pytest.raises(ConversionError) as error:
            lora.load_lora(save(path, changed))
        assert all(culprit in str(error.value) for culprit in culprits), str(error.value)

    for i, name in enumerate(tensors):
        seen = name.removeprefix("base_model.model.")
        rest = {other: tensor for other, tensor in tensors.items() if other != name}
        changes = [
            (rest, [f"missing tensor: {seen}"]),
            (
                rest | {f"{name}x": tensors[name]},
                [f"missing tensor: {seen}", f"unused tensor: {seen}x "],
            ),
            (
                tensors | {f"{prefix}{i}.lora_A.weight": tensors[name]},
                [f"unused tensor: {prefix}{i}.lora_A.weight ".replace("base_model.model.", "")],
            ),
            (
                tensors | {name: np.ones((3, 3), np.float32)},
                ["changed shape: ", f"{seen} is [3, 3]"],
            ),
        ]
        changed, culprits = changes[i % 4]
        refused(changed, *culprits)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("blocks.0.self_attn.q.diff", "blocks.0.self_attn.q.weight"),
        ("blocks.0.norm3.diff_b", "blocks.0.norm3.bias"),
        ("blocks.0.self_attn.q.lora_B.bias", "blocks.0.self_attn.q.bias"),
    ],
)
def test_an_adapter_tree_holds_no_whole_differences(tmp_path, adapter, name, tensor):
    path = save(tmp_path / "a.safetensors", spelled(adapter) | {name: np.ones(2, np.float32)})
    with pytest.raises(
        ConversionError,
        match=f"it changes 1 tensor that an adapter cannot hold: {tensor}; merge it into the base",
    ):
        lora.load_lora(path)


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [
        ("lora_magnitude_vector", "it is a DoRA (lora_magnitude_vector); merge it into its base"),
        ("dora_scale", "it is a DoRA (dora_scale); merge it into its base"),
        ("lora_mid.weight", "it is a LoRA with a Tucker core (lora_mid); merge it"),
        ("lora_A.other.weight", "it holds two adapters: blocks.0.self_attn.q.lora_A"),
        ("reshape_weight", "unused tensor: blocks.0.self_attn.q.reshape_weight [2]"),
    ],
)
def test_other_variants_are_refused_by_name(tmp_path, adapter, suffix, expected):
    name = f"blocks.0.self_attn.q.{suffix}"
    path = save(tmp_path / "a.safetensors", spelled(adapter) | {name: np.ones(2, np.float32)})
    with pytest.raises(ConversionError, match=re.escape(expected)):
        lora.load_lora(path)


def test_an_alpha_of_nothing_is_refused(tmp_path, adapter):
    alpha = {"blocks.7.ffn.0.alpha": np.array(1.0, np.float32)}
    path = save(tmp_path / "a.safetensors", spelled(adapter) | alpha)
    with pytest.raises(
        ConversionError, match="alpha of modules that are not adapted: blocks.7.ffn.0"
    ):
        lora.load_lora(path)


def test_what_is_no_lora_is_refused(tmp_path):
    path = save(tmp_path / "a.safetensors", {"blocks.0.modulation": np.ones(2, np.float32)})
    with pytest.raises(
        ConversionError,
        match="it is no LoRA: expected lora_A and lora_B, it holds blocks.0.modulation",
    ):
        lora.load_lora(path)
    with pytest.raises(
        FileNotFoundError, match=f"nothing is at {tmp_path}/nothing; expected a PEFT directory with"
    ):
        lora.load_lora(tmp_path / "nothing")
    with pytest.raises(
        FileNotFoundError, match="is a directory that holds a.safetensors; expected"
    ):
        lora.load_lora(tmp_path)


def test_another_rank_or_net_is_refused(tmp_path, adapter):
    path = save(tmp_path / "a.safetensors", spelled(adapter))
    with pytest.raises(
        ConversionError, match="its rank is 2; expected rank 4: set the rank of this run to 2"
    ):
        lora.load_lora(path, NET, 4)
    other = WanConfig(dim=12, ffn_dim=32, num_layers=2, num_heads=1)
    with pytest.raises(
        ConversionError, match="made for a transformer of width 24; this one has width 12: choose"
    ):
        lora.load_lora(path, other)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"transformer.use_dora": True}, "not a plain LoRA adapter: .*use_dora"),
        (
            {"transformer.lora_alpha": None},
            f"{lora.DIFFUSERS_WEIGHTS}: lora_alpha is None; expected a number",
        ),
        ({"transformer.r": 4}, "attn1.to_[a-z]+ has rank 2; expected rank 4, as pytorch_lora"),
    ],
)
def test_the_header_of_a_diffusers_file_is_checked(tmp_path, adapter, change, expected):
    lora.save_diffusers(adapter, tmp_path, RANK, 3.0)
    path = tmp_path / lora.DIFFUSERS_WEIGHTS
    described = json.loads(safetensors_metadata(path)[lora.DIFFUSERS_METADATA]) | change
    save(
        path,
        spelled(adapter, "transformer.", "diffusers"),
        {lora.DIFFUSERS_METADATA: json.dumps(described)},
    )
    with pytest.raises(ValueError, match=expected):
        lora.load_lora(tmp_path)
    save(path, spelled(adapter, "transformer.", "diffusers"), {lora.DIFFUSERS_METADATA: "[]"})
    with pytest.raises(ValueError, match="lora_adapter_metadata in its header is no JSON object"):
        lora.load_lora(tmp_path)


def test_adapters_have_the_names_of_the_module_map():
    """They are those of docs/checkpoints.md, Diffusers names."""
    names = {module: substituted(f"blocks.3.{module}", wan.diffusers(NET)) for module in TARGETS}
    assert (
        names["self_attn.q"] == "blocks.3.attn1.to_q"
        and names["cross_attn.o"] == "blocks.3.attn2.to_out.0"
    )
    assert names["ffn.0"] == "blocks.3.ffn.net.0.proj" and names["ffn.2"] == "blocks.3.ffn.net.2"
