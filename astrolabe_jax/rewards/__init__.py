"""The registry of rewards: a name, the function that scores videos, and the prompts that it understands.

A scorer is a function `(frames, prompts)` of decoded videos uint8 `[B, T, height, width, 3]` and B prompts that
returns either B floats, or a mapping with B floats for each reward it computes (under the reward's name) and, if it
likes, for the parts a reward consists of (under `REWARD/PART`), which are logged but not optimised. It must be a
function of its arguments alone: runs are resumed and repeated. Larger is better, on whatever scale.

To add a reward, write one file with such a function, and add one line to TABLE:

    "brightness": Reward("astrolabe_jax.rewards.brightness:score"),

Its modules are imported when the reward is first used, so that nobody needs the dependencies of rewards they do not
use. Rewards that share a function are computed by one call.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Reward(NamedTuple):
    """A line of TABLE; both functions are given as "module:function"."""

    score: str  # the scorer
    check: str | None = None  # takes one prompt, and raises ValueError if the scorer could not judge a video of it


_MOVING_SHAPES = Reward(
    "astrolabe_jax.worlds.moving_shapes.rewards:score", "astrolabe_jax.worlds.moving_shapes.vocabulary:parse"
)
TABLE = dict.fromkeys(("shapes_vq", "shapes_mq", "shapes_ta", "bounce_mq", "bounce_ta"), _MOVING_SHAPES)


def validate(names: Iterable[str]) -> None:
    """Checks that every reward is known and its functions can be imported.

    Raises:
      ValueError: naming the unknown rewards and the known ones, or the reward whose line in TABLE is wrong.
    """
    names = list(names)
    known = f"known rewards: {', '.join(sorted(TABLE))}"
    if not names:
        raise ValueError(f"no reward is configured; {known}")
    if unknown := [name for name in names if name not in TABLE]:
        raise ValueError(f"unknown reward{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))}; {known}")
    for name in names:
        _functions(name)


def check_prompt(names: Iterable[str], prompt: str) -> None:
    """Raises ValueError, naming the reward, if one of the (valid) names cannot judge videos of this prompt."""
    for name in names:
        _, check = _functions(name)
        try:
            if check:
                check(prompt)
        except ValueError as error:
            raise ValueError(f"reward {name!r}: {error}") from None


def score(
    names: Iterable[str], frames: np.ndarray, prompts: Sequence[str], numbers: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """Raw scores of every named reward, and of its parts; each distinct scorer is called once.

    Args:
      names: rewards of TABLE.
      frames: decoded videos, uint8 `[B, T, height, width, 3]`.
      prompts: B prompts.
      numbers: B numbers of the videos among those of their epoch, for errors; by default from 0.

    Returns:
      `REWARD` and `REWARD/PART` -> float32 `[B]`.

    Raises:
      ValueError: from `validate`, or for scores that are not B finite numbers, naming reward and sample.
    """
    names = list(names)
    validate(names)
    frames = np.asarray(frames)
    called, results = {}, {}
    for name in names:
        scorer = TABLE[name].score
        if scorer not in called:
            called[scorer] = _import(name, scorer)(frames, prompts)
        returned = called[scorer]
        returned = returned if isinstance(returned, Mapping) else {name: returned}
        if name not in returned:
            raise ValueError(f"reward {name!r}: {scorer} returned only {', '.join(map(repr, returned))}")
        for key, values in returned.items():
            if key == name or key.startswith(f"{name}/"):
                results[key] = _checked(key, values, prompts, range(len(prompts)) if numbers is None else numbers)
    return results


def _functions(name: str) -> list[Callable | None]:
    """Scorer and check of a reward."""
    return [target and _import(name, target) for target in TABLE[name]]


def _import(name: str, target: str) -> Callable:
    module, _, function = target.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r}: cannot import {target!r}: {error}") from error


def _checked(name: str, values, prompts: Sequence[str], numbers: Sequence[int]) -> np.ndarray:
    """`values` as float32 `[B]`; ValueError naming the reward, and the sample of a value that is not finite."""
    values = np.asarray(values, np.float32)
    if values.shape != (len(prompts),):
        raise ValueError(
            f"reward {name!r} returned scores of shape {list(values.shape)} for {len(prompts)} videos; "
            f"expected [{len(prompts)}]"
        )
    if len(bad := np.flatnonzero(~np.isfinite(values))):
        index = int(bad[0])
        raise ValueError(
            f"reward {name!r} is {values[index]} for sample {numbers[index]} (prompt {prompts[index]!r})"
            + (f" and for {len(bad) - 1} more" if len(bad) > 1 else "")
        )
    return values
