"""The registry of rewards: a name, what scores videos, and the prompts that it understands.

To add a reward, write one file with a function, and add one line to TABLE:

    "brightness": Reward("astrolabe_jax.rewards.brightness:score"),

The function `(frames, prompts)` takes decoded videos uint8 `[B, T, height, width, 3]` and B
prompts, and returns either B floats, or a mapping with B floats for each reward it computes (under
the reward's name) and, if it likes, for the parts a reward consists of (under `REWARD/PART`), which
are logged but not optimised. Values are numpy or jax arrays or lists. It must be a function of its
arguments alone: runs are resumed and repeated. Larger is better, on whatever scale.

A reward that has weights, or options in the config, names a loader instead:

    "hpsv3": Reward(load="astrolabe_jax.rewards.hpsv3:load"),

`load(names, setting, **options)` reads everything once and returns a Scorer; names are those
rewards of the run that share this loader and these options, options are what `config.rewards.NAME`
has besides `weight`.

Modules are imported when a reward is first used, so that nobody needs the dependencies of rewards
they do not use. Rewards that share a function, or a loader and their options, are computed by one
call.
"""

import importlib
import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from astrolabe_jax.config import WEIGHT
from astrolabe_jax.convert import reward_store


class Setting(NamedTuple):
    """What a run is to its rewards."""

    mesh: Mesh
    fps: float  # frames a second of the videos


class Scorer(NamedTuple):
    """`score(params, frames, prompts)` returns what the function of a reward without weights
    does.
    """

    score: Callable[[Any, Any, Sequence[str]], Any]
    # arrays on the mesh; the caller may move them to the host and back between two calls
    params: Any = None
    identity: str = ""  # of its weights: a run does not go on with others


class Reward(NamedTuple):
    """A line of TABLE; functions are given as "module:function"."""

    score: str = ""  # the function, or
    # takes one prompt, and raises ValueError if the scorer could not judge a video of it
    check: str | None = None
    load: str = ""  # the loader
    # "module:name" of what its option `path` is a directory of (convert.reward_store.Kind)
    kind: str = ""


class Loaded(NamedTuple):
    """Rewards that are computed by one call."""

    names: tuple[str, ...]
    scorer: Scorer


class SampleError(Exception):
    """Raised by a scorer that knows which video it could not judge."""

    def __init__(self, row: int, message: str):
        super().__init__(message)
        self.row = row  # of the batch


class RewardError(ValueError):
    """A reward cannot be had, or is no finite number; the message names it and the sample."""


_MOVING_SHAPES = Reward(
    "astrolabe_jax.worlds.moving_shapes.rewards:score",
    "astrolabe_jax.worlds.moving_shapes.vocabulary:parse",
)
_HERE, _CONVERT = "astrolabe_jax.rewards", "astrolabe_jax.convert"
_CHAT = f"{_HERE}.chat:check"
_VIDEOALIGN = Reward(
    load=f"{_HERE}.videoalign:load", check=_CHAT, kind=f"{_CONVERT}.rewards:VIDEOALIGN"
)
_CLIP_CHECK = "astrolabe_jax.models.clip_tokenizer:check_prompt"
_FLOW = Reward(load=f"{_HERE}.flow:load", kind=f"{_CONVERT}.sea_raft:SEA_RAFT")
TABLE = {
    **dict.fromkeys(
        ("shapes_vq", "shapes_mq", "shapes_ta", "bounce_mq", "bounce_ta"), _MOVING_SHAPES
    ),
    "hpsv3": Reward(load=f"{_HERE}.hpsv3:load", check=_CHAT, kind=f"{_CONVERT}.rewards:HPSV3"),
    **dict.fromkeys(("videoalign_vq", "videoalign_mq", "videoalign_ta", "videoalign"), _VIDEOALIGN),
    "hpsv2": Reward(load=f"{_HERE}.hpsv2:load", check=_CLIP_CHECK, kind=f"{_CONVERT}.clip:HPSV2"),
    "aesthetic": Reward(load=f"{_HERE}.aesthetic:load", kind=f"{_CONVERT}.clip:AESTHETIC"),
    **dict.fromkeys(("dynamic_degree", "motion_smoothness"), _FLOW),
    "unifiedreward": Reward(load=f"{_HERE}.remote:load_unified"),
}
_GIVEN = 2  # parameters of a loader that are no options


def options(value: Any) -> dict[str, Any]:
    """The options of a reward, given what config.rewards has under its name."""
    given = isinstance(value, Mapping | ConfigDict)
    return {key: option for key, option in value.items() if key != WEIGHT} if given else {}


def validate(settings: Mapping[str, Any]) -> None:
    """Checks that every reward is known, its functions can be imported, and its options are those
    of its loader.

    Raises:
      ValueError: naming the reward, and the options that are unknown or missing.
    """
    known = f"known rewards: {', '.join(sorted(TABLE))}"
    if not settings:
        raise ValueError(f"no reward is configured; {known}")
    if unknown := [name for name in settings if name not in TABLE]:
        raise ValueError(
            f"unknown reward{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))}; {known}"
        )
    for name, value in settings.items():
        line, given = TABLE[name], options(value)
        _imported(name, line.check)
        function = _imported(name, line.load or line.score)
        parameters = (
            list(inspect.signature(function).parameters.values())[_GIVEN:] if line.load else []
        )
        takes = [parameter.name for parameter in parameters]
        needs = [
            parameter.name
            for parameter in parameters
            if parameter.default is inspect.Parameter.empty
        ]
        told = f"it takes {', '.join(takes) or 'none'}"
        if unknown := [option for option in given if option not in takes]:
            raise ValueError(
                f"config.rewards.{name} has unknown options {', '.join(unknown)}; {told}"
            )
        if missing := [option for option in needs if option not in given]:
            raise ValueError(
                f"config.rewards.{name} needs the options {', '.join(missing)} beside its weight; "
                f"{told}"
            )


def check_prompt(names: Iterable[str], prompt: str) -> None:
    """Raises ValueError, naming the reward, if one of the (valid) names cannot judge videos of this
    prompt.
    """
    for name in names:
        check = _imported(name, TABLE[name].check)
        try:
            if check:
                check(prompt)
        except ValueError as error:
            raise ValueError(f"reward {name!r}: {error}") from None


def load(settings: Mapping[str, Any], setting: Setting) -> tuple[Loaded, ...]:
    """Makes the rewards of config.rewards ready, their weights on the mesh.

    Raises:
      ValueError, OSError: of `validate`, or naming the reward and its file at fault.
    """
    validate(settings)
    return tuple(
        Loaded(names, _scorer(names, settings[names[0]], setting)) for names in _groups(settings)
    )


def _groups(settings: Mapping[str, Any]) -> list[tuple[str, ...]]:
    groups: dict[Any, list[str]] = {}
    for name, value in settings.items():
        key = (TABLE[name].load or TABLE[name].score, repr(sorted(options(value).items())))
        groups.setdefault(key, []).append(name)
    return [tuple(names) for names in groups.values()]


def planned(settings: Mapping[str, Any], mesh: Any) -> tuple[Loaded, ...]:
    """As `load`, with the shapes of weights that need not be there, on a mesh of devices that need
    not exist.
    """
    validate(settings)
    return tuple(
        Loaded(
            names, Scorer(_unplanned, _shapes(TABLE[names[0]], options(settings[names[0]]), mesh))
        )
        for names in _groups(settings)
    )


def _shapes(line: Reward, given: Mapping[str, Any], mesh: Any) -> Any:
    return (
        reward_store.planned(Path(given["path"]), _imported("", line.kind), mesh)
        if line.kind
        else None
    )


def _unplanned(*_) -> None:
    raise RewardError("rewards that are only planned do not score")


def _scorer(names: Sequence[str], value: Any, setting: Setting) -> Scorer:
    line = TABLE[names[0]]
    if not line.load:
        function = _imported(names[0], line.score)
        return Scorer(lambda _, frames, prompts: function(frames, prompts))
    try:
        return _imported(names[0], line.load)(tuple(names), setting, **options(value))
    except (ValueError, OSError) as error:
        raise type(error)(f"config.rewards.{names[0]}: {error}") from error


def score(
    loaded: Loaded, frames: Any, prompts: Sequence[str], numbers: Sequence[int] | None = None
) -> dict[str, np.ndarray]:
    """Raw scores of the rewards that one call computes, and of their parts.

    Args:
      frames: decoded videos, uint8 `[B, T, height, width, 3]`.
      prompts: B prompts.
      numbers: B numbers of the videos among those of their epoch, for errors; by default from 0.

    Returns:
      `REWARD` and `REWARD/PART` -> float32 `[B]`.

    Raises:
      RewardError: naming reward and sample, for whatever the scorer raises, and for what are not B
      finite numbers.
    """
    numbers = range(len(prompts)) if numbers is None else numbers
    names, scorer, results = loaded.names, loaded.scorer, {}
    told = "reward" + "s" * (len(names) > 1) + f" {', '.join(map(repr, names))}"
    try:
        returned = scorer.score(scorer.params, frames, prompts)
        returned = returned if isinstance(returned, Mapping) else {names[0]: returned}
        returned = {
            key: np.asarray(values, np.float32) for key, values in jax.device_get(returned).items()
        }
    except SampleError as error:
        number, prompt = numbers[error.row], prompts[error.row]
        raise RewardError(
            f"{told} failed on sample {number} (prompt {prompt!r}): {error}"
        ) from error
    except Exception as error:  # a reward is anybody's code
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise RewardError(
            f"{told} failed on samples {_span(numbers)}: {type(error).__name__}: {error} "
            f"({Path(place.filename).name}, line {place.lineno})"
        ) from error
    for name in names:
        if name not in returned:
            raise RewardError(
                f"reward {name!r}: its scorer returned only {', '.join(map(repr, returned))}"
            )
        for key, values in returned.items():
            if key == name or key.startswith(f"{name}/"):
                results[key] = _checked(key, values, prompts, numbers)
    return results


def _span(numbers: Sequence[int]) -> str:
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"


def _imported(name: str, target: str | None) -> Callable | None:
    if not target:
        return None
    module, _, function = target.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward {name!r}: cannot import {target!r}: {error}") from error


def _checked(
    name: str, values: np.ndarray, prompts: Sequence[str], numbers: Sequence[int]
) -> np.ndarray:
    """`values` if they are float32 `[B]` and finite; else RewardError, naming the reward and the
    sample.
    """
    if values.shape != (len(prompts),):
        raise RewardError(
            f"reward {name!r} returned scores of shape {list(values.shape)} for {len(prompts)} "
            f"videos; expected [{len(prompts)}]"
        )
    if len(bad := np.flatnonzero(~np.isfinite(values))):
        index = int(bad[0])
        raise RewardError(
            f"reward {name!r} is {values[index]} for sample {numbers[index]} (prompt "
            f"{prompts[index]!r})" + (f" and for {len(bad) - 1} more" if len(bad) > 1 else "")
        )
    return values
