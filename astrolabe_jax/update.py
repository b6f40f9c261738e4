"""Stage update: an epoch's samples -> optimiser steps on the adapter `current`.

Every policy is an adapter over one frozen base. A step noises each sample to one level, predicts its clean latent with
`current`, `old` and `reference` from the same x_t, and accumulates the gradient of losses.py over microbatches. All
draws derive from (seed, epoch, pass) and from one key per sample, so that a sample's noise does not depend on the
microbatch it is in. Section numbers are those of spec/objective.md.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from astrolabe_jax import losses, sharding
from astrolabe_jax.config import piece
from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.schedule import T_MAX, Schedule, add_noise, sigma_of, velocity_to_x0, warp
from astrolabe_jax.types import Purpose

CLIP_EPSILON = 1e-6  # added to the gradient norm it divides by, as torch does


class TrainState(NamedTuple):
    """What training changes: adapter trees (models/lora.py) in config.lora.dtype, the optimiser, and its step count."""

    current: dict  # theta, trained
    old: dict  # behaviour policy: samples, and supplies the loss's second prediction
    reference: dict  # what the KL keeps `current` close to
    ema: dict  # average of `current` for evaluation
    optimiser: Any
    step: jax.Array  # [] int32, optimiser steps taken


class Samples(NamedTuple):
    """An epoch's N samples: stages `rollout` and `advantages` -> `update`."""

    latents: jax.Array  # [N, F, C, H, W] clean, any float dtype
    r: np.ndarray  # [N] optimality in [0, 1]
    mask: np.ndarray  # [N] bool, samples that the KL restrains; all of them unless kl.kind is 'selective'
    prompt: np.ndarray  # [N] int32, each sample's row of `text`
    key: jax.Array  # [N] keys of this epoch's noise
    text: jax.Array  # [G, S, E] embeddings


class Batch(NamedTuple):
    """The samples of one optimiser step as m microbatches, or pieces of them, of B."""

    latents: jax.Array  # [m, B, F, C, H, W]
    r: jax.Array  # [m, B]
    kl_weight: jax.Array  # [m, B], see losses.kl_weights
    prompt: jax.Array  # [m, B] int32
    t: jax.Array  # [m, B] float32 timestep in [0, 1000]
    key: jax.Array  # [m, B]


@dataclasses.dataclass(frozen=True)
class Forward:
    """The training forward of one policy over a whole video (spec/model.md 7).

    context 'clean': earlier blocks are read from the policy's own clean stream at timestep `context_noise`, without
    gradient, so that the forward equals the rollout; 'noisy': they are read at the level of the query, as published.
    """

    graphdef: Any
    layout: Layout  # of the training mask
    lora_scale: float  # alpha / R
    context: str = "clean"
    context_noise: float = 0.0

    def velocity(self, params, adapter, text, x0, x_t, t) -> jax.Array:
        """Velocities like x_t [B, F, C, H, W]. text [B, S, E]; x0 the clean latents; t [B], the same for all frames."""
        model = merge(self.graphdef, params)
        text = model.encode_text(text, adapter, self.lora_scale)
        context = None
        # The last block is nobody's past; a video of one block has no context.
        past = self.layout.blocks(x0.shape[1])[-1].start
        if self.context == "clean" and past:
            adapter_, text_ = jax.lax.stop_gradient((adapter, text))
            context = model.context(
                x0[:, :past], text_, adapter_, self.lora_scale, layout=self.layout, t=self.context_noise
            )
        t = jnp.broadcast_to(t[:, None], x_t.shape[:2])
        return model(x_t, t, text, adapter, self.lora_scale, layout=self.layout, context=context)


def training_layout(config: ConfigDict, layout: Layout) -> Layout:
    """The layout of the training mask that `config` asks for, for a model that samples with `layout`."""
    loss = config.loss
    block = layout.block if loss.mask_block == -1 else loss.mask_block
    return dataclasses.replace(layout, block=block, sink=layout.sink if loss.mask_sink else 0)


def training_forward(config: ConfigDict, graphdef: Any, layout: Layout) -> Forward:
    """The forward that `config` asks for, for a model that samples with `layout`."""
    mask, scale = training_layout(config, layout), config.lora.alpha / config.lora.rank
    return Forward(graphdef, mask, scale, config.loss.context, config.sampler.context_noise)


def make_optimiser(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW of config.optimiser with a constant rate and decoupled decay (section 9); clipping is in the train step."""
    settings = config.optimiser
    return optax.adamw(
        settings.learning_rate, settings.b1, settings.b2, settings.eps, weight_decay=settings.weight_decay
    )


def init_state(config: ConfigDict, adapter: dict, mesh: Mesh) -> TrainState:
    """The state before the first epoch, on the mesh. Every policy has buffers of its own."""
    return sharding.replicate(mesh, first_state(config, jax.tree.map(np.asarray, adapter)))


def first_state(config: ConfigDict, adapter: dict) -> TrainState:
    """Every policy is the starting adapter; may be traced."""
    adapter = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(config.lora.dtype)), adapter)
    return TrainState(adapter, adapter, adapter, adapter, make_optimiser(config).init(adapter), np.zeros((), np.int32))


def standard_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Noise of one sample from its key."""
    return jax.random.normal(key, shape, jnp.float32)


def make_train_step(
    config: ConfigDict,
    graphdef: Any,
    layout: Layout,
    mesh: Mesh,
    noise: Callable[[jax.Array, tuple[int, ...]], jax.Array] = standard_normal,
) -> Callable:
    """One optimiser step, jitted: (state, params, text [G, S, E], batch: Batch) -> (state, metrics); state is donated.

    layout: of the rollout. noise(key, (F, C, H, W)) draws one sample's noise.

    metrics: the means of `sample_terms` over the step under the names of section 2, `grad_norm` before clipping,
    `adapter_norm` of the new `current`, and `sample_loss` [m B]. If any of these is not finite, the returned state
    equals the given one.
    """
    forward, optimiser = training_forward(config, graphdef, layout), make_optimiser(config)
    terms_of = partial(sample_terms, config, forward, noise)

    def step(state: TrainState, params, text, batch: Batch):
        count = batch.r.size

        def objective(current, micro):
            terms = terms_of(state._replace(current=current), params, text, micro)
            return terms["total_loss"].sum() / count, terms

        def accumulate(total, micro):
            grads, terms = jax.grad(objective, has_aux=True)(state.current, micro)
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, grads), terms

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), state.current)
        grads, terms = jax.lax.scan(accumulate, zeros, batch)
        norm = optax.tree.norm(grads)
        sample_loss = terms["total_loss"].reshape(-1)
        new = apply_gradient(config, optimiser, state, grads, norm)
        moved = optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), new.current))
        metrics = {name: values.mean() for name, values in terms.items()} | {"grad_norm": norm, "adapter_norm": moved}
        finite = jnp.isfinite(norm) & jnp.isfinite(moved) & jnp.isfinite(sample_loss).all()
        state = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        return state, metrics | {"sample_loss": sample_loss}

    return jax.jit(sharding.on_mesh(mesh, step), donate_argnums=0, out_shardings=sharding.replicated(mesh))


def sample_terms(
    config: ConfigDict, forward: Forward, noise: Callable, state: TrainState, params, text, micro: Batch
) -> dict[str, jax.Array]:
    """losses.objective of one microbatch (Batch without its first axis): {name: [B]}, float32."""
    loss, schedule = config.loss, Schedule(shift=config.sampler.shift)
    x0 = micro.latents.astype(jnp.float32)
    eps = jax.vmap(lambda key: noise(key, x0.shape[1:]))(micro.key)
    x_t = add_noise(x0, eps, micro.t / T_MAX)
    sigma = sigma_of(micro.t, schedule, config.sampler.sigma_source)
    text = text[micro.prompt]

    def predict(adapter):
        velocity = forward.velocity(params, adapter, text, x0, x_t, micro.t)
        return velocity_to_x0(x_t, velocity, sigma) if loss.kind == "astrolabe" else velocity

    old, reference = (predict(jax.lax.stop_gradient(adapter)) for adapter in (state.old, state.reference))
    return losses.objective(
        loss.kind, x0, predict(state.current), old, reference, micro.r, micro.kl_weight, beta=loss.mix_beta,
        kl_lambda=loss.kl_weight, x_t=x_t, sigma=sigma, clip_max=config.advantages.clip,
    )  # fmt: skip


def apply_gradient(
    config: ConfigDict, optimiser: optax.GradientTransformation, state: TrainState, grads, norm
) -> TrainState:
    """Clip by the global norm, AdamW, evaluation average (sections 8 and 9)."""
    scale = jnp.minimum(1.0, config.optimiser.clip_norm / (norm + CLIP_EPSILON))
    grads = jax.tree.map(lambda grad, leaf: (grad * scale).astype(leaf.dtype), grads, state.current)
    updates, moments = optimiser.update(grads, state.optimiser, state.current)
    current = optax.apply_updates(state.current, updates)
    # The first step starts the average from its result.
    decay = jnp.where(state.step == 0, 0.0, ema_decay(state.step, config.optimiser.ema_cap))
    ema = average(state.ema, current, decay)
    return state._replace(current=current, ema=ema, optimiser=moments, step=state.step + 1)


def average(mean, new, decay):
    """decay mean + (1 - decay) new, leaf by leaf, in float32, rounded once to the dtype of `mean`."""

    def one(mean, new):
        return (decay * mean.astype(jnp.float32) + (1 - decay) * new.astype(jnp.float32)).astype(mean.dtype)

    return jax.tree.map(one, mean, new)


def ema_decay(step, cap: float) -> jax.Array:
    """Decay of the evaluation average at the optimiser step with index `step`, from 0 (section 8)."""
    return jnp.minimum((1 + step) / (10 + step), cap)


def old_decay(kind: str, step: int, constant: float) -> float:
    """Weight that the behaviour policy keeps after an epoch that ended at optimiser step `step` (section 8).

    kind: 'type0' on-policy, 'type1' Astrolabe's schedule, 'type2' DiffusionNFT's slow start, or 'constant'.
    """
    if kind == "type2":
        return 0.0 if step < 75 else min(0.0075 * (step - 75), 0.999)
    decays = {"type0": 0.0, "type1": min(0.001 * step, 0.5), "constant": constant}
    if kind not in decays:
        raise ValueError(f"optimiser.old_decay is {kind!r}; use {', '.join([*decays, 'type2'])}")
    return decays[kind]


@partial(jax.jit, donate_argnums=0)
def blend_old(state: TrainState, decay: float) -> TrainState:
    """old <- decay old + (1 - decay) current, after each epoch, with decay = old_decay(...)."""
    return state._replace(old=average(state.old, state.current, decay))


@partial(jax.jit, donate_argnums=0)
def reset_reference(state: TrainState) -> TrainState:
    """reference <- current, a copy (section 7.5)."""
    return state._replace(reference=jax.tree.map(jnp.copy, state.current))


def levels(config: ConfigDict) -> tuple[float, ...]:
    """Timesteps at which the loss is taken (section 10): the rollout's, or the raw list for loss.timesteps 'raw'.

    Without a final 0 (Krea's sampler has one): there is no noise to predict there, so nothing could be learnt.
    """
    steps = tuple(t for t in config.sampler.steps if t > 0)
    warped = config.loss.timesteps == "warped" and config.sampler.warp
    return warp(steps, Schedule(shift=config.sampler.shift)) if warped else steps


class Plan(NamedTuple):
    """One pass over an epoch's samples; arrays [optimiser steps, m, B]."""

    order: np.ndarray  # which sample
    t: np.ndarray  # float32, its timestep
    kl_weight: np.ndarray  # float32


def plan_pass(config: ConfigDict, epoch: int, turn: int, mask: np.ndarray) -> Plan:
    """Order, timesteps and KL weights of pass `turn` (from 0) over the samples whose KL mask [N] is `mask`.

    loss.timestep_draw 'stratified': of any len(levels) neighbouring samples of the epoch, aligned, each has another
    level, and a sample goes through all levels in as many passes. 'batch': one random level per microbatch.
    """
    settings, table = config.optimiser, np.asarray(levels(config), np.float32)
    count, size = len(mask), settings.microbatch
    if count % (size * settings.steps_per_pass):
        raise ValueError(
            f"{count} samples do not fill {settings.steps_per_pass} optimiser steps "
            f"(optimiser.steps_per_pass) with whole microbatches of {size} (optimiser.microbatch)"
        )
    order = np.argsort(_random_bits(config, epoch, 2 * turn, count), kind="stable")
    if config.loss.timestep_draw == "stratified":
        cycle, shift = divmod(turn, len(table))
        rows = -(-count // len(table))
        bits = _random_bits(config, epoch, 2 * cycle + 1, rows * len(table)).reshape(rows, -1)
        strata = np.roll(np.argsort(bits, axis=1, kind="stable"), shift, axis=1)
        t = table[strata.reshape(-1)[order]]
    else:
        drawn = _random_bits(config, epoch, 2 * turn + 1, count // size) % np.uint64(len(table))
        t = np.repeat(table[drawn], size)
    if config.kl.reduction == "epoch":
        kl_weight = losses.kl_weights(mask)[order]
    else:
        kl_weight = np.concatenate([losses.kl_weights(part) for part in mask[order].reshape(-1, size)])
    shape = (settings.steps_per_pass, -1, size)
    return Plan(order.reshape(shape), t.reshape(shape), kl_weight.reshape(shape))


def cut(config: ConfigDict, plan: Plan, devices: int) -> Plan:
    """The plan with microbatches in pieces that the devices can hold: the same samples, timesteps and weights."""
    size = piece(config, plan.order.shape[2], devices)
    return Plan(*(part.reshape(len(part), -1, size) for part in plan))


def update(
    train_step: Callable,
    config: ConfigDict,
    mesh: Mesh,
    state: TrainState,
    params,
    samples: Samples,
    epoch: int,
) -> Iterator[tuple[TrainState, dict[str, float]]]:
    """The optimiser steps of an epoch: yields the state and the metrics (floats) after each. `state` is donated.

    train_step: from make_train_step, with the same config and mesh. epoch: from 0; errors count epochs and steps from
    1, as people do, and samples from 0. Follow the last step by blend_old. Raises FloatingPointError, naming the
    samples where it can, when a step's loss, gradient or result is not finite; the step is not taken.
    """
    text = sharding.replicate(mesh, samples.text)
    for turn in range(config.optimiser.inner_epochs):
        plan = cut(config, plan_pass(config, epoch, turn, samples.mask), mesh.size)
        for i, (order, t, kl_weight) in enumerate(zip(*plan, strict=True), start=turn * len(plan.order)):
            latents, key = _gather(samples.latents, samples.key, order, turn, mesh)
            r, prompt = samples.r[order].astype(np.float32), samples.prompt[order]
            r, kl_weight, prompt, t = sharding.shard_batch(mesh, (r, kl_weight, prompt, t), axis=1)
            state, metrics = train_step(state, params, text, Batch(latents, r, kl_weight, prompt, t, key))
            yield state, _checked(jax.device_get(metrics), order.reshape(-1), f"epoch {epoch + 1}, step {i + 1}")


@partial(jax.jit, static_argnames="mesh")
def _gather(latents, key, order, turn, mesh):
    """The latents and this pass's noise keys of the samples `order` [m, B], each device's share of every microbatch."""
    key = jax.vmap(lambda key: jax.random.fold_in(key, turn))(key)
    place = sharding.batch_sharding(mesh, axis=1)
    return jax.lax.with_sharding_constraint((latents[order], key[order]), place)


def _random_bits(config, epoch, stream, count):
    """count uint64 of a counter-based generator's raw output, which no numpy release changes."""
    key = np.array([config.seed, (Purpose.LOSS << 32) | epoch], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], np.uint64)).random_raw(count)


def _checked(metrics, order, place):
    """The scalar metrics as floats; FloatingPointError if a sample's loss or a norm is not finite."""
    sample_loss = metrics.pop("sample_loss")
    bad = np.flatnonzero(~np.isfinite(sample_loss))
    if bad.size:
        culprits = ", ".join(f"sample {order[j]}: {sample_loss[j]}" for j in bad[:8])
        raise FloatingPointError(
            f"{place}: the loss of {bad.size} of {len(order)} samples is not finite ({culprits}); "
            "the step was not taken; lower optimiser.learning_rate or use model.dtype=float32"
        )
    for name, what in (("grad_norm", "the gradient norm"), ("adapter_norm", "the norm of the updated adapter")):
        if not np.isfinite(metrics[name]):
            raise FloatingPointError(
                f"{place}: {what} is {metrics[name]} although every sample's loss is finite; the step was not taken; "
                "lower optimiser.learning_rate"
            )
    return {name: float(value) for name, value in metrics.items()}
