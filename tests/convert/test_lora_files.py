"""LoRAs as people have them: `convert merge` and `sample --lora` apply all of each exactly, an
adapter tree takes what fits it, and everything else is refused in one sentence.
"""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from astrolabe_jax.convert import base as bases
from astrolabe_jax.convert import commands, engine, lora, nets, parts
from astrolabe_jax.convert.__main__ import main
from astrolabe_jax.models.lora import TARGETS
from astrolabe_jax.runtime.files import Lazy, read_safetensors
from tests import tiny_base
from tests.convert import torch_files

NET = tiny_base.TRANSFORMER
SHAPES = nets.source_shapes(parts.PARTS["transformer"], NET)
LINEARS = [f"blocks.{i}.{module}.weight" for i in range(NET.num_layers) for module in TARGETS]
RANK = 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base.write_tiny_base(tmp_path_factory.mktemp("base"))


class Writer:
    """A LoRA as it is made up, and the change of each tensor that it stands for."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.tensors: dict[str, np.ndarray] = {}
        self.changes: dict[str, np.ndarray] = {}
        self.config: dict | None = None
        self.header: dict | None = None

    def draw(self, *shape):
        return self.rng.normal(size=shape).astype(np.float32)

    def pair(self, weight, name, rank=RANK, scale=1.0, halves=("lora_down", "lora_up")):
        """Add a pair for a weight under the name of its module in the file."""
        out, *inputs = SHAPES[weight]
        down = self.draw(rank, *inputs)
        up = self.draw(out, rank, *(1 for _ in inputs[1:]))
        for half, tensor in zip(halves, (down, up), strict=True):
            self.tensors[f"{name}.{half}.weight"] = tensor
        product = up.reshape(out, rank) @ down.reshape(rank, -1)
        self.add(weight, scale * product.reshape(SHAPES[weight]))

    def add(self, tensor, change):
        self.changes[tensor] = self.changes.get(tensor, 0.0) + change

    def difference(self, tensor, name):
        change = self.draw(*SHAPES[tensor])
        self.tensors[name] = change
        self.add(tensor, change)

    def write(self, directory):
        path = directory / "lora.safetensors"
        if self.config:
            path = directory / "adapter_model.safetensors"
            (directory / "adapter_config.json").write_text(json.dumps(self.config))
        safetensors.numpy.save_file(self.tensors, path, self.header)
        return path


def module_of(weight):
    return weight.removesuffix(".weight")


def attention_alone(writer):
    for weight in LINEARS:
        if "attn" in weight:
            writer.pair(weight, f"diffusion_model.{module_of(weight)}")


def last_block_alone(writer):
    for weight in LINEARS[-10:]:
        writer.pair(weight, f"diffusion_model.{module_of(weight)}")


def several_ranks(writer):
    """The alpha of every second module is not its rank."""
    for j, weight in enumerate(LINEARS):
        rank = 1 + j % 4
        alpha = rank * (1 + j % 2)
        name = f"diffusion_model.{module_of(weight)}"
        writer.pair(weight, name, rank, alpha / rank)
        writer.tensors[f"{name}.alpha"] = np.array(alpha, np.int64)


def underscores(writer):
    for weight in LINEARS:
        name = f"lora_unet_{module_of(weight).replace('.', '_')}"
        writer.pair(weight, name, scale=1.0 / RANK)
        writer.tensors[f"{name}.alpha"] = np.ones(1, np.float16)


def extracted(writer):
    """Every tensor is changed, as tools do that subtract one transformer from another."""
    ends = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}
    for tensor, shape in SHAPES.items():
        module, _, end = tensor.rpartition(".")
        if end == "weight" and len(shape) > 1:
            writer.pair(tensor, f"diffusion_model.{module}")
        else:
            writer.difference(tensor, f"diffusion_model.{module}.{ends[end]}")


def with_biases(writer):
    """Biases of adapted linears, as the extracted LoRAs of lightx2v have them."""
    for weight in LINEARS:
        writer.pair(weight, f"diffusion_model.{module_of(weight)}")
        bias = f"{module_of(weight)}.bias"
        writer.difference(bias, f"diffusion_model.{module_of(weight)}.diff_b")


def lycoris(writer):
    """Whole weights, and norms with names of their own."""
    for tensor in SHAPES:
        module, _, end = tensor.rpartition(".")
        flat = f"lycoris_{module.replace('.', '_')}"
        is_norm = ".norm" in tensor
        if end == "weight":
            writer.difference(tensor, f"{flat}.{'w_norm' if is_norm else 'diff'}")
        elif end == "bias":
            writer.difference(tensor, f"{flat}.{'b_norm' if is_norm else 'diff_b'}")


def a_pair_and_a_difference(writer):
    """Of one weight, and the bias of a pair, which has its scale."""
    weight = LINEARS[0]
    name = module_of(weight)
    writer.pair(weight, name, scale=3.0 / RANK, halves=("lora_A", "lora_B"))
    writer.tensors[f"{name}.alpha"] = np.array(3.0, np.float32)
    writer.difference(weight, f"{name}.diff")
    bias = writer.draw(NET.dim)
    writer.tensors[f"{name}.lora_B.bias"] = bias
    writer.add(f"{name}.bias", 3.0 / RANK * bias)


def outside_the_blocks(writer):
    """In the names of diffusers."""
    names = {
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "head.head": "proj_out",
        "patch_embedding": "patch_embedding",
    }
    for module, theirs in names.items():
        writer.pair(f"{module}.weight", f"transformer.{theirs}", halves=("lora_A", "lora_B"))


def header(writer):
    writer.header = {"ss_network_dim": "2", "ss_network_alpha": "0.5"}
    for weight in LINEARS:
        writer.pair(weight, f"lora_unet_{module_of(weight).replace('.', '_')}", scale=0.25)


def peft_patterns(writer):
    writer.config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {"ffn.0": 4, r"blocks\.1\.self_attn\.q": 1},
        "alpha_pattern": {"^model.blocks.*cross_attn.[qk]": 5, "q_proj": 7},
        "init_lora_weights": "gaussian",
    }
    for weight in LINEARS:
        rank = 4 if "ffn.0" in weight else 1 if "1.self_attn.q" in weight else RANK
        alpha = 5 if "cross_attn.q" in weight or "cross_attn.k" in weight else 3
        name = f"base_model.model.{module_of(weight)}"
        writer.pair(weight, name, rank, alpha / rank**0.5, ("lora_A", "lora_B"))


KINDS = (
    attention_alone,
    last_block_alone,
    several_ranks,
    underscores,
    extracted,
    with_biases,
    lycoris,
    a_pair_and_a_difference,
    outside_the_blocks,
    header,
    peft_patterns,
)
FIT_A_TREE = (
    attention_alone,
    last_block_alone,
    several_ranks,
    underscores,
    header,
    peft_patterns,
)


def made(kind, directory):
    writer = Writer()
    kind(writer)
    return writer, writer.write(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_it_is_applied(base, tmp_path, kind):
    """By the command, and to the leaves that `sample` loads, bit for bit the same."""
    writer, path = made(kind, tmp_path)
    main(["merge", str(base), str(path), "--to", str(tmp_path / "merged.safetensors")])
    merged = read_safetensors(tmp_path / "merged.safetensors")
    plain = read_safetensors(base / "transformer.safetensors")
    assert merged.keys() == plain.keys() and writer.changes
    for name, tensor in plain.items():
        want = np.asarray(tensor) + writer.changes.get(name, 0.0)
        np.testing.assert_allclose(np.asarray(merged[name]), want, rtol=0, atol=1e-5)
    change = lora.leaf_changer(lora.read_changes(path, NET), NET)
    numerics = {"dtype": "float32", "param_dtype": "float32"}
    sampled = bases.load_base(str(base), place=change, **numerics)
    again = bases.load_base(str(base), transformer=str(tmp_path / "merged.safetensors"), **numerics)
    leaves = engine.flatten(again.transformer.params)
    for where, leaf in engine.flatten(sampled.transformer.params).items():
        np.testing.assert_array_equal(leaf, leaves[where])


def test_numbers_that_are_none_are_not_merged(base, tmp_path, capsys):
    writer = Writer()
    attention_alone(writer)
    name = next(iter(writer.tensors))
    plain = name.removeprefix("diffusion_model.")
    writer.tensors[name][0, 0] = np.nan
    path = writer.write(tmp_path)
    for command in (["merge", str(base), str(path)], ["export-lora", str(path)]):
        with pytest.raises(SystemExit):
            main([*command, "--to", str(tmp_path / "x.safetensors"), "--format", "diffusers"])
        assert (
            f"error: {path}: {plain} holds numbers that are not finite" in capsys.readouterr().err
        )
        assert not (tmp_path / "x.safetensors").exists()
    writer.tensors[name][0, 0] = 3e38
    path = writer.write(tmp_path)
    with pytest.raises(SystemExit):
        main(["merge", str(base), str(path), "--to", str(tmp_path / "x.safetensors")])
    assert f"error: {path}: merged blocks.0.self_attn.q.weight is not finite in float32" in (
        capsys.readouterr().err
    )


def test_a_warning_looks_like_those_of_the_other_programs(tmp_path):
    writer = Writer()
    writer.pair(LINEARS[0], module_of(LINEARS[0]), halves=("lora_A", "lora_B"))
    path = writer.write(tmp_path).rename(tmp_path / "a.safetensors")
    command = ["export-lora", path, "--to", tmp_path / "out.safetensors", "--format", "diffusers"]
    ended = subprocess.run(
        [sys.executable, "-m", "astrolabe_jax.convert", *command], capture_output=True, text=True
    )
    assert ended.returncode == 0
    assert (
        ended.stderr == f"warning: {path} tells no alpha; scale 1 is taken, as other programs do\n"
    )


def test_a_sum_too_large_for_its_dtype_is_not_merged():
    weight, change = (
        Lazy((1,), np.dtype(dtype), lambda dtype=dtype: np.array([6e4], dtype))
        for dtype in ("float16", "float32")
    )
    with pytest.raises(engine.ConversionError, match="not finite in float16"):
        np.asarray(lora.merged(weight, [change]))
    assert np.asarray(lora.merged(weight, [change], "float32")) == 12e4


@pytest.mark.parametrize("alpha", [1, 1.0])
def test_alpha_may_be_a_plain_number_in_a_torch_file(tmp_path, alpha):
    writer, path = made(underscores, tmp_path)
    tree = {
        name: alpha if name.endswith(".alpha") else torch_files.whole(tensor)
        for name, tensor in writer.tensors.items()
    }
    numbers = torch_files.write(tmp_path / "numbers.pt", tree)
    (tensors, scale), (others, other) = lora.load_lora(path, NET), lora.load_lora(numbers, NET)
    assert scale == other == 1.0 / RANK
    jax.tree.map(np.testing.assert_array_equal, tensors, others)


@pytest.mark.parametrize("kind", FIT_A_TREE)
@pytest.mark.parametrize("form", lora.SAVERS)
def test_what_fits_a_tree_can_be_trained_and_exported(base, tmp_path, kind, form):
    """What is absent is zero, scales that differ are folded; what is exported changes the same."""
    writer, path = made(kind, tmp_path)
    adapter, scale = lora.load_lora(path, NET)
    assert adapter.keys() == TARGETS.keys()
    for module, pair in adapter.items():
        for i, (a, b) in enumerate(zip(pair["a"], pair["b"], strict=True)):
            want = writer.changes.get(f"blocks.{i}.{module}.weight", np.zeros((1, 1)))
            np.testing.assert_allclose(scale * (a @ b).T, want + np.zeros_like(a @ b).T, atol=1e-5)
    commands.export_lora(path, tmp_path / "to", form)
    exported = lora.read_changes(tmp_path / "to", NET)
    assert exported.keys() >= writer.changes.keys()
    for name, (change,) in exported.items():
        want = writer.changes.get(name, 0.0)
        np.testing.assert_allclose(np.asarray(change), want + np.zeros(change.shape), atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FIT_A_TREE])
def test_what_does_not_fit_a_tree_is_refused_with_the_way_out(tmp_path, capsys, kind):
    _, path = made(kind, tmp_path)
    with pytest.raises(engine.ConversionError, match="cannot hold: .*merge it into the base"):
        lora.load_lora(path, NET)
    with pytest.raises(SystemExit):
        main(["export-lora", str(path), "--to", str(tmp_path / "to")])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and len(error) < 700 and not (tmp_path / "to").exists()


@pytest.mark.filterwarnings("error")
def test_float64_is_read_as_float32_without_a_warning(tmp_path):
    writer, path = made(attention_alone, tmp_path)
    writer.tensors = {name: tensor.astype(np.float64) for name, tensor in writer.tensors.items()}
    (tmp_path / "wide").mkdir()
    (adapter, _), (wide, _) = (
        lora.load_lora(file, NET) for file in (path, writer.write(tmp_path / "wide"))
    )
    jax.tree.map(np.testing.assert_array_equal, adapter, wide)
    opened, _ = lora.open_lora(tmp_path / "wide" / path.name, NET)
    assert opened["self_attn.q"]["a"].dtype == np.float32


def test_bfloat16_is_rounded_once(base, tmp_path):
    writer, path = made(several_ranks, tmp_path)
    change = lora.leaf_changer(lora.read_changes(path, NET), NET)
    low = bases.load_base(str(base), place=change, dtype="float32", param_dtype="bfloat16")
    plain = read_safetensors(base / "transformer.safetensors")
    kernel = np.asarray(low.transformer.params["blocks"]["ffn"]["fc1"]["kernel"])
    for i, layer in enumerate(kernel):
        name = f"blocks.{i}.ffn.0.weight"
        weight = np.asarray(plain[name]).astype(jnp.bfloat16).astype(np.float32)
        want = (weight + writer.changes[name]).astype(jnp.bfloat16)
        wrong = np.asarray(layer.T != want).mean()
        assert layer.dtype == jnp.bfloat16 and wrong < 0.01  # products differ in their last bit


RELATIVES = {
    "it is made for a transformer of width 1536 (wan_1.3b); this one has width 24: choose": {
        "blocks.0.self_attn.q.lora_A.weight": (2, 1536),
        "blocks.0.self_attn.q.lora_B.weight": (1536, 2),
    },
    "it changes block 7, the transformer has blocks 0 to 1: choose": {
        "blocks.7.self_attn.q.lora_A.weight": (2, 24),
        "blocks.7.self_attn.q.lora_B.weight": (24, 2),
    },
    "it is for image-to-video (k_img, v_img), whose attention sees a picture": {
        f"lora_unet_blocks_0_cross_attn_{name}.lora_{half}.weight": (2, 2)
        for name in ("q", "k_img", "v_img")
        for half in ("down", "up")
    },
    "it is not for Wan's transformer: it holds double_blocks.0.img_attn": {
        f"double_blocks.{i}.img_attn.lora_{half}.weight": (2, 2) for i in range(9) for half in "AB"
    },
    "it is for the second transformer of Wan 2.2 (transformer_2)": {
        f"transformer_2.blocks.0.attn1.to_q.lora_{half}.weight": (2, 2) for half in "AB"
    },
    "it is for VACE (vace_blocks)": {
        f"vace_blocks.0.self_attn.q.lora_{half}.weight": (2, 2) for half in "AB"
    },
    "it changes the text encoder, too (lora_te": {
        f"lora_te{i}_block.lora_{half}.weight": (2, 2) for i in "12" for half in ("down", "up")
    },
    "it is a DoRA (dora_scale); merge it into its base": {
        "blocks.0.self_attn.q.lora_A.weight": (2, 24),
        "blocks.0.self_attn.q.lora_B.weight": (24, 2),
        "blocks.0.self_attn.q.dora_scale": (24, 1),
    },
    "it is a LoKr (lokr_w1, lokr_w2); merge it into its base": {
        "blocks.0.self_attn.q.lokr_w1": (2, 2),
        "blocks.0.self_attn.q.lokr_w2": (12, 12),
        "blocks.0.self_attn.q.alpha": (),
    },
    "it is a LoHa (hada_w1_a, hada_w1_b and 2 more); merge it into its base": {
        f"blocks.0.self_attn.q.hada_w{i}_{half}": (2, 24) for i in "12" for half in "ab"
    },
    "blocks.0.self_attn.q.alpha has shape [2]; expected one finite number": {
        "blocks.0.self_attn.q.lora_A.weight": (2, 24),
        "blocks.0.self_attn.q.lora_B.weight": (24, 2),
        "blocks.0.self_attn.q.alpha": (2,),
    },
}


def test_an_alpha_that_is_too_large_is_told(tmp_path):
    writer, path = made(underscores, tmp_path)
    name = next(name for name in writer.tensors if name.endswith("alpha"))
    writer.tensors[name] = np.array(1e30, np.float32)
    with pytest.raises(engine.ConversionError, match=f"{name} is 1e.30; expected a number betw"):
        lora.load_lora(writer.write(tmp_path), NET)


@pytest.mark.parametrize("expected", RELATIVES)
def test_a_relative_is_refused_in_one_sentence(base, tmp_path, capsys, expected):
    tensors = {name: np.ones(shape, np.float32) for name, shape in RELATIVES[expected].items()}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors")
    to = tmp_path / "to.safetensors"
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(base), str(tmp_path / "a.safetensors"), "--to", str(to)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and not to.exists()
    assert f"error: {tmp_path / 'a.safetensors'}: {expected}" in error
    assert error.count("\n") == 1 and len(error) < 400


def test_a_long_list_is_cut_short(base, tmp_path, capsys):
    writer = Writer()
    attention_alone(writer)
    writer.tensors |= {f"blocks.{i}.mystery.diff": np.ones(2, np.float32) for i in range(11)}
    writer.tensors["blocks.0.self_attn.q.lora_A.bias"] = np.ones(2, np.float32)
    path = writer.write(tmp_path)
    with pytest.raises(SystemExit):
        main(["merge", str(base), str(path), "--to", str(tmp_path / "to.safetensors")])
    lines = capsys.readouterr().err.splitlines()
    assert "unused tensor: blocks.0.mystery.diff [2]" in lines[1]
    assert len(lines) == 10 and lines[-1] == "  and 4 more"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which"),
        ({"init_lora_weights": "olora"}, "convert the adapter in PEFT first: save_pretrained"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq', which changes the weights"),
        ({"use_dora": True}, "not a plain LoRA adapter: .*use_dora"),
        ({"modules_to_save": ["head"]}, "not a plain LoRA adapter: .*modules_to_save"),
        ({"bias": "all"}, "not a plain LoRA adapter: .*bias"),
        ({"r": 3}, "has rank 2; expected rank 3, as adapter_config.json says"),
        ({"lora_alpha": 10**400}, "is not valid JSON: a number of 401 digits"),
        ({"alpha_pattern": {"q": "x"}}, "has alpha_pattern 'x'; expected a number"),
        ({"alpha_pattern": {"(q": 4}}, "pattern '.q' makes no sense"),
        ({"rank_pattern": {"(a|a)*q": 4}}, "rank_pattern .*; expected names of modules"),
        ({"rank_pattern": ["q"]}, "rank_pattern .*; expected names of modules"),
    ],
)
def test_a_config_of_another_kind_is_refused(tmp_path, change, expected):
    writer = Writer()
    writer.config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4} | change
    writer.pair(LINEARS[0], module_of(LINEARS[0]), halves=("lora_A", "lora_B"))
    path = writer.write(tmp_path)
    for given in (path, tmp_path):
        with pytest.raises(ValueError, match=expected) as error:
            lora.read_changes(given, NET)
        assert len(str(error.value)) < 500


def test_the_strength_is_never_1_in_silence(tmp_path, caplog):
    writer = Writer()
    writer.config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4}
    writer.pair(LINEARS[0], module_of(LINEARS[0]), scale=2.0, halves=("lora_A", "lora_B"))
    path = writer.write(tmp_path)
    (change,) = lora.read_changes(path, NET)[LINEARS[0]]
    np.testing.assert_allclose(np.asarray(change), writer.changes[LINEARS[0]], atol=1e-5)
    writer.tensors[f"{module_of(LINEARS[0])}.alpha"] = np.array(1.0, np.float32)
    safetensors.numpy.save_file(writer.tensors, path)
    with pytest.raises(ValueError, match="alpha is 1, which is scale 0.5, but .* gives scale 2"):
        lora.read_changes(path, NET)
    del writer.tensors[f"{module_of(LINEARS[0])}.alpha"]
    safetensors.numpy.save_file(writer.tensors, path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no .*adapter_config.json; expected a PEFT"):
        lora.read_changes(path, NET)
    assert not caplog.records
    lora.read_changes(path.rename(tmp_path / "a.safetensors"), NET)
    assert "a.safetensors tells no alpha; scale 1 is taken" in caplog.text
    safetensors.numpy.save_file(
        writer.tensors, tmp_path / "a.safetensors", {"ss_network_alpha": "Dynamic"}
    )
    with pytest.raises(ValueError, match="alpha is 'Dynamic' in its header; expected a number"):
        lora.read_changes(tmp_path / "a.safetensors", NET)


def test_a_lora_in_place_of_a_transformer_is_named(base, tmp_path, capsys):
    _, path = made(attention_alone, tmp_path)
    with pytest.raises(engine.ConversionError, match="it is a LoRA, not a whole net; give the"):
        bases.load_base(str(base), transformer=str(path), dtype="float32", param_dtype="float32")
    with pytest.raises(SystemExit):
        main(["import", str(path), "--to", str(tmp_path / "to")])
    assert "it is a LoRA, not a whole net" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (attention_alone, ["not adapted: ffn.0, ffn.2", "rank 2, scale 1.0"]),
        (several_ranks, ["rank 1 to 4, scale 1 to 2"]),
        (last_block_alone, ["blocks: 1", "num_layers 2"]),
        (underscores, ["original names with underscores, lora_down", "scale 0.5"]),
        (extracted, ["head.head, ", "differences: ", "modulation"]),
        (lycoris, ["original names with underscores, differences"]),
        (outside_the_blocks, ["format: diffusers names, lora_A"]),
        (peft_patterns, ["families: PEFT", "rank 1 to 4"]),
    ],
)
def test_inspect_says_what_is_changed(tmp_path, capsys, kind, expected):
    _, path = made(kind, tmp_path)
    main(["inspect", str(path)])
    out = capsys.readouterr().out
    assert "part: lora" in out and "complete: yes" in out
    for words in expected:
        assert words in out, out
