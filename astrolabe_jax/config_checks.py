"""Refuse a config that makes no sense, with all its faults at once, before anything is compiled.

Each `_..._faults` gives one message for each fault: the field, its value, what was expected. What
a field takes by itself is declared in config.py; here is what fields ask of each other and of the
devices. What depends on the base model or the prompts is checked in preflight.py.
"""

import contextlib
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict

from astrolabe_jax.arithmetic import piece, repeats, rounds, samples
from astrolabe_jax.config import FIELDS, LOAD, POSITIVE, WEIGHT, flatten, reward_weights

# What devices hold of numbers: int32, and float32 whose smallest are not rounded to 0.
_MOST_INT = 2**31 - 1
_MOST_FLOAT = 3.4e38
_TINY = 1.2e-38

# Fields that are no text without a name in it, and what they take.
_NAMES = {
    "base": "the name of a shipped model, or a directory",
    "prompts.train": "a text file, a .jsonl, or world:NAME/SPLIT",
    "prompts.test": "a text file, a .jsonl, or world:NAME/SPLIT",
}


def validate(config: ConfigDict, reward_names: Collection[str], devices: int, backend: str) -> None:
    """Check a config for a training run.

    Args:
      config: the config.
      reward_names: the rewards that the program knows.
      devices: how many there are, over all processes.
      backend: theirs: 'cpu', 'gpu' or 'tpu'.

    Raises:
      ValueError: its message lists every field at fault: its value, what was expected, what to do.
    """
    at_fault = dict(_field_faults(config))
    sound = _without(config, at_fault)
    of_devices = _device_faults(sound, devices)
    _refuse(
        *at_fault.values(),
        *_each((_sample_faults, _shown_faults, _window_faults, _kl_faults), sound),
        *_reward_faults(config, reward_names),
        *_each((_attention_faults,), sound, backend),
        *of_devices,
        *(_fitting_devices(config, devices) if of_devices and not at_fault else ()),
    )


def validate_sampling(config: ConfigDict, devices: int, backend: str) -> None:
    """Check a config for sampling alone, which needs no rewards, batches or objective.

    Arguments and errors are those of validate().
    """
    given = bool(config.lora.init)
    told = "config.lora.init is where training starts; videos take an adapter as --lora"
    at_fault = dict(_field_faults(config))
    sound = _without(config, at_fault)
    _refuse(
        *at_fault.values(),
        *_each((_window_faults,), sound),
        *_each((_attention_faults,), sound, backend),
        *_broken((given, told)),
        *_each((_mesh_faults,), sound, devices),
    )


def validate_scoring(config: ConfigDict, devices: int) -> None:
    """Check a config for scoring alone, but for what rewards there are (registry.validate).

    Arguments and errors are those of validate().
    """
    at_fault = dict(_field_faults(config))
    sound = _without(config, at_fault)
    _refuse(
        *at_fault.values(),
        *_weight_faults(config),
        *_each((_mesh_faults,), sound, devices),
    )


def _refuse(*faults: str) -> None:
    if faults:
        raise ValueError("\n  ".join(["the config does not make sense:", *faults]))


def _broken(*rules: tuple[object, str]) -> Iterable[str]:
    """Return the messages of the rules that are broken; a rule is (whether it is, message)."""
    return [message for broken, message in rules if broken]


def _field_faults(config: ConfigDict) -> Iterator[tuple[str, str]]:
    """Yield the fields whose value is none that they take by themselves, and what to say of it."""
    for name, field in FIELDS.items():
        value = operator.attrgetter(name)(config)
        if name in _NAMES and not value.strip():
            yield name, f"config.{name} is empty; expected {_NAMES[name]}"
        bound = _bound(value)
        if bound or (field.constraint and not field.constraint.allows(value)):
            expected = field.constraint.expected if field.constraint else ""
            if field.constraint is POSITIVE:
                bound = bound.removeprefix("0 or ")
            told = [expected, bound if "at most" not in expected else ""]
            yield name, f"config.{name} is {value!r}; expected {', '.join(filter(None, told))}"


def _bound(value: Any) -> str:
    """Return what a number is beyond that devices cannot hold; empty for any other value."""
    if isinstance(value, int) and abs(value) > _MOST_INT:
        return f"at most {_MOST_INT}"
    if isinstance(value, float) and not abs(value) <= _MOST_FLOAT:
        return f"at most {_MOST_FLOAT}"
    if isinstance(value, float) and 0 < abs(value) < _TINY:
        return f"0 or a size of at least {_TINY}"
    return ""


def _without(config: ConfigDict, names: Collection[str]) -> ConfigDict:
    """Return a copy of a config that lacks the fields `names`."""
    copy = config.copy_and_resolve_references()
    with copy.unlocked():
        for name in names:
            section, _, field = name.rpartition(".")
            del (operator.attrgetter(section)(copy) if section else copy)[field]
    return copy


def _each(
    checks: Iterable[Callable[..., Iterable[str]]], config: ConfigDict, *more: Any
) -> Iterator[str]:
    """Yield the faults that checks find, but for checks of a field that `_without` left out: what
    they would say follows from the fault that it has.
    """
    lacking = () if FIELDS.keys() - {"rewards"} <= flatten(config).keys() else (AttributeError,)
    for check in checks:
        with contextlib.suppress(*lacking):
            yield from check(config, *more)


def _sample_faults(config: ConfigDict) -> Iterable[str]:
    train = config.train
    return _broken(
        (
            train.save_samples and train.checkpoint_every != 1,
            f"config.train.save_samples is True and train.checkpoint_every "
            f"{train.checkpoint_every}: samples go with the checkpoint before them; expected "
            "checkpoint_every 1",
        )
    )


def _shown_faults(config: ConfigDict) -> Iterable[str]:
    shown = config.eval.shown
    videos = config.eval.videos
    return _broken(
        (shown > videos, f"config.eval.shown is {shown}; expected at most eval.videos, {videos}")
    )


def _window_faults(config: ConfigDict) -> Iterable[str]:
    model = config.model
    field = "max_global" if model.window == -1 else "window"
    capacity = getattr(model, field)
    sink = 0 if model.faithful_sinks else model.sink
    least = sink + model.block
    return _broken(
        (
            capacity < least,
            f"config.model.{field} is {capacity}; expected at least {least}, a block "
            f"(model.block {model.block}) behind the sink (model.sink {model.sink})",
        )
    )


def _attention_faults(config: ConfigDict, backend: str) -> Iterable[str]:
    model = config.model
    return _broken(
        (
            model.attention == "cudnn" and (backend != "gpu" or model.dtype != "bfloat16"),
            f"config.model.attention is 'cudnn' with model.dtype {model.dtype} on a {backend}; "
            "expected bfloat16 on a gpu; or use auto",
        ),
        (
            model.attention == "splash" and backend != "tpu",
            f"config.model.attention is 'splash' on a {backend}; expected a tpu; or use auto",
        ),
    )


def _reward_faults(config: ConfigDict, reward_names: Collection[str]) -> Iterator[str]:
    known = ", ".join(sorted(reward_names))
    weights = reward_weights(config)
    yield from _broken(
        (
            not config.rewards,
            "config.rewards is empty; give at least one reward a weight, config.rewards.NAME = "
            f"1.0 ({known})",
        )
    )
    for name in weights:
        options = config.rewards[name] if isinstance(config.rewards[name], ConfigDict) else {}
        yield from _broken(
            (
                name not in reward_names and LOAD not in options,
                f"config.rewards.{name}: unknown reward; expected one of {known}, or the function "
                f"of another, config.rewards.{name}.{LOAD}=module:name",
            )
        )
    yield from _weight_faults(config)
    if weights and not any(weights.values()):
        summands = ", ".join(f"{name}={weight}" for name, weight in weights.items())
        yield f"config.rewards has no weight but 0 ({summands}); raise one"


def _weight_faults(config: ConfigDict) -> Iterator[str]:
    """Yield the weights that are no finite numbers; the command line may give any literal."""
    for name, weight in reward_weights(config).items():
        value = config.rewards[name]
        option = f".{WEIGHT}" if isinstance(value, ConfigDict) and WEIGHT in value else ""
        if not _is_weight(weight):
            yield f"config.rewards.{name}{option} is {weight!r}; expected a finite weight"


def _is_weight(weight: Any) -> bool:
    """Return whether a weight is a finite number."""
    return isinstance(weight, int | float) and not isinstance(weight, bool) and not _bound(weight)


def _of_epoch(config: ConfigDict) -> str:
    """Return the words for the videos of an epoch."""
    prompts = config.prompts
    return (
        f"the {samples(config)} videos of an epoch (prompts.prompts_per_epoch x "
        f"samples_per_prompt, {prompts.prompts_per_epoch} x {prompts.samples_per_prompt})"
    )


def _batch_faults(config: ConfigDict) -> Iterator[str]:
    batch = config.sampler.batch
    if samples(config) % batch:
        yield f"config.sampler.batch is {batch}; expected a divisor of {_of_epoch(config)}"
    else:
        yield from _prompt_faults(config)


def _microbatch_faults(config: ConfigDict) -> Iterable[str]:
    optimizer = config.optimizer
    return _broken(
        (
            samples(config) % (optimizer.microbatch * optimizer.steps_per_pass),
            f"config.optimizer.microbatch is {optimizer.microbatch}; expected {_of_epoch(config)} "
            f"to be a whole number of them in each of the {optimizer.steps_per_pass} steps of a "
            "pass",
        )
    )


def _size_faults(config: ConfigDict, devices: int) -> Iterable[str]:
    return [
        f"config.{field} is {size}; expected a multiple of the {devices} devices"
        for field, size in _batch_sizes(config).items()
        if size % devices
    ]


def _device_faults(config: ConfigDict, devices: int) -> list[str]:
    """Return what does not fit each other and the devices."""
    return [
        *_each((_batch_faults, _microbatch_faults), config),
        *_each((_mesh_faults, _size_faults, _streaming_faults), config, devices),
    ]


def _fitting_devices(config: ConfigDict, devices: int) -> list[str]:
    """Return a line with the numbers of devices that would do, if there are any."""
    most = min(_batch_sizes(config).values())
    fitting = [count for count in range(1, most + 1) if not _device_faults(config, count)]
    numbers = ", ".join(map(str, fitting))
    told = f"with these fields it runs on {numbers} devices; here are {devices}"
    return [told] if fitting else []


def _prompt_faults(config: ConfigDict) -> Iterator[str]:
    """Yield the faults of an epoch that is a whole number of batches."""
    prompts = config.prompts
    repeated = repeats(config)
    if prompts.prompts_per_epoch % repeated:
        yield (
            f"config.prompts.repeated asks for {repeated} batches with the same prompts; expected "
            f"a divisor of prompts.prompts_per_epoch, {prompts.prompts_per_epoch}; change it or "
            "sampler.batch"
        )
    elif config.advantages.std == "prompt" and prompts.samples_per_prompt * repeated == 1:
        yield (
            "config.prompts.samples_per_prompt is 1 with advantages.std 'prompt': one video does "
            "not deviate from its mean; expected at least 2, or advantages.std='global'"
        )


def _batch_sizes(config: ConfigDict) -> dict[str, int]:
    """Return the videos of a batch, by the field that sets them."""
    return {
        "sampler.batch": config.sampler.batch,
        "optimizer.microbatch": config.optimizer.microbatch,
    }


def _mesh_faults(config: ConfigDict, devices: int) -> Iterable[str]:
    mesh = config.mesh
    data = devices // mesh.fsdp if mesh.data == -1 else mesh.data
    return _broken(
        (
            data * mesh.fsdp != devices,
            f"config.mesh has data {mesh.data} x fsdp {mesh.fsdp}; expected their product to be "
            f"the {devices} devices",
        ),
        (
            config.scoring.overlap == "all" and mesh.fsdp > 1,
            f"config.scoring.overlap is 'all' with mesh.fsdp {mesh.fsdp}: rewards and sampling "
            "that gather weights at one time may wait for each other for ever; expected host or "
            "none",
        ),
    )


def _kl_faults(config: ConfigDict) -> Iterable[str]:
    names = ", ".join(config.rewards)
    selective = config.kl.kind == "selective"
    several = len(config.rewards) >= 2
    return _broken(
        (
            selective and not several,
            f"config.kl.kind 'selective' compares rewards; expected at least 2, got {names}",
        ),
        (
            selective and several and config.kl.main_reward not in config.rewards,
            f"config.kl.main_reward is {config.kl.main_reward!r}; expected one of the rewards of "
            f"this run, {names}",
        ),
    )


def _streaming_faults(config: ConfigDict, devices: int) -> Iterator[str]:
    streaming = config.streaming
    block = config.model.block
    score_frames = streaming.score_frames
    if not streaming.window:
        yield from _broken(
            (
                config.eval.frames,
                "config.eval.frames belongs to the training of windows; set video.frames, or "
                "streaming.window",
            ),
            (
                score_frames,
                "config.streaming.score_frames belongs to the training of windows; expected 0, or "
                "a streaming.window",
            ),
        )
        return
    if score_frames and (score_frames % block or streaming.window % score_frames):
        yield (
            f"config.streaming.score_frames is {score_frames}; expected whole blocks of {block}, "
            f"and the window of {streaming.window} to be whole clips"
        )
    try:
        count, streams = rounds(config, devices)
    except ValueError as error:
        yield str(error)
        return
    if streaming.sampling == "clip":
        videos_per_stream = samples(config) // (count * streams)
        yield from _stream_batch_faults(config, devices, streams, videos_per_stream)
    yield from _variant_faults(config)
    yield from _cache_faults(config)


def _stream_batch_faults(
    config: ConfigDict, devices: int, streams: int, videos_per_stream: int
) -> Iterator[str]:
    """Yield the faults of batches that do not hold as many videos of each stream.

    Args:
      config: the config.
      devices: how many there are.
      streams: pasts that are worked on together, over all devices.
      videos_per_stream: videos of an epoch that share one of them.
    """
    for field, size in _batch_sizes(config).items():
        at_once = size if size % devices else piece(config, size, devices)
        whole = size % streams == 0 and at_once % streams == 0
        if not whole or videos_per_stream % (size // streams):
            yield (
                f"config.{field} is {size}, {at_once} at once (mesh.samples_per_device); expected "
                f"the same number of videos, a divisor of {videos_per_stream}, of each of the "
                f"{streams} prompts that are worked on together (streaming.prompts_per_device)"
            )


def _variant_faults(config: ConfigDict) -> Iterable[str]:
    """Return the variants of windows that exclude each other."""
    streaming = config.streaming
    progressive = streaming.mode == "progressive"
    sequence = streaming.sampling == "sequence"
    old_prefix = streaming.prefix == "rollout_old"
    return _broken(
        (
            sequence and progressive,
            "config.streaming.sampling is 'sequence', whose videos begin at frame 0; expected "
            "'clip' if progressive",
        ),
        (
            streaming.backprop == "full" and (progressive or not old_prefix),
            "config.streaming.backprop 'full' makes all keys anew; expected mode 'epoch' and "
            "prefix 'rollout_old'",
        ),
        (
            sequence and not old_prefix,
            f"config.streaming.prefix is {streaming.prefix!r}; expected 'rollout_old' where "
            "sampling is 'sequence'",
        ),
        (
            progressive and streaming.reward == "full",
            "config.streaming.reward is 'full', a progressive stream does not keep its frames; "
            "expected window_stream",
        ),
        (
            config.prompts.repeated != 1,
            f"config.prompts.repeated is {config.prompts.repeated}; expected 1 where windows are "
            "trained",
        ),
    )


def _cache_faults(config: ConfigDict) -> Iterable[str]:
    """Return what the cache of a long video cannot do."""
    streaming = config.streaming
    model = config.model
    hidden_sink = model.sink and not config.loss.mask_sink
    capacity = model.max_global if model.window == -1 else model.window
    recomputed = streaming.prefix != "rollout_old" or streaming.recache_on_update
    return _broken(
        (
            model.independent_first_frame or (model.faithful_sinks and model.sink > model.block),
            "config.streaming.window cuts videos into equal blocks with whole sinks; expected "
            "model.independent_first_frame False, and model.faithful_sinks False for a sink larger "
            "than a block",
        ),
        (
            hidden_sink or config.loss.mask_block > model.block,
            "config.loss.mask_sink and mask_block ask for frames that the cache of a long video "
            "does not hold; where windows are trained, expected mask_sink True and mask_block at "
            "most model.block",
        ),
        (
            recomputed and (capacity - model.sink) % model.block,
            f"config.streaming makes keys anew, but a window of {capacity} less a sink of "
            f"{model.sink} is not whole blocks of {model.block}; expected prefix 'rollout_old' "
            "without recache_on_update, or another model.window",
        ),
    )


@contextlib.contextmanager
def error_prefix(field: str) -> Iterator[None]:
    """Put the field at fault in front of an error's message."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{field}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
