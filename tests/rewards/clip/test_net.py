"""CLIP equals that of transformers in both towers; the end token is the only one that a text is
read at.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from astrolabe_jax.convert import engine
from astrolabe_jax.models import layers
from astrolabe_jax.rewards.clip import weights as tables
from astrolabe_jax.rewards.clip.net import (
    CLIP,
    VIT_H_14,
    VIT_L_14,
    AestheticNet,
    CLIPConfig,
    normalised,
)
from tests.models import tiny
from tests.rewards.clip import clips

END = clips.SIZES["vocab_size"] - 1
IDS = np.array(
    [[58, 3, 7, 1, END, 0, 0, 0, 0], [58, END, 0, 0, 0, 0, 0, 0, 0], [58, 9, 8, 7, 6, 5, 4, 3, END]]
)


def hugging_face(rules):
    return engine.renamed(tables.hugging_face_layout(rules), tables.HUGGING_FACE)


def loaded(config, tensors, names=hugging_face):
    graphdef, expected = layers.graphdef_of(lambda: CLIP(config, nnx.Rngs(0)))
    return graphdef, engine.load(names(tables.table(config)), tensors, expected)


def images(config, batch=3, seed=0):
    shape = (batch, config.image_size, config.image_size, 3)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(params=[clips.OPEN, clips.OPENAI], ids=["gelu", "quick_gelu"], scope="module")
def pair(request):
    """(config, transformers' net, ours as a function (tower, inputs))."""
    config = request.param
    net = clips.model(config)
    given = {name: tensor for name, tensor in clips.tensors(net).items() if name != "logit_scale"}
    graphdef, params = loaded(config, given)
    run = jax.jit(
        lambda name, params, x: getattr(layers.merge(graphdef, params), name)(x), static_argnums=0
    )
    return config, net, lambda name, x: np.asarray(run(name, params, x))


def test_images_are_read_as_by_transformers(pair):
    config, net, run = pair
    pixels = images(config)
    with torch.no_grad():
        want = net.get_image_features(
            torch.from_numpy(pixels).permute(0, 3, 1, 2)
        ).pooler_output.numpy()
    np.testing.assert_allclose(run("vision", pixels), want, atol=1e-5)


def test_texts_are_read_as_by_transformers(pair):
    _, net, run = pair
    with torch.no_grad():
        want = net.get_text_features(torch.from_numpy(IDS)).pooler_output.numpy()
    np.testing.assert_allclose(run("text", IDS), want, atol=1e-5)


def test_what_stands_behind_the_end_token_does_not_matter(pair):
    _, _, run = pair
    ends = np.argmax(IDS, axis=1)[:, None]
    for filler in (END, 5):
        np.testing.assert_array_equal(
            run("text", np.where(np.arange(IDS.shape[1]) > ends, filler, IDS)), run("text", IDS)
        )
    np.testing.assert_allclose(run("text", IDS[:2, :5]), run("text", IDS)[:2], atol=2e-6)


def test_openclip_stores_the_same_net(pair):
    config, net, _ = pair
    given = clips.tensors(net)
    plain = {name: tensor for name, tensor in given.items() if name != "logit_scale"}
    want = loaded(config, plain)[1]
    got = loaded(config, tables.prepare_hpsv2(clips.open_clip(given)), names=list)[1]
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_the_aesthetic_layers_are_one_affine_map_of_the_normalised_features():
    config = clips.OPENAI
    graphdef, shapes = layers.graphdef_of(lambda: AestheticNet(config, nnx.Rngs(0)))
    params, pixels = tiny.random_params(shapes, np.random.default_rng(1)), images(config, 4)

    @jax.jit
    def run(params):
        net = layers.merge(graphdef, params)
        return normalised(net.vision(pixels)), net(pixels)

    features, scores = (np.asarray(part, np.float64) for part in run(params))
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)
    matrix, offset = np.eye(config.embed_dim), np.zeros(config.embed_dim)
    for i in range(5):
        kernel, bias = (
            np.asarray(params["head"][i][name], np.float64) for name in ("kernel", "bias")
        )
        matrix, offset = matrix @ kernel, offset @ kernel + bias
    assert matrix.shape == (config.embed_dim, 1)
    np.testing.assert_allclose(scores, (features @ matrix + offset)[:, 0], rtol=1e-4)


@pytest.mark.parametrize(
    ("field", "value"), [("vision_heads", 3), ("text_heads", 3), ("patch_size", 5)]
)
def test_sizes_that_do_not_fit_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"CLIPConfig.*{field}"):
        dataclasses.replace(clips.OPEN, **{field: value})


def test_sixteen_bit_activations_stay_close_to_float32(pair):
    config, net, run = pair
    given = {name: tensor for name, tensor in clips.tensors(net).items() if name != "logit_scale"}
    half = dataclasses.replace(config, dtype="bfloat16")
    graphdef, params = loaded(half, given)
    got = jax.jit(lambda params, x: layers.merge(graphdef, params).vision(x))(
        params, images(config)
    )
    assert got.dtype == jnp.float32
    want = run("vision", images(config))
    assert np.abs(got - want).max() < 0.05 * np.abs(want).max()


@pytest.mark.parametrize(
    ("config", "vision", "text"),
    [(VIT_H_14, 632_076_800, 354_032_640), (VIT_L_14, 303_966_208, 123_650_304)],
    ids=["ViT-H/14", "ViT-L/14"],
)
def test_published_parameter_counts(config: CLIPConfig, vision, text):
    _, params = layers.graphdef_of(lambda: CLIP(config, nnx.Rngs(0)))
    count = {
        name: sum(leaf.size for leaf in jax.tree.leaves(params[name]))
        for name in ("vision", "text")
    }
    assert count == {"vision": vision, "text": text}
