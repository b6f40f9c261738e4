"""Qwen2-VL and its heads: what transformers computes, whatever the batch and the padding."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from astrolabe_jax import sharding
from astrolabe_jax.convert.engine import nested
from astrolabe_jax.models import layers
from astrolabe_jax.models.lora import parameter_count
from astrolabe_jax.rewards.qwen2_vl import convert, weights
from astrolabe_jax.rewards.qwen2_vl.config import (
    HPSV3,
    PATCH_VALUES,
    QWEN2_VL_2B,
    QWEN2_VL_7B,
    VIDEOALIGN,
)
from astrolabe_jax.rewards.qwen2_vl.linear import quantise
from astrolabe_jax.rewards.qwen2_vl.net import QwenRewardNet
from tests.meshes import mesh_of
from tests.models import tiny
from tests.rewards.qwen2_vl import qwen
from tests.rewards.qwen2_vl.qwen import IMAGE, VIDEO

GRIDS = {"image": (1, 4, 6), "video": (3, 4, 6)}
KINDS = {"image": IMAGE, "video": VIDEO}
TYPES = {IMAGE: 1, VIDEO: 2}  # of transformers


@pytest.fixture(scope="module")
def oracle():
    """transformers' model and our parameters with its weights."""
    model = qwen.oracle()
    qwen.random_weights(model)
    tensors = {
        name.removeprefix("model."): weight.numpy() for name, weight in model.state_dict().items()
    }
    config, stacks = convert.assemble(tensors, weights.spec_of("plain", qwen.CONFIG))
    assert config == qwen.CONFIG
    return model.model, nested((path, np.asarray(stack)) for path, stack in stacks.items())


@functools.partial(jax.jit, static_argnums=(0, 3))
def hidden(graphdef, params, patches, grid, ids, where):
    return layers.merge(graphdef, params).hidden(patches, grid, ids, where)


@functools.partial(jax.jit, static_argnums=(0, 3))
def scores(graphdef, params, patches, grid, ids, where):
    return layers.merge(graphdef, params)(patches, grid, ids, where)


def close(ours, theirs):
    theirs = theirs.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1.0, np.abs(theirs).max()))


@pytest.mark.parametrize("kind", GRIDS)
def test_vision_features(oracle, kind):
    model, params = oracle
    grid, patches = GRIDS[kind], qwen.patches(2, GRIDS[kind])
    graphdef, _ = qwen.net()
    ours = jax.jit(lambda params: layers.merge(graphdef, params).vision(patches, grid))(params)
    with torch.no_grad():
        theirs = model.visual(
            torch.from_numpy(patches.reshape(-1, PATCH_VALUES)), torch.tensor([grid] * 2)
        )
    assert ours.shape == (2, math.prod(grid) // 4, qwen.CONFIG.dim)
    close(ours.reshape(-1, qwen.CONFIG.dim), theirs.pooler_output)


def their_hidden(model, ids, patches, grid):
    """All hidden states of samples without padding, at the positions of the text alone."""
    kind = "image" if IMAGE in ids else "video"
    names = {
        "image": ("pixel_values", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }[kind]
    given = (torch.from_numpy(patches.reshape(-1, PATCH_VALUES)), torch.tensor([grid] * len(ids)))
    positions = torch.arange(ids.shape[1]).expand(3, *ids.shape)
    with torch.no_grad():
        return model(
            input_ids=torch.from_numpy(ids).long(),
            position_ids=positions,
            mm_token_type_ids=torch.from_numpy((ids == KINDS[kind]) * TYPES[KINDS[kind]]),
            **dict(zip(names, given, strict=True)),
        ).last_hidden_state


@pytest.mark.parametrize("kind", GRIDS)
def test_hidden_states_of_prompts_of_several_lengths(oracle, kind):
    model, params = oracle
    grid, lengths = GRIDS[kind], (25, 33, 28)
    ids, patches = qwen.ids(lengths, grid, KINDS[kind]), qwen.patches(3, grid)
    everywhere = np.broadcast_to(np.arange(max(lengths)), ids.shape)
    ours = hidden(qwen.net()[0], params, patches, grid, ids, everywhere)
    for i, length in enumerate(lengths):
        alone = ids[i : i + 1, :length]
        close(ours[i : i + 1, :length], their_hidden(model, alone, patches[i : i + 1], grid))


# Of one token for HPSv3, and of three for VideoAlign.
REWARDS = {
    "hpsv3": (qwen.HPSV3, "image", [[-2]]),
    "videoalign": (qwen.VIDEOALIGN, "video", [[-8, -5, -2]]),
}


@pytest.fixture(scope="module", params=REWARDS)
def scored(request):
    """A reward net, a batch of samples of several lengths, and its scores."""
    config, kind, behind = REWARDS[request.param]
    grid, lengths = GRIDS[kind], np.array([31, 40, 35])
    ids, patches = qwen.ids(lengths, grid, KINDS[kind]), qwen.patches(3, grid)
    where = (lengths[:, None] + behind).astype(np.int32)
    return *qwen.net(config), grid, (patches, ids, where)


def score(scored, patches, ids, where):
    graphdef, params, grid, _ = scored
    return np.asarray(scores(graphdef, params, patches, grid, ids, where))


def test_a_score_does_not_depend_on_the_batch_or_on_the_padding(scored):
    patches, ids, where = scored[-1]
    together = score(scored, *scored[-1])
    assert together.dtype == np.float32 and together.shape == (3, 2 if where.shape[1] == 1 else 3)
    assert np.abs(np.diff(together, axis=0)).min() > 1e-3
    atol = 2e-6 * max(1, np.abs(together).max())
    for i in range(2):
        alone = score(
            scored, patches[i : i + 1], ids[i : i + 1, : where[i].max() + 1], where[i : i + 1]
        )
        np.testing.assert_allclose(alone, together[i : i + 1], rtol=0, atol=atol)
    wide = np.pad(ids, [(0, 0), (0, 24)], constant_values=qwen.PADDING)
    np.testing.assert_allclose(score(scored, patches, wide, where), together, rtol=0, atol=atol)
    order = np.array([2, 0, 1])
    mixed = score(scored, patches[order], ids[order], where[order])
    np.testing.assert_allclose(mixed, together[order], rtol=0, atol=atol)


def test_a_score_sees_what_stands_before_its_token_and_nothing_behind(scored):
    patches, ids, where = scored[-1]
    together = score(scored, *scored[-1])
    behind = np.arange(ids.shape[1]) > where.max(axis=1, keepdims=True)
    np.testing.assert_array_equal(score(scored, patches, np.where(behind, 5, ids), where), together)
    changed = ids.copy()
    changed[np.arange(3), where[:, -1] - 1] = 6  # between the last token and the one before it
    different = score(scored, patches, changed, where) != together
    assert different[:, -1].all()
    if where.shape[1] == 3:
        assert not different[:, :2].any()
    assert (score(scored, patches + 0.1, ids, where) != together).all()


@pytest.mark.parametrize("quantised", [False, True])
def test_a_score_is_the_same_on_a_mesh_that_splits_kernels_and_samples(scored, quantised):
    graphdef, params, grid, inputs = scored
    if quantised:
        graphdef, params, _ = qwen.quantised(params)
    mesh = mesh_of(2, 2, jax.devices()[:4])
    placed = sharding.shard_params(mesh, params)
    kernel = placed["language"]["blocks"]["down"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape
    inputs = tuple(np.concatenate([part, part[:1]]) for part in inputs)
    run = sharding.on_mesh(
        mesh, lambda params, *inputs: layers.merge(graphdef, params)(inputs[0], grid, *inputs[1:])
    )
    want = np.asarray(scores(graphdef, params, inputs[0], grid, *inputs[1:]))
    got = np.asarray(jax.jit(run)(placed, *sharding.shard_batch(mesh, inputs)))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(1, np.abs(want).max()))


def test_heads(scored):
    graphdef, params, grid, (patches, ids, where) = scored
    x = np.asarray(hidden(graphdef, params, patches, grid, ids, where), np.float64)
    linears = list(params["head"]["linears"].values())
    for i, linear in enumerate(linears):
        x = (x if i == 0 else np.maximum(x, 0)) @ linear["kernel"] + linear.get("bias", 0)
    np.testing.assert_allclose(score(scored, *scored[-1]), x.reshape(3, -1), rtol=1e-4, atol=1e-5)


def test_temporal_patches_do_not_see_each_other():
    graphdef, params = qwen.net()
    grid, patches = GRIDS["video"], qwen.patches(1, GRIDS["video"])
    run = jax.jit(lambda patches: layers.merge(graphdef, params).vision(patches, grid))

    def slices(x):
        return np.asarray(x).reshape(grid[0], -1, x.shape[-1])

    order = np.array([2, 0, 1])
    moved = slices(patches)[order].reshape(patches.shape)
    np.testing.assert_array_equal(slices(run(moved)), slices(run(patches))[order])


@pytest.mark.parametrize("config", [QWEN2_VL_2B, QWEN2_VL_7B, HPSV3, VIDEOALIGN])
def test_published_parameter_counts(config):
    """Published counts have an output layer, which the 2B model shares with its embedding and we do
    not build.
    """
    params = qwen.shapes(config).params
    output = config.vocab_size * config.dim * (config.dim == QWEN2_VL_7B.dim)
    small = config.dim == QWEN2_VL_2B.dim
    assert parameter_count(params["vision"]) == (665_271_296 if small else 675_759_104)
    counts = {151936: 2_208_985_600, 152064: 8_291_375_616, 151658: 8_292_152_882}
    counts[151660] = counts[151936] - (151936 - 151660) * config.dim + config.dim
    assert parameter_count(params) + output == counts[config.vocab_size]


def test_int8_kernels_are_within_half_a_step():
    kernel = tiny.normal(0, 2, 30, 5)
    kernel[0, :, 3] = 0
    whole, scale = map(np.asarray, quantise(kernel))
    assert (whole.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (2, 5))
    np.testing.assert_allclose(whole * scale[:, None], kernel, atol=0.501 * scale.max())
    np.testing.assert_array_equal(np.abs(whole).max(axis=1), np.where(scale == 0, 0, 127))
    for ours, theirs in zip((whole, scale), quantise(kernel, np), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_int8_scores_are_those_of_the_kernels_that_they_hold(scored):
    graphdef, params, grid, inputs = scored
    int8, quantised, plain = qwen.quantised(params)
    got = np.asarray(scores(int8, quantised, inputs[0], grid, *inputs[1:]))
    want = np.asarray(scores(graphdef, plain, inputs[0], grid, *inputs[1:]))
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())
    assert np.abs(got - score(scored, *inputs)).max() > 1e-4


def test_sixteen_bit_scores_stay_close(scored):
    _, params, grid, (patches, ids, where) = scored
    graphdef = qwen.shapes(dataclasses.replace(qwen.config_of(params), dtype="bfloat16")).graphdef
    got, want = (
        scores(graphdef, params, patches, grid, ids, where),
        score(scored, patches, ids, where),
    )
    assert got.dtype == jnp.float32
    assert np.abs(np.asarray(got) - want).max() < 0.1 * np.abs(want).max()


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"dim": 36}, "dim is 36"),
        ({"dim_kv": 12}, "dim_kv is 12"),
        ({"dim_kv": 24}, "dim is 32; expected a multiple of dim_kv"),
        ({"vision_heads": 4}, "vision_dim is 24"),
        ({"mrope_section": (1, 1, 1)}, "mrope_section"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(changes, fault):
    with pytest.raises(ValueError, match=f"Qwen2VLConfig.{fault}"):
        dataclasses.replace(qwen.CONFIG, **changes)


@pytest.mark.parametrize(("samples", "grid"), [((1, 24), (1, 4, 4)), ((1, 15), (1, 3, 5))])
def test_patches_of_another_grid_are_refused(samples, grid):
    graphdef, params = qwen.net()
    with pytest.raises(ValueError, match="patches have the shape"):
        layers.merge(graphdef, params).vision(np.zeros((*samples, PATCH_VALUES), np.float32), grid)


def test_a_reward_needs_a_head():
    with pytest.raises(ValueError, match="Qwen2VLConfig.head is empty"):
        QwenRewardNet(qwen.CONFIG, nnx.Rngs(0))
