"""From rewards to what the update needs: the optimality r, and which samples the selective KL
restrains.

Everything here runs on the host, in numpy float64, once per epoch over all N = G K samples. Groups
are identified by the index of their prompt, never by its text. The formulas are those of
docs/objective.md. The controllers of the selective KL are pure functions on small states whose
`_asdict()` survives JSON.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from astrolabe_jax.config import reward_weights

STD_FLOOR = 1e-4  # added to every standard deviation
TOP_SHARES = (100, 75, 50, 25, 10)  # per cent of each group's best samples whose mean is logged


class Advantages(NamedTuple):
    """What the rewards of an epoch say about its samples."""

    total: np.ndarray  # [N] float64, weighted sum of the raw rewards
    advantage: np.ndarray  # [N] float64, unclipped, in standard deviations
    r: np.ndarray  # [N] float32 in [0, 1], the optimality
    metrics: dict[str, float]  # figures for the log, see `statistics`


def advantages(
    config: ConfigDict, rewards: Mapping[str, np.ndarray], groups: np.ndarray
) -> Advantages:
    """Return the advantages of an epoch's samples.

    Args:
      config: of the whole run.
      rewards: {name: [N]}.
      groups: [N], the index of each sample's prompt.

    Raises:
      ValueError: on a reward that is not finite, naming it and the sample.
    """
    settings = config.advantages
    weights = reward_weights(config)
    total = total_reward(rewards, weights)
    score = total_reward(standardise(rewards), weights) if settings.standardise else total
    advantage = normalise(score, groups, settings.std, settings.min_std)
    return Advantages(
        total,
        advantage,
        optimality(advantage, settings.clip).astype(np.float32),
        statistics(total, groups),
    )


def total_reward(rewards: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Return the weighted sum [N] float64 of the rewards {name: [N]}.

    Raises ValueError unless every reward has a weight and is finite.
    """
    if set(rewards) != set(weights):
        raise ValueError(
            f"rewards {sorted(rewards)} were measured, but weights are given for {sorted(weights)}"
        )
    for name, values in rewards.items():
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise ValueError(
                f"reward {name!r} of sample {bad[0]} is {np.asarray(values)[bad[0]]} ({bad.size} "
                f"of {len(values)} samples are not finite); look at that video before training on "
                "it"
            )
    return np.asarray(
        sum(weights[name] * np.asarray(rewards[name], np.float64) for name in sorted(rewards))
    )


def standardise(rewards: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return each reward [N], centred and divided by its standard deviation over the epoch.

    So no reward's scale dominates the sum.
    """
    doubles = {name: np.asarray(values, np.float64) for name, values in rewards.items()}
    return {name: (x - x.mean()) / (x.std() + STD_FLOOR) for name, x in doubles.items()}


def normalise(score: np.ndarray, groups: np.ndarray, std: str, min_std: float = 0.0) -> np.ndarray:
    """Return the advantages [N] = (score - mean of its group) / (std + 1e-4).

    See docs/objective.md, Advantages. Where every group has one member, mean and standard deviation
    are those of the whole epoch. Equal scores have the advantage 0, not that of rounding.

    Args:
      score: [N].
      groups: [N], the index of each sample's prompt.
      std: 'global': the population standard deviation over the whole epoch, or 'prompt': over the
        group.
      min_std: a standard deviation below this counts as this.
    """
    score = np.asarray(score, np.float64)
    overall_std = score.std()
    members_by_group = _members(groups)
    if all(len(members) == 1 for members in members_by_group):
        members_by_group = [np.arange(len(score))]
    advantage = np.zeros_like(score)
    for members in members_by_group:
        group = score[members]
        spread = overall_std if std == "global" else group.std()
        if np.ptp(group):
            advantage[members] = (group - group.mean()) / (max(spread, min_std) + STD_FLOOR)
    return advantage


def optimality(advantage: np.ndarray, clip: float) -> np.ndarray:
    """Return r = clip(A, -clip, clip) / (2 clip) + 1/2, in [0, 1].

    See docs/objective.md, Optimality.
    """
    return np.clip(np.clip(advantage, -clip, clip) / clip / 2 + 0.5, 0.0, 1.0)


def statistics(total: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """Return figures about the groups for the log: size, spread, and mean of the best samples.

    `zero_std_ratio` is the share of groups whose samples all score the same, from which nothing can
    be learnt; `top_P` averages over groups the mean of the samples at or above the group's (100 -
    P)-th percentile.
    """

    scores = [np.asarray(total[members], np.float64) for members in _members(groups)]

    def top(share: int) -> np.floating:
        best = [score[score >= np.percentile(score, 100 - share)] for score in scores]
        return np.mean([score.mean() for score in best])

    metrics = {
        "group_size": len(total) / len(scores),
        "groups": len(scores),
        "zero_std_ratio": np.mean([np.ptp(score) == 0 for score in scores]),
        "group_std": np.mean([score.std() for score in scores]),
        **{f"top_{share}": top(share) for share in TOP_SHARES},
    }
    return {name: float(value) for name, value in metrics.items()}


def _members(groups: np.ndarray) -> list[np.ndarray]:
    """Return the sample indices of each distinct group."""
    names, inverse = np.unique(groups, return_inverse=True)
    return [np.flatnonzero(inverse == i) for i in range(len(names))]


# Selective KL: which samples are suspicious, how many, and when the reference moves.


def rank_discrepancy(rewards: Mapping[str, np.ndarray], main: str, direction: str) -> np.ndarray:
    """Return how far the main reward's rank departs from the mean rank of the others, [N].

    See docs/objective.md, Rank discrepancy. Ranks run over the whole epoch; ties keep the order of
    the samples.

    Args:
      rewards: {name: [N]}.
      main: name of the main reward.
      direction: 'paper': positive where the main reward likes a sample more than the others do,
        which is what reward hacking looks like. 'published': the opposite sign and at most two
        other rewards, as the released code has it (docs/published.md, Objective).
    """
    others = sorted(set(rewards) - {main})
    if main not in rewards or not others:
        raise ValueError(
            f"selective KL compares the main reward {main!r} with others, but has "
            f"{sorted(rewards)}; set kl.main_reward to one of at least two rewards"
        )
    if direction == "published":
        others = others[:2]
    excess = _ranks(rewards[main]) - np.mean([_ranks(rewards[name]) for name in others], axis=0)
    return -excess if direction == "paper" else excess


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks [N]: 1 for the highest value, N for the lowest."""
    order = np.argsort(-np.asarray(values, np.float64), kind="stable")
    return np.argsort(order) + 1.0


class RiskState(NamedTuple):
    """Controller of how many samples the KL restrains; see docs/objective.md, Risk controller."""

    ratio: float = 0.1  # share of the samples with a discrepancy of at least 0
    history: tuple[float, ...] = ()  # risks of the last epochs


RATIO_BOUNDS = (0.02, 0.2)
HISTORY = 20  # epochs


def update_risk(state: RiskState, discrepancy: np.ndarray) -> tuple[RiskState, float]:
    """Return the controller after one epoch, and the epoch's risk.

    The risk is the mean of the discrepancies [N] that are at least 0. A risk above all of the
    history raises the ratio by 1.1, one below all of it lowers it by 0.9.
    """
    risk = float(discrepancy[discrepancy >= 0].mean())
    ratio = state.ratio
    if not state.history:
        ratio = RiskState().ratio
    elif risk > max(state.history):
        ratio *= 1.1
    elif risk < min(state.history):
        ratio *= 0.9
    ratio = float(np.clip(ratio, *RATIO_BOUNDS))
    return RiskState(ratio, (*state.history, risk)[-HISTORY:]), risk


def risk_mask(discrepancy: np.ndarray, ratio: float) -> tuple[np.ndarray, float]:
    """Return which samples the KL restrains, bool [N], and the threshold that they exceed.

    See docs/objective.md, Risk mask.
    The threshold is the (100 - 100 ratio)-th percentile of the discrepancies that are at least 0.
    """
    threshold = np.percentile(discrepancy[discrepancy >= 0], 100 - 100 * ratio)
    return discrepancy > threshold, float(threshold)


class ResetState(NamedTuple):
    """Controller of the reference policy; see docs/objective.md, Reference reset."""

    threshold: float  # mean KL of a step above which a reset is asked for
    previous: int = 0  # epoch of the last reset
    pending: bool = False  # whether one was asked for since


# How resets move the threshold: (floor when they are rare, ceiling when they are frequent). The
# published numbers are exchanged, so that its first frequent reset makes the threshold jump down to
# 0.05 (docs/published.md, Objective).
RESET_BOUNDS = {"corrected": (0.05, 0.15), "published": (0.1, 0.05)}
RESET_STEP = 0.01
FREQUENT_EPOCHS = 5  # resets fewer epochs apart than this are frequent


def start_epoch(
    state: ResetState, epoch: int, max_epochs: int, bounds: str
) -> tuple[ResetState, bool]:
    """Return the controller at the start of an epoch, and whether the reference is reset there.

    A reset makes the current policy the reference. It happens when a step of an earlier epoch asked
    for it, or after more than `max_epochs` epochs without.

    Args:
      state: the controller after the last step.
      epoch: finished epochs.
      max_epochs: that may pass without a reset.
      bounds: 'corrected' or 'published', see RESET_BOUNDS. The corrected bounds never move a
        threshold that starts outside of them the wrong way.
    """
    elapsed = epoch - state.previous
    if elapsed <= max_epochs and not (epoch > 0 and state.pending):
        return state, False
    threshold = state.threshold
    floor, ceiling = RESET_BOUNDS[bounds]
    if bounds == "corrected":
        floor = min(floor, threshold)
        ceiling = max(ceiling, threshold)
    if elapsed > max_epochs:
        threshold = max(threshold - RESET_STEP, floor)
    if elapsed < FREQUENT_EPOCHS:
        threshold = min(threshold + RESET_STEP, ceiling)
    return ResetState(threshold, epoch, False), True


def after_step(state: ResetState, kl: float) -> ResetState:
    """Return the controller after an optimizer step of mean KL `kl`, which may ask for a reset."""
    return state._replace(pending=state.pending or bool(kl > state.threshold))
