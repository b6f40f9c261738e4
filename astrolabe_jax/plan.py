"""What a run would hold and do, from shapes alone: no weights, no prompts, no accelerator.

    python -m astrolabe_jax.plan --config=configs/self_forcing.py:hpsv3 [--on=h100:8 --price=2.5]
    [--devices=8] [--config.FIELD=VALUE ...]

The config is validated for so many devices. Every program of an epoch is traced with arrays that
have shapes but no content, on a mesh of devices that need not exist, and the shapes that come out
are checked. The memory is that of the opening summary: without activations. With --on these are
counted, too, for one device's share of the work (estimate.py).
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from astrolabe_jax import encode, estimate, minibatches, report, sharding, update
from astrolabe_jax.arithmetic import piece, repeats, rounds, samples, shares_prefix, window_starts
from astrolabe_jax.config import flatten
from astrolabe_jax.config_checks import validate
from astrolabe_jax.convert import base as bases
from astrolabe_jax.convert.nets import make_config, sizes_of
from astrolabe_jax.convert.parts import PARTS, SIZES
from astrolabe_jax.cost import Cost, calls
from astrolabe_jax.decode import decode_video
from astrolabe_jax.geometry import geometry_of, numerics
from astrolabe_jax.models.lora import adapter_shapes
from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.rewards.panel import RewardRunner
from astrolabe_jax.run import Run, timeline_of
from astrolabe_jax.runtime import backend, cli
from astrolabe_jax.runtime.files import new_file, write_json
from astrolabe_jax.runtime.progress import counted
from astrolabe_jax.streaming import streams, windows
from astrolabe_jax.types import (
    Array,
    LossPart,
    PrefixContext,
    PromptBatch,
    StreamState,
    VideoBatch,
)


def abstract_run(config: ConfigDict, devices: int) -> Run:
    """Return the run of `config` on so many devices, with shapes in place of its arrays.

    It has no prompts and no directory; weights of rewards need not be there, nor the base of a
    published model, config.model.size.

    Raises:
      ValueError, OSError: as run.prepare does.
    """
    validate(config, rewards.TABLE, devices, backend.current())
    return shapes_of(config, sharding.abstract_mesh(config.mesh, devices))


def on_one_device(run: Run) -> Run:
    """Return a run on one device that works on what each device of `run` works on at once.

    Its epoch is no longer than that takes: the videos of one prompt, or of those whose past a
    device holds together.
    """
    config = run.config.copy_and_resolve_references()
    devices = run.mesh.size
    sampled, trained = (
        piece(config, batch, devices) // devices
        for batch in (config.sampler.batch, config.optimizer.microbatch)
    )
    streams = config.streaming.prompts_per_device
    copies = max(streams * devices // config.prompts.prompts_per_epoch, 1)
    shared = shares_prefix(config)
    videos = config.prompts.samples_per_prompt // copies if shared else math.lcm(sampled, trained)
    config.update_from_flattened_dict(
        {
            "mesh.data": 1,
            "mesh.fsdp": 1,
            "mesh.samples_per_device": -1,
            "prompts.repeated": 1,
            "prompts.prompts_per_epoch": streams if shared else 1,
            "prompts.samples_per_prompt": videos,
            "sampler.batch": sampled,
            "optimizer.microbatch": trained,
            "optimizer.steps_per_pass": 1,
            "model.attention": "auto",
            # these change where arrays lie, not what is computed
            "prompts.encoder": "auto",
            "scoring.weights": "device",
        }
    )
    return shapes_of(config, sharding.abstract_mesh(config.mesh, 1))


def shapes_of(config: ConfigDict, mesh: sharding.AnyMesh) -> Run:
    """Do what `abstract_run` does, for a config that was validated, on any mesh."""
    chosen = numerics(config)
    if config.model.size:
        parts = {
            part: make_config(PARTS[part], sizes_of(net), **chosen)
            for part, net in SIZES[config.model.size].items()
        }
    else:
        parts = bases.configs(config.base, **chosen)
    layout, sampler, latent_shape = geometry_of(config, parts)
    nets = {name: bases.shapes(name, sizes) for name, sizes in parts.items()}
    for name, net in nets.items():
        place = sharding.replicate if name == "vae" else sharding.shard_params
        nets[name] = net._replace(params=place(mesh, net.params))
    return Run(
        config,
        Path(),
        {},
        bases.Base(nets["transformer"], nets["vae"], nets["text_encoder"], None, ""),
        layout,
        sampler,
        mesh,
        latent_shape,
        (),
        (),
        adapter_shapes(parts["transformer"], config.lora.rank, jnp.dtype(config.lora.dtype)),
        window_starts(config, parts["vae"].latent_frames(config.video.frames)),
        RewardRunner(
            rewards.planned(config.rewards, mesh), config.scoring.overlap, config.scoring.weights
        ),
    )


class Program(NamedTuple):
    """A program of an epoch, and what comes out of it."""

    function: Callable
    arguments: tuple  # of shapes
    # the array of each stage in it, and the shape that the next stage expects
    outputs: dict[str, tuple[Array, tuple[int, ...]]]


def trace(run: Run) -> dict[str, Array]:
    """Trace every program of an epoch, an evaluation's among them: name -> what comes out.

    Raises:
      ValueError: if its shape is not the one that the next stage expects.
    """
    with jax.sharding.use_abstract_mesh(run.mesh.abstract_mesh):
        traced = programs(run, EQUAL_PIECES)
        outputs = [output for program in traced for output in program.outputs.items()]
    for name, (output, expected) in outputs:
        if output.shape != expected:
            raise ValueError(
                f"{name}: it gives {output.shape}, expected {expected}; this is a fault of the "
                "program"
            )
    return {name: output for name, (output, _) in outputs}


def programs(run: Run, pieces: int | None = None) -> Iterator[Program]:
    """Yield every program of an epoch; to be called under the run's mesh.

    Of the pieces of an optimizer step, which are alike, only so many are taken; None: all.
    """
    config = run.config
    text = run.base.text
    tokens = _shape(encode.call_size(run.mesh), text.config.text_len, dtype=jnp.int32)
    prompt = (text.config.text_len, run.base.transformer.config.text_dim)
    embed = functools.partial(encode.embed, text.graphdef)
    arguments = (text.params, tokens, tokens)
    embeddings = jax.eval_shape(embed, *arguments)
    outputs = {"text encoder": (embeddings, (tokens.shape[0], *prompt))}
    yield Program(embed, arguments, outputs)
    adapter = sharding.shard_params(run.mesh, run.adapter)
    videos = piece(config, config.sampler.batch, run.mesh.size)
    prefix = None
    state = None
    if config.streaming.window:
        # The streams that advance together: of a round, or those that an update goes along.
        count = piece(config, config.optimizer.microbatch, run.mesh.size)
        if shares_prefix(config):
            _, count = rounds(config, run.mesh.size)
        past, after = _blocks(run, adapter, prompt, count, None)
        yield past._replace(outputs={"past": past.outputs["rollout"]})
        prefix = _prefix_shapes(run, after)
        if shares_prefix(config):
            after = after._replace(decoder=after.decoder if windows.decodes(run) else None)
            state = jax.eval_shape(lambda past: streams.fork(past, videos // count), after)
    yield _blocks(run, adapter, prompt, videos, state)[0]
    yield _step(run, adapter, prompt, prefix, pieces)


def _blocks(
    run: Run, adapter: dict, prompt: tuple[int, ...], count: int, state: StreamState | None
) -> tuple[Program, StreamState]:
    """Return the sampling and decoding of `count` videos, and the state after.

    One block stands for all where windows are trained; else every block of the video is traced.

    Args:
      prompt: (S, E).
      state: of the videos; None: they begin.
    """
    traced = bool(run.config.streaming.window)
    frames = run.config.model.block if traced else run.latent_shape[0]
    timeline = timeline_of(run, "a", frames)
    batch = PromptBatch(("a",) * count, np.zeros(count, np.int32), np.arange(count, dtype=np.int32))
    video = run.config.video
    chunk = min(video.decode_chunk, frames)
    decoded = chunk if traced else frames

    def run_blocks(params, vae_params, adapter, embeddings, keys, state):
        net = run.base.transformer._replace(params=params)
        own = run._replace(base=run.base._replace(transformer=net))
        videos = VideoBatch(batch, (timeline,) * count, {"a": 0}, embeddings, keys, traced)
        state = windows.begin(own, count, frames) if state is None else state
        blocks = range(len(timeline.blocks))
        latents, after = windows.sampled(
            streams.sample_blocks(own.policy(adapter), videos, state, blocks)
        )
        vae = run.base.vae._replace(params=vae_params)
        pixels, decoder = decode_video(vae, latents[:, :decoded], state.decoder, chunk)
        return latents, jnp.concatenate(pixels, axis=1), after._replace(decoder=decoder)

    arguments = (
        run.base.transformer.params,
        run.base.vae.params,
        adapter,
        _shape(1, *prompt),
        _keys(count),
        state,
    )
    latents, pixels, after = jax.eval_shape(run_blocks, *arguments)
    vae = run.base.vae.config
    begins = state is None or state.decoder is None
    pixel_frames = vae.pixel_frames(decoded) if begins else vae.temporal_stride * decoded
    outputs = {
        "rollout": (latents, (count, frames, *run.latent_shape[1:])),
        "decoder": (pixels, (count, pixel_frames, video.height, video.width, 3)),
    }
    return Program(run_blocks, arguments, outputs), after


def _prefix_shapes(run: Run, state: StreamState) -> PrefixContext | None:
    """Return what the loss reads of these streams, at the last start."""
    streaming = run.config.streaming
    start = max(run.starts)
    context = PrefixContext(_shape(dtype=jnp.int32), _shape(streaming.window, dtype=jnp.int32))
    if streaming.backprop == "full":
        if not start or not shares_prefix(run.config):
            return None
        return context._replace(whole=_shape(state.first.shape[0], start, *run.latent_shape[1:]))
    if streaming.prefix == "rollout_old":
        return context._replace(cache=state.cache)
    return context._replace(
        first=_shape(state.first.shape[0], run.layout.kept, *run.latent_shape[1:]),
        recent=state.recent,
    )


def _step(
    run: Run,
    adapter: dict,
    prompt: tuple[int, ...],
    prefix: PrefixContext | None,
    pieces: int | None,
) -> Program:
    """Return an optimizer step; ValueError if it changes the shapes of the state."""
    config = run.config
    state = jax.eval_shape(functools.partial(update.first_state, config), adapter)
    step = update.TrainStep(config, run.base.transformer.graphdef, run.layout, run.mesh)
    window = config.streaming.window
    cut = window and not shares_prefix(config) and config.streaming.backprop == "detach"
    frames = (0, window) if cut else None

    def take(state, params, texts, batch, prefix):
        return step(state, params, texts, batch, lambda *_: [LossPart(frames, 0, prefix)])

    batch = _step_batch(run, pieces)
    arguments = (
        state,
        run.base.transformer.params,
        _shape(config.prompts.prompts_per_epoch // repeats(config), *prompt),
        batch,
        prefix,
    )
    after, metrics = jax.eval_shape(take, *arguments)
    after = jax.eval_shape(update.blend_old, after, _shape())
    before = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    if [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] != before:
        raise ValueError(
            "train step: the state changes its shapes or dtypes; this is a fault of the program"
        )
    expected = (math.prod(batch.r.shape),)
    return Program(take, arguments, {"train step": (metrics["sample_loss"], expected)})


def _step_batch(run: Run, pieces: int | None) -> update.StepBatch:
    """Return the shapes of the samples of the first optimizer step, of so many of its pieces."""
    plan = minibatches.plan_pass(
        run.config, 0, 0, np.ones(samples(run.config), bool), run.mesh.size
    )
    order = minibatches.cut(run.config, plan, run.mesh.size).order
    shape = order[0, :pieces].shape
    frames = run.window if shares_prefix(run.config) else run.latent_shape[0]
    return update.StepBatch(
        latents=_shape(*shape, frames, *run.latent_shape[1:]),
        r=_shape(*shape),
        kl_weight=_shape(*shape),
        prompt=_shape(*shape, dtype=jnp.int32),
        t=_shape(*shape),
        key=_keys(*shape),
    )


def _shape(*sizes: int, dtype=jnp.float32) -> Any:
    """Return the abstract array of these sizes."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def _keys(*sizes: int) -> Any:
    """Return an abstract array of keys."""
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), sizes))


def planned_devices(config: ConfigDict) -> int:
    """Return the devices that a recipe's batches were published for, or those of this machine."""
    limit = config.mesh.samples_per_device
    return jax.device_count() if limit == -1 else max(config.sampler.batch // limit, 1)


GIB = 2**30
EQUAL_PIECES = 2  # that are traced of an optimizer step: a first one, and one that adds to it
# What the errors of a device, of the host and of what reads files say where memory ends.
_SHORTAGES = ("resource_exhausted", "out of memory", "unable to allocate", "bad_alloc")
TRAINING = ()  # all that report.memory counts


@contextlib.contextmanager
def naming_memory(config: ConfigDict, held: Sequence[str] = TRAINING) -> Iterator[None]:
    """End the program with one line and status 1 where memory runs out inside.

    The line says what takes how much, and which settings help, the best first. `held` are the rows
    of report.memory that this program holds; none: all of them.
    """
    try:
        yield
        return
    except Exception as error:
        shortage = _shortage(error)
        if not shortage:
            raise
    # after the error is gone, and with it what its frames held
    cli.fail(f"out of memory: {shortage}; {_memory_advice(config, held)}", 1)


def _shortage(error: BaseException | None) -> str:
    """Return the first line of the error, or of one behind it, that tells of too little memory.

    What a reward has raised is told as the reward's error, which names it and its line.
    """
    named = ""
    while error is not None:
        text = str(error) or type(error).__name__
        if isinstance(error, rewards.RewardError):
            named = text
        on_disk = "error writing" in text.lower()  # tensorstore calls a full disk so, too
        short = any(word in text.lower() for word in _SHORTAGES) and not on_disk
        if isinstance(error, MemoryError) or short:
            return named or text.splitlines()[0][:200]
        error = error.__cause__ or error.__context__
    return ""


def _memory_advice(config: ConfigDict, held: Sequence[str]) -> str:
    """Return what takes how much on a device, and the settings that take less, the best first."""
    sizes = _held_bytes(config, held)
    listed = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in _by_size(sizes))
    # Settings that what is not counted, activations, shrinks with.
    activations = {"mesh.samples_per_device": 1, "model.remat": True, "video.decode_chunk": 1}
    others = {
        "mesh.fsdp": jax.device_count(),
        "prompts.encoder": "host",
        "scoring.weights": "host",
        "scoring.overlap": "none",
        "model.param_dtype": "bfloat16",
        "model.dtype": "bfloat16",
    }
    saved = {}
    for field, value in (activations | others).items():
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict({field: value})
        less = sum(sizes.values()) - sum((_held_bytes(changed, held) or sizes).values())
        if changed != config and (field in activations or less > 0):
            saved[f"config.{field}={value}"] = (field in activations, less)
    order = sorted(saved, key=lambda setting: saved[setting], reverse=True)
    mebibytes = {
        name: f" (-{saved[name][1] / 2**20:,.0f})" * (saved[name][1] > 0) for name in order
    }
    settings = ", ".join(f"{name}{mebibytes[name]}" for name in order)
    return (
        f"a device holds, in MiB and besides activations, {listed or 'what was not counted'}; what "
        f"helps, the best first: {settings or 'fewer or smaller videos'}"
    )


def _by_size(sizes: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(sizes.items(), key=lambda item: -item[1])


def _held_bytes(config: ConfigDict, held: Sequence[str]) -> dict[str, int]:
    """Return the rows of report.memory; none for a config that cannot be planned."""
    try:
        sizes = report.memory(abstract_run(config, jax.device_count()))
    except (ValueError, OSError, MemoryError, RuntimeError):  # or there is still no memory
        return {}
    return {name: size for name, size in sizes.items() if not held or name in held}


def estimated(run: Run, device: estimate.Device) -> estimate.Estimate:
    """Return what an epoch of `run` holds and takes on such devices."""
    with backend.planned(device.backend):
        held = report.memory(run)
        one = on_one_device(run)
    split = estimate.split_shapes(run)
    # settings of how arrays are placed and of other devices have the same programs
    kind = "cpu" if device.backend == "cpu" else "tpu"
    key = (kind, one.config.to_json_best_effort(), *sorted(split.items()))
    if key not in _COUNTED:
        _COUNTED[key] = list(_counted(one, split, kind)), list(_counted_rewards(one, kind))
    costs, rewards_ = _COUNTED[key]
    return estimate.of(run, one, costs, rewards_, device, held)


# costs of an epoch's programs, and of rewards
_COUNTED: dict[tuple, tuple[list[tuple[str, str, Cost]], list[tuple[str, Cost, float]]]] = {}


def _counted(
    one: Run, split: Mapping[tuple[int, ...], int], kind: str
) -> Iterator[tuple[str, str, Cost]]:
    """Yield stage, name and cost of each call of a program of one device.

    kind: cpu, or tpu, whose fused attention can be traced anywhere, and stands for that of all
      accelerators.
    """
    jax.clear_caches()  # what was traced for the devices that are here would be taken
    with (
        backend.planned(kind),
        jax.default_matmul_precision("float32"),
        jax.sharding.use_abstract_mesh(one.mesh.abstract_mesh),
    ):
        for program in programs(one):
            stage = next(iter(program.outputs))
            traced = jax.make_jaxpr(program.function)(*program.arguments)
            for name, cost in calls(traced, split):
                yield stage, name, cost


def _counted_rewards(one: Run, kind: str) -> Iterator[tuple[str, Cost, float]]:
    """Yield names, the cost of a call, and the calls of a video, for each program of a reward.

    Rewards that are no part of this package, or compute on the host, are left out.
    """
    video = one.config.video
    frames, clips = _scored(one)
    clip = rewards.Clip(frames, video.height, video.width, video.fps)
    with (
        backend.planned(kind),
        jax.default_matmul_precision("float32"),
        jax.sharding.use_abstract_mesh(one.mesh.abstract_mesh),
    ):
        for names, params, work in rewards.works(one.config.rewards, clip, one.mesh):
            traced = jax.make_jaxpr(jax.jit(work.function))(params, *work.arguments)
            for _, cost in calls(traced):
                yield " + ".join(names), cost, clips * work.calls


def _scored(run: Run) -> tuple[int, float]:
    """Return the frames that a reward is given at once, and how often of a video of an epoch."""
    streaming = run.config.streaming
    if not streaming.window:
        return run.config.video.frames, 1.0
    stride = run.base.vae.config.temporal_stride
    before = float(np.mean(run.starts)) if streaming.reward == "full" else 0.0
    length = before + streaming.window
    at_once = streaming.score_frames or length
    return round(stride * at_once), length / at_once


# Settings that take less memory, in the order in which they are tried: what costs no time first.
SMALLER = {
    "prompts.encoder": "host",
    "mesh.fsdp": -1,  # all devices
    "scoring.weights": "host",
    "mesh.samples_per_device": 1,
    "video.decode_chunk": 1,
    "model.remat": True,
}


def fitting(
    config: ConfigDict, device: estimate.Device, count: int
) -> tuple[dict[str, Any], estimate.Estimate]:
    """Return the settings with which a run fits on such devices, and its estimate with them.

    Settings of SMALLER, but for those that this config cannot have, are added until it fits; those
    without which it fits, too, are left out. Where none suffices, all of them come back.

    Raises ValueError as `abstract_run` does.
    """

    def tried(settings: Mapping[str, Any]) -> estimate.Estimate:
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(dict(settings))
        return estimated(planned_on(changed, device, count), device)

    chosen: dict[str, Any] = {}
    found = tried(chosen)
    current = flatten(config)
    for field, value in SMALLER.items():
        value = count if value == -1 else value
        if found.fits or current[field] == value:
            continue
        with contextlib.suppress(ValueError):  # such as fsdp beside a given mesh.data
            found = tried(chosen | {field: value})
            chosen[field] = value
    for field in list(chosen) if found.fits else ():
        fewer = {name: value for name, value in chosen.items() if name != field}
        without = tried(fewer)
        if without.fits:
            chosen = fewer
            found = without
    return chosen, found


def planned_on(config: ConfigDict, device: estimate.Device, count: int) -> Run:
    """Return `abstract_run` on such devices."""
    with backend.planned(device.backend):
        return abstract_run(config, count)


def verdict(config: ConfigDict, on: str, price: float) -> dict[str, Any]:
    """Return whether a run fits on devices such as `h100:8`, and what it takes; JSON can hold it.

    price: of a device and hour; 0: unknown.
    """
    kind, device, count = estimate.parse(on)
    settings, found = fitting(config, device, count)
    plain = found if not settings else estimated(planned_on(config, device, count), device)
    scoring = sum(phase.seconds for phase in found.rewards.values())
    hours = config.train.epochs * (found.seconds + scoring) / 3600
    return {
        "name": config.name,
        "kind": kind,
        "devices": count,
        "memory_bytes": device.memory,
        "fits": plain.fits,
        "peak_bytes": plain.peak,
        "peak_phase": max(plain.peaks, key=lambda name: plain.peaks[name]),
        "settings": settings,  # with which it fits, or all that take less memory
        "fits_with_settings": found.fits,
        "peak_bytes_with_settings": found.peak,
        # of an epoch with these settings, without rewards
        "phases": {
            name: {
                "seconds": phase.seconds,
                "operations": phase.operations,
                "peak_bytes": found.peaks[name],
            }
            for name, phase in found.phases.items()
        },
        "rewards": {name: {"seconds": phase.seconds} for name, phase in found.rewards.items()},
        "rewards_not_counted": sorted(
            set(config.rewards) - {name for names in found.rewards for name in names.split(" + ")}
        ),
        "epochs": config.train.epochs,
        "hours": hours,
        "device_hours": hours * count,
        "price": price,
        "cost": hours * count * price,
    }


def told(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines about a verdict."""
    yield (
        f"  on         {found['devices']} x {found['kind']}: "
        f"{'fits' if found['fits'] else 'does not fit'}, at most {found['peak_bytes'] / GIB:,.1f} "
        f"of {found['memory_bytes'] / GIB:,.1f} GiB on a device, in the {found['peak_phase']}"
    )
    peak = f"{found['peak_bytes_with_settings'] / GIB:,.1f} GiB"
    if found["settings"] and found["fits_with_settings"]:
        flags_ = " ".join(f"--config.{name}={value}" for name, value in found["settings"].items())
        yield f"             fits with {flags_}: {peak}"
    elif found["settings"]:
        yield (
            f"             with all that takes less memory it holds {peak}; take more devices, or "
            "larger ones"
        )
    phases = ", ".join(
        f"{name} {phase['seconds']:,.0f} s ({phase['operations'] / 1e15:,.1f} PFLOP, peak "
        f"{phase['peak_bytes'] / GIB:,.1f} GiB)"
        for name, phase in found["phases"].items()
    )
    so = " so" * bool(found["settings"])
    yield f"             an epoch{so}, without rewards: {phases}"
    counted_ = [f"{name} {taken['seconds']:,.0f} s" for name, taken in found["rewards"].items()]
    without = found["rewards_not_counted"]
    uncounted = [f"not counted: {', '.join(without)}"] if without else []
    yield f"             rewards of an epoch: {', '.join(counted_ + uncounted)}"
    price = found["price"]
    cost = f", {found['cost']:,.0f} at {price:g} an hour" if price else ""
    yield (
        f"             {counted(found['epochs'], 'epoch')} without evaluations: "
        f"{found['hours']:,.1f} h, {found['device_hours']:,.0f} device-hours{cost}"
    )


def main(holders: Mapping[str, flags.FlagHolder]) -> None:
    """Print the opening summary of the run and what was traced; status 2 if it cannot be."""
    cli.set_up()
    config = holders["config"].value
    on = holders["on"].value
    devices = holders["devices"].value
    text = holders["json"].value
    price = holders["price"].value
    try:
        if on and devices:
            raise ValueError(f"--on={on} says how many devices; leave --devices out")
        if (text or price) and not on:
            flag = "--json" if text else "--price"
            raise ValueError(f"{flag} is about --on; give devices, such as --on=h100:8")
        if not math.isfinite(price):
            raise ValueError(f"--price is {price}; expected that of a device and hour, a number")
        path = new_file(text, "--json") if text else None
        if on:
            _, device, devices = estimate.parse(on)
        kind = device.backend if on else backend.current()
        with naming_memory(config), backend.planned(kind):
            run = abstract_run(config, devices or planned_devices(config))
            rows = report.describe(run, f"{run.mesh.size}, planned")
        print(
            "\n".join([report.titled(f"plan of {config.name}", rows), *report.warnings(run)]),
            flush=True,
        )
        with naming_memory(config):
            found = verdict(config, on, price) if on else {}
            for line in told(found) if on else _traced(run):
                print(line, flush=True)
        if path:
            write_json(path, found)
    except (ValueError, OSError) as error:
        cli.fail(error, 2)


def _traced(run: Run) -> Iterator[str]:
    """Yield a line for each program that was traced, and for what else is told of a run."""
    for name, out in trace(run).items():
        yield f"  traced the {name}: {out.dtype} {list(out.shape)}"
    config = run.config
    if config.streaming.window and config.streaming.mode == "progressive":
        shapes = windows.stream_shapes(run, config.streaming.window, progressive=True)
        size = report.bytes_of(shapes)
        yield f"  a checkpoint with streams in the middle takes {size / 2**20:,.0f} MiB more"


if __name__ == "__main__":
    given = {
        "config": cli.define(),
        "devices": flags.DEFINE_integer(
            "devices", None, "of the run; by default the recipe's", lower_bound=1
        ),
        "on": flags.DEFINE_string(
            "on", "", f"devices to run on, as h100:8 or v5e:4x4: {', '.join(estimate.DEVICES)}"
        ),
        "json": flags.DEFINE_string("json", None, "file to write the verdict of --on to"),
        "price": flags.DEFINE_float("price", 0.0, "of a device and hour", lower_bound=0.0),
    }
    flags.mark_flag_as_required("config")
    app.run(lambda _: main(given), flags_parser=cli.parse)
