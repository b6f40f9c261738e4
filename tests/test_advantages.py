"""advantages.py against worked numbers and the meaning of its terms."""

import json

import numpy as np
import pytest

from astrolabe_jax import advantages as adv
from astrolabe_jax.config import get_config


def test_worked_example():
    """Prompts a, a, b, b with rewards 1, 2, 3, 5."""
    config = get_config()
    config.rewards.vq = 1.0
    result = adv.advantages(config, {"vq": np.array([1.0, 2.0, 3.0, 5.0])}, np.array([7, 7, 2, 2]))
    np.testing.assert_allclose(
        result.advantage, [-0.33803885, 0.33803885, -0.67607769, 0.67607769], rtol=1e-7
    )
    np.testing.assert_allclose(
        result.r, [0.46619612, 0.53380388, 0.43239223, 0.56760777], rtol=1e-7
    )
    assert result.metrics["group_size"] == 2 and result.metrics["groups"] == 2
    assert (
        result.metrics["group_std"] == 0.75
        and result.metrics["top_100"] == 2.75
        and result.metrics["top_10"] == 3.5
    )


def test_weights_and_standardisation():
    rng = np.random.default_rng(0)
    rewards = {"a": rng.normal(size=12), "b": 100 * rng.normal(size=12) + 7}
    np.testing.assert_allclose(
        adv.total_reward(rewards, {"a": 2.0, "b": 0.5}), 2 * rewards["a"] + 0.5 * rewards["b"]
    )
    scores = adv.standardise(rewards)
    np.testing.assert_allclose([scores["a"].std(), scores["b"].std()], 1, rtol=1e-3)
    scaled = adv.standardise({"a": 1000 * rewards["a"] - 3, "b": rewards["b"]})
    np.testing.assert_allclose(scaled["a"], scores["a"], rtol=1e-3)
    np.testing.assert_array_equal(adv.standardise({"a": np.full(4, 0.3)})["a"], 0)


def test_group_and_global_spread():
    score, groups = np.array([0.0, 1.0, 10.0, 30.0]), np.array([0, 0, 1, 1])
    np.testing.assert_allclose(adv.normalise(score, groups, "prompt"), [-1, 1, -1, 1], rtol=1e-3)
    overall = adv.normalise(score, groups, "global")
    np.testing.assert_allclose(overall[3] / overall[1], 20)


def test_a_small_spread_counts_as_the_least():
    score, groups = np.array([0.0, 0.02, 10.0, 30.0]), np.array([0, 0, 1, 1])
    np.testing.assert_allclose(
        adv.normalise(score, groups, "prompt", 0.1), [-0.1, 0.1, -1, 1], rtol=2e-3
    )
    np.testing.assert_allclose(
        adv.normalise(score / 1e3, groups, "global", 0.1)[2:], [-0.1, 0.1], rtol=2e-3
    )
    alone = adv.normalise(score[:2], np.arange(2), "prompt", 0.1)  # one video of each prompt
    np.testing.assert_allclose(alone, [-0.1, 0.1], rtol=2e-3)


@pytest.mark.parametrize("std", ["global", "prompt"])
@pytest.mark.parametrize(
    "score", [np.full(6, 0.1), np.full(6, 1e8 + 0.3), np.repeat([0.1, 1e8 + 0.3], 3)], ids=str
)
def test_equal_scores_of_a_prompt_have_no_advantage(score, std):
    """Exactly: rounding in a mean of 1e8 would be 1e-4 deviations."""
    assert not adv.normalise(score, np.repeat([0, 1], 3), std).any()
    if np.ptp(score) == 0:
        assert not adv.normalise(score, np.arange(6), std).any()


def test_single_candidates_are_compared_with_the_whole_epoch():
    score = np.array([1.0, 2.0, 6.0])
    want = (score - 3) / (score.std() + 1e-4)
    for std in ("global", "prompt"):
        np.testing.assert_allclose(adv.normalise(score, np.arange(3), std), want, rtol=1e-12)


def test_groups_are_interleaved_and_any_labels_will_do():
    rng = np.random.default_rng(1)
    score, groups, order = rng.normal(size=12), np.repeat([3, 8, 1], 4), rng.permutation(12)
    np.testing.assert_allclose(
        adv.normalise(score, groups, "prompt")[order],
        adv.normalise(score[order], groups[order], "prompt"),
    )


def test_optimality_is_clipped_and_symmetric():
    np.testing.assert_array_equal(
        adv.optimality(np.array([-9.0, -5.0, 0.0, 2.5, 5.0, 9.0]), 5.0), [0, 0, 0.5, 0.75, 1, 1]
    )


def test_statistics():
    total = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 2.0, 3.0])
    metrics = adv.statistics(total, np.repeat([0, 1], 4))
    assert metrics["zero_std_ratio"] == 0.5
    assert metrics["top_100"] == 1.25 and metrics["top_25"] == 2.0  # of the second group: 1.5 and 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_rewards_are_refused(bad):
    rewards = {"vq": np.array([1.0, 2.0]), "mq": np.array([0.0, bad])}
    with pytest.raises(ValueError, match="'mq' of sample 1"):
        adv.total_reward(rewards, {"vq": 1.0, "mq": 1.0})
    with pytest.raises(ValueError, match="weights are given for"):
        adv.total_reward(rewards, {"vq": 1.0})


def test_discrepancy_finds_what_only_the_main_reward_likes():
    rewards = {
        "main": np.array([5.0, 3.0, 4.0, 1.0]),
        "a": np.array([1.0, 3.0, 4.0, 2.0]),
        "b": np.array([0.0, 2.0, 3.0, 1.0]),
    }
    paper = adv.rank_discrepancy(rewards, "main", "paper")
    assert paper.argmax() == 0 and paper[0] == 3  # first for main, last for both others
    np.testing.assert_array_equal(adv.rank_discrepancy(rewards, "main", "published"), -paper)
    assert paper.sum() == 0


def test_discrepancy_of_many_rewards():
    """The published code compares with the first two others in sorted order, the corrected one with
    all.
    """
    rng = np.random.default_rng(0)
    rewards = {name: rng.normal(size=9) for name in ("z", "main", "b", "a")}
    two = {name: rewards[name] for name in ("a", "b", "main")}
    for direction, same in (("published", True), ("paper", False)):
        pair = [adv.rank_discrepancy(given, "main", direction) for given in (rewards, two)]
        assert np.array_equal(*pair) == same


@pytest.mark.parametrize("main", ["absent", "main"])
def test_discrepancy_needs_a_main_reward_and_another(main):
    with pytest.raises(ValueError, match="kl.main_reward"):
        adv.rank_discrepancy({"main": np.zeros(3)}, main, "paper")


def through_json(state):
    """What a checkpoint does to a controller's state."""
    return type(state)(**json.loads(json.dumps(state._asdict())))


def test_risk_ratio_sequence():
    state, ratios = adv.RiskState(), []
    for risk in (10, 11, 12, 9, 9.5, 8):
        after, measured = adv.update_risk(state, np.array([risk - 1, risk + 1, -3.0]))
        assert measured == risk
        state = through_json(after)
        ratios.append(state.ratio)
    np.testing.assert_allclose(ratios, [0.1, 0.11, 0.121, 0.1089, 0.1089, 0.09801], rtol=1e-12)


def test_risk_ratio_is_bounded_and_forgets():
    up, down = adv.RiskState(), adv.RiskState()
    for epoch in range(30):
        up, _ = adv.update_risk(up, np.array([epoch]))
        down, _ = adv.update_risk(down, np.array([29 - epoch]))
    assert up.ratio == 0.2 and down.ratio == 0.02
    assert up.history == tuple(range(10, 30))


def test_mask_takes_the_ratio_of_the_non_negative_discrepancies():
    discrepancy = np.concatenate([np.arange(100.0), -np.arange(1.0, 300.0)])
    mask, threshold = adv.risk_mask(discrepancy, 0.1)
    assert mask.sum() == 10 and discrepancy[mask].min() > threshold
    assert not adv.risk_mask(np.zeros(5), 0.1)[0].any()  # strict: perfect agreement masks nothing


def run_resets(bounds, kl_by_epoch, threshold=0.15, max_epochs=15):
    state, resets, thresholds = adv.ResetState(threshold), [], []
    for epoch, kl in enumerate(kl_by_epoch):
        state, reset = adv.start_epoch(through_json(state), epoch, max_epochs, bounds)
        resets.append(reset)
        thresholds.append(state.threshold)
        state = adv.after_step(state, kl)
    return np.flatnonzero(resets), thresholds


def test_forced_resets_come_every_sixteen_epochs_and_lower_the_threshold():
    resets, thresholds = run_resets("corrected", [0.0] * 200)
    np.testing.assert_array_equal(resets, np.arange(16, 200, 16))
    np.testing.assert_allclose([thresholds[16], thresholds[-1]], [0.14, 0.05])


def test_frequent_resets_raise_the_threshold_up_to_its_ceiling():
    resets, thresholds = run_resets("corrected", [1.0] * 40, threshold=0.05)
    np.testing.assert_array_equal(resets, np.arange(1, 40))
    np.testing.assert_allclose([thresholds[1], thresholds[-1]], [0.06, 0.15])


def test_published_bounds_are_exchanged():
    _, thresholds = run_resets("published", [1.0, 0.0, 0.0, *[0.0] * 20])
    assert thresholds[0] == 0.15 and thresholds[1] == 0.05  # one quick reset lowers
    assert thresholds[17] == 0.1  # the next forced one raises


def test_corrected_bounds_never_move_the_wrong_way():
    assert run_resets("corrected", [9.0] * 5, threshold=0.4)[1][-1] == 0.4
    assert run_resets("corrected", [0.0] * 40, threshold=0.02)[1][-1] == 0.02
