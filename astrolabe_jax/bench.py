"""Measures what a recipe takes on the devices that are here; it needs no weights and no prompts.

    python -m astrolabe_jax.bench --config=configs/longlive.py:streaming [--json=FILE]
    [--config.FIELD=VALUE ...]

The nets have the recipe's sizes and random numbers in them, the embeddings of prompts are random.
Rewards are measured where their weights are there. Everything is done twice: the first time
compiles, the second one counts. Several processes start it as they start astrolabe_jax.main.
"""

import functools
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

import astrolabe_jax
from astrolabe_jax import checkpoint, encode, estimate, plan, prompts, report, sharding, train
from astrolabe_jax import run as runs
from astrolabe_jax.advantages import ResetState, RiskState, advantages
from astrolabe_jax.arithmetic import piece, rounds, samples, shares_prefix
from astrolabe_jax.config_checks import validate
from astrolabe_jax.decode import decode_video
from astrolabe_jax.rewards import registry
from astrolabe_jax.rewards.panel import RewardRunner
from astrolabe_jax.runtime import backend, cli, multihost
from astrolabe_jax.runtime.files import check_takes_files, new_file, write_json
from astrolabe_jax.runtime.progress import Progress, clock, compilation, counted, log
from astrolabe_jax.streaming import streams, windows
from astrolabe_jax.types import PromptBatch, RngStream, TrainState, VideoBatch
from astrolabe_jax.update import TrainStep, init_state

T = TypeVar("T")

LATER_BLOCKS = 3  # whose median is the time of a later block
PROMPT = "a red circle moving left on a grey background"  # one that every reward can score
SCALE = 0.02  # of random weights


class Timed(NamedTuple):
    """How long something took."""

    seconds: float  # the second time
    compiling: float  # the first time, of it alone


def twice(what: str, action: Callable[[], T]) -> tuple[T, Timed]:
    """Return what `action` returns the second time, and how long it took."""
    log(f"measuring {what}")
    before = compilation().seconds
    jax.block_until_ready(action())
    compiling = compilation().seconds - before
    began = time.monotonic()
    result = jax.block_until_ready(action())
    return result, Timed(time.monotonic() - began, compiling)


def smallest_epoch(config: ConfigDict, devices: int, starts: tuple[int, ...]) -> ConfigDict:
    """Return a config whose epoch has the pieces of `config`'s, but as few as there can be.

    Its window begins where the cache is full; that of streams that go on begins at frame 0.
    """
    small = config.copy_and_resolve_references()
    shared = shares_prefix(config)
    sampled, trained = (
        piece(config, batch, devices)
        for batch in (config.sampler.batch, config.optimizer.microbatch)
    )
    width = rounds(config, devices)[1] if shared else 1
    changes = {
        "prompts.repeated": 1,
        "prompts.prompts_per_epoch": min(config.prompts.prompts_per_epoch, width),
        "prompts.samples_per_prompt": config.prompts.samples_per_prompt
        if shared
        else math.lcm(sampled, trained),
        "sampler.batch": sampled,
        "optimizer.microbatch": trained,
        "optimizer.inner_epochs": 1,
        "optimizer.steps_per_pass": 1,
    }
    if config.streaming.window and config.streaming.mode != "progressive":
        changes |= {"streaming.selection": "choices", "streaming.starts": starts}
    small.update_from_flattened_dict(changes)
    return small


def random_run(config: ConfigDict) -> runs.Run:
    """Return a run of the smallest epoch of `config` on the devices that are here.

    Raises ValueError and OSError as run.prepare does.
    """
    validate(config, registry.TABLE, jax.device_count(), backend.current())
    mesh = sharding.make_mesh(config.mesh)
    planned = plan.shapes_of(config, mesh)
    full = [start for start in sorted(planned.starts) if start >= planned.layout.capacity]
    small = smallest_epoch(config, mesh.size, (full[0] if full else max(planned.starts),))
    run = plan.shapes_of(small, mesh)
    log("making random weights")
    nets = {
        name: getattr(run.base, name)._replace(params=_random(getattr(run.base, name).params))
        for name in ("transformer", "vae", "text")
    }
    if runs.encoder_on_host(config):
        nets["text"] = nets["text"]._replace(params=sharding.moved_to_host(nets["text"].params))
    return run._replace(
        base=run.base._replace(**nets),
        adapter=runs.fresh_adapter(config, nets["transformer"].config),
        reward_runner=RewardRunner([]),
    )


def _random(shapes: Any) -> Any:
    """Return random arrays of these shapes, dtypes and shardings."""
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return structure.unflatten(
        _normal(leaf.shape, leaf.dtype, leaf.sharding)(key)
        for leaf, key in zip(leaves, keys, strict=True)
    )


@functools.cache
def _normal(shape: tuple[int, ...], dtype: Any, place: jax.sharding.Sharding) -> Callable:
    """Return the program that draws an array from a key; there is one for equal arrays."""
    return jax.jit(
        lambda key: (SCALE * jax.random.normal(key, shape)).astype(dtype), out_shardings=place
    )


def random_videos(run: runs.Run) -> VideoBatch:
    """Return the videos of the run's epoch, of prompts that are random numbers."""
    config = run.config
    each = config.prompts.samples_per_prompt
    index, candidate = np.divmod(np.arange(samples(config), dtype=np.int32), each)
    batch = PromptBatch((PROMPT,) * len(index), index, candidate)
    text = run.base.text.config
    embedding = np.random.default_rng(0).standard_normal((1, text.text_len, text.dim), np.float32)
    timeline = runs.timeline_of(run, PROMPT, run.latent_shape[0])
    return VideoBatch(
        batch,
        (timeline,) * len(index),
        {PROMPT: 0},
        embedding,
        prompts.sample_keys(batch, config.seed, RngStream.ROLLOUT, 0),
        traced=bool(config.streaming.window),
    )


def matrix_rate(dtype: str) -> float:
    """Return the operations a second that one device reaches on products of square matrices."""
    size = 1024 if backend.current() == "cpu" else 8192
    repeats = 16
    matrix = jnp.full((size, size), 1 / size, jnp.dtype(dtype))
    product = jax.jit(lambda x: jax.lax.fori_loop(0, repeats, lambda _, y: y @ matrix, x))
    _, timed = twice(f"products of {dtype}", lambda: product(matrix))
    return repeats * 2 * size**3 / timed.seconds


def measure_encoder(run: runs.Run) -> dict[str, Any]:
    """Return the seconds in which some prompts are encoded."""
    text = run.base.text
    count = encode.call_size(run.mesh)
    tokens = np.ones((count, text.config.text_len), np.int32)

    def embed() -> jax.Array:
        with sharding.on_devices(text.params) as params:
            ids, mask = sharding.shard_batch(run.mesh, (tokens, tokens))
            return jax.block_until_ready(encode.embed(text.graphdef, params, ids, mask))

    _, timed = twice("the text encoder", embed)
    return {"prompts": count, **timed._asdict()}


def measure_blocks(run: runs.Run, videos: VideoBatch, adapter: dict) -> dict[str, Any]:
    """Return what blocks take one by one, as `sample` makes them: until the cache is full."""
    config = run.config
    count = piece(config, config.sampler.batch, run.mesh.size)
    part = videos.take(np.arange(count))
    most = run.layout.capacity // run.layout.block + LATER_BLOCKS
    blocks = range(min(len(part.blocks), most))

    def make() -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {"transformer": [], "vae": [], "frames": []}
        state = windows.begin(run, count, run.latent_shape[0])
        decoder = None
        sampled = streams.sample_blocks(run.policy(adapter), part, state, blocks)
        for _ in blocks:
            began = time.monotonic()
            latents = jax.block_until_ready(next(sampled).latents)
            between = time.monotonic()
            decoded, decoder = decode_video(
                run.base.vae, latents, decoder, config.video.decode_chunk
            )
            jax.block_until_ready(decoded)
            seconds["transformer"].append(between - began)
            seconds["vae"].append(time.monotonic() - between)
            seconds["frames"].append(count * sum(frames.shape[1] for frames in decoded))
        return seconds

    made, timed = twice(f"{counted(len(blocks), 'block')} of {counted(count, 'video')}", make)
    later = {
        name: statistics.median(values[1:][-LATER_BLOCKS:] or values)
        for name, values in made.items()
    }
    whole = sum(made["transformer"]) + sum(made["vae"])
    return {
        "videos": count,
        "latent_frames": run.layout.block,
        "first": {name: made[name][0] for name in ("transformer", "vae")},
        "later": {name: later[name] for name in ("transformer", "vae")},
        "frames_per_second": {
            "transformer": later["frames"] / later["transformer"],
            "with_vae": later["frames"] / (later["transformer"] + later["vae"]),
            "end_to_end": sum(made["frames"]) / whole,
        },
        "compiling": timed.compiling,
    }


def measure_epoch(
    run: runs.Run, videos: VideoBatch, state: TrainState
) -> tuple[TrainState, dict[str, float], float]:
    """Return the state after two epochs, the second one's seconds by phase, and compilation's."""
    config = run.config
    step = TrainStep(config, run.base.transformer.graphdef, run.layout, run.mesh)
    scores = np.random.default_rng(0).standard_normal((len(config.rewards), samples(config)))
    rewards = dict(zip(config.rewards, scores.astype(np.float32), strict=True))
    result = advantages(config, rewards, videos.batch.index)
    _, mask, _ = train.kl_mask(config, rewards, RiskState())
    compiled = compilation().seconds
    seconds: dict[str, float] = {}
    for number in range(2):
        again = ", again" * number
        log(f"measuring an epoch of {counted(samples(config), 'video')}{again}")
        progress = Progress()
        segment = windows.collect(run, state.old, videos, run.starts[0], [], progress, "sampling")
        with progress.phase("update"):
            learn_from = train.samples_of(run, segment, result, mask, number)
            before = train.RunState(
                number, state, RiskState(), ResetState(config.kl.reset_threshold), {}
            )
            state = jax.block_until_ready(train.learn(run, before, step, learn_from, segment)[0])
        seconds = progress.take()
        compiled = compilation().seconds - compiled if number == 0 else compiled
    return state, seconds, compiled


def measure_rewards(
    config: ConfigDict, mesh: jax.sharding.Mesh
) -> tuple[dict[str, Any], list[str]]:
    """Return what each call of rewards takes on a piece of videos, and why others are left out.

    What is wrong with a reward does not end it: the other figures are there by then.
    """
    left_out = []
    there = {}
    for name, value in config.rewards.items():
        one = {name: value}
        faults = [*registry.directory_faults(one), *map(str, registry.reach_faults(one))]
        there |= {} if faults else one
        left_out += faults[:1]
    count = piece(config, config.sampler.batch, mesh.size)
    shape = (count, config.video.frames, config.video.height, config.video.width, 3)
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    figures = {}
    setting = registry.Setting(mesh, config.video.fps)
    try:
        groups = multihost.on_all(lambda: registry.load(there, setting)) if there else ()
    except (ValueError, OSError) as error:
        return figures, [*left_out, str(error)]
    for group in groups:
        runner = RewardRunner([group], place=config.scoring.weights, timeout=config.scoring.timeout)
        what = " + ".join(group.names)

        def score(runner: RewardRunner = runner) -> Any:
            return runner.score_async(frames, [PROMPT] * count)()

        try:
            _, timed = twice(what, score)
        except (ValueError, OSError) as error:
            left_out.append(str(error))
            continue
        figures[what] = {"videos": count, "weights": runner.weights, **timed._asdict()}
    return figures, left_out


def measure_checkpoint(state: TrainState, directory: Path) -> dict[str, float]:
    """Return the bytes of a checkpoint, and the seconds to save and to restore it."""
    log("measuring a checkpoint")
    place = Path(multihost.on_primary(lambda: tempfile.mkdtemp(dir=directory)))
    try:
        began = time.monotonic()
        snapshot = checkpoint.Snapshot(0, {"train": state}, {})
        size = checkpoint.save(place, snapshot, {}, keep=1)
        between = time.monotonic()
        checkpoint.restore(place, lambda _: {"train": state}, {})
        return {"bytes": size, "save": between - began, "restore": time.monotonic() - between}
    finally:
        multihost.on_primary(lambda: shutil.rmtree(place, ignore_errors=True))


def measure(config: ConfigDict, directory: Path) -> dict[str, Any]:
    """Return all figures about a recipe, which JSON can hold.

    Raises ValueError and OSError before anything is compiled.
    """
    run = random_run(config)
    with jax.set_mesh(run.mesh):
        videos = random_videos(run)
        state = init_state(run.config, run.adapter, run.mesh)
        rate = matrix_rate(config.model.dtype)
        encoder = measure_encoder(run)
        blocks = measure_blocks(run, videos, state.old)
        state, seconds, compiling = measure_epoch(run, videos, state)
        saved = measure_checkpoint(state, directory)
        scores, left_out = measure_rewards(config, run.mesh)
    peak = backend.peak_bytes()
    log("counting operations")
    device = estimate.Device(backend.current(), math.inf, rate, math.inf)
    phases = plan.estimated(run, device).phases
    often = repetitions(config, run)
    return {
        "name": config.name,
        "version": astrolabe_jax.__version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "devices": run.mesh.size,
        "processes": jax.process_count(),
        "matrix_rate": rate,
        "encode": encoder,
        "block": blocks,
        "epoch": {
            phase: {
                "seconds": taken,
                "times": often.get(phase, 1.0),
                "share_of_rate": phases[phase].operations / taken / rate
                if phase in phases
                else None,
            }
            for phase, taken in seconds.items()
            if phase != "rewards"
        },
        "videos": samples(run.config),
        "compiling": compiling,
        "rewards": scores,
        "rewards_left_out": left_out,
        "checkpoint": saved,
        "peak_bytes": peak,
    }


def repetitions(config: ConfigDict, small: runs.Run) -> dict[str, float]:
    """Return how often an epoch of `config` takes as long as one of `small`, by phase."""
    often = samples(config) / samples(small.config)
    mean = float(np.mean(plan.shapes_of(config, small.mesh).starts))
    start = small.starts[0]
    window = config.streaming.window
    longer = 1.0
    past = 0.0
    if shares_prefix(config) and start:
        ratio = rounds(config, small.mesh.size)[0] / rounds(small.config, small.mesh.size)[0]
        past = ratio * mean / start
    elif window:
        longer = (mean + window) / (start + window)
    return {
        "past": past,
        "rollout": often * longer,
        "decode": often * longer,
        "update": config.optimizer.inner_epochs * often * longer,
    }


def rows(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and text of what people read of `measure`'s figures."""
    block = figures["block"]
    rates = block["frames_per_second"]
    yield (
        "devices",
        f"{figures['devices']} x {figures['device']} in "
        f"{counted(figures['processes'], 'process', 'processes')}; each "
        f"{figures['matrix_rate'] / 1e12:.4g} TFLOP/s on products; jax {figures['jax']}",
    )
    encoder = figures["encode"]
    yield "encode", f"{counted(encoder['prompts'], 'prompt')} in {encoder['seconds']:.3f} s"
    first = block["first"]
    later = block["later"]
    frames = counted(block["latent_frames"], "latent frame")
    yield (
        "block",
        f"{frames} of {counted(block['videos'], 'video')}: {later['transformer']:.3f} s, "
        f"decoded in {later['vae']:.3f}; the first one {first['transformer']:.3f} and "
        f"{first['vae']:.3f}",
    )
    yield (
        "frames/s",
        f"{rates['transformer']:.1f} of the transformer alone, {rates['with_vae']:.1f} with the "
        f"VAE, {rates['end_to_end']:.1f} from the first block on; all videos together",
    )
    for phase, figure in figures["epoch"].items():
        share = figure["share_of_rate"]
        told = f", {100 * share:.0f} % of the products' rate" if share else ""
        yield phase, f"{counted(figures['videos'], 'video')} in {figure['seconds']:.3f} s{told}"
    for name, figure in figures["rewards"].items():
        yield name, f"{counted(figure['videos'], 'video')} in {figure['seconds']:.3f} s"
    for fault in figures["rewards_left_out"]:
        yield "left out", fault
    saved = figures["checkpoint"]
    yield (
        "checkpoint",
        f"{saved['bytes'] / 2**20:,.0f} MiB, saved in {saved['save']:.2f} s, restored in "
        f"{saved['restore']:.2f}",
    )
    whole = sum(figure["times"] * figure["seconds"] for figure in figures["epoch"].values())
    yield "an epoch", f"{whole:,.1f} s without rewards, evaluations and checkpoints"
    yield "compiling", f"blocks {clock(block['compiling'])}, an epoch {clock(figures['compiling'])}"
    yield "peak", f"{figures['peak_bytes'] / 2**30:,.1f} GiB"


def main(holders: Mapping[str, flags.FlagHolder], joining: tuple[flags.FlagHolder, ...]) -> None:
    """Print the figures; status 2 for a recipe that cannot be, or a file that is not written."""
    cli.set_up(lambda: multihost.join(*(flag.value for flag in joining)))
    config = holders["config"].value
    path = None
    directory = Path(holders["directory"].value or tempfile.gettempdir())
    try:
        if text := holders["json"].value:
            path = multihost.on_all(lambda: new_file(text, "--json"))
        told = f"--directory: {directory}"
        multihost.on_all(lambda: check_takes_files(directory, told, "another --directory"))
        with plan.naming_memory(config):
            figures = measure(config, directory)
        log(report.titled(f"bench of {figures['name']}", dict(rows(figures))))
        if path:
            multihost.on_primary(lambda: write_json(path, figures))
    except (ValueError, OSError) as error:
        cli.fail(error, 2)


if __name__ == "__main__":
    flag_holders = {
        "config": cli.define(),
        "json": flags.DEFINE_string("json", None, "file to write the figures to"),
        "directory": flags.DEFINE_string(
            "directory",
            None,
            "where a checkpoint is written, and removed; default: where temporary files are",
        ),
    }
    flags.mark_flag_as_required("config")
    join = cli.define_joining()

    def start(_: list[str]) -> None:
        with multihost.exit_together():
            main(flag_holders, join)

    app.run(start, flags_parser=cli.parse)
