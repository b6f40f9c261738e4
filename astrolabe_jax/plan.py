"""What a run would hold and do, from shapes alone: no weights, no prompts, no accelerator.

    python -m astrolabe_jax.plan --config=configs/self_forcing.py:hpsv3 [--devices=8]
    [--config.FIELD=VALUE ...]

The config is validated for so many devices. Every program of an epoch is traced with arrays that
have shapes but no content, on a mesh of devices that need not exist, and the shapes that come out
are checked. The memory is that of the opening summary: without activations.
"""

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from astrolabe_jax import encode, generate, report, segments, sharding, stream, update
from astrolabe_jax.config import piece, repeats, rounds, samples, validate, window_starts
from astrolabe_jax.convert import base as bases
from astrolabe_jax.convert.base import Base
from astrolabe_jax.convert.nets import make_config, sizes_of
from astrolabe_jax.convert.parts import PARTS, SIZES
from astrolabe_jax.decode import decode, decode_chunk
from astrolabe_jax.models.lora import adapter_shapes
from astrolabe_jax.prepare import Run, geometry, numerics, story_of
from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.rewards.panel import RewardRunner
from astrolabe_jax.runtime import cli


def abstract_run(config: ConfigDict, devices: int) -> Run:
    """The run of `config` on so many devices, with shapes in place of its arrays, and without
    prompts and directory.

    Raises ValueError or OSError as prepare.prepare does. Weights of rewards need not be there.
    """
    validate(config, rewards.TABLE, devices, jax.default_backend())
    parts = _sizes(config)
    layout, sampler, latent_shape = geometry(config, parts)
    mesh = sharding.abstract_mesh(config.mesh, devices)
    nets = {name: bases.shapes(name, sizes) for name, sizes in parts.items()}
    for name, net in nets.items():
        place = sharding.replicate if name == "vae" else sharding.shard_params
        nets[name] = net._replace(params=place(mesh, net.params))
    adapter = adapter_shapes(parts["transformer"], config.lora.rank, jnp.dtype(config.lora.dtype))
    base = Base(nets["transformer"], nets["vae"], nets["text_encoder"], None, "")
    starts = window_starts(config, parts["vae"].latent_frames(config.video.frames))
    panel = RewardRunner(
        rewards.planned(config.rewards, mesh), config.scoring.overlap, config.scoring.weights
    )
    return Run(
        config,
        Path(),
        {},
        base,
        layout,
        sampler,
        mesh,
        latent_shape,
        (),
        (),
        adapter,
        starts,
        panel,
    )


def _sizes(config: ConfigDict) -> dict[str, Any]:
    """The config of each part: of a published model, whose base need not be there, or as the base
    says.
    """
    chosen = numerics(config)
    if not config.model.size:
        return bases.configs(config.base, **chosen)
    return {
        part: make_config(PARTS[part], sizes_of(net), **chosen)
        for part, net in SIZES[config.model.size].items()
    }


def trace(run: Run) -> dict[str, Any]:
    """Traces every program of an epoch (those of an evaluation are among them): name -> shapes that
    come out.

    Raises ValueError if they are not those that the next stage expects.
    """
    config, mesh, text = run.config, run.mesh, run.base.text
    adapter = sharding.replicate(mesh, run.adapter)
    tokens = _shape(encode.call_size(mesh), text.config.text_len, dtype=jnp.int32)
    embeddings = jax.eval_shape(
        functools.partial(encode.embed, text.graphdef, mesh=mesh), text.params, tokens, tokens
    )
    prompt, width = embeddings.shape[1:], run.base.transformer.config.text_dim
    made = {"text encoder": (embeddings, (tokens.shape[0], text.config.text_len, width))}
    videos, history = (_streams if run.starts else _videos)(run, adapter, prompt)
    made |= videos
    state = jax.eval_shape(functools.partial(update.first_state, config), adapter)
    step = update.TrainStep(config, run.base.transformer.graphdef, run.layout, mesh)
    texts = _shape(config.prompts.prompts_per_epoch // repeats(config), *prompt)

    cut = (
        run.starts
        and config.streaming.sampling == "sequence"
        and config.streaming.backprop == "detach"
    )
    work = update.Work((0, config.streaming.window) if cut else None, 0)

    def take(state, params, texts, batch, history):
        return step(state, params, texts, batch, lambda *_: [work._replace(history=history)])

    after, metrics = jax.eval_shape(
        take, state, run.base.transformer.params, texts, _step_batch(run), history
    )
    after = jax.eval_shape(update.blend_old, after, _shape())
    made["train step"] = (
        metrics["sample_loss"],
        (samples(config) // config.optimizer.steps_per_pass,),
    )
    for name, (out, expected) in made.items():
        if out.shape != expected:
            raise ValueError(
                f"{name}: it gives {out.shape}, expected {expected}; this is a fault of the program"
            )
    if [(x.shape, x.dtype) for x in jax.tree.leaves(after)] != [
        (x.shape, x.dtype) for x in jax.tree.leaves(state)
    ]:
        raise ValueError(
            "train step: the state changes its shapes or dtypes; this is a fault of the program"
        )
    return {name: out for name, (out, _) in made.items()}


def _videos(
    run: Run, adapter: dict, prompt: tuple[int, ...]
) -> tuple[dict[str, tuple[Any, tuple[int, ...]]], None]:
    """What comes out where whole videos are sampled, and what is expected; the loss has no
    history.
    """
    config, mesh, vae, video = run.config, run.mesh, run.base.vae, run.config.video
    batch = piece(config, config.sampler.batch, mesh.size)
    sample = functools.partial(generate.sample, run)
    latents = jax.eval_shape(
        sample, run.base.transformer.params, adapter, _shape(batch, *prompt), _keys(batch)
    )
    draw = functools.partial(decode, vae.graphdef, chunk=video.decode_chunk, mesh=mesh)
    frames = jax.eval_shape(draw, vae.params, latents)
    shape = (batch, vae.config.pixel_frames(run.latent_shape[0]), video.height, video.width, 3)
    return {"rollout": (latents, (batch, *run.latent_shape)), "decoder": (frames, shape)}, None


def _streams(
    run: Run, adapter: dict, prompt: tuple[int, ...]
) -> tuple[dict[str, tuple[Any, tuple[int, ...]]], update.History | None]:
    """As `_videos`: of a block of the streams, of one of the videos behind them, and of its frames;
    and the history.

    Where every video is sampled from frame 0, the streams are those that an update goes along with.
    """
    config, video, mesh, latent = run.config, run.config.video, run.mesh, run.latent_shape[1:]
    clip, block = config.streaming.sampling == "clip", config.model.block
    seen = clip and config.streaming.reward != "window_alone"  # as they go on
    videos, learnt = (
        piece(config, batch, mesh.size)
        for batch in (config.sampler.batch, config.optimizer.microbatch)
    )
    count = rounds(config, mesh.size)[1] if clip else learnt
    step, chunk = story_of(config, run.layout, "a", block).steps[0], min(video.decode_chunk, block)

    def of_block(nets, adapter, embeddings, keys, streams):
        params, vae = nets
        transformer = run.base.transformer._replace(params=params)
        policy = segments.policy_of(
            run._replace(base=run.base._replace(transformer=transformer)), adapter
        )
        scale, graphdef = policy.lora_scale, policy.graphdef
        text = stream.encode_text(graphdef, params, adapter, scale, embeddings, mesh=mesh)
        latents, streams = segments.block(policy, text, keys, streams, step, latent)
        frames, memory = decode_chunk(
            run.base.vae.graphdef, vae, latents[:, :chunk], streams.vae, mesh=mesh
        )
        return latents, frames, streams._replace(vae=memory if seen else None)

    def sampled(number, streams):
        nets = run.base.transformer.params, run.base.vae.params
        return jax.eval_shape(
            of_block, nets, adapter, _shape(number, *prompt), _keys(number), streams
        )

    past, _, streams = sampled(count, jax.eval_shape(lambda: segments.begin(run, count)))
    if clip:
        begun = jax.eval_shape(
            lambda streams: segments.fork(run, streams, videos // count), streams
        )
    else:
        begun = jax.eval_shape(lambda: segments.begin(run, videos))
    latents, frames, _ = sampled(videos, begun)
    pixels = run.base.vae.config.temporal_stride * chunk
    # the first latent frame of a video is one pixel's
    pixels -= 0 if seen else run.base.vae.config.temporal_stride - 1
    made = {
        "past": (past, (count, block, *latent)),
        "rollout": (latents, (videos, block, *latent)),
        "decoder": (frames, (videos, pixels, video.height, video.width, 3)),
    }
    return made, _history(run, streams)


def _history(run: Run, streams: segments.Streams) -> update.History | None:
    """What the loss reads of these streams, at the last start."""
    streaming, start = run.config.streaming, max(run.starts)
    history = update.History(_shape(dtype=jnp.int32), _shape(streaming.window, dtype=jnp.int32))
    if streaming.backprop == "full":
        whole = _shape(streams.first.shape[0], start, *run.latent_shape[1:])
        return history._replace(whole=whole) if start and streaming.sampling == "clip" else None
    if streaming.prefix == "rollout_old":
        return history._replace(cache=streams.cache)
    return history._replace(first=streams.first, recent=streams.recent)


def _step_batch(run: Run) -> update.Batch:
    """The samples of the first optimizer step."""
    whole = update.plan_pass(run.config, 0, 0, np.ones(samples(run.config), bool), run.mesh.size)
    shape = update.cut(run.config, whole, run.mesh.size).order.shape[1:]
    numbers, indices = _shape(*shape), _shape(*shape, dtype=jnp.int32)
    clip = run.starts and run.config.streaming.sampling == "clip"
    frames = run.config.streaming.window if clip else run.latent_shape[0]
    return update.Batch(
        _shape(*shape, frames, *run.latent_shape[1:]),
        numbers,
        numbers,
        indices,
        numbers,
        _keys(*shape),
    )


def _shape(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _keys(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), sizes))


def planned_devices(config: ConfigDict) -> int:
    """The devices that a recipe's batches were published for; without such a number, those of this
    machine.
    """
    limit = config.mesh.samples_per_device
    return jax.device_count() if limit == -1 else max(config.sampler.batch // limit, 1)


def main(argv: list[str], config: flags.FlagHolder, devices: flags.FlagHolder) -> None:
    """Prints the opening summary of the run and what was traced; status 2 if it cannot be."""
    if len(argv) > 1:
        cli.fail(f"unexpected argument {argv[1]!r}; flags start with --", 2)
    cli.set_up()
    config = config.value
    try:
        run = abstract_run(config, devices.value or planned_devices(config))
        rows = report.describe(run, f"{run.mesh.size}, planned")
        print(
            "\n".join([report.titled(f"plan of {config.name}", rows), *report.warnings(run)]),
            flush=True,
        )
        for name, out in trace(run).items():
            print(f"  traced the {name}: {out.dtype} {list(out.shape)}", flush=True)
        if config.streaming.window and config.streaming.mode == "progressive":
            held = jax.tree.leaves(segments.shapes(run, config.streaming.window, progressive=True))
            size = sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in held)
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
    app.run(lambda argv: main(argv, *given), flags_parser=cli.parse)
