"""Every field of a run, once, with its meaning; and the check that a run makes sense before
anything is compiled.

`configs/*.py` start from `get_config()` and change what their recipe changes. The glossary of the
objective is spec objective.md; where the published code differs from the corrected default,
`reference(config)` sets it.
"""

import math
from collections.abc import Collection, Iterator
from typing import Any

from ml_collections import ConfigDict

WEIGHT = "weight"  # of a reward that has options


def get_config() -> ConfigDict:
    """The defaults: the corrected behaviour of every switch (spec objective.md section 14).

    Fields that are not in it are refused; only `rewards` takes new names.
    """
    config = ConfigDict()
    _generation(config)
    _objective(config)
    _running(config)
    config.lock()
    config.rewards.unlock()
    return config


def _generation(config: ConfigDict) -> None:
    config.name = "run"  # shown in the summaries and on the contact sheet
    config.seed = 0  # every random draw derives from it

    # The base model: the name of a shipped one (`moving_shapes`) or a directory with its files.
    config.base = "moving_shapes"
    # Weights of the transformer in place of the base's: a published file (.safetensors, its
    # .index.json, .pt or .pth), or a base directory. Empty: the base's own.
    config.transformer = ""

    config.model = ConfigDict()
    # sizes of a published model, wan_1.3b or wan_14b; empty: those in the base's config.json
    config.model.size = ""
    # compute dtype of transformer, text encoder and VAE: float32 or bfloat16
    config.model.dtype = "float32"
    config.model.param_dtype = "float32"  # storage dtype of the frozen base
    config.model.block = 3  # P, latent frames per block of the rollout
    # attention window in latent frames, sink and current block included; -1: `max_global`
    config.model.window = -1
    config.model.max_global = 21  # latent frames that a global window sees
    config.model.sink = 0  # first latent frames that stay visible for ever
    config.model.positions = "absolute"  # rotary positions of a rolled window: absolute or relative
    config.model.independent_first_frame = False  # latent frame 0 is a block of its own
    # the published cache where a block meets the sink's slots (Layout)
    config.model.faithful_sinks = False
    config.model.remat = True  # recompute each layer in the backward pass
    config.model.attention = "auto"  # attention back end: auto, xla or cudnn

    config.sampler = ConfigDict()
    config.sampler.shift = 5.0  # timestep shift of the schedule
    # denoising steps on the unshifted scale; the last may be 0
    config.sampler.steps = (1000, 750, 500, 250)
    config.sampler.warp = True  # map the steps through the shifted schedule
    config.sampler.context_noise = 0.0  # timestep of the pass that caches a finished block
    # sigma of a timestep: exact (t/1000), or lookup (nearest table entry)
    config.sampler.sigma_source = "exact"
    config.sampler.batch = 24  # videos sampled, decoded and scored at once, over all devices

    config.video = ConfigDict()
    config.video.frames = 33  # pixel frames; 1 modulo 4
    config.video.height = 48  # pixels
    config.video.width = 48
    config.video.fps = 16  # of the files in samples/
    # latent frames decoded at once; more is faster only on large accelerators
    config.video.decode_chunk = 1

    # Training on windows of long videos (spec/streaming.md), in latent frames; the video has
    # video.frames.
    config.streaming = ConfigDict()
    config.streaming.window = 0  # W, frames that an epoch trains on; 0: the whole video
    # epoch: every epoch has new prompts and one window, whose past is sampled anew (Mode A).
    # progressive: the streams of its prompts go on from epoch to epoch, a window each, until the
    # video is full (Mode B).
    config.streaming.mode = "epoch"
    # where an epoch's window begins: random, first, last, or one of `starts`
    config.streaming.selection = "random"
    config.streaming.starts = ()  # for choices; a frame that is there twice is drawn twice as often
    # clip: the videos of a prompt share its past; sequence: each is made from 0 on
    config.streaming.sampling = "clip"
    # detach: gradients end at the window; full: they go back to frame 0
    config.streaming.backprop = "detach"
    # Whose keys of the past the loss reads: those of the rollout (rollout_old), each policy's own,
    # made anew from the latents in sight (per_policy), or the same from noised latents, Algorithm 2
    # to the letter (noised_prefix).
    config.streaming.prefix = "rollout_old"
    # score the window as it continues (window_stream), alone, or all (full)
    config.streaming.reward = "window_stream"
    # frames that are scored at once: a window has the mean of its clips; 0: the whole window
    config.streaming.score_frames = 0
    # progressive: the video that goes on: uniform (random), best or first
    config.streaming.continuation = "uniform"
    # progressive: make the keys in sight anew before each window
    config.streaming.recache_on_update = False
    config.streaming.prompts_per_device = 1  # prompts whose pasts are made together on a device
    # progressive: checkpoints may hold streams in the middle (full; `plan` prints their size), or
    # are made between two sets of streams only (sequence_end).
    config.streaming.save = "sequence_end"

    config.scenes = ConfigDict()  # how prompts follow each other within a video
    # flush (keep the first and the last two frames), recache, or cut: always hard
    config.scenes.transition = "flush"
    # what a hard cut keeps: sink (with absolute positions a flush and a jump), or nothing
    config.scenes.cut = "sink"
    config.scenes.global_sink = True  # recache: the sink keeps the keys of the first prompt
    # read strings and flush as the published command line does (sampling.md 7, 11)
    config.scenes.published = False

    config.prompts = ConfigDict()
    # a text file with one prompt a line, or world:NAME/SPLIT
    config.prompts.train = "world:moving_shapes/train"
    config.prompts.test = "world:moving_shapes/test"  # prompts of the evaluation
    config.prompts.prompts_per_epoch = 6  # G, prompts per epoch
    config.prompts.samples_per_prompt = 8  # K, videos per prompt
    # Sampling batches that ask for the same prompts, so that an epoch has G / repeated prompts with
    # `repeated` times K videos each. 1: all groups are distinct; -1: every batch of the epoch.
    config.prompts.repeated = 1
    # Videos per epoch, G K, for which a recipe's rates were chosen: a run with others says so. 0:
    # no opinion.
    config.prompts.tuned_for = 0


def _objective(config: ConfigDict) -> None:
    # Reward name -> weight, or {"weight": weight, OPTION: value, ...} for one that has options; the
    # total of a video is the weighted sum (rewards/__init__.py lists the names, the file of a
    # reward its options).
    config.rewards = ConfigDict()

    config.scoring = ConfigDict()
    # Rewards that may be computed while the next videos are sampled: none; host, those without
    # weights on the devices, such as remote ones; or all, which takes the memory of both.
    config.scoring.overlap = "host"
    # where weights of rewards are between two batches: device, or host
    config.scoring.weights = "device"
    config.scoring.timeout = 3600.0  # seconds that a batch may take a reward, compilation included

    config.advantages = ConfigDict()
    # divide by the std of the whole epoch (global) or of each prompt (prompt)
    config.advantages.std = "global"
    # a smaller std counts as this: it would make advantages of the rewards' noise
    config.advantages.min_std = 0.0
    config.advantages.clip = 5.0  # A_max: advantages are clipped to +-this before they become r
    # divide each reward by its std over the epoch before weighting
    config.advantages.standardise = False

    config.loss = ConfigDict()
    # astrolabe (x0 space) or diffusion_nft (adaptive weight, 1/beta, A_max)
    config.loss.kind = "astrolabe"
    # beta of the objective: interpolation between current and behaviour policy
    config.loss.mix_beta = 0.1
    config.loss.kl_weight = 1e-4  # lambda: weight of the deviation from the reference
    config.loss.context_gradient = False  # clean context: let gradients through it
    # keys of earlier blocks: clean (a clean stream, as in the rollout) or noisy
    config.loss.context = "clean"
    # noise levels of the loss: warped (the rollout's) or raw (the unshifted list)
    config.loss.timesteps = "warped"
    # stratified: levels balanced over an epoch; batch: one level a microbatch
    config.loss.timestep_draw = "stratified"
    config.loss.mask_block = -1  # frames per block of the training mask; -1: model.block
    config.loss.mask_sink = True  # the training mask keeps the sink visible

    config.kl = ConfigDict()
    # uniform, or selective: only samples that the main reward alone likes
    config.kl.kind = "uniform"
    config.kl.main_reward = ""  # name of the main reward, for selective
    # selective: paper (mask what only the main reward likes) or published
    config.kl.rank_direction = "paper"
    # selective: divide by the masked samples of the epoch, or of each microbatch
    config.kl.reduction = "epoch"
    # adaptation of the reset threshold: corrected or published (inverted)
    config.kl.reset_bounds = "corrected"
    config.kl.reset_threshold = 0.15  # mean deviation above which the reference is reset
    config.kl.reset_epochs = 15  # the reference is reset after more epochs than this

    config.lora = ConfigDict()
    config.lora.rank = 16
    config.lora.alpha = 16.0  # the adapter's output is scaled by alpha / rank
    config.lora.dtype = "float32"  # master weights of the adapters: float32 or bfloat16
    # an adapter to start from: a file, a PEFT or diffusers directory, a run's; empty: fresh
    config.lora.init = ""

    config.optimizer = ConfigDict()
    config.optimizer.learning_rate = 1e-3
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip_norm = 1.0  # global gradient norm
    config.optimizer.microbatch = 12  # videos per forward and backward pass, over all devices
    # passes over an epoch's samples, each with fresh noise and levels
    config.optimizer.inner_epochs = 1
    config.optimizer.steps_per_pass = 1  # optimizer steps per pass; gradients accumulate in between
    # behaviour policy <- d old + (1-d) current: type0, type1, type2 or constant
    config.optimizer.old_decay = "type1"
    config.optimizer.old_decay_constant = 0.9  # d for constant
    config.optimizer.ema_cap = 0.9  # largest decay of the evaluation average


def _running(config: ConfigDict) -> None:
    config.train = ConfigDict()
    config.train.epochs = 40
    # epochs between evaluations besides the first and the last; 0: only those
    config.train.eval_every = 0
    config.train.checkpoint_every = 10  # epochs between checkpoints; the last epoch always saves
    config.train.checkpoints_kept = 2
    # Also save an epoch's samples and scores before learning from them, so that a killed run
    # repeats at most the phase it was in; for checkpoint_every 1.
    config.train.save_samples = False

    config.eval = ConfigDict()
    config.eval.videos = 96  # held-out videos per evaluation
    # pixel frames of a held-out video when windows are trained; 0: video.frames
    config.eval.frames = 0
    config.eval.policy = "ema"  # adapter that is evaluated and exported: ema or current
    config.eval.ceiling = True  # also score reconstructions of real videos (worlds only)
    config.eval.shown = 8  # prompts on the contact sheet and in samples/

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices along the batch; -1: what fsdp leaves
    config.mesh.fsdp = 1  # devices that the parameters are split over
    # Videos that a device works on at once; larger batches are cut into pieces, with equal
    # arithmetic. -1: no limit.
    config.mesh.samples_per_device = -1


# The published behaviour, one switch each (objective.md section 14); `--config=FILE:reference` sets
# all.
REFERENCE_SWITCHES = {
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


def with_reference(config: ConfigDict, *switches: str) -> ConfigDict:
    """Sets the published behaviour of the named switches (all of REFERENCE_SWITCHES if none is
    named).
    """
    for switch in switches or REFERENCE_SWITCHES:
        if switch not in REFERENCE_SWITCHES:
            raise ValueError(
                f"unknown reference switch {switch!r}; expected one of "
                f"{', '.join(REFERENCE_SWITCHES)}"
            )
        config.update_from_flattened_dict(REFERENCE_SWITCHES[switch])
    return config


def samples(config: ConfigDict) -> int:
    """Videos per epoch, N = G K."""
    return config.prompts.prompts_per_epoch * config.prompts.samples_per_prompt


def reward_weights(config: ConfigDict) -> dict[str, float]:
    """Name of a reward -> its weight."""
    settings = config.rewards.items()
    return {
        name: value.get(WEIGHT) if isinstance(value, ConfigDict) else value
        for name, value in settings
    }


def repeats(config: ConfigDict) -> int:
    """Sampling batches that share their prompts: `prompts.repeated`, or all batches of the epoch
    for -1.
    """
    repeated = config.prompts.repeated
    return samples(config) // config.sampler.batch if repeated == -1 else repeated


def eval_frames(config: ConfigDict) -> int:
    """Pixel frames of a held-out video."""
    return config.eval.frames or config.video.frames


def clip_length(config: ConfigDict) -> int:
    """Latent frames of a long video that are scored at once."""
    return config.streaming.score_frames or config.streaming.window


def window_starts(config: ConfigDict, frames: int) -> tuple[int, ...]:
    """Return the frames at which a window of a video of `frames` latent frames may begin, ascending.

    A whole video is the window that begins at frame 0. A frame that `starts` has twice is there
    twice.

    Raises:
      ValueError: for a window that is not whole blocks, or does not lie in the video.
    """
    streaming, block = config.streaming, config.model.block
    window, last = streaming.window, frames - streaming.window
    if not window:
        return (0,)
    choices = {
        "first": (0,),
        "last": (last - last % block,),
        "random": range(0, max(last, 0) + 1, block),
        "choices": sorted(streaming.starts),
    }
    progressive = streaming.mode == "progressive"
    starts = tuple(
        range(0, max(last, 0) + 1, window) if progressive else choices[streaming.selection]
    )
    if window % block or any(
        type(start) is not int or start < 0 or start % block for start in starts
    ):
        raise ValueError(
            f"config.streaming has a window of {window} and starts {tuple(streaming.starts)}; "
            f"expected whole blocks of {block}"
        )
    if last < 0 or not starts or starts[-1] > last:
        raise ValueError(
            f"config.streaming: a window of {window} from frame {max(starts, default='(none)')} "
            f"does not lie in the {frames} latent frames of a video; give other starts, or raise "
            "config.video.frames"
        )
    return starts


def shares_prefix(config: ConfigDict) -> bool:
    """Return whether the videos of a prompt share its past; else each is sampled from frame 0 on."""
    return bool(config.streaming.window) and config.streaming.sampling == "clip"


def rounds(config: ConfigDict, devices: int) -> tuple[int, int]:
    """Return how an epoch's videos are taken in turn: (rounds, streams of a round).

    A stream is the past of one prompt, on one device, with its share of the prompt's videos. With
    more devices than prompts, several devices hold the same past. Where nothing is shared, every
    video is a stream of its own.

    Raises:
      ValueError: unless prompts, samples and devices fit each other.
    """
    groups, candidates = config.prompts.prompts_per_epoch, config.prompts.samples_per_prompt
    if not shares_prefix(config):
        streams = piece(config, config.sampler.batch, devices)
        return max(groups * candidates // streams, 1), streams
    streams = devices * config.streaming.prompts_per_device
    if groups % streams == 0:
        return groups // streams, streams
    if (
        streams % groups == 0
        and streams // groups <= candidates
        and candidates % (streams // groups) == 0
    ):
        return 1, streams
    raise ValueError(
        f"config.prompts.prompts_per_epoch is {groups}; expected a multiple of {streams} "
        f"(streaming.prompts_per_device on each of {devices} devices), or a divisor of it that "
        f"splits the {candidates} candidates evenly"
    )


def piece(config: ConfigDict, batch: int, devices: int) -> int:
    """Videos of a `batch`, which the devices divide, that are worked on at once, over all
    `devices`.

    It is the largest divisor of the batch that gives no device more than mesh.samples_per_device.
    """
    each, limit = batch // devices, config.mesh.samples_per_device
    if limit == -1:
        return batch
    return devices * max(size for size in range(1, min(limit, each) + 1) if each % size == 0)


_CHOICES = {
    "model.size": ("", "wan_1.3b", "wan_14b"),
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.positions": ("absolute", "relative"),
    "model.attention": ("auto", "xla", "cudnn"),
    "sampler.sigma_source": ("exact", "lookup"),
    "streaming.mode": ("epoch", "progressive"),
    "streaming.selection": ("random", "first", "last", "choices"),
    "streaming.sampling": ("clip", "sequence"),
    "streaming.backprop": ("detach", "full"),
    "streaming.prefix": ("rollout_old", "per_policy", "noised_prefix"),
    "streaming.reward": ("window_stream", "window_alone", "full"),
    "streaming.continuation": ("uniform", "best", "first"),
    "streaming.save": ("sequence_end", "full"),
    "scenes.transition": ("flush", "recache", "cut"),
    "scenes.cut": ("sink", "nothing"),
    "advantages.std": ("global", "prompt"),
    "loss.kind": ("astrolabe", "diffusion_nft"),
    "loss.context": ("clean", "noisy"),
    "loss.timesteps": ("warped", "raw"),
    "loss.timestep_draw": ("stratified", "batch"),
    "scoring.overlap": ("none", "host", "all"),
    "scoring.weights": ("device", "host"),
    "kl.kind": ("uniform", "selective"),
    "kl.rank_direction": ("paper", "published"),
    "kl.reduction": ("epoch", "microbatch"),
    "kl.reset_bounds": ("corrected", "published"),
    "lora.dtype": ("float32", "bfloat16"),
    "optimizer.old_decay": ("type0", "type1", "type2", "constant"),
    "eval.policy": ("ema", "current"),
}
# field -> least and largest value
_BOUNDS = {
    "seed": (0, 2**31 - 1),
    "model.block": (1, math.inf),
    "model.max_global": (1, math.inf),
    "model.sink": (0, math.inf),
    "sampler.context_noise": (0, 1000),
    "sampler.batch": (1, math.inf),
    "video.frames": (1, math.inf),
    "video.height": (1, math.inf),
    "video.width": (1, math.inf),
    "video.fps": (1, math.inf),
    "video.decode_chunk": (1, math.inf),
    "streaming.window": (0, math.inf),
    "streaming.score_frames": (0, math.inf),
    "streaming.prompts_per_device": (1, math.inf),
    "prompts.prompts_per_epoch": (1, math.inf),
    "prompts.samples_per_prompt": (1, math.inf),
    "prompts.tuned_for": (0, math.inf),
    "loss.kl_weight": (0, math.inf),
    "kl.reset_epochs": (1, math.inf),
    "lora.rank": (1, math.inf),
    "optimizer.learning_rate": (0, math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.microbatch": (1, math.inf),
    "optimizer.inner_epochs": (1, math.inf),
    "optimizer.steps_per_pass": (1, math.inf),
    "optimizer.old_decay_constant": (0, 1),
    "optimizer.ema_cap": (0, 1),
    "train.epochs": (1, math.inf),
    "train.eval_every": (0, math.inf),
    "train.checkpoint_every": (1, math.inf),
    "train.checkpoints_kept": (1, math.inf),
    "advantages.min_std": (0, math.inf),
    "eval.videos": (2, math.inf),
    "eval.frames": (0, math.inf),
    "eval.shown": (1, math.inf),
    "mesh.fsdp": (1, math.inf),
}
_POSITIVE = (
    "sampler.shift",
    "advantages.clip",
    "loss.mix_beta",
    "kl.reset_threshold",
    "lora.alpha",
    "optimizer.eps",
    "optimizer.clip_norm",
)
# -1, or at least 1
_OR_MINUS_ONE = (
    "model.window",
    "prompts.repeated",
    "loss.mask_block",
    "mesh.data",
    "mesh.samples_per_device",
)


def validate(config: ConfigDict, reward_names: Collection[str], devices: int, backend: str) -> None:
    """Raises one ValueError that lists every field at fault: its value, what was expected, what to
    do.

    `reward_names` are those that the program knows; `backend` is JAX's, 'cpu', 'gpu' or 'tpu', with
    so many `devices`. What depends on the base model or the prompts: prepare.py.
    """
    faults = [*_field_faults(config), *_reward_faults(config, reward_names)]
    faults += _attention_faults(config, backend)
    if not faults:  # the sums below need sensible numbers
        faults = [
            *_batch_faults(config, devices),
            *_kl_faults(config),
            *_streaming_faults(config, devices),
        ]
    if faults:
        raise ValueError("\n  ".join(["the config does not make sense:", *faults]))


def validate_sampling(config: ConfigDict, devices: int, backend: str) -> None:
    """As `validate`, for videos alone: nothing is asked of rewards, batches and objective."""
    faults = [*_field_faults(config), *_attention_faults(config, backend)] or [
        *_mesh_faults(config, devices)
    ]
    if faults:
        raise ValueError("\n  ".join(["the config does not make sense:", *faults]))


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{'optimizer.b1': 0.9, ...}, every field once, tuples as lists, so that it survives JSON."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def _field_faults(config: ConfigDict) -> Iterator[str]:
    flat = flatten(config)
    for field, choices in _CHOICES.items():
        if flat[field] not in choices:
            names = ", ".join(choice or "''" for choice in choices)
            yield f"config.{field} is {flat[field]!r}; expected one of {names}"
    for field, (least, most) in _BOUNDS.items():
        if not least <= flat[field] <= most or math.isinf(flat[field]):
            upper = "" if most == math.inf else f" and at most {most}"
            yield f"config.{field} is {flat[field]}; expected at least {least}{upper}"
    for field in _POSITIVE:
        if not 0 < flat[field] < math.inf:
            yield f"config.{field} is {flat[field]}; expected a positive number"
    for field in _OR_MINUS_ONE:
        if flat[field] != -1 and flat[field] < 1:
            yield (
                f"config.{field} is {flat[field]}; expected at least 1, or -1 (see its comment in "
                "config.py)"
            )
    for field in ("optimizer.b1", "optimizer.b2"):
        if not 0 <= flat[field] < 1:
            yield f"config.{field} is {flat[field]}; expected a number in [0, 1)"
    steps = list(config.sampler.steps)
    if any(isinstance(step, bool) or not isinstance(step, int | float) for step in steps):
        yield f"config.sampler.steps is {tuple(steps)}; expected numbers"
    elif (
        not steps
        or steps != sorted(set(steps), reverse=True)
        or not (0 < steps[0] <= 1000 and 0 <= steps[-1])
    ):
        yield (
            f"config.sampler.steps is {tuple(steps)}; expected timesteps in (0, 1000], strictly "
            "decreasing, after which a 0 may come"
        )
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
        if not _finite(weight):
            field = f"config.rewards.{name}" + f".{WEIGHT}" * isinstance(
                config.rewards[name], ConfigDict
            )
            yield f"{field} is {weight!r}; expected a finite weight"
    if weights and all(map(_finite, weights.values())) and sum(weights.values()) == 0:
        told = ", ".join(f"{name}={weight}" for name, weight in weights.items())
        yield f"config.rewards has a total weight of 0 ({told}); raise a weight"


def _finite(weight: Any) -> bool:
    """A weight that is new on the command line may be any literal."""
    return (
        isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
    )


def _batch_faults(config: ConfigDict, devices: int) -> Iterator[str]:
    prompts, optimizer = config.prompts, config.optimizer
    count = samples(config)
    epoch = (
        f"the {count} videos of an epoch (prompts.prompts_per_epoch x candidates, "
        f"{prompts.prompts_per_epoch} x {prompts.samples_per_prompt})"
    )
    if count % config.sampler.batch:
        yield f"config.sampler.batch is {config.sampler.batch}; expected a divisor of {epoch}"
    elif prompts.prompts_per_epoch % (repeated := repeats(config)):
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
    if count % (optimizer.microbatch * optimizer.steps_per_pass):
        yield (
            f"config.optimizer.microbatch is {optimizer.microbatch}; expected {epoch} to be a "
            f"whole number of them in each of the {optimizer.steps_per_pass} steps of a pass"
        )
    yield from _mesh_faults(config, devices)
    for field, size in (
        ("sampler.batch", config.sampler.batch),
        ("optimizer.microbatch", optimizer.microbatch),
    ):
        if size % devices:
            yield f"config.{field} is {size}; expected a multiple of the {devices} devices"


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


def _streaming_faults(config: ConfigDict, devices: int) -> Iterator[str]:
    streaming, model = config.streaming, config.model
    if not streaming.window:
        if config.eval.frames:
            yield (
                "config.eval.frames belongs to the training of windows; set video.frames, or "
                "streaming.window"
            )
        return
    if streaming.score_frames and (
        streaming.score_frames % model.block or streaming.window % streaming.score_frames
    ):
        yield (
            f"config.streaming.score_frames is {streaming.score_frames}; expected whole blocks of "
            f"{model.block}, and the window of {streaming.window} to be whole clips"
        )
    try:
        count, streams = rounds(config, devices)
    except ValueError as error:
        yield str(error)
        return
    each = samples(config) // (count * streams)
    for field, size in (
        ("sampler.batch", config.sampler.batch),
        ("optimizer.microbatch", config.optimizer.microbatch),
    ):
        at_once = size if size % devices else piece(config, size, devices)
        if streaming.sampling == "clip" and (
            size % streams or at_once % streams or each % (size // streams)
        ):
            yield (
                f"config.{field} is {size}, {at_once} at once (mesh.samples_per_device); expected "
                f"the same number of videos, a divisor of {each}, of each of the {streams} prompts "
                "that are worked on together (streaming.prompts_per_device)"
            )
    if streaming.sampling == "sequence" and streaming.mode == "progressive":
        yield (
            "config.streaming.sampling is 'sequence', whose videos begin at frame 0; expected "
            "'clip' if progressive"
        )
    if streaming.backprop == "full" and (
        streaming.mode == "progressive" or streaming.prefix != "rollout_old"
    ):
        yield (
            "config.streaming.backprop 'full' makes all keys anew; expected mode 'epoch' and "
            "prefix 'rollout_old'"
        )
    if streaming.sampling == "sequence" and streaming.prefix != "rollout_old":
        yield (
            f"config.streaming.prefix is {streaming.prefix!r}; expected 'rollout_old' where "
            "sampling is 'sequence'"
        )
    if streaming.mode == "progressive" and streaming.reward == "full":
        yield (
            "config.streaming.reward is 'full', a progressive stream does not keep its frames; "
            "expected window_stream"
        )
    if model.independent_first_frame or (model.faithful_sinks and model.sink > model.block):
        yield (
            "config.streaming.window cuts videos into equal blocks with whole sinks; expected "
            "model.independent_first_frame False, and model.faithful_sinks False for a sink larger "
            "than a block"
        )
    if config.prompts.repeated != 1:
        yield (
            f"config.prompts.repeated is {config.prompts.repeated}; expected 1 where windows are "
            "trained"
        )
    if model.sink and not config.loss.mask_sink or not config.loss.mask_block <= model.block:
        yield (
            "config.loss.mask_sink and mask_block ask for frames that the cache of a long video "
            "does not hold; where windows are trained, expected mask_sink True and mask_block at "
            "most model.block"
        )
    capacity = model.max_global if model.window == -1 else model.window
    again = streaming.prefix != "rollout_old" or streaming.recache_on_update
    if again and (capacity - model.sink) % model.block:
        yield (
            f"config.streaming makes keys anew, but a window of {capacity} less a sink of "
            f"{model.sink} is not whole blocks of {model.block}; expected prefix 'rollout_old' "
            "without recache_on_update, or another model.window"
        )


def _kl_faults(config: ConfigDict) -> Iterator[str]:
    if config.kl.kind != "selective":
        return
    if len(config.rewards) < 2:
        yield (
            "config.kl.kind 'selective' compares rewards; expected at least 2, got "
            f"{', '.join(config.rewards)}"
        )
    elif config.kl.main_reward not in config.rewards:
        names = ", ".join(config.rewards)
        yield (
            f"config.kl.main_reward is {config.kl.main_reward!r}; expected one of the rewards of "
            f"this run, {names}"
        )
