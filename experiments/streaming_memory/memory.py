"""Peak memory of the programs of a streaming epoch, compiled from shapes alone for a device that
need not be there.

    python -m experiments.streaming_memory.memory --target=h200 --cells=clip_detach:39
    python -m experiments.streaming_memory.memory --stored    # bytes a sample leaves for the update

The model is LongLive's 1.3B at 480x832, bfloat16, with remat and windows of 21 latent frames; a
device has one prompt with 24 candidates and works on one at a time. With --model=shipped it is the
base of the moving-shapes world, which compiles in seconds. A cell is VARIANT:START; variants are
those of Table 4a (docs/streaming.md, Variants).

--target: here; h200, with jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cudnn-cu13 on the path; or
a TPU's topology as v5p:2x2x1, with TPU_LIBRARY_PATH (README.md). With --target=here --run each
program also runs, on random numbers.
"""

import contextlib
import functools
import importlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from ml_collections import ConfigDict

from astrolabe_jax import plan, rollout, sharding, update
from astrolabe_jax.arithmetic import piece
from astrolabe_jax.decode import decode_chunk
from astrolabe_jax.models.wan import cache as kv
from astrolabe_jax.run import Run
from astrolabe_jax.runtime import backend, cli
from astrolabe_jax.streaming import windows
from astrolabe_jax.types import Place, PrefixContext
from configs import longlive, moving_shapes_long

VARIANTS = {  # streaming.sampling, streaming.backprop
    "clip_detach": ("clip", "detach"),
    "seq_detach": ("sequence", "detach"),
    "clip_fullbp": ("clip", "full"),
    "seq_fullbp": ("sequence", "full"),
}
_CELL = re.compile(rf"({'|'.join(VARIANTS)}):\d+")
PROGRAMS = ("block", "decoder", "update")
SIZES = {
    "lora.init": "",
    "streaming.selection": "choices",
    "prompts.prompts_per_epoch": 1,
    "prompts.samples_per_prompt": 24,
    "sampler.batch": 24,
    "optimizer.microbatch": 24,
    "mesh.samples_per_device": 1,
}


class Call(NamedTuple):
    """A jitted function and what to call it with: shapes, after what is static."""

    function: Any
    arguments: tuple
    static: tuple = ()

    def lower(self):
        return self.function.lower(*self.static, *self.arguments)


class Execution(NamedTuple):
    """What a program took on the device that is here."""

    seconds: float  # the least of several calls
    # bytes that this process has had on the device at most; 0 where the device does not count
    peak: int


class Program(NamedTuple):
    """Memory of a compiled program, in bytes."""

    temporaries: int
    arguments: int
    fresh: int  # outputs that do not take an argument's place
    seconds: float  # of tracing and compiling
    execution: Execution | None = None


class Peak(NamedTuple):
    """Bytes on the device while a program runs."""

    held: int  # arrays that are there anyway: nets, policies, optimizer, gradient, latents, pasts
    program: Program

    @property
    def total(self) -> int:
        return self.held + self.program.temporaries + self.program.fresh


def setting(variant: str, start: int, config: ConfigDict | None = None) -> ConfigDict:
    """The config of a cell, from `config` (LongLive's streaming run if None)."""
    config = longlive.get_config("streaming") if config is None else config
    config.update_from_flattened_dict(SIZES)
    config.streaming.starts = (start,)
    config.streaming.sampling, config.streaming.backprop = VARIANTS[variant]
    return config


def shipped(start: int) -> ConfigDict:
    """The embedded world's long videos with windows like the 1.3B's, for `setting`."""
    config = moving_shapes_long.get_config()
    config.model.remat = True
    config.optimizer.steps_per_pass = 1
    config.streaming.window, config.streaming.score_frames, config.streaming.prompts_per_device = (
        21,
        0,
        1,
    )
    config.video.frames = 4 * (start + 20) + 1
    return config


def measure(
    config: ConfigDict, target: str, only: tuple[str, ...] = (), execute: bool = False
) -> dict[str, Peak]:
    """Return the peak of each program, at the single start of `config`.

    Args:
      target: of the compiler, see above.
      only: these programs, or all.
      execute: also run them.
    """
    peaks = {}
    with compiling_for(target) as devices:
        run = plan.abstract_run(config, 1)
        run = run._replace(mesh=sharding.make_mesh(config.mesh, devices))
        held = held_bytes(run)
        with jax.set_mesh(run.mesh):
            for name, call in programs(run).items():
                if name in (only or (name,)):
                    phase = "update" if name == "update" else "sampling"
                    start = config.streaming.starts[0] if execute else None
                    peaks[name] = Peak(held[phase], compiled(call, start))
    return peaks


@contextlib.contextmanager
def compiling_for(target: str, count: int = 1) -> Iterator[list[Any]]:
    """The devices that are compiled for; within, the library chooses what it would choose there.

    Raises ValueError for a target that is unknown, or whose compiler is not installed.
    """
    if target == "here":
        yield jax.devices()[:count]
        return
    try:
        if target == "h200":
            importlib.import_module("jax_plugins.xla_cuda13")  # registers the platform
            config = (Path(__file__).parent / "h200.txtpb").read_text()
            kind = "gpu"
            given = {"platform": "cuda", "topology_name": "", "target_config": config}
            given["topology"] = "1x1x1"
        else:
            kind = "tpu"
            given = {"platform": "tpu", "topology_name": target}
        devices = topologies.get_topology_desc(**given).devices[:count]
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"--target={target}: {error}; expected here, h200 (with jax[cuda13]) or the topology "
            "of a TPU such as v5e:2x2 (with libtpu)"
        ) from None
    with backend.planned(kind):
        yield devices


def programs(run: Run) -> dict[str, Call]:
    """Return the programs that work on a piece of an epoch's videos, by name."""
    mesh = run.mesh
    net = run.base.transformer
    vae = run.base.vae
    latent = run.latent_shape[1:]
    count = piece(run.config, run.config.sampler.batch, 1)
    block = run.layout.block
    policy = run.policy(run.adapter)
    embeddings = _shape(count, run.base.text.config.text_len, net.config.text_dim)
    text = jax.eval_shape(rollout.encode_text, policy, embeddings)
    noise = _shape(len(run.sampler.steps), count, block, *latent)
    place = Place(_number(), _shape(block, dtype=jnp.int32), aligned=True, partial=True)
    sample = (policy, text, noise, _cache(run, count), place)
    memory = windows.stream_shapes(run, block, progressive=True).decoder
    decode = (vae.params, _shape(count, run.config.video.decode_chunk, *latent), memory)
    step = update.TrainStep(run.config, net.graphdef, run.layout, mesh)
    return {
        # A past's block and a candidate's: one program where the past of one prompt and one
        # candidate are made at once.
        "block": Call(rollout.sample_block, sharding.replicate(mesh, sample)),
        "decoder": Call(decode_chunk, sharding.replicate(mesh, decode), (vae.graphdef,)),
        "update": Call(step.accumulate, sharding.replicate(mesh, step_arguments(run))),
    }


def step_arguments(run: Run) -> tuple:
    """Return the shapes of the arguments of update.TrainStep.accumulate."""
    config = run.config
    net = run.base.transformer
    state = jax.eval_shape(functools.partial(update.first_state, config), run.adapter)
    size = piece(config, config.optimizer.microbatch, 1)
    number = config.optimizer.microbatch // size
    cut = config.streaming.backprop == "detach"
    frames = config.streaming.window if cut else kept_frames(run)
    batch = update.StepBatch(
        latents=_shape(number, size, frames, *run.latent_shape[1:]),
        r=_shape(number, size),
        kl_weight=_shape(number, size),
        prompt=_shape(number, size, dtype=jnp.int32),
        t=_shape(number, size),
        key=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), (number, size))),
    )
    text_len = run.base.text.config.text_len
    text = _shape(config.prompts.prompts_per_epoch, text_len, net.config.text_dim)
    scalars = update.Scalars(*(_shape() for _ in update.Scalars._fields))
    part = update.PartArrays(_number(), None, None, prefix_context(run), scalars)
    if cut and config.streaming.sampling == "sequence":
        part = part._replace(number=_number(), share=_shape())
    gradient = jax.tree.map(lambda leaf: _shape(*leaf.shape), run.adapter)
    return gradient, state, net.params, text, batch, part


def prefix_context(run: Run) -> PrefixContext | None:
    """Return the shapes of what the loss reads of the past."""
    streaming = run.config.streaming
    (start,) = streaming.starts
    context = PrefixContext(_number(), _shape(streaming.window, dtype=jnp.int32))
    if streaming.backprop == "detach":
        return context._replace(cache=_cache(run, 1))
    if streaming.sampling == "sequence" or not start:
        return None
    return context._replace(whole=_shape(1, start, *run.latent_shape[1:]))


def held_bytes(run: Run) -> dict[str, int]:
    """What is on the device in each phase while a program runs, its own temporaries and outputs
    apart.
    """
    config = run.config
    nets = [net.params for net in (run.base.transformer, run.base.vae, run.base.text)]
    state = jax.eval_shape(functools.partial(update.first_state, config), run.adapter)
    latents = (
        4
        * config.prompts.prompts_per_epoch
        * config.prompts.samples_per_prompt
        * kept_frames(run)
        * np.prod(run.latent_shape[1:])
    )
    # a stream, with the decoder's memory
    one = size_of(windows.stream_shapes(run, run.layout.block, progressive=True))
    # twice: in pieces and sorted, then sorted and dealt to a step
    always = size_of((nets, state)) + 2 * int(latents)
    streams = 2 if config.streaming.sampling == "clip" else 1  # the past, and the one that is made
    gradient = size_of(jax.tree.map(lambda leaf: _shape(*leaf.shape), run.adapter))
    return {
        "sampling": always + streams * one,
        "update": always + gradient + size_of(prefix_context(run)),
    }


def kept_frames(run: Run) -> int:
    """Latent frames that the epoch keeps of each video."""
    (start,), window = run.config.streaming.starts, run.config.streaming.window
    return start + window if run.config.streaming.sampling == "sequence" else window


def stored(run: Run) -> dict[str, int]:
    """Bytes that a sample of the window leaves for the update, here and where likelihoods of steps
    are trained.
    """
    steps, window = len(run.sampler.steps), run.config.streaming.window
    latents = 4 * window * int(np.prod(run.latent_shape[1:]))
    frame = size_of(_cache(run, 1)) // run.layout.capacity
    keys = size_of(jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))))
    return {
        "NFT: clean latents": latents,
        "NFT: r, KL mask, prompt, key of the noise": 4 + 1 + 4 + keys,
        "trajectory: x_t of every step, clean latents": (steps + 1) * latents,
        "trajectory: log-probability of every step of every block": 4
        * steps
        * window
        // run.layout.block,
        "trajectory: clean keys and values of the window, where they are kept": window * frame,
        "trajectory: the same of every step": (steps + 1) * window * frame,
    }


def compiled(call: Call, start: int | None = None) -> Program:
    """The compiler's own figures; where `start` is given also the device's, with that place."""
    began = time.monotonic()
    program = call.lower().compile()
    seconds, found = time.monotonic() - began, program.memory_analysis()
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    ran = None if start is None else executed(program, call.arguments, start)
    return Program(found.temp_size_in_bytes, found.argument_size_in_bytes, fresh, seconds, ran)


def executed(program: Any, shapes: tuple, start: int, times: int = 3) -> Execution:
    """Calls it behind `start` frames, 1 + `times` times; donated arguments are made anew."""
    fill = functools.partial(filled, start)
    arguments, seconds = jax.tree_util.tree_map_with_path(fill, shapes), []
    for _ in range(1 + times):
        arguments = jax.tree_util.tree_map_with_path(
            lambda path, shape, leaf: fill(path, shape) if leaf.is_deleted() else leaf,
            shapes,
            arguments,
        )
        jax.block_until_ready(arguments)
        began = time.monotonic()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.monotonic() - began)
    return Execution(
        min(seconds[1:]), (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    )


def filled(start: int, path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Return an argument of that shape: small random numbers, and zeros of integers.

    Where a block or a window stands (types.Place, types.PrefixContext) it is behind `start` frames:
    at frame 0 there would be nothing in sight.
    """
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return _normal(leaf.shape, leaf.dtype, leaf.sharding)
    here = getattr(path[-1], "name", "") in ("start", "positions")
    numbers = start + np.arange(leaf.size).reshape(leaf.shape) if here else np.zeros(leaf.shape)
    return jnp.asarray(numbers, leaf.dtype, device=leaf.sharding)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _normal(shape: tuple[int, ...], dtype: Any, where: Any) -> jax.Array:
    made = jax.random.normal(jax.random.key(0), shape, dtype) * jnp.asarray(0.02, dtype)
    return made if where is None else jax.lax.with_sharding_constraint(made, where)


def size_of(tree: Any) -> int:
    """Bytes of arrays or shapes."""
    leaves = [
        leaf
        for leaf in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _number() -> jax.ShapeDtypeStruct:
    return _shape(dtype=jnp.int32)


def _cache(run: Run, count: int) -> kv.Cache:
    slots, latent_hw = run.layout.capacity, tuple(run.latent_shape[2:])
    return jax.eval_shape(
        lambda: kv.empty_cache(run.base.transformer.config, count, slots, latent_hw)
    )


def main(argv: list[str]) -> None:
    """Print a line for each cell and program, in GiB; in MiB for the shipped model."""
    values = flags.FLAGS
    if values.run and values.target != "here":
        cli.fail(
            f"--run runs on the device that is here, not on {values.target}; give --target=here", 2
        )
    try:
        if values.stored:
            for name, size in stored(plan.abstract_run(setting("clip_detach", 39), 1)).items():
                print(f"{name:72} {size / 2**20:12,.6g} MiB")
            return
        for cell in values.cells:
            _tell(cell, values)
    except (ValueError, OSError) as error:
        cli.fail(error, 2)


def _tell(cell: str, values: flags.FlagValues) -> None:
    """Print a line for each program of a cell."""
    unit = 20 if values.model == "shipped" else 30
    variant, start = cell.split(":")
    config = shipped(int(start)) if values.model == "shipped" else None
    config = setting(variant, int(start), config)
    config.model.attention = values.attention
    peaks = measure(config, values.target, tuple(values.programs), values.run)
    for name, peak in peaks.items():
        program = peak.program
        sizes = (peak.held, program.arguments, program.temporaries, program.fresh, peak.total)
        row = "  ".join(f"{size / 2**unit:7.2f}" for size in sizes) + f"  {program.seconds:6.0f} s"
        if ran := program.execution:
            row += f"  ran: {ran.seconds:.3f} s, {ran.peak / 2**unit:.2f}"
        print(f"{values.target} {variant:12} {start:>4} {name:8} {row}", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("target", "here", "here, h200, or the name of a TPU's topology")
    flags.DEFINE_enum("model", "longlive", ["longlive", "shipped"], "whose programs")
    flags.DEFINE_list("cells", ["clip_detach:39"], "VARIANT:START, ...")
    flags.DEFINE_list("programs", [], "block, decoder, update; all by default")
    flags.DEFINE_string("attention", "auto", "model.attention: auto takes what the target has")
    flags.DEFINE_bool("run", False, "also run what is compiled, on the device that is here")
    flags.DEFINE_bool("stored", False, "instead, the bytes that a sample leaves for the update")

    flags.register_validator(
        "cells",
        lambda cells: all(map(_CELL.fullmatch, cells)),
        f"expected VARIANT:START, ...; a variant is one of {', '.join(VARIANTS)}",
    )
    flags.register_validator(
        "programs",
        lambda names: set(names) <= set(PROGRAMS),
        f"expected some of {', '.join(PROGRAMS)}",
    )
    app.run(main, flags_parser=cli.parse)
