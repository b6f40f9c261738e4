"""The registry of rewards. To add one, write a function, and name it in a config or in TABLE.

A reward without weights
------------------------
Write a module, say astrolabe_jax/rewards/brightness.py, with one function:

    def score(frames, prompts):
        return frames.mean(axis=(1, 2, 3, 4)) / 255

    frames    decoded videos, uint8 [B, T, height, width, 3], numpy or jax, on the host or a device
    prompts   B strings
    returns   B real numbers, in any array or list. Larger is better, on whatever scale.

Add the line

    "brightness": Reward("astrolabe_jax.rewards.brightness:score"),

to TABLE, and give it a weight in a config: `config.rewards.brightness = 1.0`. A module that is not
in this package, wherever Python finds it, needs no line:

    config.rewards.brightness = {"weight": 1.0, "load": "my.brightness:score"}

The function must depend on its arguments alone, because runs are resumed and repeated. Numbers must
be finite: anything else ends the run with the name of the reward and the sample.

Several rewards of one function
-------------------------------
A function may return a mapping, with B numbers under the name of each reward that it computes. Give
each a line with the same function: one call then computes them all. Keys `REWARD/PART`, such as
`brightness/left`, are logged beside the reward and not optimised.

Prompts that a reward cannot score
----------------------------------
Name a second function, `Reward("...:score", check="...:check")`. `check(prompt)` raises ValueError
for a prompt whose videos cannot be scored. It is called for every prompt before a run begins.

A reward with weights or options
--------------------------------
Name a loader instead, `"taste": Reward(load="astrolabe_jax.rewards.taste:load")`:

    @dataclasses.dataclass(frozen=True)
    class TasteOptions:
        path: str
        frame_stride: int = 1

    def load(names: tuple[str, ...], setting: Setting, options: TasteOptions) -> Scorer:
        params = ...  # read once, placed on setting.mesh
        return Scorer(score, params, identity)

(`load` in a config names such a loader, too.) The options are what `config.rewards.taste` has
besides `weight` and `load`. Their names, and which of them are
needed, are read from the dataclass that `options` is annotated with; a loader that has no parameter
`options` takes none. `names` are the rewards of the run that have this loader and equal options:
one call of `score(params, frames, prompts)` computes them all, and returns what the function of a
reward without weights returns. Raise ValueError or OSError for options that cannot be; the registry
adds the name of the reward. Options that have a method `reach` are asked before anything is loaded
whether what they need from elsewhere is there; it raises OSError if not.

Keep net, tensor names and scorers of a model in one folder, as rewards/clip does. A line's `net`
names the NetSpec of the directory that its option `path` gives, so that `plan` knows how large the
weights are before they are there, and `work` what is computed of a video, so that `plan` counts it.
See docs/rewards.md, A reward of your own.

A program of your own in any language can score, too: see remote.py.

Modules are imported when their reward is first used, so that nobody needs the dependencies of
rewards that they do not use.
"""

import contextlib
import dataclasses
import inspect
import pkgutil
import sysconfig
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from astrolabe_jax.config import LOAD, WEIGHT
from astrolabe_jax.rewards import directory
from astrolabe_jax.runtime import backend
from astrolabe_jax.runtime.files import local_directory


class Setting(NamedTuple):
    """What a loader knows of the run."""

    mesh: Mesh
    fps: float  # frames a second of the videos


class Scorer(NamedTuple):
    """What a loader returns."""

    # (params, frames, prompts) -> what the function of a reward without weights returns
    score: Callable[[Any, Any, Sequence[str]], Any]
    # arrays on the mesh; the caller may move them to the host and back between two calls
    params: Any = None
    identity: str = ""  # a hash of the weights: a run does not go on with others


class Reward(NamedTuple):
    """A line of TABLE; functions and specs are named as "module:name"."""

    score: str = ""  # (frames, prompts) -> scores, for a reward without weights and options
    check: str = ""  # (prompt) -> None, or ValueError for a prompt that cannot be scored
    load: str = ""  # (names, setting, options) -> Scorer, for any other reward
    net: str = ""  # the NetSpec of the reward directory that the option `path` names
    # (names, net, clip, options) -> the Work of a video, so that `plan` counts it
    work: str = ""


class Clip(NamedTuple):
    """What a reward is given of a video."""

    frames: int
    height: int
    width: int
    fps: float


class Work(NamedTuple):
    """A program of a reward, for some frames at once."""

    function: Callable  # (params, *arguments)
    arguments: tuple  # of shapes
    calls: float  # for a video


class Loaded(NamedTuple):
    """Rewards that one call computes."""

    names: tuple[str, ...]
    scorer: Scorer


class SampleError(Exception):
    """Raised by a scorer that knows which video of the batch it could not score."""

    def __init__(self, row: int, message: str):
        super().__init__(message)
        self.row = row  # of the batch


class RewardError(ValueError):
    """A reward failed, or is no finite number; the message names it and the sample."""


LARGEST_SCORE = 1e30  # sums over an epoch stay finite in float32
_LONGEST = 300  # characters of an error in a message, so that its place stands behind it
# Where code is that no user wrote: Python's own, and packages that are installed.
_PYTHON = sysconfig.get_path("stdlib")
_PACKAGES = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
_REWARDS = "astrolabe_jax.rewards"
_WORLD = "astrolabe_jax.worlds.moving_shapes"
TABLE = {
    **dict.fromkeys(
        ("shapes_vq", "shapes_mq", "shapes_ta", "bounce_mq", "bounce_ta"),
        Reward(f"{_WORLD}.rewards:score", f"{_WORLD}.vocabulary:parse"),
    ),
    "hpsv3": Reward(
        load=f"{_REWARDS}.qwen2_vl.hpsv3:load",
        check=f"{_REWARDS}.qwen2_vl.chat:check_prompt",
        net=f"{_REWARDS}.qwen2_vl.weights:HPSV3",
        work=f"{_REWARDS}.qwen2_vl.hpsv3:work",
    ),
    **dict.fromkeys(
        ("videoalign_vq", "videoalign_mq", "videoalign_ta", "videoalign"),
        Reward(
            load=f"{_REWARDS}.qwen2_vl.videoalign:load",
            check=f"{_REWARDS}.qwen2_vl.chat:check_prompt",
            net=f"{_REWARDS}.qwen2_vl.weights:VIDEOALIGN",
            work=f"{_REWARDS}.qwen2_vl.videoalign:work",
        ),
    ),
    "hpsv2": Reward(
        load=f"{_REWARDS}.clip.scorers:load_hpsv2",
        check=f"{_REWARDS}.clip.tokenizer:check_prompt",
        net=f"{_REWARDS}.clip.weights:HPSV2",
        work=f"{_REWARDS}.clip.scorers:work_hpsv2",
    ),
    "aesthetic": Reward(
        load=f"{_REWARDS}.clip.scorers:load_aesthetic",
        net=f"{_REWARDS}.clip.weights:AESTHETIC",
        work=f"{_REWARDS}.clip.scorers:work_aesthetic",
    ),
    **dict.fromkeys(
        ("dynamic_degree", "motion_smoothness"),
        Reward(
            load=f"{_REWARDS}.flow.scorers:load",
            net=f"{_REWARDS}.flow.weights:SEA_RAFT",
            work=f"{_REWARDS}.flow.scorers:work",
        ),
    ),
    "unifiedreward": Reward(load=f"{_REWARDS}.remote:load_unified"),
}


def options(value: Any) -> dict[str, Any]:
    """Return the options in a value of config.rewards, which may be a weight alone."""
    fields = value if isinstance(value, Mapping | ConfigDict) else {}
    return {key: option for key, option in fields.items() if key != WEIGHT}


def validate(settings: Mapping[str, Any]) -> None:
    """Check that rewards are known, their functions can be imported, and their options exist.

    Args:
      settings: config.rewards.

    Raises:
      ValueError: naming the reward, and the options that are unknown, missing, or of another type.
    """
    known = f"known rewards: {', '.join(sorted(TABLE))}; others take {LOAD}=module:function"
    if not settings:
        raise ValueError(f"no reward is configured; {known}")
    if unknown := [
        name for name in settings if name not in TABLE and LOAD not in options(settings[name])
    ]:
        raise ValueError(
            f"unknown reward{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))}; {known}"
        )
    for name, value in settings.items():
        line = _line(name, value)
        if line.check:
            _imported(name, line.check)
        function = _imported(name, line.load or line.score)
        kind = _options_class(name, function) if line.load else None
        fields = {field.name: field for field in dataclasses.fields(kind)} if kind else {}
        _check_options(name, _given(name, value), fields)


def reach_faults(settings: Mapping[str, Any]) -> Iterator[ValueError | OSError]:
    """Ask whether what rewards need from elsewhere, such as servers, is there.

    Yields an error for each call of which it is not, naming the reward. Nothing is loaded. Only
    process 0 asks, as only it will score with them.
    """
    for names in _groups(settings) if jax.process_index() == 0 else []:
        try:
            with _error_prefix(names[0]):
                chosen = _options(names[0], settings[names[0]])
                if hasattr(chosen, "reach"):
                    chosen.reach()
        except (ValueError, OSError) as error:
            yield error


def _line(name: str, value: Any) -> Reward:
    """Return the line of a reward: of TABLE, or of the function that its option `load` names."""
    if name in TABLE:
        return TABLE[name]
    target = options(value)[LOAD]
    module, _, function_name = str(target).partition(":")
    fault = f"config.rewards.{name}.{LOAD} is {target!r}"
    if "/" in module or module.endswith(".py"):
        raise ValueError(
            f"{fault}; expected a module as Python imports it, such as "
            f"{Path(module).stem}:{function_name}, from this directory or PYTHONPATH"
        )
    function = _imported(name, target)
    if not callable(function) or inspect.isclass(function):
        kind = type(function).__name__
        raise ValueError(f"{fault}, of type {kind}; expected module:function")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise ValueError(f"{fault}, which is async or yields; expected a function that returns")
    try:
        signature = inspect.signature(function)
        if {"names", "setting"} <= set(signature.parameters):
            return Reward(load=target)
        signature.bind("frames", "prompts")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{fault}, which cannot be called with (frames, prompts), or as a loader with (names, "
            f"setting): {error}"
        ) from None
    return Reward(target)


def _given(name: str, value: Any) -> dict[str, Any]:
    """Return the options that a value of config.rewards has for the loader."""
    return {key: option for key, option in options(value).items() if name in TABLE or key != LOAD}


def _options(name: str, value: Any) -> Any:
    """Return the options of a reward as its loader takes them; None if it takes none."""
    line = _line(name, value)
    kind = _options_class(name, _imported(name, line.load)) if line.load else None
    return kind(**_given(name, value)) if kind else None


@contextlib.contextmanager
def _error_prefix(name: str) -> Iterator[None]:
    """Put the reward in front of the message of an error of its options or files.

    Whatever else its code raises becomes a RewardError that tells where.
    """
    try:
        with _refusing_settings("its code"):
            yield
    except (ValueError, OSError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"config.rewards.{name}: {error}") from error
    except (Exception, SystemExit) as error:  # a loader is anybody's code
        raise RewardError(f"config.rewards.{name}: {_described(error)}") from error


@contextlib.contextmanager
def _refusing_settings(what: str) -> Iterator[None]:
    """Raise ValueError if settings of JAX are changed within, with which others would compute."""
    with backend.settings_kept() as changed:
        yield
    if changed:
        raise ValueError(
            f"{what} changes {', '.join(changed)} for the whole program, whose numbers depend on "
            "it; expected a setting within a block, such as with jax.enable_x64(True)"
        )


def _options_class(name: str, load: Callable) -> Any:
    """Return the dataclass of a loader's options; None for a loader that takes none."""
    parameter = inspect.signature(load).parameters.get("options")
    if parameter and not dataclasses.is_dataclass(parameter.annotation):
        raise ValueError(
            f"reward {name!r}: the parameter `options` of its loader is annotated with "
            f"{parameter.annotation!r}; expected a dataclass"
        )
    return parameter.annotation if parameter else None


def _check_options(
    name: str, given: Mapping[str, Any], fields: Mapping[str, dataclasses.Field]
) -> None:
    expected = f"it takes {', '.join(fields) or 'none'}"
    if unknown := [option for option in given if option not in fields]:
        raise ValueError(
            f"config.rewards.{name} has unknown options {', '.join(unknown)}; {expected}"
        )
    if missing := [
        option
        for option, field in fields.items()
        if option not in given
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]:
        raise ValueError(
            f"config.rewards.{name} needs the options {', '.join(missing)} beside its weight; "
            f"{expected}"
        )
    for option, value in given.items():
        kind = fields[option].type
        kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        if not any(_fits(value, kind) for kind in kinds):
            expected = " or ".join(_KINDS.get(kind, str(kind)) for kind in kinds)
            raise ValueError(f"config.rewards.{name}.{option} is {value!r}; expected {expected}")


_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "True or False"}


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value is of a type; a whole number is a number, True is none."""
    if kind not in _KINDS:
        return not isinstance(kind, type) or isinstance(value, kind)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def directory_faults(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the directory of each reward that has one; no weights are read."""
    for name, value in settings.items():
        path = options(value).get("path")
        if name in TABLE and TABLE[name].net and isinstance(path, str) and path:
            try:
                directory.check(local_directory(path), _imported(name, TABLE[name].net))
            except (ValueError, OSError) as error:
                yield f"config.rewards.{name}: {error}"


def check_prompt(names: Iterable[str], prompt: str) -> None:
    """Raise ValueError, naming the reward, if one of them cannot score videos of a prompt."""
    prompt_check(names)(prompt)


def prompt_check(names: Iterable[str]) -> Callable[[str], None]:
    """Return `check_prompt` of these rewards, whose functions are imported once."""
    checks = []
    for name in names:
        if target := TABLE.get(name, Reward()).check:
            checks.append((name, _imported(name, target)))

    def check_all(prompt: str) -> None:
        for name, check in checks:
            try:
                check(prompt)
            except ValueError as error:
                raise ValueError(f"reward {name!r}: {error}") from None

    return check_all


def load(settings: Mapping[str, Any], setting: Setting) -> tuple[Loaded, ...]:
    """Return the rewards of config.rewards, ready to score, with their weights on the mesh.

    Raises:
      ValueError, OSError: of `validate`, or naming the reward and its file at fault.
    """
    validate(settings)
    return tuple(
        Loaded(names, _scorer(names, settings[names[0]], setting)) for names in _groups(settings)
    )


def _groups(settings: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the names of the rewards that one call computes, for each call."""
    groups: dict[Any, list[str]] = {}
    for name, value in settings.items():
        line = _line(name, value)
        key = (line.load or line.score, repr(sorted(options(value).items())))
        groups.setdefault(key, []).append(name)
    return [tuple(names) for names in groups.values()]


def _scorer(names: tuple[str, ...], value: Any, setting: Setting) -> Scorer:
    line = _line(names[0], value)
    if not line.load:
        function = _imported(names[0], line.score)
        return Scorer(lambda _, frames, prompts: function(frames, prompts))
    loader = _imported(names[0], line.load)
    with _error_prefix(names[0]):
        chosen = _options(names[0], value)
        made = loader(names, setting) if chosen is None else loader(names, setting, chosen)
        if not isinstance(made, Scorer):
            what = "nothing" if made is None else f"a {type(made).__name__}"
            raise ValueError(
                f"its loader returned {what}; expected a Scorer (from "
                "astrolabe_jax.rewards.registry), with a function of (params, frames, prompts)"
            )
        return made


def planned(settings: Mapping[str, Any], mesh: Any) -> tuple[Loaded, ...]:
    """Return what `load` does, with shapes in place of weights, which need not be there.

    The devices of the mesh need not exist. The scorers do not score.
    """
    validate(settings)
    return tuple(
        Loaded(names, Scorer(_refuse_to_score, _planned_params(names[0], settings, mesh)))
        for names in _groups(settings)
    )


def _planned_params(name: str, settings: Mapping[str, Any], mesh: Any) -> Any:
    """Return the shapes of a reward's weights; None if it has none on the mesh."""
    if net := _line(name, settings[name]).net:
        path = local_directory(options(settings[name])["path"])
        return directory.planned(path, _imported(name, net), mesh).params


def works(
    settings: Mapping[str, Any], clip: Clip, mesh: Any
) -> Iterator[tuple[tuple[str, ...], Any, Work]]:
    """Yield the names of rewards, the shapes of their weights, and what they compute of a video.

    Weights need not be there, nor the devices of the mesh. Rewards that have no `work` are left
    out, such as remote ones.
    """
    for names in _groups(settings):
        line = _line(names[0], settings[names[0]])
        if not line.work:
            continue
        chosen = _options(names[0], settings[names[0]])
        spec = _imported(names[0], line.net)
        dtype = getattr(chosen, "dtype", directory.DTYPES[0])
        net = directory.planned(local_directory(chosen.path), spec, mesh, dtype)
        for work in _imported(names[0], line.work)(names, net, clip, chosen):
            yield names, net.params, work


def _refuse_to_score(*_) -> None:
    raise RewardError("rewards that are only planned do not score")


def score(
    loaded: Loaded, frames: Any, prompts: Sequence[str], numbers: Sequence[int]
) -> dict[str, np.ndarray]:
    """Return the raw scores of the rewards that one call computes, and of their parts.

    Args:
      loaded: the rewards.
      frames: decoded videos, uint8 `[B, T, height, width, 3]`.
      prompts: B prompts.
      numbers: B numbers of the videos among those of their epoch, for errors.

    Returns:
      `REWARD` and `REWARD/PART` -> float32 `[B]`.

    Raises:
      RewardError: naming reward and sample, for whatever the scorer raises, and for what are not B
        finite numbers.
    """
    returned = _call(loaded, frames, prompts, numbers)
    if missing := [name for name in loaded.names if name not in returned]:
        raise RewardError(
            f"reward {missing[0]!r}: its scorer returned only "
            f"{', '.join(map(repr, returned)) or 'an empty mapping'}"
        )
    return {
        key: _checked(key, values, prompts, numbers)
        for name in loaded.names
        for key, values in returned.items()
        if key == name or key.startswith(f"{name}/")
    }


def _call(
    loaded: Loaded, frames: Any, prompts: Sequence[str], numbers: Sequence[int]
) -> dict[str, Any]:
    """Return what a scorer returns, on the host; RewardError for whatever it raises."""
    names = loaded.names
    subject = f"reward{'s' * (len(names) > 1)} {', '.join(map(repr, names))}"
    if isinstance(frames, np.ndarray):  # which other rewards see, as they do the prompts
        frames = frames.view()
        frames.flags.writeable = False
    try:
        with _refusing_settings("it"):
            returned = loaded.scorer.score(loaded.scorer.params, frames, list(prompts))
        if not isinstance(returned, Mapping):
            returned = {names[0]: returned}
        return jax.device_get(
            {key: values for key, values in returned.items() if isinstance(key, str)}
        )
    except SampleError as error:
        raise RewardError(
            f"{subject} failed on sample {numbers[error.row]} (prompt {prompts[error.row]!r}): "
            f"{error}"
        ) from error
    except BaseException as error:  # a reward is anybody's code; Ctrl-C is of another thread
        raise RewardError(
            f"{subject} failed on {samples_named(numbers)}: {_described(error)}"
        ) from error


def samples_named(numbers: Sequence[int]) -> str:
    """Return how messages name consecutive samples: sample 4, or samples 4 to 6."""
    if len(numbers) == 1:
        return f"sample {numbers[0]}"
    return f"samples {numbers[0]} to {numbers[-1]}"


def _described(error: BaseException) -> str:
    """Return the type and the text of an error in one line, and where its user's code raised it.

    That is the innermost line that is neither of this file, nor installed; if there is none, of a
    package.
    """
    calls = [
        call
        for call in traceback.extract_tb(error.__traceback__)
        if call.filename != __file__ and not call.filename.startswith("<")
    ]
    own = [call for call in calls if not call.filename.startswith((_PYTHON, *_PACKAGES))]
    packaged = [call for call in calls if call.filename.startswith(_PACKAGES)]
    place = "".join(f" ({call.filename}:{call.lineno})" for call in (own or packaged)[-1:])
    try:
        text = " ".join(str(error).split())[:_LONGEST]
    except Exception:
        text = "it cannot be written as text"
    return f"{type(error).__name__}: {text}{place}"


def _imported(name: str, target: str) -> Any:
    """Return what "module:name" names; RewardError, naming the reward, if that cannot be."""
    try:
        with _refusing_settings(f"its module {target!r}"):
            return pkgutil.resolve_name(target)
    except (Exception, SystemExit) as error:  # a reward is anybody's code
        reason = _described(error)
        raise RewardError(f"reward {name!r}: cannot import {target!r}: {reason}") from error


def _checked(name: str, values: Any, prompts: Sequence[str], numbers: Sequence[int]) -> np.ndarray:
    """Return scores as float32 [B] if they are B finite real numbers; else raise RewardError.

    The error names the sample, where it is one that is wrong.
    """
    scores, what = _as_array(values)
    real = jnp.issubdtype(scores.dtype, np.floating) or jnp.issubdtype(scores.dtype, np.integer)
    if not real or scores.shape != (len(prompts),):
        raise RewardError(
            f"reward {name!r} returned {what}; expected real numbers of shape ({len(prompts)},), "
            "one a video, all finite"
        )
    scores = scores.astype(np.float64)
    bad = np.flatnonzero(~(np.abs(scores) < LARGEST_SCORE))
    if not len(bad):
        return scores.astype(np.float32)
    index = int(bad[0])
    others = f" and for {len(bad) - 1} more" if len(bad) > 1 else ""
    expected = f"number below {LARGEST_SCORE:g}" if np.isfinite(scores[index]) else "finite number"
    raise RewardError(
        f"reward {name!r} is {scores[index]} for sample {numbers[index]} (prompt "
        f"{prompts[index]!r}){others}; expected a {expected}"
    )


def _is_real(value: Any) -> bool:
    """Return whether an object is a real number, such as a Fraction; True is none."""
    return isinstance(value, Real | Decimal) and not isinstance(value, bool)


_NO_NUMBERS = {"c": "complex numbers", "b": "True and False", "U": "text", "S": "text"}


def _as_array(values: Any) -> tuple[np.ndarray, str]:
    """Return an array of what a reward returned, and in words what that is."""
    if values is None:
        return np.array(None), "None (does it end in a return?)"
    try:
        array = np.asarray(values)
        if array.dtype == object and all(map(_is_real, array.flat)):
            array = array.astype(np.float64)
    except Exception:  # rows of unequal lengths, or whatever an array of others raises
        return np.array(None), f"a {type(values).__name__} that is no array of numbers"
    if array.dtype == object and not array.ndim:
        return array, f"a {type(values).__name__}"
    if array.dtype == object:
        kinds = sorted({type(value).__name__ for value in array.flat})
        return array, f"{type(values).__name__} of {', '.join(kinds[:3])}"
    kind = _NO_NUMBERS.get(array.dtype.kind, str(array.dtype))
    return array, f"{kind} of shape {array.shape}"
