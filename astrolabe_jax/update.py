"""Stage update: an epoch's samples -> optimizer steps on the adapter `current`.

Every policy is an adapter over one frozen base. A step noises each sample to one level, predicts
its clean latent with `current`, `old` and `reference` from the same x_t, and accumulates the
gradient of losses.py over microbatches. All draws derive from (seed, epoch, pass) and from one key
per sample, so that a sample's noise does not depend on the microbatch it is in. Section numbers are
those of spec/objective.md.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from astrolabe_jax import losses, sharding
from astrolabe_jax.config import piece, rounds
from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.wan import cache as kv
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.models.wan.transformer import KeyValues, Past
from astrolabe_jax.schedule import T_MAX, Schedule, add_noise, sigma_of, velocity_to_x0, warp
from astrolabe_jax.types import RngStream

CLIP_EPSILON = 1e-6  # added to the gradient norm it divides by, as torch does


class TrainState(NamedTuple):
    """What training changes: adapter trees (models/lora.py) in config.lora.dtype, the optimizer,
    and its step count.
    """

    current: dict  # theta, trained
    old: dict  # behaviour policy: samples, and supplies the loss's second prediction
    reference: dict  # what the KL keeps `current` close to
    ema: dict  # average of `current` for evaluation
    optimizer: Any
    step: jax.Array  # [] int32, optimizer steps taken


class Samples(NamedTuple):
    """An epoch's N samples: stages `rollout` and `advantages` -> `update`."""

    latents: jax.Array  # [N, F, C, H, W] clean, any float dtype
    r: np.ndarray  # [N] optimality in [0, 1]
    # [N] bool, samples that the KL restrains; all of them unless kl.kind is 'selective'
    mask: np.ndarray
    prompt: np.ndarray  # [N] int32, each sample's row of `text`
    key: jax.Array  # [N] keys of this epoch's noise
    text: jax.Array  # [G, S, E] embeddings


class History(NamedTuple):
    """What the loss of a window may read of the frames before it, for each stream, that is prompt
    or sample.
    """

    start: jax.Array  # frames so far, in the count of the cache
    positions: np.ndarray  # [W] int32 rotary positions of the window's frames
    cache: kv.Cache | None = None  # [layers, streams, slots L, A, K] of the rollout
    first: jax.Array | None = None  # [streams, kept, C, H, W] the clean latents of the sink
    recent: jax.Array | None = None  # [streams, n, C, H, W] the last ones
    # [streams, start, C, H, W] all of them, with streaming.backprop 'full'
    whole: jax.Array | None = None


class Work(NamedTuple):
    """A part of a microbatch that is worked on at once: frames of its samples behind a history."""

    frames: tuple[int, int] | None = None  # from, to; None: all
    number: int = 0  # among the parts of the microbatch: each draws noise of its own
    history: History | None = None


class Batch(NamedTuple):
    """The samples of one optimizer step as m microbatches, or pieces of them, of B."""

    latents: jax.Array  # [m, B, F, C, H, W]
    r: jax.Array  # [m, B]
    kl_weight: jax.Array  # [m, B], see losses.kl_weights
    prompt: jax.Array  # [m, B] int32
    t: jax.Array  # [m, B] float32 timestep in [0, 1000]
    key: jax.Array  # [m, B]


@dataclasses.dataclass(frozen=True)
class Forward:
    """The training forward of one policy over a whole video (spec/model.md 7), or a window of one
    (streaming.md 6).

    context 'clean': earlier blocks are read from the policy's own clean stream at timestep
    `context_noise`, without gradient unless `context_gradient`, so that the forward equals the
    rollout; 'noisy': they are read at the level of the query, as published. prefix:
    config.streaming.prefix, or 'full' for streaming.backprop 'full'.
    """

    graphdef: Any
    layout: Layout  # of the training mask
    lora_scale: float  # alpha / R
    context: str = "clean"
    context_noise: float = 0.0
    context_gradient: bool = False
    prefix: str = "rollout_old"

    def velocity(
        self, params, adapter, text, x0, x_t, t, history: History | None = None
    ) -> jax.Array:
        """Velocities like x_t [B, F, C, H, W]. text [B, S, E]; x0 the clean latents; t [B], the
        same for all frames.
        """
        model = merge(self.graphdef, params)
        text = model.encode_text(text, adapter, self.lora_scale)
        past = None if history is None else self._past(model, adapter, text, t, history)
        context = None
        # The last block is nobody's past; a video of one block has no context.
        earlier = self.layout.blocks(x0.shape[1])[-1].start
        if self.context == "clean" and earlier:
            given = (adapter, text, past)
            adapter_, text_, past_ = given if self.context_gradient else _stopped(given)
            context = model.context(
                x0[:, :earlier],
                text_,
                adapter_,
                self.lora_scale,
                layout=self.layout,
                t=self.context_noise,
                past=past_,
            )
        t = jnp.broadcast_to(t[:, None], x_t.shape[:2])
        return model(
            x_t, t, text, adapter, self.lora_scale, layout=self.layout, context=context, past=past
        )

    def _past(self, model, adapter, text, t, history: History) -> Past:
        """The keys of the past that this policy reads. text: of the samples, those of a stream
        adjacent.
        """
        if self.prefix == "rollout_old":
            return Past(_stopped(history.cache), history.start, history.positions)
        options = {"adapter": adapter, "lora_scale": self.lora_scale, "layout": self.layout}
        if self.prefix == "full":
            text = _of_streams(text, history.whole)
            made = model.context(history.whole, text, t=self.context_noise, **options)
            streams, frames, _, *latent_hw = history.whole.shape
            cache = kv.empty_cache(model.config, streams, self.layout.capacity, tuple(latent_hw))
            cache = kv.place_visible(cache, *made, self.layout, frames)
            return Past(cache, history.start, history.positions)
        first, recent = (
            history.first,
            history.recent[:, history.recent.shape[1] - self.recent_frames :],
        )
        level = t if self.prefix == "noised_prefix" else self.context_noise
        first, recent, text, options["adapter"] = _stopped(
            (first, recent, _of_streams(text, first), adapter)
        )
        cache = model.reencode(first, recent, level, text, history.start, **options)
        return Past(cache, history.start, history.positions)

    @property
    def recent_frames(self) -> int:
        """Frames besides the sink that the first block of a window sees."""
        return max(self.layout.capacity - self.layout.kept - self.layout.block, 0)


def _of_streams(text: KeyValues, latents: jax.Array) -> KeyValues:
    """Of the prompts' keys and values, one for each of the streams that `latents` [streams, ...]
    belong to.
    """
    return jax.tree.map(lambda part: part[:, :: part.shape[1] // latents.shape[0]], text)


def _stopped(tree: Any) -> Any:
    return jax.lax.stop_gradient(tree)


def training_layout(config: ConfigDict, layout: Layout) -> Layout:
    """The layout of the training mask that `config` asks for, for a model that samples with
    `layout`.
    """
    loss = config.loss
    block = layout.block if loss.mask_block == -1 else loss.mask_block
    return dataclasses.replace(layout, block=block, sink=layout.sink if loss.mask_sink else 0)


def training_forward(config: ConfigDict, graphdef: Any, layout: Layout) -> Forward:
    """The forward that `config` asks for, for a model that samples with `layout`."""
    loss, full = config.loss, config.streaming.backprop == "full"
    return Forward(
        graphdef,
        training_layout(config, layout),
        config.lora.alpha / config.lora.rank,
        loss.context,
        config.sampler.context_noise,
        loss.context_gradient or full,
        "full" if full else config.streaming.prefix,
    )


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW of config.optimizer with a constant rate and decoupled decay (section 9); clipping is
    in the train step.
    """
    settings = config.optimizer
    return optax.adamw(
        settings.learning_rate,
        settings.b1,
        settings.b2,
        settings.eps,
        weight_decay=settings.weight_decay,
    )


def init_state(config: ConfigDict, adapter: dict, mesh: Mesh) -> TrainState:
    """The state before the first epoch, on the mesh. Every policy has buffers of its own."""
    return sharding.replicate(mesh, first_state(config, jax.tree.map(np.asarray, adapter)))


def first_state(config: ConfigDict, adapter: dict) -> TrainState:
    """Every policy is the starting adapter; may be traced."""
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
    """Noise of one sample from its key."""
    return jax.random.normal(key, shape, jnp.float32)


class TrainStep:
    """One optimizer step: step(state, params, text [G, S, E], batch: Batch) -> (state, metrics);
    state is donated.

    layout: of the rollout. noise(key, (F, C, H, W)) draws one sample's noise. Gradients accumulate
    over the batch's microbatches, one call of a compiled program each. parts(state, batch, i) gives
    the parts of microbatch i, by default all of it at once; a part's share of the loss is its share
    of the frames.

    metrics: the means of `sample_terms` over the step under the names of section 2, `grad_norm`
    before clipping, `adapter_norm` of the new `current`, and `sample_loss` [m B]. If any of these
    is not finite, the returned state equals the given one.
    """

    def __init__(
        self,
        config: ConfigDict,
        graphdef: Any,
        layout: Layout,
        mesh: Mesh,
        noise: Callable[[jax.Array, tuple[int, ...]], jax.Array] = standard_normal,
    ):
        forward, optimizer = training_forward(config, graphdef, layout), make_optimizer(config)
        terms_of = partial(sample_terms, config, forward, noise)

        def begin(current):
            return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), current)

        def accumulate(
            total, state: TrainState, params, text, batch: Batch, i, number, share, history
        ):
            micro = jax.tree.map(lambda part: part[i], batch)
            if number is not None:  # the first part draws what a whole would
                others = jax.vmap(jax.random.fold_in, in_axes=(0, None))(micro.key, number)
                micro = micro._replace(key=jnp.where(number > 0, others, micro.key))

            def objective(current):
                terms = terms_of(state._replace(current=current), params, text, micro, history)
                terms = terms if share is None else jax.tree.map(lambda term: term * share, terms)
                return terms["total_loss"].sum() / batch.r.size, terms

            grads, terms = jax.grad(objective, has_aux=True)(state.current)
            return jax.tree.map(lambda a, b: a + b.astype(jnp.float32), total, grads), terms

        def finish(state: TrainState, grads, terms):
            norm = optax.tree.norm(grads)
            terms = jax.tree.map(lambda *parts: jnp.concatenate(parts), *terms)
            sample_loss = terms["total_loss"]
            new = apply_gradient(config, optimizer, state, grads, norm)
            moved = optax.tree.norm(
                jax.tree.map(lambda leaf: leaf.astype(jnp.float32), new.current)
            )
            metrics = {name: values.mean() for name, values in terms.items()}
            metrics |= {"grad_norm": norm, "adapter_norm": moved}
            finite = jnp.isfinite(norm) & jnp.isfinite(moved) & jnp.isfinite(sample_loss).all()
            state = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
            return state, metrics | {"sample_loss": sample_loss}

        whole = sharding.replicated(mesh)
        self._begin = jax.jit(begin, out_shardings=whole)
        self.accumulate = jax.jit(
            sharding.on_mesh(mesh, accumulate), donate_argnums=0, out_shardings=whole
        )
        self.finish = jax.jit(finish, donate_argnums=0, out_shardings=whole)

    def __call__(
        self, state: TrainState, params, text, batch: Batch, parts: Callable | None = None
    ):
        grads, terms = self._begin(state.current), []
        for i in range(batch.r.shape[0]):
            of_sample = None
            for work in parts(state, batch, i) if parts else (Work(),):
                part, number, share = batch, None, None
                # cut outside of the program, so that one serves all windows of a length
                if work.frames:
                    part = batch._replace(latents=batch.latents[:, :, slice(*work.frames)])
                    share = np.float32((work.frames[1] - work.frames[0]) / batch.latents.shape[2])
                    number = np.int32(work.number)
                grads, made = self.accumulate(
                    grads, state, params, text, part, np.int32(i), number, share, work.history
                )
                of_sample = made if of_sample is None else jax.tree.map(jnp.add, of_sample, made)
            terms.append(of_sample)
        return self.finish(state, grads, terms)


def sample_terms(
    config: ConfigDict,
    forward: Forward,
    noise: Callable,
    state: TrainState,
    params,
    text,
    micro: Batch,
    history=None,
) -> dict[str, jax.Array]:
    """losses.objective of one microbatch (Batch without its first axis): {name: [B]}, float32."""
    loss, schedule = config.loss, Schedule(shift=config.sampler.shift)
    x0 = micro.latents.astype(jnp.float32)
    eps = jax.vmap(lambda key: noise(key, x0.shape[1:]))(micro.key)
    x_t = add_noise(x0, eps, micro.t / T_MAX)
    sigma = sigma_of(micro.t, schedule, config.sampler.sigma_source)
    text = text[micro.prompt]
    if history is not None and forward.prefix == "noised_prefix":
        history = noised(history, noise, micro)

    def predict(adapter):
        velocity = forward.velocity(params, adapter, text, x0, x_t, micro.t, history)
        return velocity_to_x0(x_t, velocity, sigma) if loss.kind == "astrolabe" else velocity

    old, reference = (
        predict(jax.lax.stop_gradient(adapter)) for adapter in (state.old, state.reference)
    )
    return losses.objective(
        loss.kind,
        x0,
        predict(state.current),
        old,
        reference,
        micro.r,
        micro.kl_weight,
        beta=loss.mix_beta,
        kl_lambda=loss.kl_weight,
        x_t=x_t,
        sigma=sigma,
        clip_max=config.advantages.clip,
    )


def noised(history: History, noise: Callable, micro: Batch) -> History:
    """The past of every sample at the sample's own level, as Algorithm 2 has it (streaming.md
    6.4).
    """

    def one(latents, number):
        x0 = jnp.repeat(latents, micro.r.shape[0] // latents.shape[0], axis=0).astype(jnp.float32)
        eps = jax.vmap(lambda key: noise(jax.random.fold_in(key, number), x0.shape[1:]))(micro.key)
        return add_noise(x0, eps, micro.t / T_MAX)

    return history._replace(first=one(history.first, 1), recent=one(history.recent, 2))


def apply_gradient(
    config: ConfigDict, optimizer: optax.GradientTransformation, state: TrainState, grads, norm
) -> TrainState:
    """Clip by the global norm, AdamW, evaluation average (sections 8 and 9)."""
    scale = jnp.minimum(1.0, config.optimizer.clip_norm / (norm + CLIP_EPSILON))
    grads = jax.tree.map(lambda grad, leaf: (grad * scale).astype(leaf.dtype), grads, state.current)
    updates, moments = optimizer.update(grads, state.optimizer, state.current)
    current = optax.apply_updates(state.current, updates)
    # The first step starts the average from its result.
    decay = jnp.where(state.step == 0, 0.0, ema_decay(state.step, config.optimizer.ema_cap))
    ema = average(state.ema, current, decay)
    return state._replace(current=current, ema=ema, optimizer=moments, step=state.step + 1)


def average(mean, new, decay):
    """decay mean + (1 - decay) new, leaf by leaf, in float32, rounded once to the dtype of
    `mean`.
    """

    def one(mean, new):
        return (decay * mean.astype(jnp.float32) + (1 - decay) * new.astype(jnp.float32)).astype(
            mean.dtype
        )

    return jax.tree.map(one, mean, new)


def ema_decay(step, cap: float) -> jax.Array:
    """Decay of the evaluation average at the optimizer step with index `step`, from 0 (section
    8).
    """
    return jnp.minimum((1 + step) / (10 + step), cap)


def old_decay(kind: str, step: int, constant: float) -> float:
    """Weight that the behaviour policy keeps after an epoch that ended at optimizer step `step`
    (section 8).

    kind: 'type0' on-policy, 'type1' Astrolabe's schedule, 'type2' DiffusionNFT's slow start, or
    'constant'.
    """
    if kind == "type2":
        return 0.0 if step < 75 else min(0.0075 * (step - 75), 0.999)
    decays = {"type0": 0.0, "type1": min(0.001 * step, 0.5), "constant": constant}
    if kind not in decays:
        raise ValueError(f"optimizer.old_decay is {kind!r}; use {', '.join([*decays, 'type2'])}")
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
    """Timesteps at which the loss is taken (section 10): the rollout's, or the raw list for
    loss.timesteps 'raw'.

    Without a final 0 (Krea's sampler has one): there is no noise to predict there, so nothing could
    be learnt.
    """
    steps = tuple(t for t in config.sampler.steps if t > 0)
    warped = config.loss.timesteps == "warped" and config.sampler.warp
    return warp(steps, Schedule(shift=config.sampler.shift)) if warped else steps


class Plan(NamedTuple):
    """One pass over an epoch's samples; arrays [optimizer steps, m, B]."""

    order: np.ndarray  # which sample
    t: np.ndarray  # float32, its timestep
    kl_weight: np.ndarray  # float32


def plan_pass(
    config: ConfigDict, epoch: int, turn: int, mask: np.ndarray, devices: int = 1
) -> Plan:
    """Order, timesteps and KL weights of pass `turn` (from 0) over the samples whose KL mask [N] is
    `mask`.

    Where videos share their prompt's past (config.streaming), a microbatch has equally many of each
    stream of a round, adjacent; so that each of the `devices` has the pasts of its samples.

    loss.timestep_draw 'stratified': of any len(levels) neighbouring samples of the epoch, aligned,
    each has another level, and a sample goes through all levels in as many passes. 'batch': one
    random level per microbatch.
    """
    settings, table = config.optimizer, np.asarray(levels(config), np.float32)
    count, size = len(mask), settings.microbatch
    if count % (size * settings.steps_per_pass):
        raise ValueError(
            f"{count} samples do not fill {settings.steps_per_pass} optimizer steps "
            f"(optimizer.steps_per_pass) with whole microbatches of {size} (optimizer.microbatch)"
        )
    order = _order(config, _random_bits(config, epoch, 2 * turn, count), devices)
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
        kl_weight = np.concatenate(
            [losses.kl_weights(part) for part in mask[order].reshape(-1, size)]
        )
    shape = (settings.steps_per_pass, -1, size)
    return Plan(order.reshape(shape), t.reshape(shape), kl_weight.reshape(shape))


def _order(config: ConfigDict, bits: np.ndarray, devices: int) -> np.ndarray:
    """A random order [N] of the samples by their random `bits`."""
    if not config.streaming.window or config.streaming.sampling == "sequence":
        return np.argsort(bits, kind="stable")
    count, streams = rounds(config, devices)
    by_stream = bits.reshape(count * streams, -1)
    each = by_stream.shape[1]
    order = (
        np.argsort(by_stream, axis=1, kind="stable") + each * np.arange(count * streams)[:, None]
    )
    # videos of a stream that are together
    share = piece(config, config.optimizer.microbatch, devices) // streams
    return order.reshape(count, streams, -1, share).transpose(2, 0, 1, 3).reshape(-1)


def cut(config: ConfigDict, plan: Plan, devices: int) -> Plan:
    """A plan with microbatches in pieces that the devices can hold: the same samples, timesteps and
    weights.
    """
    size = piece(config, plan.order.shape[2], devices)
    return Plan(*(part.reshape(len(part), -1, size) for part in plan))


def update(
    train_step: TrainStep,
    config: ConfigDict,
    mesh: Mesh,
    state: TrainState,
    params,
    samples: Samples,
    epoch: int,
    parts: Callable[[np.ndarray, TrainState, Batch, int], Iterable[Work]] | None = None,
) -> Iterator[tuple[TrainState, dict[str, float]]]:
    """The optimizer steps of an epoch: yields the state and the metrics (floats) after each.
    `state` is donated.

    train_step: with the same config and mesh. epoch: from 0; errors count epochs and steps from 1,
    as people do, and samples from 0. parts(samples [B], state, batch, i): those of microbatch i of
    a step, which has these samples; by default all of it at once. Follow the last step by
    blend_old. Raises FloatingPointError, naming the samples where it can, when a step's loss,
    gradient or result is not finite; the step is not taken.
    """
    text = sharding.replicate(mesh, samples.text)
    for turn in range(config.optimizer.inner_epochs):
        plan = cut(config, plan_pass(config, epoch, turn, samples.mask, mesh.size), mesh.size)
        for i, (order, t, kl_weight) in enumerate(
            zip(*plan, strict=True), start=turn * len(plan.order)
        ):
            latents, key = _gather(samples.latents, samples.key, order, turn, mesh)
            r, prompt = samples.r[order].astype(np.float32), samples.prompt[order]
            r, kl_weight, prompt, t = sharding.shard_batch(mesh, (r, kl_weight, prompt, t), axis=1)
            batch = Batch(latents, r, kl_weight, prompt, t, key)
            work = parts and (lambda state, batch, i, order=order: parts(order[i], state, batch, i))
            state, metrics = train_step(state, params, text, batch, work)
            yield (
                state,
                _checked(
                    jax.device_get(metrics), order.reshape(-1), f"epoch {epoch + 1}, step {i + 1}"
                ),
            )


@partial(jax.jit, static_argnames="mesh")
def _gather(latents, key, order, turn, mesh):
    """The latents and this pass's noise keys of the samples `order` [m, B], each device's share of
    every microbatch.
    """
    key = jax.vmap(lambda key: jax.random.fold_in(key, turn))(key)
    place = sharding.batch_sharding(mesh, axis=1)
    return jax.lax.with_sharding_constraint((latents[order], key[order]), place)


def _random_bits(config, epoch, stream, count):
    """count uint64 of a counter-based generator's raw output, which no numpy release changes."""
    key = np.array([config.seed, (RngStream.LOSS << 32) | epoch], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, stream], np.uint64)).random_raw(
        count
    )


def _checked(metrics, order, place):
    """The scalar metrics as floats; FloatingPointError if a sample's loss or a norm is not
    finite.
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
