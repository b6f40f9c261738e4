"""What a run would hold and do, from shapes alone: no weights, no prompts, no accelerator.

    python -m astrolabe_jax.plan --config=configs/self_forcing.py:hpsv3 [--devices=8]
    [--config.FIELD=VALUE ...]

The config is validated for so many devices. Every program of an epoch is traced with arrays that
have shapes but no content, on a mesh of devices that need not exist, and the shapes that come out
are checked. The memory is that of the opening summary: without activations.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from astrolabe_jax import encode, minibatches, report, sharding, update
from astrolabe_jax.arithmetic import piece, repeats, rounds, samples, shares_prefix, window_starts
from astrolabe_jax.config_checks import validate
from astrolabe_jax.convert import base as bases
from astrolabe_jax.convert.nets import make_config, sizes_of
from astrolabe_jax.convert.parts import PARTS, SIZES
from astrolabe_jax.decode import decode_video
from astrolabe_jax.geometry import geometry_of, numerics
from astrolabe_jax.models.lora import adapter_shapes
from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.rewards.panel import RewardRunner
from astrolabe_jax.run import Run, timeline_of
from astrolabe_jax.runtime import cli
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
    validate(config, rewards.TABLE, devices, jax.default_backend())
    chosen = numerics(config)
    if config.model.size:
        parts = {
            part: make_config(PARTS[part], sizes_of(net), **chosen)
            for part, net in SIZES[config.model.size].items()
        }
    else:
        parts = bases.configs(config.base, **chosen)
    layout, sampler, latent_shape = geometry_of(config, parts)
    mesh = sharding.abstract_mesh(config.mesh, devices)
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
        outputs = [output for program in programs(run) for output in program.outputs.items()]
    for name, (output, expected) in outputs:
        if output.shape != expected:
            raise ValueError(
                f"{name}: it gives {output.shape}, expected {expected}; this is a fault of the "
                "program"
            )
    return {name: output for name, (output, _) in outputs}


def programs(run: Run) -> Iterator[Program]:
    """Yield every program of an epoch; to be called under the run's mesh."""
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
    yield _step(run, adapter, prompt, prefix)


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
    run: Run, adapter: dict, prompt: tuple[int, ...], prefix: PrefixContext | None
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

    arguments = (
        state,
        run.base.transformer.params,
        _shape(config.prompts.prompts_per_epoch // repeats(config), *prompt),
        _step_batch(run),
        prefix,
    )
    after, metrics = jax.eval_shape(take, *arguments)
    after = jax.eval_shape(update.blend_old, after, _shape())
    before = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    if [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)] != before:
        raise ValueError(
            "train step: the state changes its shapes or dtypes; this is a fault of the program"
        )
    expected = (samples(config) // config.optimizer.steps_per_pass,)
    return Program(take, arguments, {"train step": (metrics["sample_loss"], expected)})


def _step_batch(run: Run) -> update.StepBatch:
    """Return the shapes of the samples of the first optimizer step."""
    plan = minibatches.plan_pass(
        run.config, 0, 0, np.ones(samples(run.config), bool), run.mesh.size
    )
    shape = minibatches.cut(run.config, plan, run.mesh.size).order.shape[1:]
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
    """Return the first line of the error, or of one behind it, that tells of too little memory."""
    while error is not None:
        text = str(error) or type(error).__name__
        on_disk = "error writing" in text.lower()  # tensorstore calls a full disk so, too
        short = any(word in text.lower() for word in _SHORTAGES) and not on_disk
        if isinstance(error, MemoryError) or short:
            return text.splitlines()[0][:200]
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


def main(recipe: flags.FlagHolder, devices: flags.FlagHolder) -> None:
    """Print the opening summary of the run and what was traced; status 2 if it cannot be."""
    cli.set_up()
    config = recipe.value
    try:
        with naming_memory(config):
            run = abstract_run(config, devices.value or planned_devices(config))
        rows = report.describe(run, f"{run.mesh.size}, planned")
        print(
            "\n".join([report.titled(f"plan of {config.name}", rows), *report.warnings(run)]),
            flush=True,
        )
        with naming_memory(config):
            traced = trace(run)
        for name, out in traced.items():
            print(f"  traced the {name}: {out.dtype} {list(out.shape)}", flush=True)
        if config.streaming.window and config.streaming.mode == "progressive":
            size = report.bytes_of(
                windows.stream_shapes(run, config.streaming.window, progressive=True)
            )
            print(
                f"  a checkpoint with streams in the middle takes {size / 2**20:,.0f} MiB more",
                flush=True,
            )
    except (ValueError, OSError) as error:
        cli.fail(error, 2)


if __name__ == "__main__":
    given = (
        cli.define(),
        flags.DEFINE_integer("devices", None, "of the run; by default the recipe's", lower_bound=1),
    )
    flags.mark_flag_as_required("config")
    app.run(lambda _: main(*given), flags_parser=cli.parse)
