"""What a run says about itself: the opening summary, samples, curves and the closing summary.

Progress lines are in runtime/progress.py, figures of every epoch in runtime/metrics.py. Files of
the working directory that are written here:

    samples/HEADING            held-out videos as mp4 and as film strips (png): before, after, and
                               epoch_EPOCH of evaluations in between
    samples/contact_sheet.png  before, and the last, side by side
    scores/EPOCH.csv           every sample of an epoch: prompt, rewards raw and standardised,
                               total, advantage
    curves.png                 rewards, losses and deviations over the epochs
    summary.json               evaluations before and after, ceiling, gain, seconds per phase,
                               versions, config
"""

import importlib.metadata
import itertools
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import astrolabe_jax
from astrolabe_jax import sharding
from astrolabe_jax.arithmetic import piece, repeats, rounds, samples
from astrolabe_jax.config import flatten, reward_weights
from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.lora import parameter_count
from astrolabe_jax.models.wan.cache import empty_cache
from astrolabe_jax.run import Run, encoder_on_host
from astrolabe_jax.runtime import media
from astrolabe_jax.runtime.files import write_atomic, write_json, writing
from astrolabe_jax.runtime.progress import counted, rewards_of
from astrolabe_jax.types import Evaluation, PromptBatch

# whose versions the summary gives
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "ml_collections",
    "transformers",
)


# The opening.


def opening(run: Run) -> str:
    """Return the summary of what will run: a title and aligned rows."""
    processes = counted(jax.process_count(), "process", "processes")
    devices = f"{run.mesh.size} x {jax.devices()[0].device_kind}, {processes}"
    return titled(run.config.name, describe(run, devices) | {"workdir": str(run.workdir)})


def titled(title: str, rows: Mapping[str, str]) -> str:
    """Return the program's version and a title, then the rows, aligned."""
    return "\n".join([f"astrolabe_jax {astrolabe_jax.__version__}: {title}", *_aligned(rows)])


def _aligned(rows: Mapping[str, str]) -> list[str]:
    """Return a line for each row, with the texts below one another."""
    width = max(map(len, rows))
    return [f"  {name:{width}}  {text}" for name, text in rows.items()]


def warnings(run: Run) -> list[str]:
    """Return what a run says once, at its start, about settings that are seldom meant."""
    config = run.config
    count = samples(config)
    tuned_for = config.prompts.tuned_for
    told = []
    if tuned_for not in (0, count):
        told.append(
            f"warning: an epoch has {count} videos, the recipe's {tuned_for}: its learning rate "
            "and KL weight were chosen for those; go back to them "
            f"(config.prompts.prompts_per_epoch x samples_per_prompt), or choose rates for {count} "
            f"and say so with --config.prompts.tuned_for={count}"
        )
    vae = run.base.vae.config
    reached = run.latent_shape[0]
    asked = vae.latent_frames(config.video.frames)
    if reached < asked and config.streaming.mode == "progressive":
        window = config.streaming.window
        told.append(
            f"warning: config.video.frames is {config.video.frames}, {asked} latent frames, of "
            f"which windows of {window} reach {reached}: the frames from "
            f"{vae.pixel_frames(reached)} on are neither sampled nor trained; expected "
            f"{vae.pixel_frames(reached)} or {vae.pixel_frames(reached + window)}"
        )
    return told


def describe(run: Run, devices: str) -> dict[str, str]:
    """Return the rows of the opening summary, by name.

    Shapes suffice: plan.py has a run without weights, prompts and devices. `devices` is the text
    about them.
    """
    config = run.config
    video = config.video
    place = f", weights on the {config.scoring.weights}" if run.reward_runner.weights else ""
    weighted = " + ".join(f"{weight:g} {name}" for name, weight in reward_weights(config).items())
    distinct = config.prompts.prompts_per_epoch // repeats(config)
    each = config.prompts.samples_per_prompt * repeats(config)
    sampled = piece(config, config.sampler.batch, run.mesh.size)
    trained = piece(config, config.optimizer.microbatch, run.mesh.size)
    accumulated = samples(config) // (config.optimizer.steps_per_pass * trained)
    steps = config.optimizer.inner_epochs * config.optimizer.steps_per_pass
    sizes = memory(run)
    settings = {
        "model": _model(run),
        "policy": _policy(run),
        "videos": f"{counted(video.frames, 'frame')} of {video.height}x{video.width}, latents "
        + "x".join(map(str, run.latent_shape)),
        "windows": _windows(run),
        "rewards": f"{weighted}; overlap {config.scoring.overlap}{place}",
        "objective": f"{config.loss.kind}, beta {config.loss.mix_beta:g}, {config.kl.kind} KL x "
        f"{config.loss.kl_weight:g}, {config.loss.context} context, {config.loss.timesteps} "
        "timesteps",
        "epoch": f"{counted(samples(config), 'video')} ({counted(distinct, 'prompt')}"
        f"{_of_how_many(run.train_prompts)}, {each} each), {counted(steps, 'optimizer step')} at "
        f"{config.optimizer.learning_rate:g}",
        "pieces": f"{samples(config) // sampled} of {counted(sampled, 'video')} to sample, "
        f"{sampled // run.mesh.size} per device; {accumulated} of {trained} for the gradient of a "
        f"step, {trained // run.mesh.size} per device",
        "run": f"{counted(config.train.epochs, 'epoch')}, seed {config.seed}; evaluation on "
        f"{counted(config.eval.videos, 'video')} of held-out prompts"
        f"{_of_how_many(run.test_prompts)}; a checkpoint every "
        f"{counted(config.train.checkpoint_every, 'epoch')}",
        "devices": f"{devices}; data {run.mesh.shape['data']} x fsdp {run.mesh.shape['fsdp']}",
        "memory": f"{sum(sizes.values()) / 2**20:,.0f} MiB per device and activations: "
        + ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in sizes.items()),
    }
    return {name: text for name, text in settings.items() if text}


def _model(run: Run) -> str:
    config = run.config
    net = run.base.transformer.config
    counts = {
        name: count(parameter_count(getattr(run.base, name).params))
        for name in ("transformer", "text", "vae")
    }
    return (
        f"{config.transformer or config.base}: transformer {counts['transformer']} "
        f"({net.num_layers} layers of {net.dim}), text encoder {counts['text']}, "
        f"VAE {counts['vae']} parameters; {config.model.dtype}"
    )


def _policy(run: Run) -> str:
    model = run.config.model
    steps = " ".join(f"{t:.4g}" for t in run.sampler.steps)
    bounded = f"{counted(model.window, 'frame')}, sink {model.sink}"
    seen = "all before it" if model.window == -1 else bounded
    return (
        f"LoRA of rank {run.config.lora.rank}, {count(parameter_count(run.adapter))} parameters; "
        f"steps at {steps}; blocks of {counted(model.block, 'latent frame')}, each sees {seen}"
    )


def _windows(run: Run) -> str:
    """Return where windows of long videos are trained, and how; empty for whole videos."""
    streaming = run.config.streaming
    if not streaming.window:
        return ""
    distinct = len(set(run.starts))
    several = f"one of {distinct} frames {run.starts[0]} to {run.starts[-1]}"
    places = several if distinct > 1 else f"{run.starts[0]}"
    clips = f", clips of {streaming.score_frames}" if streaming.score_frames else ""
    return (
        f"{counted(streaming.window, 'latent frame')} from {places}; mode {streaming.mode}, "
        f"sampling {streaming.sampling}, backprop {streaming.backprop}, prefix {streaming.prefix}, "
        f"reward {streaming.reward}{clips}"
    )


def _of_how_many(prompts: Sequence[str]) -> str:
    """Return how long a list of prompts is; nothing for a run that is only planned."""
    return f" of {len(prompts)}" if prompts else ""


# The memory that a run takes.


def memory(run: Run) -> dict[str, int]:
    """Return the bytes per device of the large arrays, from their shapes.

    Activations come on top.
    """
    config = run.config
    streaming = config.streaming
    base = run.base
    batch = piece(config, config.sampler.batch, run.mesh.size)
    frames = run.latent_shape[0]
    pixel_frames = config.video.frames
    if streaming.window:
        if streaming.sampling == "clip":
            frames = streaming.window
        pixel_frames = base.vae.config.temporal_stride * frames
    split_over_devices = {
        "cache": _cache_bytes(run, batch, min(run.layout.capacity, frames)),
        "latents": 4 * samples(config) * frames * math.prod(run.latent_shape[1:]),
        "frames": batch * pixel_frames * config.video.height * config.video.width * 3,
    }
    if streaming.window:
        caches, decoders = streams_held(run)
        split_over_devices["cache"] = _cache_bytes(run, caches, run.layout.capacity)
        split_over_devices["decoder"] = _decoder_bytes(run, decoders)
    own_share = {name: size // run.mesh.size for name, size in split_over_devices.items()}
    rewards = {"rewards": run.reward_runner.weights} if run.reward_runner.weights else {}
    nets = _on_one_device([base.transformer.params, base.vae.params])
    encoder = _on_one_device(base.text.params)
    shapes = jax.eval_shape(lambda: run.adapter)
    adapter = _on_one_device(sharding.shard_params(run.mesh, shapes))
    on_each_device = rewards | {
        "base": nets if encoder_on_host(config) else nets + encoder,
        "four policies": 4 * adapter,
        "optimizer": 2 * adapter,
    }
    if encoder_on_host(config):
        # it is there before an epoch's arrays are; but streams that go on stay
        later = set(own_share) - (
            {"cache", "decoder"} if streaming.mode == "progressive" else set()
        )
        more = encoder - sum(own_share[name] for name in later)
        on_each_device |= {"text encoder, besides an epoch's arrays": more} if more > 0 else {}
    return on_each_device | own_share


def _on_one_device(params: Any) -> int:
    """Return the bytes of weights that one device holds."""
    return sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(params)
    )


def streams_held(run: Run) -> tuple[int, int]:
    """Return how many streams' keys, and how many streams' decoder states, are held at once.

    They are those of an epoch's prefixes, and of what forks from them, where windows are trained.
    """
    config = run.config
    streaming = config.streaming
    sampled = piece(config, config.sampler.batch, run.mesh.size)
    trained = piece(config, config.optimizer.microbatch, run.mesh.size)
    if streaming.sampling == "sequence":
        return max(sampled, trained), sampled
    rounds_per_epoch, width = rounds(config, run.mesh.size)
    progressive = streaming.mode == "progressive"
    prefixes_are_kept = streaming.prefix == "rollout_old" and streaming.backprop == "detach"
    everything = width * rounds_per_epoch
    caches = everything if progressive or prefixes_are_kept else width
    decoders = everything if progressive else width
    if streaming.reward == "window_alone":
        decoders = 0
    return sampled + caches, sampled + decoders


def _cache_bytes(run: Run, streams: int, slots: int) -> int:
    net = run.base.transformer.config
    return bytes_of(jax.eval_shape(lambda: empty_cache(net, streams, slots, run.latent_shape[2:])))


def _decoder_bytes(run: Run, streams: int) -> int:
    """Return the bytes of what decoders remember of the frames so far."""
    vae = run.base.vae
    latents = jax.ShapeDtypeStruct((streams, 1, *run.latent_shape[1:]), np.float32)

    def decode(params: Any, latents: jax.Array) -> Any:
        return merge(vae.graphdef, params).decode(latents)

    _, state = jax.eval_shape(decode, vae.params, latents)
    return bytes_of(state)


def bytes_of(tree: Any) -> int:
    """Return the bytes of all arrays of a tree, or of their shapes."""
    return sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


# Evaluations, scores, samples and curves.


def mean_and_interval(values: np.ndarray) -> dict[str, float]:
    """Return the mean of n values, the half width of its 95 % confidence interval, and n.

    The half width, `ci95`, is 1.96 s / sqrt(n).
    """
    return {
        "mean": float(np.mean(values)),
        "ci95": float(1.96 * np.std(values, ddof=1) / np.sqrt(len(values))),
        "n": len(values),
    }


def table(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Return {mean, ci95, n} of every reward, and of `total`."""
    return {name: mean_and_interval(values) for name, values in evaluation.items()}


def evaluation_line(what: str, evaluation: Evaluation) -> str:
    """Return one line with every reward and its interval; parts of rewards are left out."""
    parts = [
        f"{name} {row['mean']:.3f} +- {row['ci95']:.3f}"
        for name, row in table(evaluation).items()
        if "/" not in name
    ]
    return f"{what}: {', '.join(parts)} ({counted(len(evaluation['total']), 'held-out video')})"


def write_scores(workdir: Path, epoch: int, table: Mapping[str, np.ndarray]) -> None:
    """Write the columns [N] of an epoch to scores/EPOCH.csv, one line for each sample."""
    rows = [table, *zip(*table.values(), strict=True)]
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    directory = workdir / "scores"
    with writing(directory):
        directory.mkdir(exist_ok=True)
    write_atomic(directory / f"{epoch:06}.csv", text.encode())


def write_samples(directory: Path, frames: np.ndarray, fps: int) -> None:
    """Write videos [B, T, height, width, 3] uint8 as 00.mp4, 01.mp4, ... and strips 00.png, ..."""
    directory.mkdir(parents=True, exist_ok=True)
    for i, video in enumerate(frames):
        media.write_mp4(directory / f"{i:02d}.mp4", video, fps)
        media.write_png(directory / f"{i:02d}.png", media.strip(video))


def write_contact_sheet(
    workdir: Path, name: str, batch: PromptBatch, evaluations: Mapping[str, Evaluation]
) -> Path:
    """Write samples/contact_sheet.png and return its path.

    It has a column for each evaluation, whose strips are in samples/HEADING, and a row for each
    prompt of `batch`. An evaluation whose strips somebody has removed has no column; without any
    strips there is no sheet.
    """
    columns = {}
    for heading, evaluation in evaluations.items():
        strips = sorted((workdir / "samples" / heading).glob("*.png"))
        if strips:
            columns[heading] = [
                (media.read_png(path), _caption(evaluation, video))
                for video, path in enumerate(strips)
            ]
    means = ", ".join(
        f"{heading} {np.mean(evaluation['total']):.3f}"
        for heading, evaluation in evaluations.items()
    )
    path = workdir / "samples" / "contact_sheet.png"
    if columns:
        shown = len(next(iter(columns.values())))
        title = f"{name}: mean total reward on held-out prompts {means}"
        media.write_png(path, media.contact_sheet(title, batch.texts[:shown], columns))
    return path


def _caption(evaluation: Evaluation, video: int) -> str:
    """Return the rewards of one video."""
    return "   ".join(
        f"{name} {values[video]:.2f}" for name, values in evaluation.items() if "/" not in name
    )


def write_curves(workdir: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """Draw the records of metrics.jsonl in curves.png, and return its path."""
    epochs = [record for record in records if record["kind"] == "epoch"]

    def lines(*names: str) -> dict[str, media.Line]:
        return {name: [(record["epoch"], record[name]) for record in epochs] for name in names}

    rewards = lines("total_reward", *rewards_of(epochs[0])) if epochs else {}
    evaluations = [
        (record["epoch"], record["eval"]["total"]["mean"])
        for record in records
        if record["kind"] == "evaluation"
    ]
    if evaluations:
        # One that was lost is measured again, and comes later than its epoch.
        rewards["held-out total"] = sorted(evaluations, key=lambda point: point[0])
    panels = {
        "rewards": rewards,
        "losses": lines("total_loss", "policy_loss", "kl_loss"),
        "deviations": lines("kl_div", "old_deviate", "old_kl_div"),
    }
    path = workdir / "curves.png"
    media.write_curves(path, panels, "epoch", log=("deviations",))
    return path


# The closing.


def write_summary(
    workdir: Path,
    config: ConfigDict,
    evaluations: Mapping[str, Evaluation],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Write summary.json, and return its content.

    Its `gain` has the mean and interval of the paired differences after - before: both evaluations
    score the same prompts and noise. Its `share_of_ceiling` is the gain of the total over the
    distance of the total from the ceiling; null without a ceiling above the start.

    Args:
      workdir: directory of the run.
      config: of the run.
      evaluations: `before`, `after` and, where it was measured, `ceiling`.
      seconds: by phase.
    """
    before = evaluations["before"]
    after = evaluations["after"]
    gain = {name: mean_and_interval(after[name] - before[name]) for name in after}
    distance = 0.0
    if "ceiling" in evaluations:
        distance = float(np.mean(evaluations["ceiling"]["total"]) - np.mean(before["total"]))
    summary = {
        "name": config.name,
        "seed": config.seed,
        "epochs": config.train.epochs,
        "eval": {name: table(evaluation) for name, evaluation in evaluations.items()},
        "gain": gain,
        "share_of_ceiling": gain["total"]["mean"] / distance if distance > 0 else None,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "versions": {
            "astrolabe_jax": astrolabe_jax.__version__,
            "python": platform.python_version(),
        }
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "devices": [device.device_kind for device in jax.devices()],
        "config": flatten(config),
    }
    write_json(workdir / "summary.json", summary)
    return summary


def closing(workdir: Path, summary: Mapping[str, Any]) -> str:
    """Return what came out, and where everything is; `summary` as of `write_summary`."""
    total = {name: rows["total"]["mean"] for name, rows in summary["eval"].items()}
    gain = summary["gain"]["total"]
    share = summary["share_of_ceiling"]
    result = (
        f"total reward on held-out prompts: {total['before']:.3f} -> {total['after']:.3f}, "
        f"gain {gain['mean']:+.3f} +- {gain['ci95']:.3f}"
    )
    if share is not None:
        result += f", {share:.0%} of the way to the ceiling of {total['ceiling']:.3f}"
    places = {
        "summary.json": "evaluations, gain, seconds per phase",
        "samples/contact_sheet.png": "before and after, side by side; the videos are beside it",
        "curves.png": "rewards, losses, deviations",
        "metrics.jsonl": "every figure of every epoch; also `tensorboard --logdir` on tensorboard/",
        "scores/": (
            "every sample of every epoch: its rewards, raw and standardised, and its advantage"
        ),
        "lora/": "the adapter, adapter_model.safetensors, in PEFT's format",
        "checkpoints/": "to go further, raise --config.train.epochs and run the same command",
    }
    rows = {str(workdir / name): text for name, text in places.items()}
    return "\n".join([result, *_aligned(rows)])


# Numbers for people.


def count(number: float) -> str:
    """Return a size in few digits: 1.3 B, 24.6 M, 812."""
    for unit, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}"


def spans(numbers: Sequence[int]) -> str:
    """Return whole numbers, in ascending order, as 1-3, 7, 9-10."""
    # Within a span the number and its place grow alike.
    groups = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    parts = []
    for _, group in groups:
        span = [number for _, number in group]
        parts.append(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}")
    return ", ".join(parts)
