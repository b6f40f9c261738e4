"""From rewards to what the update needs of them: the optimality r, and which samples the selective
KL restrains.

Everything here runs on the host, in numpy float64, once per epoch over all N = G K samples; groups
are identified by the index of their prompt, never by its text. Section numbers are those of
spec/objective.md. The controllers of the selective KL are pure functions on small states whose
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
    metrics: dict[str, float]


def advantages(
    config: ConfigDict, rewards: Mapping[str, np.ndarray], groups: np.ndarray
) -> Advantages:
    """The advantages of an epoch. config: the whole run's; rewards {name: [N]}; groups [N], the
    prompt of each sample.

    Raises ValueError on a non-finite reward, naming it and the sample.
    """
    settings, weights = config.advantages, reward_weights(config)
    total = total_reward(rewards, weights)
    score = total_reward(standardise(rewards), weights) if settings.standardise else total
    advantage = normalise(score, groups, settings.std, settings.min_std)
    r = optimality(advantage, settings.clip).astype(np.float32)
    return Advantages(total, advantage, r, statistics(total, groups))


def total_reward(rewards: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """Weighted sum [N] of the rewards {name: [N]} (section 4), after a check that every reward is
    finite.
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
    return sum(weights[name] * np.asarray(rewards[name], np.float64) for name in sorted(rewards))


def standardise(rewards: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each reward centred and divided by its standard deviation over the epoch, so that no scale
    dominates the sum.
    """
    scores = {name: np.asarray(values, np.float64) for name, values in rewards.items()}
    return {name: (x - x.mean()) / (x.std() + STD_FLOOR) for name, x in scores.items()}


def normalise(score: np.ndarray, groups: np.ndarray, std: str, min_std: float = 0.0) -> np.ndarray:
    """Advantages [N] = (score - mean of its group) / (std + 1e-4), with population standard
    deviations (section 4).

    std: 'global', over the whole epoch, or 'prompt', of the group. Where every group has one
    member, mean and standard deviation are those of the whole epoch. A deviation below min_std
    counts as min_std.
    """
    if std not in ("global", "prompt"):
        raise ValueError(f"advantages.std is {std!r}; use 'global' or 'prompt'")
    score = np.asarray(score, np.float64)
    _, members = _by_group(groups)
    if all(len(member) == 1 for member in members):
        return (score - score.mean()) / (max(score.std(), min_std) + STD_FLOOR)
    advantage = np.empty_like(score)
    for member in members:
        spread = score.std() if std == "global" else score[member].std()
        advantage[member] = (score[member] - score[member].mean()) / (
            max(spread, min_std) + STD_FLOOR
        )
    return advantage


def optimality(advantage: np.ndarray, clip: float) -> np.ndarray:
    """r = clip(A, -clip, clip) / (2 clip) + 1/2, in [0, 1] (section 4)."""
    return np.clip(np.clip(advantage, -clip, clip) / clip / 2 + 0.5, 0.0, 1.0)


def statistics(total: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """The logged figures of section 2 about the groups: their size, spread, and the mean of their
    best samples.

    `zero_std_ratio` is the share of groups whose samples all score the same, from which nothing can
    be learnt; `top_P` averages over groups the mean of the samples at or above the group's (100 -
    P)-th percentile.
    """
    total = np.asarray(total, np.float64)
    scores = [total[member] for member in _by_group(groups)[1]]
    metrics = {
        "group_size": len(total) / len(scores),
        "groups": len(scores),
        "zero_std_ratio": np.mean([np.ptp(score) == 0 for score in scores]),
        "group_std": np.mean([score.std() for score in scores]),
    }
    for share in TOP_SHARES:
        tops = [score[score >= np.percentile(score, 100 - share)].mean() for score in scores]
        metrics[f"top_{share}"] = np.mean(tops)
    return {name: float(value) for name, value in metrics.items()}


def _by_group(groups):
    """The distinct groups, and the sample indices of each."""
    names, inverse = np.unique(groups, return_inverse=True)
    return names, [np.flatnonzero(inverse == i) for i in range(len(names))]


# Selective KL (section 7): which samples are suspicious, how many, and when the reference moves.


def rank_discrepancy(rewards: Mapping[str, np.ndarray], main: str, direction: str) -> np.ndarray:
    """How far the main reward's ranking of each sample departs from the mean of the others', [N],
    in ranks (7.1).

    'paper': positive where the main reward likes a sample more than the others do, which is what
    reward hacking looks like. 'published': the opposite sign and at most two other rewards, as the
    released code has it. Ranks run over the whole epoch; ties keep the order of the samples.
    """
    if direction not in ("paper", "published"):
        raise ValueError(f"kl.rank_direction is {direction!r}; use 'paper' or 'published'")
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


def _ranks(values):
    """Rank 1 for the highest value, N for the lowest."""
    order = np.argsort(-np.asarray(values, np.float64), kind="stable")
    ranks = np.empty(len(order))
    ranks[order] = np.arange(1, len(order) + 1)
    return ranks


class RiskState(NamedTuple):
    """Controller of the masked share. `ratio`: share of the non-negative discrepancies; `history`:
    their last means.
    """

    ratio: float = 0.1
    history: tuple[float, ...] = ()


RATIO_BOUNDS = (0.02, 0.2)
HISTORY = 20


def update_risk(state: RiskState, discrepancy: np.ndarray) -> tuple[RiskState, float]:
    """The controller after one epoch, and the epoch's risk: the mean non-negative discrepancy
    (7.2).

    A risk above all of the history raises the ratio by 1.1, one below all of it lowers it by 0.9.
    """
    return risk_step(state, risk := float(discrepancy[discrepancy >= 0].mean())), risk


def risk_step(state: RiskState, risk: float) -> RiskState:
    """The controller after an epoch of the given risk."""
    ratio, history = state.ratio, tuple(state.history)
    if not history:
        ratio = RiskState().ratio
    elif risk > max(history):
        ratio *= 1.1
    elif risk < min(history):
        ratio *= 0.9
    return RiskState(float(np.clip(ratio, *RATIO_BOUNDS)), (*history, risk)[-HISTORY:])


def risk_mask(discrepancy: np.ndarray, ratio: float) -> tuple[np.ndarray, float]:
    """Which samples the KL restrains, bool [N], and the threshold they exceed (7.3).

    The threshold is the (100 - 100 ratio)-th percentile of the non-negative discrepancies.
    """
    threshold = np.percentile(discrepancy[discrepancy >= 0], 100 - 100 * ratio)
    return discrepancy > threshold, float(threshold)


class ResetState(NamedTuple):
    """Controller of the reference. `threshold`: deviation that asks for a reset; `previous`: epoch
    of the last one.
    """

    threshold: float
    previous: int = 0
    pending: bool = False


# How resets move the threshold: (floor when they are rare, ceiling when they are frequent). The
# published numbers are exchanged, so that its first frequent reset makes the threshold jump down to
# 0.05 (section 15.9).
RESET_BOUNDS = {"corrected": (0.05, 0.15), "published": (0.1, 0.05)}
RESET_STEP = 0.01
FREQUENT_EPOCHS = 5  # resets fewer epochs apart than this are frequent


def start_epoch(
    state: ResetState, epoch: int, max_epochs: int, bounds: str
) -> tuple[ResetState, bool]:
    """Whether the reference becomes the current policy before this epoch, and the controller after
    that (7.5).

    It does when a step of an earlier epoch asked for it, or after more than `max_epochs` epochs
    without. bounds: 'corrected' or 'published', see RESET_BOUNDS. The corrected bounds never move a
    threshold that starts outside of them the wrong way.
    """
    if bounds not in RESET_BOUNDS:
        raise ValueError(f"kl.reset_bounds is {bounds!r}; use 'corrected' or 'published'")
    elapsed = epoch - state.previous
    if not (epoch and state.pending) and elapsed <= max_epochs:
        return state, False
    threshold, (floor, ceiling) = state.threshold, RESET_BOUNDS[bounds]
    if bounds == "corrected":
        floor, ceiling = min(floor, threshold), max(ceiling, threshold)
    if elapsed > max_epochs:
        threshold = max(threshold - RESET_STEP, floor)
    if elapsed < FREQUENT_EPOCHS:
        threshold = min(threshold + RESET_STEP, ceiling)
    return ResetState(threshold, epoch, False), True


def after_step(state: ResetState, kl: float) -> ResetState:
    """The controller after an optimizer step whose mean KL was `kl`: above the threshold it asks
    for a reset (7.5).
    """
    return state._replace(pending=state.pending or bool(kl > state.threshold))
