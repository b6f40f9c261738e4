"""Stage rollout: text to latents, a block at a time, with the few-step sampler and a KV cache.

A block starts from noise and is denoised in a few steps. Then it passes once more through the
network, clean, which leaves its clean keys and values in the cache for the blocks to come
(docs/sampling.md, Blocks). Every function is pure and compiled; streaming/streams.py drives them
along a video.
"""

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from astrolabe_jax import sharding
from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.lora import scaled
from astrolabe_jax.models.wan import cache as kv
from astrolabe_jax.models.wan.attention import KeyValues
from astrolabe_jax.models.wan.transformer import WanTransformer
from astrolabe_jax.schedule import (
    T_MAX,
    Schedule,
    SigmaSource,
    add_noise,
    sigma_of,
    velocity_to_x0,
)
from astrolabe_jax.types import Array, Embeddings, Place, Policy


@dataclass(frozen=True)
class Sampler:
    """The denoising steps and how their noise levels are read. The defaults are those of every
    released model.
    """

    # timesteps given to the network, see schedule.warp
    steps: tuple[float, ...] = (1000.0, 937.5, 2500 / 3, 625.0)
    context_noise: float = 0.0  # timestep of the clean pass; no noise is added whatever it is
    schedule: Schedule = field(default_factory=Schedule)
    sigma_source: SigmaSource = "exact"

    def __post_init__(self):
        if not self.steps or any(not 0 <= t <= T_MAX for t in self.steps):
            raise ValueError(
                f"Sampler.steps is {self.steps}; give at least one timestep, each in [0, {T_MAX:g}]"
            )

    def sigma(self, t) -> jax.Array:
        """Return the noise level of timestep t."""
        return sigma_of(t, self.schedule, self.sigma_source)


Block = Float[Array, "B P C H W"]  # latents of one block


@jax.jit
def encode_text(policy: Policy, embeddings: Embeddings) -> KeyValues:
    """Return the cross-attention keys and values of prompts [B, S, E]: the `text` of a block."""
    model, lora = _model(policy)
    return model.encode_text(embeddings, lora)


@functools.partial(jax.jit, donate_argnames="cache")
def sample_block(
    policy: Policy,
    text: KeyValues,
    noise: Float[Array, "steps B P C H W"],
    cache: kv.Cache,
    place: Place,
) -> tuple[Block, kv.Cache]:
    """Sample one block.

    Args:
      text: from `encode_text` with the same policy.
      noise: [steps, B, P, C, H, W], the initial noise, then what is added before each later step.
      cache: its memory is taken.

    Returns:
      latents [B, P, C, H, W], and the cache with the block's clean keys.

    Raises:
      ValueError: for noise of another number of steps.
    """
    sampler = policy.sampler
    if noise.shape[0] != len(sampler.steps):
        raise ValueError(
            f"noise is {noise.shape}, expected [{len(sampler.steps)} steps, B, P, C, H, W]"
        )
    t = np.asarray((*sampler.steps, sampler.context_noise), np.float32)
    # The input of pass j + 1 is noised at its own level; the clean pass comes last and gets x0.
    next_sigma = jnp.append(sampler.sigma(t[1:-1]), jnp.zeros(2, jnp.float32))
    next_noise = jnp.concatenate([noise[1:], jnp.zeros((2, *noise.shape[1:]), noise.dtype)])

    def one_pass(carry, xs):
        x, cache = carry
        j, t, sigma, next_sigma, next_noise = xs
        velocity, cache = _call(policy, text, place, x, t, cache, j == 0)
        x0 = velocity_to_x0(x, velocity, sigma)
        return (add_noise(x0, next_noise, next_sigma), cache), x

    xs = (jnp.arange(len(t)), jnp.asarray(t), sampler.sigma(t), next_sigma, next_noise)
    (_, cache), inputs = jax.lax.scan(one_pass, (noise[0], cache), xs)
    return inputs[-1], cache


@functools.partial(jax.jit, static_argnames="t", donate_argnames="cache")
def cache_block(
    policy: Policy,
    text: KeyValues,
    latents: Block,
    cache: kv.Cache,
    place: Place,
    t: float = 0.0,
) -> kv.Cache:
    """Put the keys of given latents [B, P, C, H, W] into the cache, read at timestep `t`.

    Arguments as in `sample_block`.
    """
    return _call(policy, text, place, latents, t, cache, True)[1]


@functools.partial(jax.jit, static_argnames="skip", donate_argnames="cache")
def recache(
    policy: Policy,
    text: KeyValues,
    latents: Float[Array, "B n C H W"],
    cache: kv.Cache,
    place: Place,
    skip: int = 0,
) -> kv.Cache:
    """Compute the cached keys anew for another prompt (docs/streaming.md, Scene changes).

    Args:
      latents: [B, n, C, H, W], the clean frames in sight, oldest first.
      place: these frames as one block, with their rotary positions.
      skip: first places, of the sink, that keep their keys.

    Other arguments as in `sample_block`.
    """
    model, lora = _model(policy)
    view = _view(policy, latents, cache, place)
    return model.recache(latents, policy.sampler.context_noise, text, cache, view, lora, skip)[1]


@jax.jit
def reencode(
    policy: Policy,
    text: KeyValues,
    first: Float[Array, "B sink C H W"],
    recent: Float[Array, "B n C H W"],
    start: Int[Array, ""],
) -> kv.Cache:
    """Return a cache for frame `start` made in one pass from latents (WanTransformer.reencode)."""
    model, lora = _model(policy)
    return model.reencode(
        first, recent, policy.sampler.context_noise, text, start, lora, layout=policy.layout
    )


@functools.partial(jax.jit, static_argnames=("steps", "frames", "shape"))
def block_noise(
    keys: jax.Array, frame: Int[Array, ""], steps: int, frames: int, shape: tuple[int, int, int]
) -> Float[Array, "steps B P C H W"]:
    """Return the noise [steps, B, P, C, H, W] of the block at `frame`; it is counter-based.

    A sample's noise is normal(fold_in(fold_in(key, frame), step)): it depends on its key, frame and
    step only, not on the batch or the length.

    Args:
      keys: [B], one a sample.
      frame: first frame of the block in the video; traced.
      steps: denoising steps; step 0 is the initial noise, step j the noise added before it.
      frames: P; shape: (C, H, W).
    """

    def one(key, step):
        key = jax.random.fold_in(jax.random.fold_in(key, frame), step)
        return jax.random.normal(key, (frames, *shape))

    noise = [jax.vmap(functools.partial(one, step=step))(keys) for step in range(steps)]
    return sharding.by_sample(jnp.stack(noise), axis=1)


def _call(policy: Policy, text: KeyValues, place: Place, x, t, cache: kv.Cache, first):
    """Run the network on a block at timestep `t`, a scalar: (velocity, cache)."""
    model, lora = _model(policy)
    return model.step(x, t, text, cache, _view(policy, x, cache, place), lora, first)


def _model(policy: Policy) -> tuple[WanTransformer, dict | None]:
    """Return the network of a policy, and its adapter as the network takes it."""
    model = merge(policy.graphdef, policy.params)
    return model, scaled(policy.adapter, policy.lora_scale)


def _view(policy: Policy, x, cache: kv.Cache, place: Place) -> kv.View:
    """Return what a call on latents x writes and reads in the cache."""
    h, w = policy.config.grid(x.shape[3:])
    return kv.View(
        policy.layout,
        h * w,
        kv.frames_of(cache, h * w),
        place.frame,
        x.shape[1],
        place.aligned,
        place.partial,
        place.positions,
    )
