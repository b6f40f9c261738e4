"""HPS_v2.1_compressed.pt, clip-vit-large-patch14 and the aesthetic predictor, generated as they are
published.
"""

import dataclasses
import math

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import CLIPConfig as TorchConfig
from transformers import CLIPModel

from astrolabe_jax.convert import engine, nets
from astrolabe_jax.convert.weights import read_weights
from astrolabe_jax.models import layers
from astrolabe_jax.rewards.clip import weights
from astrolabe_jax.rewards.clip.net import CLIP, VIT_H_14, VIT_L_14, AestheticNet, CLIPConfig
from astrolabe_jax.rewards.clip.weights import AESTHETIC, HPSV2
from astrolabe_jax.runtime.files import write_safetensors
from tests.convert import torch_files
from tests.rewards.clip import clips


def expected(module, config):
    return layers.graphdef_of(lambda: module(config, nnx.Rngs(0)))[1]


def aesthetic_rules(config):
    return nets.rules(AESTHETIC, config, "hugging_face")


def torch_tree(tensors):
    return {name: torch_files.whole(tensor) for name, tensor in tensors.items()}


def hps(seed=0):
    return clips.open_clip(clips.tensors(clips.model(clips.OPEN, seed)))


def predictor(embed_dim, seed=0):
    """sac+logos+ava1-l14-linearMSE.pth behind features of another width."""
    rng, widths = np.random.default_rng(seed), (embed_dim, 1024, 128, 64, 16, 1)
    found = {}
    for number, a, b in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
        found[f"layers.{number}.weight"] = rng.standard_normal((b, a)).astype(np.float32)
        found[f"layers.{number}.bias"] = rng.standard_normal(b).astype(np.float32)
    return found


def test_hpsv2_file(tmp_path):
    given = hps()
    torch_files.write(tmp_path / "HPS.pt", {"epoch": 3, "state_dict": torch_tree(given)})
    tensors = HPSV2.prepare(read_weights(tmp_path / "HPS.pt"))
    assert CLIPConfig(**nets.measure(HPSV2, "original", tensors)) == clips.OPEN
    params = engine.load(weights.table(clips.OPEN), tensors, expected(CLIP, clips.OPEN))
    back = engine.save(weights.table(clips.OPEN), params)
    for name in ("visual.conv1.weight", "visual.proj", "transformer.resblocks.1.mlp.c_proj.weight"):
        np.testing.assert_array_equal(back[name], given[name])
    name = "visual.transformer.resblocks.2.attn.in_proj_weight"
    np.testing.assert_array_equal(
        np.concatenate([back[f"{name}[{part}]"] for part in "qkv"]), given[name]
    )
    np.testing.assert_array_equal(
        params["text"]["blocks"]["attn"]["k"]["bias"][1],
        given["transformer.resblocks.1.attn.in_proj_bias"][128:256],
    )


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_aesthetic_files(tmp_path, suffix):
    config = clips.OPENAI
    given = clips.tensors(clips.model(config))
    patches = (config.image_size // config.patch_size) ** 2
    for tower, count in (("vision", patches + 1), ("text", config.text_len)):
        given[f"{tower}_model.embeddings.position_ids"] = np.arange(count)[None]
    path = tmp_path / f"model.{suffix}"
    if suffix == "bin":
        torch_files.write(path, torch_tree(given))
    else:
        write_safetensors(path, given)
    head = predictor(config.embed_dim)
    torch_files.write(tmp_path / "sac.pth", torch_tree(head))
    tensors = AESTHETIC.prepare(read_weights(path) | read_weights(tmp_path / "sac.pth"))
    sizes = nets.measure(AESTHETIC, "hugging_face", tensors)
    assert sizes == {name: getattr(config, name) for name in sizes}
    assert {
        "vision_dim",
        "vision_ffn",
        "vision_layers",
        "vision_heads",
        "image_size",
        "embed_dim",
    } < set(sizes)
    net = dataclasses.replace(VIT_L_14, **sizes)
    params = engine.load(aesthetic_rules(net), tensors, expected(AestheticNet, net))
    np.testing.assert_array_equal(params["head"][3]["kernel"], head["layers.6.weight"].T)
    np.testing.assert_array_equal(params["head"][4]["bias"], head["layers.7.bias"])
    conv = given["vision_model.embeddings.patch_embedding.weight"]
    patches = params["vision"]["patch_embedding"]["kernel"].reshape(4, 4, 3, -1)
    np.testing.assert_array_equal(patches[1, 2, 0], conv[:, 0, 1, 2])


@pytest.mark.parametrize("kind", ["hpsv2", "aesthetic"])
def test_every_tensor_is_required_and_no_other_accepted(kind):
    if kind == "hpsv2":
        config, given, prepare, module, table = (
            clips.OPEN,
            hps(),
            HPSV2.prepare,
            CLIP,
            weights.table,
        )
        dropped = {"logit_scale"}
    else:
        config, given, prepare = (
            clips.OPENAI,
            clips.tensors(clips.model(clips.OPENAI)),
            AESTHETIC.prepare,
        )
        given |= predictor(config.embed_dim)
        module, table = AestheticNet, aesthetic_rules
        dropped = {name for name in given if name.startswith(("logit_scale", "text_"))}

    tree = expected(module, config)

    def load(tensors):
        return engine.stacks(table(config), prepare(tensors), tree)

    load(given)
    for name in sorted(set(given) - dropped)[::9]:
        # A fused projection is named with its thirds.
        with pytest.raises(engine.ConversionError, match=f"missing tensor: {name}"):
            load({other: tensor for other, tensor in given.items() if other != name})
        with pytest.raises(engine.ConversionError, match=f"(unused tensor|changed shape): {name}"):
            load(given | {name: given[name][None]})
    with pytest.raises(engine.ConversionError, match="unused tensor: visual.extra"):
        load(given | {"visual.extra": np.zeros(3)})


def test_published_names_and_shapes_of_openai():
    """Those that transformers' model has at full size; nothing is allocated."""
    tower = {"num_attention_heads": 16, "hidden_act": "quick_gelu"}
    given = TorchConfig(
        vision_config=tower
        | {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "patch_size": 14,
        },
        text_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
        projection_dim=768,
    )
    with torch.device("meta"):
        net = CLIPModel(given)
    shapes = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    assert shapes.pop("logit_scale") == ()
    both = weights.hugging_face_layout(weights.table(VIT_L_14))
    both = engine.renamed(both, weights.HUGGING_FACE)
    assert engine.source_shapes(both, expected(CLIP, VIT_L_14)) == shapes
    mine = engine.source_shapes(aesthetic_rules(VIT_L_14), expected(AestheticNet, VIT_L_14))
    head = {name: tensor.shape for name, tensor in predictor(768).items()}
    assert mine == AESTHETIC.prepare(shapes) | head


def test_published_names_and_shapes_of_hpsv2():
    """ViT-H/14 has 986,109,441 parameters with the scale of logits; the file of them is read piece
    by piece.
    """
    config, read = VIT_H_14, []
    shapes = engine.source_shapes(weights.table(config), expected(CLIP, config))
    fused = {}
    for name, shape in shapes.items():
        bare = name.partition("[")[0]
        fused[bare] = (3 * shape[0], *shape[1:]) if bare != name else shape
    assert len(fused) == 13 + 12 * (32 + 24)
    assert sum(map(math.prod, fused.values())) + 1 == 986_109_441
    assert fused["visual.transformer.resblocks.31.attn.in_proj_weight"] == (3840, 1280)
    assert fused["visual.proj"] == (1280, 1024) and fused["positional_embedding"] == (77, 1024)

    def lazy(name, shape):
        def zeros():
            read.append(name)
            return np.broadcast_to(np.float32(0), shape)

        return engine.Lazy(shape, np.dtype(np.float32), zeros)

    tensors = HPSV2.prepare({name: lazy(name, shape) for name, shape in fused.items()})
    assert CLIPConfig(**nets.measure(HPSV2, "original", tensors)) == config
    stacks = engine.stacks(weights.table(config), tensors, expected(CLIP, config))
    assert not read
    stack = stacks["vision", "blocks", "attn", "k", "kernel"]
    assert stack.shape == (32, 1280, 1280) and np.asarray(stack[7]).shape == (1280, 1280)
    assert read == ["visual.transformer.resblocks.7.attn.in_proj_weight"]
    assert sum(math.prod(stack.shape) for stack in stacks.values()) == 986_109_440
    assert jax.tree.structure(
        engine.nested(dict.fromkeys(stacks, 0).items())
    ) == jax.tree.structure(expected(CLIP, config))
