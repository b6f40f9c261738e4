"""The plan of a pass: order, noise levels and KL weights of an epoch's samples, and its pieces."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from astrolabe_jax.arithmetic import rounds
from astrolabe_jax.minibatches import cut, levels, plan_pass
from tests.tiny_training import make_config


def plan(config, epoch=0, turn=0, count=24, mask=None):
    return plan_pass(config, epoch, turn, np.ones(count, bool) if mask is None else mask)


def test_a_pass_visits_every_sample_once_in_an_order_of_its_own():
    config = make_config(optimizer__microbatch=4, optimizer__steps_per_pass=3)
    first = plan(config)
    assert first.order.shape == first.t.shape == first.kl_weight.shape == (3, 2, 4)
    np.testing.assert_array_equal(np.sort(first.order.reshape(-1)), np.arange(24))
    np.testing.assert_array_equal(plan(config).order, first.order)
    reseeded = make_config(seed=1, optimizer__microbatch=4, optimizer__steps_per_pass=3)
    others = [plan(config, epoch=1), plan(config, turn=1), plan(reseeded)]
    assert all(np.any(other.order != first.order) for other in others)


def levels_of_samples(config, turn, count=24):
    drawn = plan(config, turn=turn, count=count)
    timesteps = np.empty(count)
    timesteps[drawn.order.reshape(-1)] = drawn.t.reshape(-1)
    return timesteps


def test_stratified_levels_are_balanced_over_neighbours_and_over_passes():
    config = make_config(optimizer__microbatch=4)
    table = np.sort(np.asarray(levels(config), np.float32))
    passes = np.stack([levels_of_samples(config, turn) for turn in range(8)])
    for turn in range(8):
        neighbours = np.sort(passes[turn].reshape(6, 4), axis=1)
        np.testing.assert_array_equal(neighbours, np.tile(table, (6, 1)))
    for cycle in (passes[:4], passes[4:]):
        np.testing.assert_array_equal(np.sort(cycle, axis=0), np.tile(table[:, None], (1, 24)))
    assert np.any(passes[:4] != passes[4:])
    few = levels_of_samples(make_config(optimizer__microbatch=1), 0, count=6)
    _, counts = np.unique(few, return_counts=True)
    assert counts.max() <= 2  # 6 samples over 4 levels


def test_nothing_is_learnt_without_noise():
    krea = make_config(sampler__steps=(1000, 750, 500, 250, 0))
    assert levels(krea) == levels(make_config(sampler__steps=(1000, 750, 500, 250)))


def test_batch_levels_are_one_to_a_microbatch():
    config = make_config(optimizer__microbatch=4, loss__timestep_draw="batch")
    drawn = np.concatenate([plan(config, epoch).t.reshape(-1, 4) for epoch in range(20)])
    assert np.all(drawn == drawn[:, :1])
    assert set(drawn[:, 0]) == set(np.asarray(levels(config), np.float32))


def test_levels_warped_or_raw():
    np.testing.assert_allclose(levels(make_config()), (1000, 937.5, 833.33333, 625))
    assert levels(make_config(loss__timesteps="raw")) == (1000, 750, 500, 250)
    assert levels(make_config(sampler__warp=False)) == (1000, 750, 500, 250)


def test_kl_weights_by_epoch_or_microbatch():
    mask = np.arange(24) < 6
    for reduction, size in (("epoch", 24), ("microbatch", 4)):
        config = make_config(optimizer__microbatch=4, kl__reduction=reduction)
        drawn = plan(config, mask=mask)
        chosen = mask[drawn.order.reshape(-1)].reshape(-1, size)
        assert np.all(drawn.kl_weight.reshape(-1, size)[~chosen] == 0)
        np.testing.assert_allclose(
            drawn.kl_weight.reshape(-1, size).mean(axis=1), chosen.any(axis=1), rtol=1e-6
        )


def test_plan_refuses_incomplete_microbatches():
    with pytest.raises(ValueError, match="24 samples .*optimizer.microbatch"):
        plan(make_config(optimizer__microbatch=5))


@given(
    devices=st.sampled_from([1, 2, 4, 8]),
    each=st.integers(1, 12),
    limit=st.integers(1, 16) | st.just(-1),
)
def test_a_cut_plan_is_the_same_plan_in_the_largest_pieces_that_fit(devices, each, limit):
    config = make_config(
        optimizer__microbatch=devices * each,
        kl__reduction="microbatch",
        loss__timestep_draw="batch",
    )
    config.mesh.samples_per_device = limit
    mask = np.arange(3 * devices * each) % 3 > 0
    whole = plan(config, mask=mask)
    pieces = cut(config, whole, devices)
    for part, wanted in zip(pieces, whole, strict=True):
        np.testing.assert_array_equal(part.reshape(-1), wanted.reshape(-1))
    size, rest = divmod(pieces.order.shape[2], devices)
    fitting = [p for p in range(1, each + 1) if each % p == 0 and (limit == -1 or p <= limit)]
    assert rest == 0
    assert size == max(fitting)


@pytest.mark.parametrize(
    ("devices", "prompts", "microbatch"),
    [
        (1, 4, 4),  # two rounds of two pasts
        (2, 4, 16),
        (4, 2, 8),  # several devices hold the same past
    ],
)
def test_a_microbatch_has_equally_many_videos_of_each_shared_past(devices, prompts, microbatch):
    """They are adjacent, in the order of the streams, so that each device has the pasts of its
    samples.
    """
    config = make_config(
        model__block=1,
        streaming__window=2,
        streaming__prompts_per_device=2,
        prompts__prompts_per_epoch=prompts,
        prompts__samples_per_prompt=8,
        optimizer__microbatch=microbatch,
    )
    count, streams = rounds(config, devices)
    videos = 8 * prompts
    order = plan_pass(config, 0, 0, np.ones(videos, bool), devices).order
    np.testing.assert_array_equal(np.sort(order.reshape(-1)), np.arange(videos))
    stream = (order // (videos // (count * streams))).reshape(-1, streams, microbatch // streams)
    first = stream[:, :1, :1]
    assert (first % streams == 0).all()  # of a round
    np.testing.assert_array_equal(stream - first, np.arange(streams)[None, :, None] + 0 * stream)
