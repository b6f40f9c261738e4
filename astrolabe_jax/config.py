"""Declare every field of a run once: its default, the values it takes, and what it means.

FIELDS is the only place where a field is written down. get_config() builds the config of the
defaults from it, config_checks.py refuses other values, and describe_fields() writes the table of
docs/config.md. A recipe (configs/*.py) starts from get_config() and changes what is its own.

Defaults are the consistent choice wherever the published code deviates from its paper;
with_reference() sets the published behaviour (docs/published.md).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flax import traverse_util
from ml_collections import ConfigDict

WEIGHT = "weight"  # option of a reward: its weight, where it has other options, too
LOAD = "load"  # option of a reward that is none of ours: its function, "module:name"


class Constraint(NamedTuple):
    """The values that a field takes: in words, for messages and docs, and as a test."""

    expected: str
    allows: Callable[[Any], bool]


def one_of(*choices: str) -> Constraint:
    """Return the constraint of a field that takes one of these words."""
    return Constraint(
        f"one of {', '.join(choice or repr(choice) for choice in choices)}",
        lambda value: value in choices,
    )


def at_least(least: float) -> Constraint:
    """Return the constraint of a finite number from `least` on."""
    return Constraint(f"at least {least}", lambda value: least <= value < math.inf)


def between(least: float, most: float) -> Constraint:
    """Return the constraint of a number from `least` to `most`, both included."""
    return Constraint(f"at least {least} and at most {most}", lambda value: least <= value <= most)


def _are_timesteps(steps: Sequence[Any]) -> bool:
    """Return whether denoising can go through `steps`: down from 1000, at last to 0."""
    return (
        bool(steps)
        and all(isinstance(step, int | float) and not isinstance(step, bool) for step in steps)
        and list(steps) == sorted(set(steps), reverse=True)
        and steps[0] == 1000
        and steps[-1] >= 0
    )


MOST_VIDEOS = 1_000_000  # of an epoch, and of an evaluation: their list is in memory
POSITIVE = Constraint("a positive number", lambda value: 0 < value < math.inf)
BELOW_ONE = Constraint("a number in [0, 1)", lambda value: 0 <= value < 1)
POSITIVE_OR_MINUS_ONE = Constraint("at least 1, or -1", lambda value: value == -1 or value >= 1)
TIMESTEPS = Constraint(
    "timesteps from 1000, pure noise, strictly decreasing, after which a 0 may come",
    _are_timesteps,
)
FRAMES = Constraint(
    "whole numbers from 0 on",
    lambda frames: all(type(frame) is int and 0 <= frame < 2**31 for frame in frames),
)
DTYPE = one_of("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of the config.

    Attributes:
      default: its value, whose type is that of the field.
      meaning: what it sets, with its unit.
      constraint: the values that it takes by itself; None: all of its type. What fields ask of
        each other is in config_checks.py.
    """

    default: Any
    meaning: str
    constraint: Constraint | None = None


FIELDS: dict[str, Field] = {
    "name": Field("run", "Name of the run in summaries and on the contact sheet."),
    "seed": Field(0, "Seed that every random draw derives from.", between(0, 2**31 - 1)),
    "base": Field(
        "moving_shapes",
        "The base model: the name of a shipped one, or a directory with its files.",
    ),
    "transformer": Field(
        "",
        "Weights of the transformer in place of the base's: a published file (.safetensors, its "
        ".index.json, .pt or .pth), or a base directory. Empty: the base's own.",
    ),
    "model.size": Field(
        "",
        "Sizes of a published model. Empty: those in the base's config.json.",
        one_of("", "wan_1.3b", "wan_14b"),
    ),
    "model.dtype": Field(
        "float32", "Type that transformer, text encoder and VAE compute in.", DTYPE
    ),
    "model.param_dtype": Field("float32", "Type that the frozen base is stored in.", DTYPE),
    "model.block": Field(3, "Latent frames of a block of the rollout, P.", at_least(1)),
    "model.window": Field(
        -1,
        "Latent frames that attention sees, with the sink and the current block. -1: global "
        "attention, of model.max_global frames.",
        POSITIVE_OR_MINUS_ONE,
    ),
    "model.max_global": Field(21, "Latent frames that global attention sees.", at_least(1)),
    "model.sink": Field(0, "First latent frames that stay in sight for ever.", at_least(0)),
    "model.positions": Field(
        "absolute",
        "Rotary positions of a window that has moved on: those in the video (absolute) or in the "
        "window (relative).",
        one_of("absolute", "relative"),
    ),
    "model.independent_first_frame": Field(False, "Latent frame 0 is a block of its own."),
    "model.faithful_sinks": Field(
        False,
        "The cache is laid out as published, where a block that is smaller than the sink reads "
        "empty slots.",
    ),
    "model.remat": Field(True, "The backward pass computes each layer again, to save memory."),
    "model.attention": Field(
        "auto", "How attention is computed.", one_of("auto", "xla", "cudnn", "splash")
    ),
    "sampler.shift": Field(5.0, "Timestep shift of the noise schedule.", POSITIVE),
    "sampler.steps": Field((1000, 750, 500, 250), "Denoising steps before the shift.", TIMESTEPS),
    "sampler.warp": Field(True, "Denoising steps go through the shifted schedule."),
    "sampler.context_noise": Field(
        0.0, "Timestep at which finished blocks are cached.", between(0, 1000)
    ),
    "sampler.sigma_source": Field(
        "exact",
        "Noise level of a timestep: t / 1000 (exact), or the nearest entry of the schedule's "
        "table (lookup).",
        one_of("exact", "lookup"),
    ),
    "sampler.batch": Field(
        24, "Videos sampled, decoded and scored at once, over all devices.", at_least(1)
    ),
    "video.frames": Field(33, "Pixel frames of a video, 1 modulo 4.", at_least(1)),
    "video.height": Field(48, "Height of a video in pixels.", at_least(1)),
    "video.width": Field(48, "Width of a video in pixels.", at_least(1)),
    "video.fps": Field(16, "Frames a second of the files in samples/.", between(1, 1000)),
    "video.decode_chunk": Field(
        1,
        "Latent frames that are decoded at once. More is faster on large accelerators only.",
        at_least(1),
    ),
    "streaming.window": Field(0, "Latent frames trained on, W. 0: the whole video.", at_least(0)),
    "streaming.mode": Field(
        "epoch",
        "Every epoch has new prompts and one window, behind a past that is sampled for it (epoch), "
        "or the videos of its prompts go on from epoch to epoch, a window each, until they are "
        "full (progressive).",
        one_of("epoch", "progressive"),
    ),
    "streaming.selection": Field(
        "random",
        "Where an epoch's window begins; choices: at one of streaming.starts.",
        one_of("random", "first", "last", "choices"),
    ),
    "streaming.starts": Field(
        (),
        "Latent frames at which a window may begin, for the selection choices. A frame that is "
        "there twice is drawn twice as often.",
        FRAMES,
    ),
    "streaming.sampling": Field(
        "clip",
        "The videos of a prompt share its past (clip), or each is sampled from frame 0 on "
        "(sequence).",
        one_of("clip", "sequence"),
    ),
    "streaming.backprop": Field(
        "detach",
        "Gradients end at the window (detach), or go back to frame 0 (full).",
        one_of("detach", "full"),
    ),
    "streaming.prefix": Field(
        "rollout_old",
        "Keys of the past that the loss reads: those of the rollout (rollout_old), each policy's "
        "own, computed from the latents in sight (per_policy), or the same from noised latents, as "
        "the paper's Algorithm 2 has it (noised_prefix).",
        one_of("rollout_old", "per_policy", "noised_prefix"),
    ),
    "streaming.reward": Field(
        "window_stream",
        "What is scored: the window as the decoder continues the video (window_stream), the window "
        "decoded alone (window_alone), or the video up to the window's end (full).",
        one_of("window_stream", "window_alone", "full"),
    ),
    "streaming.score_frames": Field(
        0,
        "Latent frames that are scored at once; the score of a window is the mean over its parts. "
        "0: the whole window.",
        at_least(0),
    ),
    "streaming.continuation": Field(
        "uniform",
        "The video of a prompt that goes on where the mode is progressive: any (uniform), the best "
        "or the first.",
        one_of("uniform", "best", "first"),
    ),
    "streaming.recache_on_update": Field(
        False,
        "The keys in sight are computed anew before each window where the mode is progressive.",
    ),
    "streaming.prompts_per_device": Field(
        1, "Prompts that a device works on at once.", at_least(1)
    ),
    "streaming.save": Field(
        "sequence_end",
        "When a progressive run saves: at any time, with unfinished videos (full; plan prints "
        "their size), or only when its videos are full (sequence_end).",
        one_of("sequence_end", "full"),
    ),
    "scenes.transition": Field(
        "flush",
        "What happens to the window before the first block of a new prompt: it keeps the first and "
        "the last two frames (flush), its keys are computed anew with the new prompt (recache), or "
        "each change is a hard cut (cut).",
        one_of("flush", "recache", "cut"),
    ),
    "scenes.cut": Field(
        "sink",
        "What a hard cut keeps: the sink (with absolute positions, a flush and a jump), or "
        "nothing.",
        one_of("sink", "nothing"),
    ),
    "scenes.global_sink": Field(True, "A recache leaves the sink the keys of the first prompt."),
    "scenes.published": Field(False, "Scene strings and flushes are those of the published code."),
    "prompts.train": Field(
        "world:moving_shapes/train",
        "Prompts of the training: a text file with one a line, a .jsonl, or world:NAME/SPLIT "
        "(docs/sampling.md, Prompt files).",
    ),
    "prompts.test": Field("world:moving_shapes/test", "Prompts of the evaluation, likewise."),
    "prompts.switch_frames": Field(
        (),
        "Latent frames at which the prompts of a line of a .jsonl change, where the line has none.",
        FRAMES,
    ),
    "prompts.prompts_per_epoch": Field(6, "Prompts of an epoch, G.", between(1, MOST_VIDEOS)),
    "prompts.samples_per_prompt": Field(
        8, "Videos of a prompt in an epoch, K.", between(1, MOST_VIDEOS)
    ),
    "prompts.repeated": Field(
        1,
        "Sampling batches that ask for the same prompts: an epoch has G / repeated different ones, "
        "with repeated x K videos each. -1: all batches of the epoch.",
        POSITIVE_OR_MINUS_ONE,
    ),
    "prompts.tuned_for": Field(
        0,
        "Videos of an epoch, G x K, that the recipe's rates were chosen for; a run with another "
        "number warns. 0: any number.",
        at_least(0),
    ),
    "prompts.encoder": Field(
        "auto",
        "Where the text encoder's weights are between two batches of prompts; auto: in training on "
        "the host, if devices have a memory of their own.",
        one_of("auto", "device", "host"),
    ),
    "rewards": Field(
        {},
        "Weights of the rewards, NAME = WEIGHT, or {'weight': WEIGHT, OPTION: VALUE, ...} for one "
        "with options, of which each is a field, too. NAME = 0 on the command line takes a reward "
        "out; a weight of 0 only watches it. A video's total is the weighted sum of its scores "
        "(docs/rewards.md).",
    ),
    "scoring.overlap": Field(
        "host",
        "Rewards that are computed while the next videos are sampled: none, those without weights "
        "on the devices (host), or all, which takes the memory of both.",
        one_of("none", "host", "all"),
    ),
    "scoring.weights": Field(
        "device", "Where the rewards' weights are between two batches.", one_of("device", "host")
    ),
    "scoring.timeout": Field(
        3600.0,
        "Seconds that a reward may take for a batch, with compilation.",
        Constraint("a positive number, at most 1e9", lambda value: 0 < value <= 1e9),
    ),
    "advantages.std": Field(
        "global",
        "Advantages are divided by the std of the whole epoch (global) or of each prompt (prompt).",
        one_of("global", "prompt"),
    ),
    "advantages.min_std": Field(
        0.0,
        "A smaller std counts as this; dividing by it would make advantages of the rewards' noise.",
        at_least(0),
    ),
    "advantages.clip": Field(
        5.0,
        "Advantages are clipped to this size, A_max.",
        Constraint("a positive number, at most 1e6", lambda value: 0 < value <= 1e6),
    ),
    "advantages.standardise": Field(False, "Rewards are divided by their std over the epoch."),
    "loss.kind": Field(
        "astrolabe",
        "The objective: the paper's (astrolabe, in x0 space) or that of DiffusionNFT "
        "(diffusion_nft: adaptive weight, 1 / beta, A_max).",
        one_of("astrolabe", "diffusion_nft"),
    ),
    "loss.mix_beta": Field(0.1, "Share of the current policy in the mixture, beta.", POSITIVE),
    "loss.kl_weight": Field(
        1e-4, "Weight of the deviation from the reference, lambda.", at_least(0)
    ),
    "loss.context_gradient": Field(False, "Gradients go through the clean context."),
    "loss.context": Field(
        "clean",
        "What the loss reads of earlier blocks: clean frames, as the rollout does (clean), or "
        "frames with the noise of the current block (noisy).",
        one_of("clean", "noisy"),
    ),
    "loss.timesteps": Field(
        "warped",
        "Noise levels of the loss: those of the rollout (warped), or sampler.steps before the "
        "shift (raw).",
        one_of("warped", "raw"),
    ),
    "loss.timestep_draw": Field(
        "stratified",
        "How levels are drawn: equally often in an epoch (stratified), or one for each microbatch "
        "(batch).",
        one_of("stratified", "batch"),
    ),
    "loss.mask_block": Field(
        -1,
        "Latent frames of a block in the training mask. -1: model.block.",
        POSITIVE_OR_MINUS_ONE,
    ),
    "loss.mask_sink": Field(True, "The training mask keeps the sink in sight."),
    "kl.kind": Field(
        "uniform",
        "The deviation from the reference counts for every sample (uniform), or only for those "
        "that the main reward alone likes (selective).",
        one_of("uniform", "selective"),
    ),
    "kl.main_reward": Field("", "Name of the main reward, for the kind selective."),
    "kl.rank_direction": Field(
        "paper",
        "Samples that a selective deviation picks: those that only the main reward likes (paper), "
        "or as the published code ranks them (published).",
        one_of("paper", "published"),
    ),
    "kl.reduction": Field(
        "epoch",
        "A selective deviation is divided by the picked samples of the epoch, or of each "
        "microbatch.",
        one_of("epoch", "microbatch"),
    ),
    "kl.reset_bounds": Field(
        "corrected",
        "How the threshold of the reset adapts: as meant (corrected), or inverted as in the "
        "published code (published).",
        one_of("corrected", "published"),
    ),
    "kl.reset_threshold": Field(0.15, "Mean deviation that resets the reference.", POSITIVE),
    "kl.reset_epochs": Field(
        15, "The reference is reset after more epochs than this.", at_least(1)
    ),
    "lora.rank": Field(16, "Rank of the adapters.", between(1, 2**14)),
    "lora.alpha": Field(16.0, "The adapters' output is multiplied by alpha / rank.", POSITIVE),
    "lora.dtype": Field("float32", "Type of the adapters' master weights.", DTYPE),
    "lora.init": Field(
        "",
        "An adapter to start from: a file, a PEFT or diffusers directory, or that of a run. Empty: "
        "a fresh one.",
    ),
    "optimizer.learning_rate": Field(1e-3, "Learning rate of AdamW.", at_least(0)),
    "optimizer.b1": Field(0.9, "Decay of AdamW's first moment.", BELOW_ONE),
    "optimizer.b2": Field(0.999, "Decay of AdamW's second moment.", BELOW_ONE),
    "optimizer.eps": Field(1e-8, "Added to the root of AdamW's second moment.", POSITIVE),
    "optimizer.weight_decay": Field(1e-4, "Weight decay of AdamW.", at_least(0)),
    "optimizer.clip_norm": Field(1.0, "Gradients are scaled down to this global norm.", POSITIVE),
    "optimizer.microbatch": Field(
        12, "Videos of one forward and backward pass, over all devices.", at_least(1)
    ),
    "optimizer.inner_epochs": Field(
        1, "Passes over an epoch's samples, each with fresh noise and levels.", at_least(1)
    ),
    "optimizer.steps_per_pass": Field(
        1, "Optimizer steps of a pass over the samples.", at_least(1)
    ),
    "optimizer.old_decay": Field(
        "type1",
        "Schedule of d in the behaviour policy's update, old <- d old + (1 - d) current.",
        one_of("type0", "type1", "type2", "constant"),
    ),
    "optimizer.old_decay_constant": Field(0.9, "The d of the schedule constant.", between(0, 1)),
    "optimizer.ema_cap": Field(0.9, "Largest decay of the evaluated average.", between(0, 1)),
    "train.epochs": Field(40, "Epochs of the run.", at_least(1)),
    "train.eval_every": Field(
        0,
        "Epochs between evaluations; the first and the last always take place. 0: only those.",
        at_least(0),
    ),
    "train.checkpoint_every": Field(
        10, "Epochs between checkpoints; the last saves, too.", at_least(1)
    ),
    "train.checkpoints_kept": Field(2, "Checkpoints that are kept.", at_least(1)),
    "train.save_samples": Field(
        False,
        "An epoch's samples and scores are saved before they are learnt from: a killed run repeats "
        "at most the phase it was in. Needs train.checkpoint_every 1.",
    ),
    "eval.videos": Field(96, "Held-out videos of an evaluation.", between(2, MOST_VIDEOS)),
    "eval.frames": Field(
        0,
        "Pixel frames of a held-out video where windows are trained. 0: video.frames.",
        at_least(0),
    ),
    "eval.policy": Field(
        "ema",
        "Adapter that is evaluated and exported: the average (ema) or the current one (current).",
        one_of("ema", "current"),
    ),
    "eval.ceiling": Field(
        True, "Real videos are also scored, after a round trip through the VAE (worlds only)."
    ),
    "eval.shown": Field(8, "Prompts on the contact sheet and in samples/.", at_least(1)),
    "mesh.data": Field(
        -1, "Devices along the batch. -1: all that mesh.fsdp leaves.", POSITIVE_OR_MINUS_ONE
    ),
    "mesh.fsdp": Field(
        1, "Devices that parameters are split over: nets, adapters, moments.", at_least(1)
    ),
    "mesh.samples_per_device": Field(
        -1,
        "Videos that a device works on at once; larger batches are cut into pieces, with equal "
        "arithmetic. -1: no limit.",
        POSITIVE_OR_MINUS_ONE,
    ),
}

# Section -> what it is about; `run` stands for the fields outside of sections.
SECTIONS = {
    "run": "What the run is called, and which model it trains.",
    "model": "The transformer, its attention and its types.",
    "sampler": "How a block is denoised.",
    "video": "Length, size and files of a video.",
    "streaming": "Training on windows of long videos; the whole one has video.frames.",
    "scenes": "How prompts follow each other within a video.",
    "prompts": "What videos are asked for.",
    "rewards": "What videos are scored by. Only this section takes new names.",
    "scoring": "When and where rewards are computed.",
    "advantages": "How scores become advantages.",
    "loss": "The objective (docs/objective.md).",
    "kl": "The deviation from the reference policy, and when that is reset.",
    "lora": "The adapters that are trained.",
    "optimizer": "How the adapters learn, and how the behaviour policy follows.",
    "train": "How long a run is, and when it saves.",
    "eval": "How a run is evaluated.",
    "mesh": "How work and parameters are spread over devices.",
}

# Names of earlier versions, whole sections or fields, and those of today.
RENAMED = {
    "optimiser": "optimizer",
    "prompts.groups": "prompts.prompts_per_epoch",
    "prompts.candidates": "prompts.samples_per_prompt",
    "streaming.clip": "streaming.score_frames",
}

# The published behaviour, one switch for each deviation (docs/published.md);
# `--config=FILE:reference` sets all.
REFERENCE_SWITCHES: dict[str, dict[str, Any]] = {
    "context": {"loss.context": "noisy"},
    "timesteps": {"loss.timesteps": "raw"},
    "mask_block": {"loss.mask_block": 1, "loss.mask_sink": False},
    "repeated_prompts": {"prompts.repeated": -1},
    "sigma_source": {"sampler.sigma_source": "lookup"},
    "timestep_draw": {"loss.timestep_draw": "batch"},
    "lora_dtype": {"lora.dtype": "bfloat16"},
    "sinks": {"model.faithful_sinks": True},
    "scenes": {"scenes.published": True},
    "selective_kl": {
        "kl.rank_direction": "published",
        "kl.reduction": "microbatch",
        "kl.reset_bounds": "published",
    },
}


def get_config() -> ConfigDict:
    """Return the config of all defaults, locked: a field that is not in FIELDS is refused.

    Only `rewards` takes new names.
    """
    defaults = {name: field.default for name, field in FIELDS.items()}
    config = ConfigDict(traverse_util.unflatten_dict(defaults, sep="."))
    config.lock()
    config.rewards.unlock()
    return config


def describe_fields() -> str:
    """Return all fields as markdown, a table (field, default, values, meaning) a section."""
    lines = []
    for section, meaning in SECTIONS.items():
        rows = [
            f"| `{name}` | `{field.default!r}` | {_values(field)} | {field.meaning} |"
            for name, field in FIELDS.items()
            if _section(name) == section
        ]
        lines += [
            f"## {section}",
            "",
            meaning,
            "",
            "| field | default | values | meaning |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    return "\n".join(lines)


def _section(name: str) -> str:
    """Return the section in which a field is described."""
    section, dot, _ = name.partition(".")
    return section if dot or section in SECTIONS else "run"


def _values(field: Field) -> str:
    """Return the values that a field takes, in words."""
    if field.constraint:
        return field.constraint.expected
    words = {bool: "True or False", str: "any text", float: "any number"}
    return words.get(type(field.default), "numbers by name")


def renamed(field: str) -> str | None:
    """Return today's name of a field ('prompts.groups') or section of earlier versions, else
    None.
    """
    names = (
        new + field.removeprefix(old)
        for old, new in RENAMED.items()
        if f"{field}.".startswith(f"{old}.")
    )
    return next(names, None)


def with_reference(config: ConfigDict, *switches: str) -> ConfigDict:
    """Set the published behaviour in `config`, and return it.

    Args:
      config: changed in place.
      *switches: names in REFERENCE_SWITCHES; none: all of them.

    Raises ValueError for an unknown switch.
    """
    for switch in switches or REFERENCE_SWITCHES:
        if switch not in REFERENCE_SWITCHES:
            raise ValueError(
                f"unknown reference switch {switch!r}; expected one of "
                f"{', '.join(REFERENCE_SWITCHES)}"
            )
        config.update_from_flattened_dict(REFERENCE_SWITCHES[switch])
    return config


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Return every field by its full name, {'optimizer.b1': 0.9, ...}, for records in JSON.

    Tuples become lists. The url of a reward ends before its query, which may hold a secret.
    """
    fields = traverse_util.flatten_dict(config.to_dict(), sep=".")
    return {name: _for_records(name, value) for name, value in fields.items()}


def _for_records(name: str, value: Any) -> Any:
    if name.startswith("rewards.") and name.endswith(".url"):
        return str(value).partition("?")[0]
    return list(value) if isinstance(value, tuple) else value


def reward_weights(config: ConfigDict) -> dict[str, float]:
    """Return the weight of each reward by its name; 1 for one that has options alone."""
    return {
        name: value.get(WEIGHT, 1.0) if isinstance(value, ConfigDict) else value
        for name, value in config.rewards.items()
    }
