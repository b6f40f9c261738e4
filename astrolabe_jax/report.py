"""What a run says about itself: the opening summary, progress lines, metrics, samples, and the
closing summary.

Files of the working directory written here:

    metrics.jsonl          one JSON object per epoch and per evaluation, `epoch` counts the finished
                           ones (so epochs
                           from 1); tensorboard/ has the same figures as events
    samples/before, after  held-out videos as mp4 and as film strips (png);
                           samples/contact_sheet.png shows both
    scores/EPOCH.csv       every sample of an epoch: prompt, rewards raw and standardised, total,
                           advantage
    curves.png             rewards, losses and deviations over the epochs
    summary.json           evaluations before and after, ceiling, gain, seconds per phase, versions,
                           config
"""

import contextlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

import astrolabe_jax
from astrolabe_jax.config import flatten, piece, repeats, reward_weights, rounds, samples
from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.lora import parameter_count
from astrolabe_jax.models.wan.cache import empty_cache
from astrolabe_jax.run import Run
from astrolabe_jax.runtime import media, multihost
from astrolabe_jax.runtime.files import read_jsonl, write_atomic, writing
from astrolabe_jax.types import Evaluation, PromptBatch

TICK_SECONDS = 10.0  # a long phase reports this often
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


def say(text: str) -> None:
    """A line for the person who watches: on one process only, at once, so that it also works
    through a pipe.
    """
    if jax.process_index() == 0:
        print(text, flush=True)


class Progress:
    """Measures phases, and tells how far a run is and how long it has left."""

    def __init__(
        self,
        seconds: Mapping[str, float],
        check: Callable[[], None],
        say: Callable[[str], None] = say,
    ):
        self.seconds = dict(seconds)  # by phase, over the whole run, earlier pieces included
        self.recent: dict[str, float] = {}  # by phase, since `take`
        self._check = check  # called before every phase; may raise to end the run there
        self._epochs: list[float] = []
        self._say = say
        self._spoken = time.monotonic()
        self._started = ("", 0.0)
        self._prefix = ""
        self.lasted: dict[str, float] = {}  # seconds of the last `within` of each name
        self._told: set[str] = set()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to the phase `name`; the caller waits for the device before it
        leaves.
        """
        self._check()
        start = time.monotonic()
        yield
        elapsed, name = time.monotonic() - start, self._prefix + name
        for table in (self.seconds, self.recent):
            table[name] = table.get(name, 0.0) + elapsed

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Phases inside are counted as PART/PHASE."""
        self._prefix, start = f"{part}/", time.monotonic()
        try:
            yield
        finally:
            self._prefix, self.lasted[part] = "", time.monotonic() - start

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        taken, self.recent = self.recent, {}
        return taken

    def tick(self, what: str, done: int, count: int) -> None:
        """`done` of `count` pieces of `what` are finished; a line every TICK_SECONDS."""
        now = time.monotonic()
        if self._started[0] != what:
            self._started = (what, now)
        if self._started[1] == now or done == count or now - self._spoken < TICK_SECONDS:
            return
        each = (now - self._started[1]) / (done - 1)
        self._spoken = now
        self._say(
            f"  {what} {done}/{count}, {each:.1f} s each, {clock((count - done) * each)} left"
        )

    def takes(self, what: str, size: int, place: Path) -> None:
        """Says once in a run how many bytes `what` takes on the disk."""
        if what not in self._told:
            self._told.add(what)
            self._say(f"  {what} takes {size / 2**20:,.1f} MiB in {place}")

    def epoch(self, record: Mapping[str, Any], count: int, after: float) -> None:
        """The line of a finished epoch; `after` is the expected time in seconds from the last epoch
        to the end.
        """
        epoch, seconds = record["epoch"], record["seconds"]
        self._epochs.append(sum(seconds.values()))
        each = statistics.median(self._epochs[-5:])
        self._spoken = time.monotonic()
        rewards = "  ".join(
            f"{name.removeprefix('reward/')} {value:.3f}"
            for name, value in rewards_of(record).items()
        )
        phases = " + ".join(f"{name} {value:.1f}" for name, value in seconds.items())
        self._say(
            f"epoch {epoch:{len(str(count))}}/{count}  {rewards}  kl {record['kl_div']:.1e}  |  "
            f"{phases} = {self._epochs[-1]:.1f} s  |  {clock((count - epoch) * each + after)} left"
        )


class Metrics:
    """metrics.jsonl and TensorBoard events; records of a lost piece, for which `keep` is false, are
    dropped.

    A record that was added is on the disk: a checkpoint that follows it never outlives it. Process
    0 reads and writes; `records` are the same on all processes, which all call what is here.
    """

    def __init__(self, workdir: Path, epoch: int, keep: Callable[[dict], bool]):
        self._path, self._events = workdir / "metrics.jsonl", None
        self._logs, self._purged = workdir / "tensorboard", epoch + 1
        self.records = multihost.by_first(lambda: self._open(keep))

    def _open(self, keep: Callable[[dict], bool]) -> list[dict]:
        found = read_jsonl(self._path)
        records = [
            record for record in found if {"kind", "epoch"} <= record.keys() and keep(record)
        ]
        write_atomic(self._path, "".join(_line(record) for record in records).encode())
        with writing(self._logs):
            self._logs.mkdir(parents=True, exist_ok=True)
            # not SummaryWriter: on a full disk that hangs
            self._events = EventsWriter(str(self._logs / "events"))
            start = SessionLog(status=SessionLog.START)  # later events of an earlier piece are void
            self._events.write_event(
                Event(wall_time=time.time(), step=self._purged, session_log=start)
            )
            self._events.flush()
        return records

    def add(self, record: dict[str, Any]) -> None:
        """Appends a record; its numbers, nested ones under NAME/INNER, become events of its
        epoch.
        """
        self.records.append(record)
        multihost.by_first(lambda: self._write(record))

    def _write(self, record: dict[str, Any]) -> None:
        line = _line(record).encode()
        with writing(self._path), open(self._path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        with writing(self._logs):
            for name, value in _numbers(record):
                point = scalar(f"{record['kind']}/{name}", value)
                self._events.write_event(
                    Event(wall_time=time.time(), step=record["epoch"], summary=point)
                )
            self._events.flush()

    def close(self) -> None:
        if self._events is not None:
            with contextlib.suppress(OSError):  # what could not be written has been told
                self._events.close()


def opening(run: Run) -> str:
    """The summary of what will run: a title and aligned rows."""
    devices = f"{run.mesh.size} x {jax.devices()[0].device_kind}, {jax.process_count()} process"
    return titled(run.config.name, describe(run, devices) | {"workdir": str(run.workdir)})


def titled(title: str, rows: Mapping[str, str]) -> str:
    """The program's version and a title, then the rows, aligned."""
    width = max(map(len, rows))
    lines = [f"astrolabe_jax {astrolabe_jax.__version__}: {title}"]
    return "\n".join([*lines, *(f"  {name:{width}}  {text}" for name, text in rows.items())])


def warnings(run: Run) -> list[str]:
    """What a run says once, at its start, about settings that may be meant but are seldom."""
    config, count = run.config, samples(run.config)
    if config.prompts.tuned_for in (0, count):
        return []
    return [
        f"warning: an epoch has {count} videos, the recipe's {config.prompts.tuned_for}: its "
        "learning rate and KL weight were chosen for those; go back to them "
        f"(config.prompts.prompts_per_epoch x candidates), or choose rates for {count} and say so "
        f"with --config.prompts.tuned_for={count}"
    ]


def memory(run: Run) -> dict[str, int]:
    """Bytes per device of the large arrays, from their shapes; activations come on top."""
    config, devices, layout = run.config, run.mesh.size, run.layout
    batch, window = piece(config, config.sampler.batch, devices), config.streaming.window
    nets = [net.params for net in (run.base.transformer, run.base.vae, run.base.text)]
    frames = window if window and config.streaming.sampling == "clip" else run.latent_shape[0]
    pixels = run.base.vae.config.temporal_stride * frames if window else config.video.frames
    split = {  # over the devices
        "cache": _cache(run, batch, min(layout.capacity, frames)),
        "latents": 4 * samples(config) * frames * math.prod(run.latent_shape[1:]),
        "frames": batch * pixels * config.video.height * config.video.width * 3,
    }
    if window:
        keys, decoders = _streams(run)
        split |= {"cache": _cache(run, keys, layout.capacity), "decoder": _decoder(run, decoders)}
    whole = {  # on each of them
        **({"rewards": run.panel.weights} if run.panel.weights else {}),
        "base": sum(
            leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in jax.tree.leaves(nets)
        ),
        "four policies": 4 * _bytes(run.adapter),
        "optimizer": 2 * _bytes(run.adapter),
    }
    return whole | {name: size // devices for name, size in split.items()}


def _streams(run: Run) -> tuple[int, int]:
    """Where windows are trained, of how many streams the keys are held at once, and of how many the
    decoder's memory.

    They are those of an epoch's pasts, and of what forks from them.
    """
    config, devices, streaming = run.config, run.mesh.size, run.config.streaming
    videos, learnt = (
        piece(config, batch, devices)
        for batch in (config.sampler.batch, config.optimizer.microbatch)
    )
    if streaming.sampling == "sequence":
        return max(videos, learnt), videos
    count, number = rounds(config, devices)
    progressive, seen = streaming.mode == "progressive", streaming.reward != "window_alone"
    kept = progressive or (streaming.prefix, streaming.backprop) == ("rollout_old", "detach")
    return videos + number * (count if kept else 1), videos + seen * number * (
        count if progressive else 1
    )


def _cache(run: Run, streams: int, slots: int) -> int:
    net = run.base.transformer.config
    return _bytes(jax.eval_shape(lambda: empty_cache(net, streams, slots, run.latent_shape[2:])))


def _decoder(run: Run, streams: int) -> int:
    """What decoders remember of the frames so far."""
    vae, latents = (
        run.base.vae,
        jax.ShapeDtypeStruct((streams, 1, *run.latent_shape[1:]), np.float32),
    )
    return _bytes(
        jax.eval_shape(lambda p, x: merge(vae.graphdef, p).decode(x)[1], vae.params, latents)
    )


def mean_and_interval(values: np.ndarray) -> dict[str, float]:
    """Mean of n values and the half width of its 95 % confidence interval, 1.96 s / sqrt(n)."""
    return {
        "mean": float(np.mean(values)),
        "ci95": float(1.96 * np.std(values, ddof=1) / np.sqrt(len(values))),
        "n": len(values),
    }


def table(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Reward name (and `total`) -> {mean, ci95, n}."""
    return {name: mean_and_interval(values) for name, values in evaluation.items()}


def evaluation_line(what: str, evaluation: Evaluation) -> str:
    """One line: every reward with its interval."""
    rows = {name: row for name, row in table(evaluation).items() if "/" not in name}
    parts = [f"{name} {row['mean']:.3f} +- {row['ci95']:.3f}" for name, row in rows.items()]
    return f"{what}: {', '.join(parts)} ({len(evaluation['total'])} held-out videos)"


def write_scores(workdir: Path, epoch: int, table: Mapping[str, np.ndarray]) -> None:
    """scores/EPOCH.csv: columns [N] of an epoch, one line for each sample."""
    lines = [
        ",".join(table),
        *(",".join(map(str, row)) for row in zip(*table.values(), strict=True)),
    ]
    folder = workdir / "scores"
    with writing(folder):
        folder.mkdir(exist_ok=True)
    write_atomic(folder / f"{epoch:06}.csv", "".join(f"{line}\n" for line in lines).encode())


def write_samples(directory: Path, frames: np.ndarray, fps: int) -> None:
    """Videos [B, T, height, width, 3] uint8 as 00.mp4, 01.mp4, ... and film strips 00.png, ..."""
    directory.mkdir(parents=True, exist_ok=True)
    for i, video in enumerate(frames):
        media.write_mp4(directory / f"{i:02d}.mp4", video, fps)
        media.write_png(directory / f"{i:02d}.png", media.strip(video))


def write_contact_sheet(
    workdir: Path, name: str, batch: PromptBatch, evaluations: Mapping[str, Evaluation]
) -> Path:
    """samples/contact_sheet.png: the strips in samples/HEADING of every evaluation side by side,
    with their rewards.

    Without strips there is no sheet.
    """
    columns = {}
    for heading, evaluation in evaluations.items():
        shown = sorted((workdir / "samples" / heading).glob("*.png"))
        if not shown:  # somebody has tidied up
            continue
        captions = [
            "   ".join(
                f"{reward} {values[i]:.2f}"
                for reward, values in evaluation.items()
                if "/" not in reward
            )
            for i in range(len(shown))
        ]
        columns[heading] = ([media.read_png(path) for path in shown], captions)
    means = ", ".join(f"{heading} {np.mean(e['total']):.3f}" for heading, e in evaluations.items())
    title = f"{name}: mean total reward on held-out prompts {means}"
    path = workdir / "samples" / "contact_sheet.png"
    if columns:
        count = len(next(iter(columns.values()))[0])
        media.write_png(path, media.contact_sheet(title, batch.texts[:count], columns))
    return path


def write_curves(workdir: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    """curves.png from the records of metrics.jsonl."""
    epochs = [record for record in records if record["kind"] == "epoch"]
    times = [record["epoch"] for record in epochs]

    def lines(*names):
        return {name: (times, [record[name] for record in epochs]) for name in names}

    rewards = lines("total_reward", *rewards_of(epochs[0])) if epochs else {}
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    # one that was lost and measured again came later
    evaluations.sort(key=lambda record: record["epoch"])
    if evaluations:
        held_out = [record["eval"]["total"]["mean"] for record in evaluations]
        rewards["held-out total"] = ([record["epoch"] for record in evaluations], held_out)
    panels = {
        "rewards": rewards,
        "losses": lines("total_loss", "policy_loss", "kl_loss"),
        "deviations": lines("kl_div", "old_deviate", "old_kl_div"),
    }
    write_atomic(workdir / "curves.png", media.curves(panels, log=("deviations",)))
    return workdir / "curves.png"


def rewards_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The mean rewards of an epoch's record, under their keys reward/NAME."""
    return {name: value for name, value in record.items() if name.startswith("reward/")}


def write_summary(
    workdir: Path,
    config: ConfigDict,
    evaluations: Mapping[str, Evaluation],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """summary.json, also returned. `evaluations` has `before`, `after` and, where it was measured,
    `ceiling`.

    gain: mean and interval of the paired differences after - before, as both score the same prompts
    and noise. share_of_ceiling: gain of the total over its distance to the ceiling; null without a
    ceiling above the start.
    """
    before, after, ceiling = (evaluations.get(name) for name in ("before", "after", "ceiling"))
    gain = {name: mean_and_interval(after[name] - before[name]) for name in after}
    distance = np.mean(ceiling["total"]) - np.mean(before["total"]) if ceiling else 0.0
    summary = {
        "name": config.name,
        "seed": config.seed,
        "epochs": config.train.epochs,
        "eval": {name: table(evaluation) for name, evaluation in evaluations.items()},
        "gain": gain,
        "share_of_ceiling": gain["total"]["mean"] / float(distance) if distance > 0 else None,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "versions": versions(),
        "devices": [device.device_kind for device in jax.devices()],
        "config": flatten(config),
    }
    write_atomic(workdir / "summary.json", json.dumps(summary, indent=1, allow_nan=False).encode())
    return summary


def closing(workdir: Path, summary: Mapping[str, Any]) -> str:
    """What came out, and where everything is."""
    total = {name: rows["total"]["mean"] for name, rows in summary["eval"].items()}
    share = summary["share_of_ceiling"]
    lines = [
        f"total reward on held-out prompts: {total['before']:.3f} -> {total['after']:.3f}, "
        f"gain {summary['gain']['total']['mean']:+.3f} +- {summary['gain']['total']['ci95']:.3f}"
        + (
            f", {share:.0%} of the way to the ceiling of {total['ceiling']:.3f}"
            if share is not None
            else ""
        )
    ]
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
    width = max(len(str(workdir / name)) for name in places)
    lines += [f"  {str(workdir / name):{width}}  {text}" for name, text in places.items()]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """What the results were made with."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"astrolabe_jax": astrolabe_jax.__version__, "python": platform.python_version()} | found


def clock(seconds: float) -> str:
    """42 s, 3 min 08 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds // 60 % 60:02d} min"


def count(number: float) -> str:
    """1.3 B, 24.6 M, 812: sizes for people."""
    for unit, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.0f}"


def spans(numbers: Sequence[int]) -> str:
    """Whole numbers in ascending order for people: 1-3, 7, 9-10."""
    groups = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    runs = [[number for _, number in group] for _, group in groups]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def describe(run: Run, devices: str) -> dict[str, str]:
    """The rows of the opening summary; shapes suffice: plan.py has a run without weights, prompts
    and devices.
    """
    config, base, mesh = run.config, run.base, run.mesh
    frames, channels, rows, columns = run.latent_shape
    sizes = {
        name: parameter_count(getattr(base, name).params) for name in ("transformer", "text", "vae")
    }
    net = base.transformer.config
    window = (
        "all before it"
        if config.model.window == -1
        else f"{config.model.window} frames, sink {config.model.sink}"
    )
    steps = " ".join(f"{t:.4g}" for t in run.sampler.steps)
    prompts_, optimizer = config.prompts, config.optimizer
    updates = optimizer.inner_epochs * optimizer.steps_per_pass
    sizes_ = memory(run)
    sampled, trained = (
        piece(config, batch, mesh.size) for batch in (config.sampler.batch, optimizer.microbatch)
    )
    accumulated = samples(config) // (optimizer.steps_per_pass * trained)
    # A run that is only planned does not know its prompts.
    of_train, of_test = (
        f" of {len(lines)}" if lines else "" for lines in (run.train_prompts, run.test_prompts)
    )
    return {
        "model": f"{config.transformer or config.base}: transformer {count(sizes['transformer'])} "
        f"({net.num_layers} layers of {net.dim}), text encoder {count(sizes['text'])}, "
        f"VAE {count(sizes['vae'])} parameters; {config.model.dtype}",
        "policy": (
            f"LoRA of rank {config.lora.rank}, {count(parameter_count(run.adapter))} parameters; "
            f"steps at {steps}; blocks of {config.model.block} latent frames, each sees {window}"
        ),
        "videos": (
            f"{config.video.frames} frames of {config.video.height}x{config.video.width}, latents "
            f"{frames}x{channels}x{rows}x{columns}"
        ),
        **({"windows": _windows(run)} if run.starts else {}),
        "rewards": " + ".join(
            f"{weight:g} {name}" for name, weight in reward_weights(config).items()
        )
        + f"; overlap {config.scoring.overlap}"
        + (f", weights on the {config.scoring.weights}" if run.panel.weights else ""),
        "objective": f"{config.loss.kind}, beta {config.loss.mix_beta:g}, {config.kl.kind} KL x "
        f"{config.loss.kl_weight:g}, {config.loss.context} context, {config.loss.timesteps} "
        "timesteps",
        "epoch": (
            f"{samples(config)} videos ({prompts_.prompts_per_epoch // repeats(config)} "
            f"prompts{of_train}, {prompts_.samples_per_prompt * repeats(config)} each), {updates} "
            f"optimizer steps at {optimizer.learning_rate:g}"
        ),
        "pieces": (
            f"{samples(config) // sampled} of {sampled} videos to sample, {sampled // mesh.size} "
            f"per device; {accumulated} of {trained} for the gradient of a step, "
            f"{trained // mesh.size} per device"
        ),
        "run": (
            f"{config.train.epochs} epochs, seed {config.seed}; evaluation on "
            f"{config.eval.videos} videos of held-out prompts{of_test}; a checkpoint every "
            f"{config.train.checkpoint_every} epochs"
        ),
        "devices": f"{devices}; data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']}",
        "memory": f"{sum(sizes_.values()) / 2**20:,.0f} MiB per device and activations: "
        + ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in sizes_.items()),
    }


def _windows(run: Run) -> str:
    streaming, starts = run.config.streaming, run.starts
    distinct, clips = (
        len(set(starts)),
        f", clips of {streaming.score_frames}" if streaming.score_frames else "",
    )
    places = (
        f"{starts[0]}" if distinct == 1 else f"one of {distinct} frames {starts[0]} to {starts[-1]}"
    )
    return (
        f"{streaming.window} latent frames from {places}; mode {streaming.mode}, sampling "
        f"{streaming.sampling}, backprop {streaming.backprop}, prefix {streaming.prefix}, reward "
        f"{streaming.reward}{clips}"
    )


def _bytes(tree: Any) -> int:
    return sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and (prefix, name) != ("", "epoch"):
            yield prefix + name, value
