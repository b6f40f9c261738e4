"""Refuse a config that makes no sense, with all its faults at once, before anything is compiled.

Each `_..._faults` yields one message for each fault: the field, its value, what was expected. What
a field takes by itself is declared in config.py; here is what fields ask of each other and of the
devices. What depends on the base model or the prompts is checked in prepare.py.
"""

import math
from collections.abc import Collection, Iterator
from typing import Any

from ml_collections import ConfigDict

from astrolabe_jax.config import FIELDS, WEIGHT, piece, repeats, reward_weights, rounds, samples


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
    faults = [
        *_field_faults(config),
        *_reward_faults(config, reward_names),
        *_attention_faults(config, backend),
    ]
    if not faults:  # the sums below need sensible numbers
        faults = [
            *_batch_faults(config, devices),
            *_kl_faults(config),
            *_streaming_faults(config, devices),
        ]
    _refuse(faults)


def validate_sampling(config: ConfigDict, devices: int, backend: str) -> None:
    """Check a config for sampling alone, which needs no rewards, batches or objective.

    Arguments and errors are those of validate().
    """
    faults = [*_field_faults(config), *_attention_faults(config, backend)]
    if not faults:
        faults = [*_mesh_faults(config, devices)]
    _refuse(faults)


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ValueError("\n  ".join(["the config does not make sense:", *faults]))


def _field_faults(config: ConfigDict) -> Iterator[str]:
    for name, field in FIELDS.items():
        value = _value(config, name)
        if field.constraint and not field.constraint.allows(value):
            yield f"config.{name} is {value!r}; expected {field.constraint.expected}"
    if config.train.save_samples and config.train.checkpoint_every != 1:
        yield (
            "config.train.save_samples is True and train.checkpoint_every "
            f"{config.train.checkpoint_every}: samples go with the checkpoint before them; "
            "expected checkpoint_every 1"
        )
    if config.eval.shown > config.eval.videos:
        yield (
            f"config.eval.shown is {config.eval.shown}; expected at most eval.videos, "
            f"{config.eval.videos}"
        )


def _value(config: ConfigDict, name: str) -> Any:
    """Return the value of a field by its full name."""
    section, _, key = name.rpartition(".")
    return config[section][key] if section else config[key]


def _attention_faults(config: ConfigDict, backend: str) -> Iterator[str]:
    model = config.model
    if model.attention == "cudnn" and (backend != "gpu" or model.dtype != "bfloat16"):
        yield (
            f"config.model.attention is 'cudnn' with model.dtype {model.dtype} on a {backend}; "
            "expected bfloat16 on a gpu; or use auto"
        )


def _reward_faults(config: ConfigDict, reward_names: Collection[str]) -> Iterator[str]:
    known = ", ".join(sorted(reward_names))
    if not config.rewards:
        yield (
            "config.rewards is empty; give at least one reward a weight, config.rewards.NAME = "
            f"1.0 ({known})"
        )
    weights = reward_weights(config)
    for name, weight in weights.items():
        if name not in reward_names:
            yield f"config.rewards.{name}: unknown reward; expected one of {known}"
        if not _is_finite(weight):
            has_options = isinstance(config.rewards[name], ConfigDict)
            field = f"config.rewards.{name}.{WEIGHT}" if has_options else f"config.rewards.{name}"
            yield f"{field} is {weight!r}; expected a finite weight"
    if weights and all(map(_is_finite, weights.values())) and sum(weights.values()) == 0:
        summands = ", ".join(f"{name}={weight}" for name, weight in weights.items())
        yield f"config.rewards has a total weight of 0 ({summands}); raise a weight"


def _is_finite(weight: Any) -> bool:
    """Return whether a weight is a finite number; the command line may give any literal."""
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    return is_number and math.isfinite(weight)


def _batch_faults(config: ConfigDict, devices: int) -> Iterator[str]:
    prompts = config.prompts
    optimizer = config.optimizer
    videos = samples(config)
    epoch = (
        f"the {videos} videos of an epoch (prompts.prompts_per_epoch x samples_per_prompt, "
        f"{prompts.prompts_per_epoch} x {prompts.samples_per_prompt})"
    )
    if videos % config.sampler.batch:
        yield f"config.sampler.batch is {config.sampler.batch}; expected a divisor of {epoch}"
    else:
        yield from _prompt_faults(config)
    if videos % (optimizer.microbatch * optimizer.steps_per_pass):
        yield (
            f"config.optimizer.microbatch is {optimizer.microbatch}; expected {epoch} to be a "
            f"whole number of them in each of the {optimizer.steps_per_pass} steps of a pass"
        )
    yield from _mesh_faults(config, devices)
    for field, size in _batch_sizes(config).items():
        if size % devices:
            yield f"config.{field} is {size}; expected a multiple of the {devices} devices"


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


def _mesh_faults(config: ConfigDict, devices: int) -> Iterator[str]:
    mesh = config.mesh
    data = devices // mesh.fsdp if mesh.data == -1 else mesh.data
    if data * mesh.fsdp != devices:
        yield (
            f"config.mesh has data {mesh.data} x fsdp {mesh.fsdp}; expected their product to be "
            f"the {devices} devices"
        )
    if config.scoring.overlap == "all" and mesh.fsdp > 1:
        yield (
            f"config.scoring.overlap is 'all' with mesh.fsdp {mesh.fsdp}: rewards and sampling "
            "that gather weights at one time may wait for each other for ever; expected host or "
            "none"
        )


def _kl_faults(config: ConfigDict) -> Iterator[str]:
    if config.kl.kind != "selective":
        return
    names = ", ".join(config.rewards)
    if len(config.rewards) < 2:
        yield f"config.kl.kind 'selective' compares rewards; expected at least 2, got {names}"
    elif config.kl.main_reward not in config.rewards:
        yield (
            f"config.kl.main_reward is {config.kl.main_reward!r}; expected one of the rewards of "
            f"this run, {names}"
        )


def _streaming_faults(config: ConfigDict, devices: int) -> Iterator[str]:
    if not config.streaming.window:
        if config.eval.frames:
            yield (
                "config.eval.frames belongs to the training of windows; set video.frames, or "
                "streaming.window"
            )
        if config.streaming.score_frames:
            yield (
                "config.streaming.score_frames belongs to the training of windows; expected 0, or "
                "a streaming.window"
            )
        return
    streaming = config.streaming
    block = config.model.block
    score_frames = streaming.score_frames
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


def _variant_faults(config: ConfigDict) -> Iterator[str]:
    """Yield the variants of windows that exclude each other."""
    streaming = config.streaming
    progressive = streaming.mode == "progressive"
    old_prefix = streaming.prefix == "rollout_old"
    if streaming.sampling == "sequence" and progressive:
        yield (
            "config.streaming.sampling is 'sequence', whose videos begin at frame 0; expected "
            "'clip' if progressive"
        )
    if streaming.backprop == "full" and (progressive or not old_prefix):
        yield (
            "config.streaming.backprop 'full' makes all keys anew; expected mode 'epoch' and "
            "prefix 'rollout_old'"
        )
    if streaming.sampling == "sequence" and not old_prefix:
        yield (
            f"config.streaming.prefix is {streaming.prefix!r}; expected 'rollout_old' where "
            "sampling is 'sequence'"
        )
    if progressive and streaming.reward == "full":
        yield (
            "config.streaming.reward is 'full', a progressive stream does not keep its frames; "
            "expected window_stream"
        )
    if config.prompts.repeated != 1:
        yield (
            f"config.prompts.repeated is {config.prompts.repeated}; expected 1 where windows are "
            "trained"
        )


def _cache_faults(config: ConfigDict) -> Iterator[str]:
    """Yield what the cache of a long video cannot do."""
    streaming = config.streaming
    model = config.model
    if model.independent_first_frame or (model.faithful_sinks and model.sink > model.block):
        yield (
            "config.streaming.window cuts videos into equal blocks with whole sinks; expected "
            "model.independent_first_frame False, and model.faithful_sinks False for a sink larger "
            "than a block"
        )
    hidden_sink = model.sink and not config.loss.mask_sink
    if hidden_sink or config.loss.mask_block > model.block:
        yield (
            "config.loss.mask_sink and mask_block ask for frames that the cache of a long video "
            "does not hold; where windows are trained, expected mask_sink True and mask_block at "
            "most model.block"
        )
    capacity = model.max_global if model.window == -1 else model.window
    recomputed = streaming.prefix != "rollout_old" or streaming.recache_on_update
    if recomputed and (capacity - model.sink) % model.block:
        yield (
            f"config.streaming makes keys anew, but a window of {capacity} less a sink of "
            f"{model.sink} is not whole blocks of {model.block}; expected prefix 'rollout_old' "
            "without recache_on_update, or another model.window"
        )
