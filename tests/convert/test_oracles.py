"""diffusers, transformers and peft load what is exported, and compute what our nets do."""

import dataclasses
import functools
import json

import jax
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
import transformers
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from peft.tuners.tuners_utils import BaseTunerLayer

from astrolabe_jax.convert import commands, engine, lora, nets, parts, umt5
from astrolabe_jax.models import layers
from astrolabe_jax.models.lora import TARGETS, adapter_shapes, scaled
from astrolabe_jax.models.umt5 import XXL
from astrolabe_jax.models.wan.config import WAN_1_3B, WAN_14B, Layout, WanConfig
from astrolabe_jax.models.wan.vae import VaeConfig
from astrolabe_jax.runtime.files import read_safetensors, write_safetensors
from experiments.moving_shapes_base.bases import save_net
from tests import tiny_base
from tests.adapters import merge_adapter
from tests.convert import test_lora_files as lora_kinds
from tests.models import tiny

FRAMES, ALPHA, RANK = 3, 3.0, 2
# one block: full attention, as in the published bidirectional model
ALL_FRAMES = Layout(block=FRAMES)


def wan_oracle(config: WanConfig) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=config.num_heads,
        attention_head_dim=config.head_dim,
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.num_layers,
    ).eval()


def vae_oracle(config: VaeConfig) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=config.dim,
        z_dim=config.z_dim,
        dim_mult=list(config.dim_mult),
        num_res_blocks=config.num_res_blocks,
        temperal_downsample=list(config.temporal_downsample),
        latents_mean=list(config.latent_mean),
        latents_std=list(config.latent_std),
    ).eval()


def umt5_oracle(config) -> transformers.UMT5EncoderModel:
    return transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.dim,
            d_kv=config.dim_attn // config.num_heads,
            d_ff=config.dim_ffn,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=config.max_distance,
        )
    ).eval()


ORACLES = {"transformer": wan_oracle, "vae": vae_oracle, "text_encoder": umt5_oracle}


def describe_in(directory, part, config):
    (directory / "config.json").write_text(json.dumps({part: nets.sizes_of(config)}))


@functools.cache
def exported_net(part):
    net = parts.shapes(part, tiny_base.PARTS[part])
    params = tiny.random_params(net.params, np.random.default_rng(1))
    if part == "vae":  # pixels beyond 1 are clamped by the oracle, which would hide differences
        params["decoder"]["conv_out"] = {
            name: leaf / 10 for name, leaf in params["decoder"]["conv_out"].items()
        }
    return net._replace(params=params)


@pytest.fixture(scope="module")
def oracles(tmp_path_factory):
    """Return the oracle of each part, loaded from our export of our import of a file of original
    names.
    """
    directory = tmp_path_factory.mktemp("oracles")
    loaded = {}
    for part, make in ORACLES.items():
        net = exported_net(part)
        folder = directory / part
        folder.mkdir()
        describe_in(folder, part, net.config)
        write_safetensors(folder / "a.safetensors", save_net(part, net.params, net.config))
        commands.import_(folder / "a.safetensors", directory / "imported")
        commands.export(
            directory / "imported", directory / f"{part}.safetensors", part, "diffusers"
        )
        state = safetensors.torch.load_file(directory / f"{part}.safetensors")
        oracle = make(net.config)
        missing, unexpected = oracle.load_state_dict(state, strict=False)
        assert not unexpected and (
            part == "text_encoder" and set(missing) <= set(umt5.ALIASES) or not missing
        )
        loaded[part] = oracle
    return loaded


def close(ours, theirs):
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1.0, np.abs(theirs).max()))


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, x, t, text, adapter=None, scale=1.0):
    model = layers.merge(graphdef, params)
    adapter = scaled(adapter, scale)
    return model(x, t, model.encode_text(text, adapter), adapter, layout=ALL_FRAMES)


# Their sinusoids are computed in float32, ours in float64: at large t the difference is above 1e-5.
T = 6.0


def inputs():
    config = tiny_base.PARTS["transformer"]
    x = tiny.normal(0, 2, FRAMES, config.in_channels, 4, 6)
    return (
        x,
        np.full((2, FRAMES), T, np.float32),
        tiny.normal(1, 2, config.text_len, config.text_dim),
    )


def their_forward(oracle):
    x, _, text = inputs()
    with torch.no_grad():
        (velocity,) = oracle(
            torch.from_numpy(x.swapaxes(1, 2).copy()),
            torch.full((2,), T),
            torch.from_numpy(text),
            return_dict=False,
        )
    return velocity.swapaxes(1, 2)


def test_the_transformer(oracles):
    net = exported_net("transformer")
    close(forward(net.graphdef, net.params, *inputs()), their_forward(oracles["transformer"]))


def test_the_vae(oracles):
    net, oracle = exported_net("vae"), oracles["vae"]
    pixels = np.tanh(tiny.normal(2, 1, 9, 16, 24, 3))
    ours = jax.jit(lambda params, x: layers.merge(net.graphdef, params).encode(x)[0])(
        net.params, pixels
    )
    with torch.no_grad():
        theirs = oracle.encode(
            torch.from_numpy(np.moveaxis(pixels, -1, 1).copy())
        ).latent_dist.mode()
        close(np.moveaxis(np.asarray(ours), 2, 1), theirs)  # B F C H W
        latents = tiny.normal(3, *ours.shape)
        decoded = oracle.decode(torch.from_numpy(latents.swapaxes(1, 2).copy())).sample  # clamped
    ours = jax.jit(lambda params, z: layers.merge(net.graphdef, params).decode(z)[0])(
        net.params, latents
    )
    close(np.clip(np.moveaxis(np.asarray(ours), -1, 1), -1, 1), decoded)


def test_the_text_encoder(oracles):
    net = exported_net("text_encoder")
    ids = np.random.default_rng(0).integers(3, net.config.vocab_size, (2, 9)).astype(np.int32)
    mask = (np.arange(9) < np.array([[9], [5]])).astype(np.int32)
    ours = jax.jit(lambda params: layers.merge(net.graphdef, params)(ids, mask))(net.params)
    with torch.no_grad():
        theirs = oracles["text_encoder"](
            torch.from_numpy(ids).long(), torch.from_numpy(mask).long()
        ).last_hidden_state
    seen = mask[..., None]
    close(np.asarray(ours) * seen, theirs * torch.from_numpy(seen))


@pytest.mark.parametrize(
    ("part", "config", "tensors", "parameters"),
    [
        ("transformer", WAN_1_3B, 825, 1_418_996_800),
        ("transformer", WAN_14B, 1095, 14_288_491_584),
        ("vae", VaeConfig(), 194, 126_892_531),
        ("text_encoder", XXL, 242, 5_680_910_336),
    ],
)
def test_published_names_and_shapes(part, config, tensors, parameters):
    with torch.device("meta"):
        oracle = ORACLES[part](config)
    theirs = {name: tuple(tensor.shape) for name, tensor in oracle.state_dict().items()}
    theirs = {name: shape for name, shape in theirs.items() if name not in umt5.ALIASES}
    ours = engine.source_shapes(
        nets.rules(parts.PARTS[part], config, "diffusers"), parts.shapes(part, config).params
    )
    assert ours == theirs
    assert (len(ours), sum(int(np.prod(shape, dtype=np.int64)) for shape in ours.values())) == (
        tensors,
        parameters,
    )
    described = parts.described(
        part, dict(oracle.config.to_dict() if part == "text_encoder" else oracle.config)
    )
    sizes = nets.sizes_of(config)
    assert {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in described.items()
    } == {name: sizes[name] for name in described}


@pytest.fixture(scope="module")
def adapter():
    rng = np.random.default_rng(4)
    shapes = adapter_shapes(tiny_base.PARTS["transformer"], RANK)
    return jax.tree.map(
        lambda leaf: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes
    )


def test_diffusers_reads_our_adapter_with_its_alpha(oracles, adapter, tmp_path):
    net = exported_net("transformer")
    lora.save_peft(adapter, tmp_path / "peft", RANK, ALPHA)
    commands.export_lora(tmp_path / "peft", tmp_path / "diffusers", "diffusers")
    ours = forward(net.graphdef, net.params, *inputs(), adapter, ALPHA / RANK)
    oracle = wan_oracle(net.config)
    oracle.load_state_dict(oracles["transformer"].state_dict())
    before = their_forward(oracle)
    oracle.load_lora_adapter(
        tmp_path / "diffusers",
        weight_name=lora.DIFFUSERS_WEIGHTS,
        prefix="transformer",
        adapter_name="default",
    )
    assert np.abs(np.asarray(ours) - before.numpy()).max() > 0.1
    close(ours, their_forward(oracle))
    pipeline = wan_oracle(net.config)
    pipeline.load_state_dict(oracles["transformer"].state_dict())
    # The two calls of WanPipeline.load_lora_weights.
    state, metadata = WanLoraLoaderMixin.lora_state_dict(
        tmp_path / "diffusers", return_lora_metadata=True
    )
    WanLoraLoaderMixin.load_lora_into_transformer(state, pipeline, metadata=metadata)
    close(ours, their_forward(pipeline))
    oracle.save_lora_adapter(tmp_path / "theirs")  # and we read theirs
    again, scale = lora.load_lora(tmp_path / "theirs", net.config, RANK)
    assert scale == ALPHA / RANK
    jax.tree.map(np.testing.assert_array_equal, again, adapter)


def fused(oracle, path):
    """Return the weights of diffusers' transformer with a LoRA file fused in, by their names."""
    state, metadata = WanLoraLoaderMixin.lora_state_dict(path, return_lora_metadata=True)
    WanLoraLoaderMixin.load_lora_into_transformer(state, oracle, metadata=metadata)
    for module in oracle.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in oracle.state_dict().items()
        if ".lora_" not in name
    }


# What diffusers' reader of each can do: no differences of norms, no names without `blocks`.
@pytest.mark.parametrize(
    "kind",
    [
        lora_kinds.attention_alone,
        lora_kinds.several_ranks,
        lora_kinds.underscores,
        lora_kinds.outside_the_blocks,
        lora_kinds.with_biases,
    ],
)
def test_diffusers_fuses_what_we_merge(tmp_path, kind):
    net = exported_net("transformer")
    describe_in(tmp_path, "transformer", net.config)
    plain = save_net("transformer", net.params, net.config)
    write_safetensors(tmp_path / "base.safetensors", plain)
    (tmp_path / "lora").mkdir()
    _, path = lora_kinds.made(kind, tmp_path / "lora")
    commands.merge(tmp_path / "base.safetensors", path, tmp_path / "ours.safetensors", "diffusers")
    commands.export(
        tmp_path / "base.safetensors", tmp_path / "plain.safetensors", "transformer", "diffusers"
    )
    oracle = wan_oracle(net.config)
    oracle.load_state_dict(safetensors.torch.load_file(tmp_path / "plain.safetensors"))
    theirs = fused(oracle, path)
    ours = read_safetensors(tmp_path / "ours.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        close(tensor, theirs[name])


class Named(torch.nn.Module):
    """A module tree with linears under given names."""

    def __init__(self, weights):
        super().__init__()
        for name, weight in weights.items():
            node = self
            *above, last = name.split(".")
            for key in above:
                if not hasattr(node, key):
                    node.add_module(key, torch.nn.Module())
                node = getattr(node, key)
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = torch.from_numpy(np.array(weight))
            node.add_module(last, linear)


def test_peft_merges_what_we_merge(adapter, tmp_path):
    net = exported_net("transformer")
    describe_in(tmp_path, "transformer", net.config)
    write_safetensors(
        tmp_path / "base.safetensors", save_net("transformer", net.params, net.config)
    )
    lora.save_peft(adapter, tmp_path / "lora", RANK, ALPHA)
    commands.merge(
        tmp_path / "base.safetensors",
        tmp_path / "lora",
        tmp_path / "merged.safetensors",
        "original",
    )
    merged = read_safetensors(tmp_path / "merged.safetensors")
    plain = read_safetensors(tmp_path / "base.safetensors")
    assert list(merged) == list(plain)
    linears = {
        name.removesuffix(".weight"): np.asarray(tensor)
        for name, tensor in plain.items()
        if name.endswith(".weight") and name.removesuffix(".weight").split(".", 2)[-1] in TARGETS
    }
    assert len(linears) == 10 * net.config.num_layers
    oracle = peft.PeftModel.from_pretrained(
        Named(linears), str(tmp_path / "lora")
    ).merge_and_unload()
    for name, tensor in plain.items():
        module = name.removesuffix(".weight")
        want = (
            oracle.get_submodule(module).weight.detach().numpy()
            if module in linears
            else np.asarray(tensor)
        )
        np.testing.assert_allclose(np.asarray(merged[name]), want, rtol=0, atol=1e-6)
    ours = save_net("transformer", merge_adapter(net.params, adapter, ALPHA / RANK), net.config)
    for name, tensor in ours.items():
        np.testing.assert_allclose(np.asarray(merged[name]), tensor, rtol=0, atol=1e-6)


def test_a_merge_is_rounded_once(adapter, tmp_path):
    net = exported_net("transformer")
    config = dataclasses.replace(net.config, param_dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jax.numpy.bfloat16), net.params)
    describe_in(tmp_path, "transformer", config)
    write_safetensors(tmp_path / "base.safetensors", save_net("transformer", rounded, config))
    lora.save_peft(adapter, tmp_path / "lora", RANK, ALPHA)
    for dtype in ("", "float32"):
        target = tmp_path / f"merged{dtype}.safetensors"
        commands.merge(tmp_path / "base.safetensors", tmp_path / "lora", target, "diffusers", dtype)
    exact, short = (
        read_safetensors(tmp_path / f"merged{dtype}.safetensors") for dtype in ("float32", "")
    )
    for name, tensor in exact.items():
        assert (tensor.dtype, short[name].dtype) == (np.float32, jax.numpy.bfloat16)
        np.testing.assert_array_equal(
            np.asarray(tensor).astype(jax.numpy.bfloat16), np.asarray(short[name])
        )
