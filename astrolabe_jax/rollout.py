"""Stage rollout: text to latent videos, block by block, with the few-step sampler and a key-value
cache.

Each block starts from noise, is denoised in a few steps, then passes once more through the network
clean, which leaves its clean keys and values in the cache for the blocks to come (spec/sampling.md
4). All functions are pure and made to be jitted by the caller with everything static but params,
adapter, embeddings, noise, cache and initial latents.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.wan.cache import Cache, frames_of, init_cache
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.models.wan.transformer import KeyValues
from astrolabe_jax.schedule import T_MAX, Schedule, SigmaSource, add_noise, sigma_of, velocity_to_x0

# draw(start, step, frames) -> standard normal noise [B, frames, C, H, W] of the block that starts
# at frame `start` (traced in long videos); step 0 is the initial noise, step j the noise added
# before denoising step j.
Draw = Callable[[int | jax.Array, int, int], jax.Array]


@dataclass(frozen=True)
class Sampler:
    """The denoising steps and how their noise levels are read. The defaults are those of every
    released model.
    """

    # timesteps given to the network, see schedule.warp
    steps: tuple[float, ...] = (1000.0, 937.5, 2500 / 3, 625.0)
    first_steps: tuple[float, ...] | None = None  # for the video's first block; None means the same
    context_noise: float = 0.0  # timestep of the clean pass; no noise is added whatever it is
    schedule: Schedule = field(default_factory=Schedule)
    sigma_source: SigmaSource = "exact"

    def __post_init__(self):
        for name in ("steps", "first_steps"):
            steps = getattr(self, name)
            if steps is None and name == "first_steps":
                continue
            if not steps or any(not 0 <= t <= T_MAX for t in steps):
                raise ValueError(
                    f"Sampler.{name} is {steps}; give at least one timestep, each in [0, {T_MAX:g}]"
                )

    def steps_at(self, start) -> tuple[float, ...]:
        """Denoising timesteps of the block that starts at frame `start` (a traced start is never
        the first block).
        """
        first = isinstance(start, int) and start == 0
        return self.first_steps if first and self.first_steps is not None else self.steps

    def sigma(self, t) -> jax.Array:
        """Noise level of timestep t."""
        return sigma_of(t, self.schedule, self.sigma_source)


class Trace(NamedTuple):
    """Every network call of one block: the steps, then the clean pass. Each [passes, B, P, C, H, W]
    but timestep.
    """

    timestep: np.ndarray  # [passes]
    inputs: jax.Array
    velocity: jax.Array
    x0: jax.Array  # inputs - sigma(timestep) velocity


def rollout(
    graphdef,
    params,
    adapter,
    text,
    draw: Draw,
    *,
    frames: int,
    latent_hw: tuple[int, int],
    layout: Layout,
    sampler: Sampler,
    lora_scale=1.0,
    initial_latents=None,
    cache: Cache | None = None,
    start: int = 0,
    trace: bool = False,
):
    """Sample `frames` latent frames: latents [B, T0 + frames, C, H, W] and the cache after them.

    text [B, S, E] embeddings; adapter: tree or None, scaled by lora_scale = alpha / R.
    initial_latents: frames [B, T0, C, H, W] that are given and come first, whole blocks. cache,
    start: continue an earlier rollout that ended at frame `start`, with its cache, made by
    init_cache for the length of the whole video; the pieces then equal one rollout. With trace=True
    a third value follows: a Trace for each block, initial ones included.

    Blocks are unrolled while the window grows and scanned once it is full, so compile time does not
    depend on length. Raises ValueError where lengths, blocks, window and cache do not fit together.
    """
    given = 0 if initial_latents is None else initial_latents.shape[1]
    end = start + given + frames
    _check_pieces(layout, start, given, frames, end)
    config = merge(graphdef, params).config
    text = encode_text(graphdef, params, adapter, text, lora_scale)
    if cache is None:
        if start:
            raise ValueError(
                f"a rollout that starts at frame {start} needs the cache of the frames before it"
            )
        cache = init_cache(config, layout, text.k.shape[1], end, latent_hw)
    h, w = config.grid(latent_hw)
    slots = frames_of(cache, h * w)
    run = _Run(graphdef, params, adapter, lora_scale, text, layout, sampler)
    blocks = [block for block in layout.blocks(end) if block.start >= start]
    steady = [
        b
        for b in blocks
        if slots == layout.capacity
        and b.stop >= slots
        and b.start >= start + given
        and b.start > 0
        and b.stop - b.start == layout.block
    ]
    latents, traces = [], []
    for block in blocks[: len(blocks) - len(steady)]:
        at, count = block.start, block.stop - block.start
        if at < start + given:
            x = initial_latents[:, at - start : at - start + count]
            cache, record = run.given_block(cache, x, at)
        else:
            noise = jnp.stack([draw(at, j, count) for j in range(len(sampler.steps_at(at)))])
            x, cache, record = run.sampled_block(cache, noise, at)
        latents.append(x)
        traces.append(record)
    if steady:
        x, cache, records = _scan_blocks(run, cache, draw, [b.start for b in steady], trace)
        latents.append(x)
        if trace:
            traces += [
                Trace(records.timestep, *(part[i] for part in records[1:]))
                for i in range(len(steady))
            ]
    latents = jnp.concatenate(latents, axis=1)
    return (latents, cache, traces) if trace else (latents, cache)


def encode_text(graphdef, params, adapter, text, lora_scale=1.0) -> KeyValues:
    """Cross-attention keys and values of prompts [B, S, E], once per prompt and policy: the `text`
    of rollout_block.
    """
    return merge(graphdef, params).encode_text(text, adapter, lora_scale)


def rollout_block(
    graphdef,
    params,
    adapter,
    text: KeyValues,
    noise,
    cache: Cache,
    start,
    *,
    layout: Layout,
    sampler: Sampler,
    lora_scale=1.0,
    positions=None,
    aligned: bool = True,
    partial: bool = False,
) -> tuple[jax.Array, Cache, Trace]:
    """Sample one block for streaming: its latents [B, P, C, H, W], the cache with its clean keys,
    and every call.

    noise [steps, B, P, C, H, W]: the initial noise, then the noise added before each later step.
    start: first frame of the block. A Python int (static) while the cache grows; it may be traced
    once start + P >= the window, so that one compiled program serves the rest of the stream. Donate
    the cache. positions, aligned, partial: see WanTransformer.step.
    """
    run = _Run(graphdef, params, adapter, lora_scale, text, layout, sampler)
    steps = len(sampler.steps_at(start))
    if noise.shape[0] != steps:
        raise ValueError(f"noise is {noise.shape}, expected [{steps} steps, B, P, C, H, W]")
    return run.sampled_block(cache, noise, start, positions, aligned, partial)


def cache_block(
    graphdef,
    params,
    adapter,
    text: KeyValues,
    latents,
    cache,
    start,
    *,
    layout,
    sampler,
    lora_scale=1.0,
    t=0.0,
    positions=None,
    aligned: bool = True,
    partial: bool = False,
) -> tuple[Cache, Trace]:
    """Put a block of given latents [B, P, C, H, W] into the cache, at timestep `t`; arguments as in
    rollout_block.
    """
    run = _Run(graphdef, params, adapter, lora_scale, text, layout, sampler)
    return run.given_block(cache, latents, start, t, positions, aligned, partial)


def recache(
    graphdef,
    params,
    adapter,
    text: KeyValues,
    latents,
    cache: Cache,
    end,
    positions,
    *,
    layout: Layout,
    sampler: Sampler,
    lora_scale=1.0,
    skip: int = 0,
) -> tuple[Cache, Trace]:
    """Make the cached keys anew for another prompt, from the clean latents [B, n, C, H, W] before
    frame `end`.

    Source: spec/sampling.md 8. end, positions, skip: see WanTransformer.recache; other arguments as
    in rollout_block.
    """
    model, t = merge(graphdef, params), sampler.context_noise
    velocity, cache = model.recache(
        latents,
        jnp.full(latents.shape[:2], t, jnp.float32),
        text,
        cache,
        end,
        positions,
        adapter,
        lora_scale,
        layout=layout,
        skip=skip,
    )
    x0 = velocity_to_x0(latents, velocity, sampler.sigma(t))
    return cache, Trace(np.full(1, t, np.float32), latents[None], velocity[None], x0[None])


def noise_from_keys(sample_keys: jax.Array, shape: tuple[int, int, int]) -> Draw:
    """Counter-based noise, one key [B] per sample: normal(fold_in(fold_in(key, block start frame),
    step)).

    shape (C, H, W). A sample's noise depends on its key, frame and step only, not on the batch or
    the length.
    """

    def draw(start, step, frames):
        def one(key):
            return jax.random.normal(
                jax.random.fold_in(jax.random.fold_in(key, start), step), (frames, *shape)
            )

        return jax.vmap(one)(sample_keys)

    return draw


def noise_from_array(noise: jax.Array, first: int = 0) -> Draw:
    """Stored noise [steps, B, F, C, H, W] for the frames from `first` on; step 0 is the initial
    noise.
    """

    def draw(start, step, frames):
        return jax.lax.dynamic_slice_in_dim(noise[step], start - first, frames, axis=1)

    return draw


class _Run(NamedTuple):
    """What stays the same over the blocks of a rollout."""

    graphdef: object
    params: dict
    adapter: dict | None
    lora_scale: float | jax.Array
    text: KeyValues
    layout: Layout
    sampler: Sampler

    def sampled_block(self, cache, noise, start, positions=None, aligned=True, partial=False):
        """Denoise a block from noise [steps, B, P, C, H, W], then cache it clean: (latents, cache,
        Trace).
        """
        sampler = self.sampler
        steps = sampler.steps_at(start)
        t = np.asarray((*steps, sampler.context_noise), np.float32)
        # The input of pass j + 1 is noised at its own level; the clean pass comes last and gets x0
        # itself.
        next_sigma = jnp.append(sampler.sigma(t[1:-1]), jnp.zeros(2, jnp.float32))
        next_noise = jnp.concatenate([noise[1:], jnp.zeros((2, *noise.shape[1:]), noise.dtype)])

        def one_pass(carry, xs):
            x, cache = carry
            j, t, sigma, next_sigma, next_noise = xs
            velocity, cache = self._call(x, t, cache, start, j == 0, positions, aligned, partial)
            x0 = velocity_to_x0(x, velocity, sigma)
            return (add_noise(x0, next_noise, next_sigma), cache), (x, velocity, x0)

        xs = (jnp.arange(len(t)), jnp.asarray(t), sampler.sigma(t), next_sigma, next_noise)
        (_, cache), passes = jax.lax.scan(one_pass, (noise[0], cache), xs)
        return passes[0][-1], cache, Trace(t, *passes)

    def given_block(
        self, cache, latents, start, t=0.0, positions=None, aligned=True, partial=False
    ):
        """Cache a block of given latents [B, P, C, H, W] at timestep t: (cache, Trace of the one
        pass).
        """
        velocity, cache = self._call(latents, t, cache, start, True, positions, aligned, partial)
        x0 = velocity_to_x0(latents, velocity, self.sampler.sigma(t))
        return cache, Trace(np.full(1, t, np.float32), latents[None], velocity[None], x0[None])

    def _call(self, x, t, cache, start, first_pass, positions=None, aligned=True, partial=False):
        model = merge(self.graphdef, self.params)
        t = jnp.full(x.shape[:2], t, jnp.float32)
        return model.step(
            x,
            t,
            self.text,
            cache,
            start,
            self.adapter,
            self.lora_scale,
            layout=self.layout,
            first_pass=first_pass,
            positions=positions,
            aligned=aligned,
            partial=partial,
        )


def _scan_blocks(run, cache, draw, starts, trace):
    """Blocks of a full window in one compiled loop: latents [B, n P, C, H, W], cache, and stacked
    Traces if asked.
    """
    frames, steps = run.layout.block, run.sampler.steps
    timestep = np.asarray((*steps, run.sampler.context_noise), np.float32)

    def body(cache, start):
        noise = jnp.stack([draw(start, j, frames) for j in range(len(steps))])
        latents, cache, record = run.sampled_block(cache, noise, start)
        return cache, (latents, record[1:] if trace else None)

    cache, (latents, records) = jax.lax.scan(body, cache, jnp.asarray(starts, jnp.int32))
    latents = jnp.moveaxis(latents, 0, 1)
    latents = latents.reshape(latents.shape[0], -1, *latents.shape[3:])
    return latents, cache, Trace(timestep, *records) if trace else None


def _check_pieces(layout, start, given, frames, end):
    """Raise ValueError unless earlier frames, given frames and new frames are whole blocks."""
    if frames < 0:
        raise ValueError(f"frames is {frames}; it must not be negative")
    layout.check_frames(end)
    boundaries = {0, *(block.stop for block in layout.blocks(end))}
    for name, frame in (("start", start), ("the end of initial_latents", start + given)):
        if frame not in boundaries:
            raise ValueError(
                f"{name} is frame {frame}, which is not a block boundary (blocks of "
                f"{layout.block}); a rollout continues, and takes given latents, in whole blocks"
            )
