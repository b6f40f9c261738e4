"""Every published layout, generated at a tiny size: in, out, byte for byte; and any one tensor at
fault is named.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest

from astrolabe_jax.convert import base as bases
from astrolabe_jax.convert import commands, describe, nets, parts
from astrolabe_jax.convert.engine import ConversionError
from astrolabe_jax.convert.open import open_part
from astrolabe_jax.runtime.files import INDEX, read_safetensors, write_safetensors
from experiments.moving_shapes_base.bases import save_net
from experiments.moving_shapes_base.words import word_tokenizer
from tests import tiny_base
from tests.convert import torch_files
from tests.models import tiny

FSDP = "model._fsdp_wrapped_module."


def drawn(part, form="original", seed=0):
    """Random tensors of a tiny part, by the names of a format."""
    net = parts.shapes(part, tiny_base.PARTS[part])
    params = tiny.random_params(net.params, np.random.default_rng(seed))
    return save_net(part, params, net.config, form)


def prefixed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def torch_tree(tensors):
    return {name: torch_files.whole(tensor) for name, tensor in tensors.items()}


def nested(entry, prefix):
    def write(path, tensors):
        torch_files.write(path, {entry: torch_tree(prefixed(tensors, prefix)), "step": 3})

    return write


def flat_torch(path, tensors):
    torch_files.write(path, torch_tree(tensors))


def flat(prefix=""):
    return lambda path, tensors: write_safetensors(path, prefixed(tensors, prefix))


def sharded(path, tensors):
    names = list(tensors)
    where = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(names)}
    for shard in set(where.values()):
        write_safetensors(
            path.parent / shard, {name: tensors[name] for name in names if where[name] == shard}
        )
    path.write_text(json.dumps({"weight_map": where}))


# name -> (part, format, name of the file, writer, families)
LAYOUTS = {
    "wan": ("transformer", "original", "diffusion_pytorch_model.safetensors", flat(), ["Wan base"]),
    "wan_sharded": (
        "transformer",
        "original",
        f"diffusion_pytorch_model{INDEX}",
        sharded,
        ["Wan base"],
    ),
    "wan_diffusers": (
        "transformer",
        "diffusers",
        "diffusion_pytorch_model.safetensors",
        flat(),
        ["Wan base"],
    ),
    "self_forcing": (
        "transformer",
        "original",
        "a.pt",
        nested("generator_ema", "model."),
        ["Self-Forcing"],
    ),
    "causal_forcing_chunkwise": (
        "transformer",
        "original",
        "a.pt",
        nested("generator", "model."),
        ["Causal-Forcing chunkwise", "LongLive base"],
    ),
    "causal_forcing_framewise": (
        "transformer",
        "original",
        "a.pt",
        nested("generator_ema", FSDP),
        ["Causal-Forcing framewise"],
    ),
    "krea": ("transformer", "original", "krea.safetensors", flat("model."), ["Krea"]),
    "vae": ("vae", "original", "Wan2.1_VAE.pth", flat_torch, ["Wan VAE"]),
    "vae_diffusers": (
        "vae",
        "diffusers",
        "diffusion_pytorch_model.safetensors",
        flat(),
        ["Wan VAE"],
    ),
    "umt5": ("text_encoder", "original", "models_t5_umt5-xxl-enc-bf16.pth", flat_torch, ["UMT5"]),
    "umt5_hugging_face": ("text_encoder", "diffusers", f"model{INDEX}", sharded, ["UMT5"]),
}


def write(directory, layout, tensors):
    """The file of a layout, with a config.json that tells what no tensor does."""
    part, _, name, writer, _ = LAYOUTS[layout]
    directory.mkdir(exist_ok=True)
    writer(directory / name, tensors)
    (directory / "config.json").write_text(json.dumps({part: nets.sizes_of(tiny_base.PARTS[part])}))
    return directory / name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_and_out_again_every_byte_is_the_same(tmp_path, layout):
    part, form, _, _, families = LAYOUTS[layout]
    want = drawn(part, form)
    path = write(tmp_path / "file", layout, want)
    (imported,) = commands.import_(path, tmp_path / "imported")
    assert imported == tmp_path / "imported" / part
    commands.export(tmp_path / "imported", tmp_path / "out.safetensors", part, form)
    got = read_safetensors(tmp_path / "out.safetensors")
    assert {name: (t.shape, t.dtype, np.asarray(t).tobytes()) for name, t in got.items()} == {
        name: (t.shape, t.dtype, t.tobytes()) for name, t in want.items()
    }
    found = describe.describe(path)
    assert (found["part"], found["format"], found["families"]) == (part, form, families)
    assert (
        found["complete"]
        and found["tensors"] == len(want)
        and found["bytes"] == sum(t.nbytes for t in want.values())
    )
    config = json.loads((tmp_path / "imported" / "config.json").read_text())
    assert nets.make_config(parts.PARTS[part], config[part]) == nets.make_config(
        parts.PARTS[part], nets.sizes_of(tiny_base.PARTS[part])
    )


ALL = ["wan", "wan_diffusers", "vae", "vae_diffusers", "umt5", "umt5_hugging_face"]


@pytest.mark.parametrize(
    "every", [4, pytest.param(1, marks=pytest.mark.slow)], ids=["one change each", "all changes"]
)
@pytest.mark.parametrize("layout", ALL)
def test_any_tensor_that_is_gone_renamed_added_or_misshapen_is_named(
    tmp_path, monkeypatch, layout, every
):
    """Of every tensor of every naming; the file itself is left out, so that all can be tried."""
    part, form, *_ = LAYOUTS[layout]
    tensors, config = drawn(part, form), tiny_base.PARTS[part]
    path = write(tmp_path / "file", layout, tensors)
    opened = {
        name: np.broadcast_to(np.float32(0), tensor.shape) for name, tensor in tensors.items()
    }
    for i, name in enumerate(tensors):
        rest = {other: tensor for other, tensor in opened.items() if other != name}
        changes = [
            (rest, {f"missing tensor: {name} "}),
            (
                rest | {f"{name}x": opened[name]},
                {f"missing tensor: {name} ", f"unused tensor: {name}x "},
            ),
            (opened | {f"{name}.more": opened[name]}, {f"unused tensor: {name}.more "}),
            (opened | {name: opened[name][None]}, {f"changed shape: {name} is "}),
        ]
        for changed, culprits in changes[i % every :: every]:
            monkeypatch.setattr(
                "astrolabe_jax.convert.open.open_weights",
                lambda *_, given=changed: Opened(given),
            )
            for read in (
                lambda: open_part(path),
                lambda given=changed: parts.load_net(part, given, config),
            ):
                with pytest.raises(ValueError) as error:
                    read()
                assert all(culprit in str(error.value) for culprit in culprits), (
                    culprits,
                    str(error.value),
                )


class Opened:
    def __init__(self, tensors):
        self.tensors = tensors


def test_hugging_face_may_store_the_embedding_twice_but_not_two(tmp_path):
    tensors = drawn("text_encoder", "diffusers")
    both = tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]}
    alias = {
        name.replace("shared.weight", "encoder.embed_tokens.weight"): tensor
        for name, tensor in tensors.items()
    }
    config = tiny_base.PARTS["text_encoder"]
    want = parts.load_net("text_encoder", tensors, config)
    for same in (both, alias):
        jax.tree.map(
            np.testing.assert_array_equal,
            parts.load_net("text_encoder", same, config).params,
            want.params,
        )
    both["encoder.embed_tokens.weight"] = 1 + both["encoder.embed_tokens.weight"]
    with pytest.raises(
        ValueError, match="encoder.embed_tokens.weight and shared.weight must be the same tensor"
    ):
        parts.load_net("text_encoder", both, config)


def test_another_size_is_one_sentence():
    config = tiny_base.PARTS["transformer"]
    with pytest.raises(ConversionError) as error:
        parts.check_size(config, {"dim": 5120, "num_layers": 40})
    assert str(error.value) == (
        "the transformer has width 5120 and 40 blocks (wan_14b); expected width 24 and 2 blocks: "
        "choose config.model.size or the file to match"
    )


NUMERICS = {"dtype": "float32", "param_dtype": "float32", "remat": False, "attention": "xla"}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    directory = tiny_base.write_tiny_base(tmp_path_factory.mktemp("own"))
    return directory, bases.load_base(str(directory), **NUMERICS)


def write_package(directory, layout, sources):
    """A base of another layout with the tensors of `sources` (directory of our own layout)."""
    tensors = {
        part: {
            name: np.asarray(tensor) for name, tensor in open_part(sources, part).tensors.items()
        }
        for part in parts.PARTS
    }
    net, vae, text = (tiny_base.PARTS[part] for part in ("transformer", "vae", "text_encoder"))
    tokenizer_dir = directory / bases.LAYOUTS[layout].tokenizer
    tokenizer_dir.mkdir(parents=True)
    (tokenizer_dir / "tokenizer.json").write_text((sources / "tokenizer.json").read_text())
    configs = {
        "transformer": {
            "_class_name": "WanTransformer3DModel",
            "attention_head_dim": net.head_dim,
            "num_attention_heads": net.num_heads,
            "num_layers": net.num_layers,
            "ffn_dim": net.ffn_dim,
            "freq_dim": net.freq_dim,
            "text_dim": net.text_dim,
            "in_channels": net.in_channels,
            "out_channels": net.in_channels,
            "patch_size": [1, 2, 2],
            "qk_norm": "rms_norm_across_heads",
        },
        "vae": {
            "base_dim": vae.dim,
            "z_dim": vae.z_dim,
            "dim_mult": vae.dim_mult,
            "num_res_blocks": vae.num_res_blocks,
            "temperal_downsample": vae.temporal_downsample,
            "latents_mean": vae.latent_mean,
            "latents_std": vae.latent_std,
        },
        "text_encoder": {
            "model_type": "umt5",
            "vocab_size": text.vocab_size,
            "d_model": text.dim,
            "d_kv": text.dim_attn // text.num_heads,
            "d_ff": text.dim_ffn,
            "num_heads": text.num_heads,
            "num_layers": text.num_layers,
        },
    }
    (directory / "model_index.json").write_text("{}")
    for part, content in configs.items():
        table = nets.rules(parts.PARTS[part], tiny_base.PARTS[part], "diffusers")
        params = parts.load_net(part, tensors[part], tiny_base.PARTS[part]).params
        (directory / part).mkdir()
        name = bases.LAYOUTS[layout].weights[part][part == "text_encoder"]
        (sharded if name.endswith(INDEX) else flat())(
            directory / name, bases.engine.save(table, params)
        )
        (directory / part / "config.json").write_text(json.dumps(content))
    return directory


def test_a_diffusers_package_is_a_base(own, tmp_path):
    directory, want = own
    package = write_package(tmp_path / "package", "diffusers", directory)
    # Their files do not say how many tokens a prompt has: 512, in every published model.
    got = bases.load_base(str(package), **NUMERICS)
    for name in ("transformer", "vae", "text"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(got, name).params, getattr(want, name).params
        )
    assert got.text.config.text_len == got.transformer.config.text_len == 512
    assert describe.describe(package)["complete"]


def test_another_kind_of_model_is_refused_by_its_config(own, tmp_path):
    package = write_package(tmp_path / "package", "diffusers", own[0])
    path = package / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_kv_proj_dim": 5120}))
    with pytest.raises(
        ValueError, match="transformer/config.json: .*another kind: {'added_kv_proj_dim': 5120}"
    ):
        bases.configs(str(package), **NUMERICS)


def test_an_imported_base_is_a_base(own, tmp_path):
    directory, want = own
    commands.import_(directory, tmp_path / "imported")
    got = bases.load_base(str(tmp_path / "imported"), **NUMERICS)
    for name in ("transformer", "vae", "text"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(got, name).params, getattr(want, name).params
        )
        assert getattr(got, name).config == getattr(want, name).config
    again = bases.load_base(str(tmp_path / "imported"), **NUMERICS)
    assert got.fingerprint == again.fingerprint != want.fingerprint


def test_a_wan_repository_is_a_base(tmp_path, monkeypatch):
    """At the tiny size, which its config.json gives for the transformer; the others have the
    published sizes.
    """
    published = {
        part: dataclasses.replace(spec, published=tiny_base.PARTS[part])
        for part, spec in parts.PARTS.items()
    }
    for module in (parts, bases):
        monkeypatch.setattr(module, "PARTS", published)
    net = tiny_base.PARTS["transformer"]
    repository = tmp_path / "Wan2.1"
    tokenizer_dir = repository / "google" / "umt5-xxl"
    tokenizer_dir.mkdir(parents=True)
    (tokenizer_dir / "tokenizer.json").write_text(word_tokenizer(tiny_base.WORDS))
    config = {
        "_class_name": "WanModel",
        "model_type": "t2v",
        "dim": net.dim,
        "ffn_dim": net.ffn_dim,
    }
    config |= {
        "num_heads": net.num_heads,
        "num_layers": net.num_layers,
        "in_dim": net.in_channels,
        "text_len": 16,
    }
    (repository / "config.json").write_text(
        json.dumps(config | {"freq_dim": net.freq_dim, "eps": 1e-6})
    )
    tensors = {part: drawn(part, seed=i) for i, part in enumerate(parts.PARTS)}
    flat()(repository / "diffusion_pytorch_model.safetensors", tensors["transformer"])
    flat_torch(repository / "Wan2.1_VAE.pth", tensors["vae"])
    flat_torch(repository / "models_t5_umt5-xxl-enc-bf16.pth", tensors["text_encoder"])
    got = bases.load_base(str(repository), **NUMERICS)
    assert nets.sizes_of(got.transformer.config) == nets.sizes_of(net)
    for part, net in zip(parts.PARTS, got[:3], strict=True):
        again = save_net(part, net.params, net.config)
        assert {name: t.tobytes() for name, t in again.items()} == {
            n: t.tobytes() for n, t in tensors[part].items()
        }
    # Another transformer in place of its own, which then need not be there.
    (repository / "diffusion_pytorch_model.safetensors").unlink()
    nested("generator_ema", FSDP)(tmp_path / "other.pt", drawn("transformer", seed=9))
    other = bases.load_base(str(repository), transformer=str(tmp_path / "other.pt"), **NUMERICS)
    again = save_net("transformer", other.transformer.params, other.transformer.config)
    want = drawn("transformer", seed=9)
    assert {name: t.tobytes() for name, t in again.items()} == {
        name: t.tobytes() for name, t in want.items()
    }
    assert other.fingerprint != got.fingerprint
    with pytest.raises(
        FileNotFoundError,
        match="has 0 files of the transformer; expected one of diffusion_pytorch_mo",
    ):
        bases.load_base(str(repository), **NUMERICS)
    (repository / "config.json").unlink()
    with pytest.raises(
        FileNotFoundError,
        match="no .*/config.json, which tells the sizes of the transformer; put it",
    ):
        bases.load_base(str(repository), **NUMERICS)
    assert bases.configs(str(repository), "wan_14b")["transformer"].dim == 5120


def test_every_leaf_is_placed_before_the_next_is_read(own):
    directory, want = own
    placed = []

    def place(part, path, leaf):
        placed.append((part, path))
        return jax.numpy.asarray(leaf)

    got = bases.load_base(str(directory), place=place, **NUMERICS)
    assert (
        len(placed) == len(set(placed)) == sum(len(jax.tree.leaves(net.params)) for net in got[:3])
    )
    assert all(
        isinstance(leaf, jax.Array) for net in got[:3] for leaf in jax.tree.leaves(net.params)
    )


@pytest.mark.parametrize("size", parts.SIZES)
def test_the_sizes_of_published_models_stand_for_those_of_the_base(own, size):
    found = bases.configs(str(own[0]), size, **NUMERICS)
    assert {part: nets.sizes_of(config) for part, config in found.items()} == {
        part: nets.sizes_of(config) for part, config in parts.SIZES[size].items()
    }
