"""What a run would hold and do, from shapes alone: no weights, no prompts, no accelerator.

    python -m astrolabe_jax.plan --config=configs/self_forcing.py:hpsv3 [--devices=8] [--config.FIELD=VALUE ...]

The config is validated for so many devices. Every program of an epoch is traced with arrays that have shapes but no
content, on a mesh of devices that need not exist, and the shapes that come out are checked. The memory is that of the
opening summary: without activations.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from astrolabe_jax import encode, generate, published, recipes, report, rewards, sharding, update
from astrolabe_jax.config import piece, repeats, samples, validate, window_starts
from astrolabe_jax.convert import base as bases
from astrolabe_jax.convert.base import Base
from astrolabe_jax.convert.parts import SIZES, make_config, sizes_of
from astrolabe_jax.decode import decode
from astrolabe_jax.models.lora import adapter_shapes
from astrolabe_jax.prepare import Run, geometry, numerics


def abstract_run(config: ConfigDict, devices: int) -> Run:
    """The run of `config` on so many devices, with shapes in place of its arrays, and without prompts and directory.

    Raises ValueError or OSError as prepare.prepare does, but takes the published rewards that are still to come.
    """
    validate(config, {*rewards.TABLE, *published.REWARDS}, devices, jax.default_backend())
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
    return Run(config, Path(), {}, base, layout, sampler, mesh, latent_shape, (), (), adapter, starts)


def _sizes(config: ConfigDict) -> dict[str, Any]:
    """The config of each part: of a published model, whose base need not be there, or as the base says."""
    chosen = numerics(config)
    if not config.model.size:
        return bases.configs(config.base, **chosen)
    return {part: make_config(part, sizes_of(net), **chosen) for part, net in SIZES[config.model.size].items()}


def trace(run: Run) -> dict[str, Any]:
    """Traces every program of an epoch (those of an evaluation are among them): name -> shapes that come out.

    Raises ValueError if they are not those that the next stage expects.
    """
    config, mesh, text, vae, video = run.config, run.mesh, run.base.text, run.base.vae, run.config.video
    net, adapter = run.base.transformer, sharding.replicate(mesh, run.adapter)
    tokens = _shape(encode.call_size(mesh), text.config.text_len, dtype=jnp.int32)
    embeddings = jax.eval_shape(functools.partial(encode.embed, text.graphdef, mesh=mesh), text.params, tokens, tokens)
    batch, prompt = piece(config, config.sampler.batch, mesh.size), embeddings.shape[1:]
    latents = jax.eval_shape(
        functools.partial(generate.sample, run), net.params, adapter, _shape(batch, *prompt), _keys(batch)
    )
    draw = functools.partial(decode, vae.graphdef, chunk=video.decode_chunk, mesh=mesh)
    frames = jax.eval_shape(draw, vae.params, latents)
    state = jax.eval_shape(functools.partial(update.first_state, config), adapter)
    step = update.TrainStep(config, net.graphdef, run.layout, mesh)
    texts = _shape(config.prompts.groups // repeats(config), *prompt)
    after, metrics = jax.eval_shape(step, state, net.params, texts, _step_batch(run))
    after = jax.eval_shape(update.blend_old, after, _shape())
    made = {
        "text encoder": (embeddings, (tokens.shape[0], text.config.text_len, net.config.text_dim)),
        "rollout": (latents, (batch, *run.latent_shape)),
        "decoder": (frames, (batch, vae.config.pixel_frames(run.latent_shape[0]), video.height, video.width, 3)),
        "train step": (metrics["sample_loss"], (samples(config) // config.optimiser.steps_per_pass,)),
    }
    for name, (out, expected) in made.items():
        if out.shape != expected:
            raise ValueError(f"{name}: it gives {out.shape}, expected {expected}; this is a fault of the program")
    if [(x.shape, x.dtype) for x in jax.tree.leaves(after)] != [(x.shape, x.dtype) for x in jax.tree.leaves(state)]:
        raise ValueError("train step: the state changes its shapes or dtypes; this is a fault of the program")
    return {name: out for name, (out, _) in made.items()}


def _step_batch(run: Run) -> update.Batch:
    """The samples of the first optimiser step."""
    whole = update.plan_pass(run.config, 0, 0, np.ones(samples(run.config), bool))
    shape = update.cut(run.config, whole, run.mesh.size).order.shape[1:]
    numbers, indices = _shape(*shape), _shape(*shape, dtype=jnp.int32)
    frames = run.config.streaming.window or run.latent_shape[0]
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
    """The devices that a recipe's batches were published for; without such a number, those of this machine."""
    limit = config.mesh.samples_per_device
    return jax.device_count() if limit == -1 else max(config.sampler.batch // limit, 1)


def main(argv: list[str], config: flags.FlagHolder, devices: flags.FlagHolder) -> None:
    """Prints the opening summary of the run and what was traced; status 2 if it cannot be."""
    if len(argv) > 1:
        recipes.fail(f"unexpected argument {argv[1]!r}; flags start with --", 2)
    recipes.set_up()
    config = config.value
    try:
        run = abstract_run(config, devices.value or planned_devices(config))
        rows = report.describe(run, f"{run.mesh.size}, planned")
        print("\n".join([report.titled(f"plan of {config.name}", rows), *report.warnings(run)]), flush=True)
        for name, out in trace(run).items():
            print(f"  traced the {name}: {out.dtype} {list(out.shape)}", flush=True)
    except (ValueError, OSError) as error:
        recipes.fail(error, 2)


if __name__ == "__main__":
    given = (
        recipes.define(),
        flags.DEFINE_integer("devices", None, "of the run; by default the recipe's", lower_bound=1),
    )
    flags.mark_flag_as_required("config")
    app.run(lambda argv: main(argv, *given), flags_parser=recipes.parse)
