"""Stage update: an epoch's samples -> optimizer steps on the adapter `current`.

Every policy is an adapter over one frozen base. A step noises each sample to one level, predicts
its clean latent with `current`, `old` and `reference` from the same x_t, and accumulates the
gradient of losses.py over microbatches. All draws derive from (seed, epoch, pass) and from one key
per sample, so that a sample's noise does not depend on the microbatch it is in
(docs/objective.md).
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from astrolabe_jax import losses, minibatches, sharding
from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.lora import scaled
from astrolabe_jax.models.wan import cache as kv
from astrolabe_jax.models.wan.attention import KeyValues
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.models.wan.transformer import Past
from astrolabe_jax.schedule import T_MAX, Schedule, add_noise, sigma_of, velocity_to_x0
from astrolabe_jax.types import LossPart, PrefixContext, Samples, TrainState

CLIP_EPSILON = 1e-6  # added to the gradient norm it divides by, as torch does

# Draws the noise of one sample from its key and the shape (F, C, H, W).
SampleNoise = Callable[[jax.Array, tuple[int, ...]], jax.Array]
# The parts of microbatch i of a step over the samples `order` [m, B], whose latents are
# [B, F, C, H, W]: (order, i, state, latents) -> LossPart, ...
LossParts = Callable[[np.ndarray, int, TrainState, jax.Array], Iterable[LossPart]]


class Scalars(NamedTuple):
    """The numbers of the objective and the optimizer that people sweep over.

    They are arguments of the compiled step, so that a sweep compiles once. As Python floats they
    take the type of what they are multiplied by, as constants do.
    """

    mix_beta: Any  # float, or traced
    kl_weight: Any
    clip_max: Any
    learning_rate: Any


def scalars_of(config: ConfigDict) -> Scalars:
    """Return the scalars that a config sets."""
    numbers = (
        config.loss.mix_beta,
        config.loss.kl_weight,
        config.advantages.clip,
        config.optimizer.learning_rate,
    )
    return Scalars(*map(float, numbers))


class StepBatch(NamedTuple):
    """The samples of one optimizer step as m microbatches, or pieces of them, of B."""

    latents: jax.Array  # [m, B, F, C, H, W]
    r: jax.Array  # [m, B] optimality
    kl_weight: jax.Array  # [m, B], see losses.kl_weights
    prompt: jax.Array  # [m, B] int32, rows of the text embeddings
    t: jax.Array  # [m, B] float32 timestep in [0, 1000]
    key: jax.Array  # [m, B] keys of the noise


@dataclasses.dataclass(frozen=True)
class TrainingForward:
    """The training forward of one policy over a whole video, or a window of one.

    See docs/models.md, Clean context, and docs/streaming.md, Whose keys.
    """

    graphdef: Any
    layout: Layout  # of the training mask
    lora_scale: float  # alpha / R
    # clean: earlier blocks are read from the policy's own clean stream at timestep `context_noise`,
    # so that the forward equals the rollout. noisy: at the level of the query, as published.
    context: str = "clean"
    context_noise: float = 0.0
    context_gradient: bool = False  # whether gradients go through the clean context
    prefix: str = "rollout_old"  # streaming.prefix, or 'full' for streaming.backprop 'full'

    def velocity(self, params, adapter, text, x0, x_t, t, prefix: PrefixContext | None = None):
        """Return velocities like x_t.

        Args:
          text: embeddings [B, S, E].
          x0: clean latents [B, F, C, H, W]; x_t: noisy ones.
          t: timesteps [B], the same for all frames.
          prefix: what there is before the frames.
        """
        model = merge(self.graphdef, params)
        lora = scaled(adapter, self.lora_scale)
        keys = model.encode_text(text, lora)
        past = None if prefix is None else self._past(model, lora, keys, t, prefix)
        context = None
        # The last block is nobody's past; a video of one block has no context.
        earlier = self.layout.blocks(x0.shape[1])[-1].start
        if self.context == "clean" and earlier:
            inputs = (lora, keys, past)
            if not self.context_gradient:
                inputs = jax.lax.stop_gradient(inputs)
            context_lora, context_keys, context_past = inputs
            context = model.context(
                x0[:, :earlier],
                context_keys,
                context_lora,
                layout=self.layout,
                t=self.context_noise,
                past=context_past,
            )
        return model(
            x_t,
            jnp.broadcast_to(t[:, None], x_t.shape[:2]),
            keys,
            lora,
            layout=self.layout,
            context=context,
            past=past,
        )

    def _past(self, model, lora, text: KeyValues, t, prefix: PrefixContext) -> Past:
        """Return the keys of the past that this policy reads. text: of the samples."""
        if self.prefix == "rollout_old":
            cache: Any = jax.lax.stop_gradient(prefix.cache)
        elif self.prefix == "full":
            cache = self._cache_of_whole(model, lora, text, prefix.whole)
        else:
            assert prefix.first is not None and prefix.recent is not None
            # besides the sink, what the first block of a window sees
            seen = max(self.layout.capacity - self.layout.kept - self.layout.block, 0)
            recent = prefix.recent[:, prefix.recent.shape[1] - seen :]
            text = _one_a_stream(text, prefix.first)
            first, recent, text, lora = jax.lax.stop_gradient((prefix.first, recent, text, lora))
            cache = model.reencode(
                first,
                recent,
                t if self.prefix == "noised_prefix" else self.context_noise,
                text,
                prefix.start,
                lora,
                layout=self.layout,
            )
        return Past(cache, prefix.start, prefix.positions)

    def _cache_of_whole(self, model, lora, text: KeyValues, whole) -> kv.Cache:
        """Return the cache behind all latents of the past; gradients go through it."""
        text = _one_a_stream(text, whole)
        context = model.context(whole, text, lora, layout=self.layout, t=self.context_noise)
        streams, frames, _, *latent_hw = whole.shape
        cache = kv.empty_cache(model.config, streams, self.layout.capacity, tuple(latent_hw))
        return kv.place_visible(cache, context.k, context.v, self.layout, frames)


def _one_a_stream(text: KeyValues, latents) -> KeyValues:
    """Return the prompts' keys and values of the streams that `latents` [streams, ...] belong to.

    The samples of a stream are adjacent.
    """
    return jax.tree.map(lambda part: part[:, :: part.shape[1] // latents.shape[0]], text)


def training_layout(config: ConfigDict, layout: Layout) -> Layout:
    """Return the layout of the training mask, for a model that samples with `layout`."""
    loss = config.loss
    return dataclasses.replace(
        layout,
        block=layout.block if loss.mask_block == -1 else loss.mask_block,
        sink=layout.sink if loss.mask_sink else 0,
    )


def training_forward(config: ConfigDict, graphdef: Any, layout: Layout) -> TrainingForward:
    """Return the forward that `config` asks for, for a model that samples with `layout`."""
    full = config.streaming.backprop == "full"
    return TrainingForward(
        graphdef,
        training_layout(config, layout),
        config.lora.alpha / config.lora.rank,
        config.loss.context,
        config.sampler.context_noise,
        config.loss.context_gradient or full,
        "full" if full else config.streaming.prefix,
    )


def make_optimizer(config: ConfigDict, learning_rate: Any = None) -> optax.GradientTransformation:
    """Return AdamW with a constant rate and decoupled decay; clipping is in the train step.

    learning_rate: in place of the config's; may be traced.
    """
    settings = config.optimizer
    return optax.adamw(
        settings.learning_rate if learning_rate is None else learning_rate,
        settings.b1,
        settings.b2,
        settings.eps,
        weight_decay=settings.weight_decay,
    )


def init_state(config: ConfigDict, adapter: dict, mesh: sharding.AnyMesh) -> TrainState:
    """Return the state before the first epoch, on the mesh. Every policy has its own buffers."""
    return sharding.shard_params(mesh, first_state(config, jax.tree.map(np.asarray, adapter)))


def first_state(config: ConfigDict, adapter: dict) -> TrainState:
    """Return a state in which every policy is the starting adapter; may be traced."""
    adapter = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(config.lora.dtype)), adapter)
    return TrainState(
        adapter,
        adapter,
        adapter,
        adapter,
        make_optimizer(config).init(adapter),
        np.zeros((), np.int32),
    )


def standard_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return the noise of one sample from its key, float32."""
    return jax.random.normal(key, shape, jnp.float32)


class Objective(NamedTuple):
    """How the loss of a sample is computed."""

    config: ConfigDict
    forward: TrainingForward
    noise: SampleNoise = standard_normal
    scalars: Scalars | None = None  # in place of the config's; may be traced


class TrainStep:
    """One optimizer step: step(state, params, text [G, S, E], batch) -> (state, metrics).

    `state` is donated. Gradients accumulate over the batch's microbatches, one call of a compiled
    program each. parts(i, state, latents) gives the parts of microbatch i, by default all of it at
    once; a part's share of the loss is its share of the frames.

    metrics are the means of `sample_terms` over the step, `grad_norm` before clipping,
    `adapter_norm` of the new `current`, and `sample_loss` [m B]. If any of these is not finite, the
    returned state equals the given one, as it does unless the step is to be `taken`.
    """

    def __init__(self, config: ConfigDict, graphdef: Any, layout: Layout, mesh: sharding.AnyMesh):
        self.config = config
        self.mesh = mesh
        self._scalars = scalars_of(config)
        objective = Objective(config, training_forward(config, graphdef, layout))

        def jitted(function):
            def placed(*arguments):
                params, values = function(*arguments)
                return sharding.shard_params(mesh, params), sharding.replicate(mesh, values)

            return jax.jit(placed, donate_argnums=0)

        self.accumulate = jitted(partial(_accumulate, objective))
        self.finish = jitted(partial(_finish, config))

    def __call__(self, state: TrainState, params, text, batch: StepBatch, parts=None, taken=True):
        grads = _zeros(state.current)
        terms = []
        for i in range(batch.r.shape[0]):
            of_parts = []
            for part in parts(i, state, batch.latents[i]) if parts else (LossPart(),):
                piece, arrays = _cut_part(batch, i, part, self._scalars)
                grads, new = self.accumulate(grads, state, params, text, piece, arrays)
                # `parts` may end the run, and must not be far ahead of the devices
                of_parts.append(jax.block_until_ready(new))
            terms.append(reduce(partial(jax.tree.map, jnp.add), of_parts))
        return self.finish(state, self._scalars, grads, terms, taken)


@jax.jit
def _zeros(params):
    """Return float32 zeros of the shape of parameters, placed as these."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params)


class PartArrays(NamedTuple):
    """A LossPart as the compiled program takes it."""

    microbatch: Any  # [] int32, which one of the batch
    number: Any  # [] int32, or None for a whole microbatch
    share: Any  # [] float32, of the frames; likewise
    prefix: PrefixContext | None
    scalars: Scalars


def _cut_part(
    batch: StepBatch, i: int, part: LossPart, scalars: Scalars
) -> tuple[StepBatch, PartArrays]:
    """Cut the frames of a part of microbatch i out of a batch.

    This happens outside of the program, so that one program serves all windows of a length.
    """
    if part.frames is None:
        return batch, PartArrays(np.int32(i), None, None, part.prefix, scalars)
    begin, end = part.frames
    arrays = PartArrays(
        np.int32(i),
        np.int32(part.number),
        np.float32((end - begin) / batch.latents.shape[2]),
        part.prefix,
        scalars,
    )
    return batch._replace(latents=batch.latents[:, :, begin:end]), arrays


def _accumulate(objective: Objective, total, state, params, text, batch: StepBatch, part):
    """Add the gradient of a part of a microbatch to `total`: (total, terms {name: [B]})."""
    objective = objective._replace(scalars=part.scalars)
    micro = jax.tree.map(lambda leaf: leaf[part.microbatch], batch)
    if part.number is not None:  # the first part draws what a whole would
        others = jax.vmap(jax.random.fold_in, in_axes=(0, None))(micro.key, part.number)
        micro = micro._replace(key=jnp.where(part.number > 0, others, micro.key))

    def loss(current):
        terms = sample_terms(
            objective, state._replace(current=current), params, text, micro, part.prefix
        )
        if part.share is not None:
            terms = jax.tree.map(lambda term: term * part.share, terms)
        return terms["total_loss"].sum() / batch.r.size, terms

    grads, terms = jax.grad(loss, has_aux=True)(state.current)
    return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, grads), terms


def _finish(config: ConfigDict, state: TrainState, scalars: Scalars, grads, terms, taken):
    """Take the step of accumulated gradients, if it is to be taken: (state, metrics)."""
    norm = optax.tree.norm(grads)
    terms = jax.tree.map(lambda *parts: jnp.concatenate(parts), *terms)
    optimizer = make_optimizer(config, scalars.learning_rate)
    new = apply_gradient(config, optimizer, state, grads, norm)
    moved = optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), new.current))
    metrics = {name: values.mean() for name, values in terms.items()}
    metrics |= {"grad_norm": norm, "adapter_norm": moved, "sample_loss": terms["total_loss"]}
    finite = jnp.isfinite(norm) & jnp.isfinite(moved) & jnp.isfinite(terms["total_loss"]).all()
    taken = taken & finite
    return jax.tree.map(lambda after, old: jnp.where(taken, after, old), new, state), metrics


def sample_terms(
    objective: Objective,
    state: TrainState,
    params,
    text,
    micro: StepBatch,
    prefix: PrefixContext | None = None,
) -> dict[str, jax.Array]:
    """Return losses.objective of one microbatch: {name: [B]}, float32.

    Args:
      text: embeddings [G, S, E] of the prompts.
      micro: a StepBatch without its first axis.
      prefix: what there is before its frames.
    """
    config, forward, noise, scalars = objective
    mix_beta, kl_weight, clip_max, _ = scalars or scalars_of(config)
    loss = config.loss
    x0 = micro.latents.astype(jnp.float32)
    eps = jax.vmap(lambda key: noise(key, x0.shape[1:]))(micro.key)
    x_t = add_noise(x0, eps, micro.t / T_MAX)
    sampler = config.sampler
    sigma = sigma_of(micro.t, Schedule(shift=sampler.shift), sampler.sigma_source)
    text = text[micro.prompt]
    if prefix is not None and forward.prefix == "noised_prefix":
        prefix = noised_prefix(prefix, noise, micro)

    def predict(adapter):
        velocity = forward.velocity(params, adapter, text, x0, x_t, micro.t, prefix)
        return velocity_to_x0(x_t, velocity, sigma) if loss.kind == "astrolabe" else velocity

    old = predict(jax.lax.stop_gradient(state.old))
    reference = predict(jax.lax.stop_gradient(state.reference))
    return losses.objective(
        losses.Coefficients(loss.kind, mix_beta, kl_weight, clip_max),
        losses.Predictions(x0, predict(state.current), old, reference, x_t, sigma),
        micro.r,
        micro.kl_weight,
    )


def noised_prefix(prefix: PrefixContext, noise: SampleNoise, micro: StepBatch) -> PrefixContext:
    """Return the past of every sample at the sample's own level (the paper's Algorithm 2)."""

    def noised(latents, number):
        x0 = jnp.repeat(latents, len(micro.r) // len(latents), axis=0).astype(jnp.float32)
        draw = jax.vmap(lambda key: noise(jax.random.fold_in(key, number), x0.shape[1:]))
        return add_noise(x0, draw(micro.key), micro.t / T_MAX)

    return prefix._replace(first=noised(prefix.first, 1), recent=noised(prefix.recent, 2))


def apply_gradient(
    config: ConfigDict, optimizer: optax.GradientTransformation, state: TrainState, grads, norm
) -> TrainState:
    """Clip by the global norm, take a step of AdamW, and update the evaluation average."""
    scale = jnp.minimum(1.0, config.optimizer.clip_norm / (norm + CLIP_EPSILON))
    grads = jax.tree.map(lambda grad, leaf: (grad * scale).astype(leaf.dtype), grads, state.current)
    updates, moments = optimizer.update(grads, state.optimizer, state.current)
    current = optax.apply_updates(state.current, updates)
    # The first step starts the average from its result.
    decay = jnp.where(state.step == 0, 0.0, ema_decay(state.step, config.optimizer.ema_cap))
    return state._replace(
        current=current,
        ema=average(state.ema, current, decay),
        optimizer=moments,
        step=state.step + 1,
    )


def average(mean, new, decay):
    """Return decay mean + (1 - decay) new, leaf by leaf.

    It is computed in float32 and rounded once to the dtype of `mean`.
    """

    def one(mean, new):
        sum32 = decay * mean.astype(jnp.float32) + (1 - decay) * new.astype(jnp.float32)
        return sum32.astype(mean.dtype)

    return jax.tree.map(one, mean, new)


def ema_decay(step, cap: float) -> jax.Array:
    """Return the decay of the evaluation average at the optimizer step `step`, from 0.

    See docs/objective.md, Evaluation average.
    """
    return jnp.minimum((1 + step) / (10 + step), cap)


def old_decay(kind: str, step: int, constant: float) -> float:
    """Return the weight that the behaviour policy keeps after an epoch that ended at step `step`.

    kind: 'type0' on-policy, 'type1' Astrolabe's schedule, 'type2' DiffusionNFT's slow start, or
    'constant' (docs/objective.md, Behaviour policy).
    """
    decays = {
        "type0": 0.0,
        "type1": min(0.001 * step, 0.5),
        "type2": 0.0 if step < 75 else min(0.0075 * (step - 75), 0.999),
        "constant": constant,
    }
    return decays[kind]


@partial(jax.jit, donate_argnums=0)
def blend_old(state: TrainState, decay: float) -> TrainState:
    """Set old <- decay old + (1 - decay) current, after each epoch, with decay = old_decay(...)."""
    return state._replace(old=average(state.old, state.current, decay))


@partial(jax.jit, donate_argnums=0)
def reset_reference(state: TrainState) -> TrainState:
    """Set reference <- current, a copy (docs/objective.md, Reference reset)."""
    return state._replace(reference=jax.tree.map(jnp.copy, state.current))


def teaches(samples: Samples) -> bool:
    """Return whether something can be learnt from an epoch: some sample is better than another.

    Otherwise all optimalities are 1/2, and the gradient is that of rounding errors, of which AdamW
    would make full steps.
    """
    return bool(np.any(samples.r != 0.5))


def update(
    train_step: TrainStep,
    state: TrainState,
    params: dict,
    samples: Samples,
    epoch: int,
    parts: LossParts | None = None,
) -> Iterator[tuple[TrainState, dict[str, float]]]:
    """Take the optimizer steps of an epoch: give the state and the metrics (floats) after each.

    `state` is donated. Follow the last step by `blend_old`. Samples that do not teach are measured,
    and leave the state as it was.

    Args:
      params: of the base, on the mesh.
      epoch: from 0; errors count epochs and steps from 1, as people do, and samples from 0.
      parts: of a microbatch; by default all of it at once.

    Raises:
      FloatingPointError: naming the samples where it can, when a step's loss, gradient or result is
        not finite; the step is not taken.
    """
    config = train_step.config
    devices = train_step.mesh.size
    text = sharding.replicate(train_step.mesh, samples.text)
    taken = teaches(samples)
    for turn in range(config.optimizer.inner_epochs):
        plan = minibatches.plan_pass(config, epoch, turn, samples.mask, devices)
        for number, (order, t, kl_weight) in enumerate(
            zip(*minibatches.cut(config, plan, devices), strict=True),
            1 + turn * config.optimizer.steps_per_pass,
        ):
            batch = _step_batch(samples, order, t, kl_weight, turn)
            state, metrics = train_step(
                state, params, text, batch, parts and partial(parts, order), taken
            )
            place = f"epoch {epoch + 1}, step {number}"
            yield state, _checked(jax.device_get(metrics), order.reshape(-1), place)


def _step_batch(samples: Samples, order, t, kl_weight, turn: int) -> StepBatch:
    """Gather the samples of one step, each device's share of every microbatch on the device."""
    latents, key = _gather(samples.latents, samples.key, order, turn)
    r, prompt, kl_weight, t = sharding.place_batch(
        (samples.r[order].astype(np.float32), samples.prompt[order], kl_weight, t), axis=1
    )
    return StepBatch(latents, r, kl_weight, prompt, t, key)


@jax.jit
def _gather(latents, key, order, turn):
    """Return the latents and this pass's noise keys of the samples `order` [m, B]."""
    key = jax.vmap(lambda key: jax.random.fold_in(key, turn))(key)
    return sharding.take([latents], order, axis=1), sharding.by_sample(key[order], axis=1)


def _checked(metrics: dict, order: np.ndarray, place: str) -> dict[str, float]:
    """Return the scalar metrics as floats.

    Raises FloatingPointError if a sample's loss or a norm is not finite.
    """
    sample_loss = metrics.pop("sample_loss")
    bad = np.flatnonzero(~np.isfinite(sample_loss))
    if bad.size:
        culprits = ", ".join(f"sample {order[j]}: {sample_loss[j]}" for j in bad[:8])
        raise FloatingPointError(
            f"{place}: the loss of {bad.size} of {len(order)} samples is not finite ({culprits}); "
            "the step was not taken; lower optimizer.learning_rate or use model.dtype=float32"
        )
    for name, what in (
        ("grad_norm", "the gradient norm"),
        ("adapter_norm", "the norm of the updated adapter"),
    ):
        if not np.isfinite(metrics[name]):
            raise FloatingPointError(
                f"{place}: {what} is {metrics[name]} although every sample's loss is finite; the "
                "step was not taken; lower optimizer.learning_rate"
            )
    return {name: float(value) for name, value in metrics.items()}
