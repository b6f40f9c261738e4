"""A video as a stream of blocks: the sampler of rollout.py along a timeline of scenes, one block at
a time.

Nothing here grows with the length of the video. While the cache fills, each block has a compiled
program of its own; once it is full, one serves the rest.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from astrolabe_jax import rollout, sharding
from astrolabe_jax.models.wan import cache as kv
from astrolabe_jax.models.wan.config import Block, Layout, WanConfig
from astrolabe_jax.models.wan.transformer import KeyValues
from astrolabe_jax.rollout import Sampler, Trace
from astrolabe_jax.streaming.scenes import Change, Step


class Policy(NamedTuple):
    """What is sampled from, and how."""

    graphdef: Any
    params: dict
    adapter: dict | None
    lora_scale: float  # alpha / R
    config: WanConfig
    layout: Layout
    sampler: Sampler
    mesh: Mesh


class Piece(NamedTuple):
    """One block of a stream."""

    step: Step | None  # None for given frames
    latents: jax.Array  # [B, P, C, H, W]
    trace: Trace | None
    change: Trace | None  # the pass of a recache before it
    cache: kv.Cache  # after it; the next block takes its memory


def stream(
    policy: Policy,
    text: Callable[[int], KeyValues],
    steps: Sequence[Step],
    noise: Callable[[Step], jax.Array],
    slots: int,
    batch: int,
    latent_hw: tuple[int, int],
    given: jax.Array | None = None,
    trace: bool = False,
) -> Iterator[Piece]:
    """The blocks of a video, those of `given` latents [B, T0, C, H, W] first, then one for each of
    `steps`.

    text(scene): from `encode_text`; it is asked for once each time a scene begins. noise(step) is
    [denoising steps, B, P, C, H, W]. slots: frames of the cache, as in scenes.timeline. trace:
    return every network call, too.
    """
    cache = empty_cache(policy, batch, slots, latent_hw)
    needed = _last_use(steps)
    # frame of the video -> its clean latents, while a change may ask for them
    history: dict[int, jax.Array] = {}
    scene, keys = None, None
    for block in _given_blocks(policy.layout, given):
        keys = text(steps[0].scene) if keys is None else keys
        scene = steps[0].scene
        latents = given[:, block.start : block.stop]
        start, at = _place(policy.layout, slots, block.start, block.stop)
        cache, record = cache_block(*split(policy), keys, latents, cache, start, at=at)
        _remember(history, needed, block.start, latents)
        yield Piece(None, latents, record if trace else None, None, cache)
    for step in steps:
        if step.scene != scene:
            scene, keys = step.scene, text(step.scene)
        cache, made = changed(policy, keys, cache, step.change, history, slots, latent_hw)
        latents, cache, record = _block(policy, keys, noise(step), cache, step, slots, trace)
        _remember(history, needed, step.frame, latents)
        for frame in [frame for frame in history if needed[frame] <= step.frame]:
            del history[frame]
        yield Piece(step, latents, record, made if trace else None, cache)


@functools.partial(jax.jit, static_argnames=("graphdef", "mesh"))
def encode_text(graphdef, params, adapter, lora_scale, text: jax.Array, *, mesh: Mesh) -> KeyValues:
    """Cross-attention keys and values of prompts [B, S, E]."""
    return sharding.on_mesh(mesh, rollout.encode_text)(graphdef, params, adapter, text, lora_scale)


def _given_blocks(layout: Layout, given: jax.Array | None) -> Sequence[Block]:
    return layout.blocks(given.shape[1]) if given is not None else ()


def _last_use(steps: Sequence[Step]) -> Mapping[int, int]:
    """Frame of the video -> first frame of the last block before which a change asks for its
    latents.
    """
    return {frame: step.frame for step in steps if step.change for frame in step.change.frames}


def _remember(history: dict, needed: Mapping[int, int], start: int, latents: jax.Array) -> None:
    history |= {start + i: latents[:, i] for i in range(latents.shape[1]) if start + i in needed}


def changed(
    policy: Policy,
    keys: KeyValues,
    cache: kv.Cache,
    change: Change | None,
    history: Mapping[int, jax.Array],
    slots: int,
    latent_hw: tuple[int, int],
) -> tuple[kv.Cache, Trace | None]:
    """The cache, whose memory is taken, after a change, and the Trace of a recache, which needs
    frames of `history`.
    """
    if change is None:
        return cache, None
    end, at = _place(policy.layout, slots, change.end, change.end)
    if change.keep is not None:
        return _restart(
            cache, end, at, policy.layout, change.keep, change.every, policy.config, latent_hw
        ), None
    latents = jnp.stack([history[frame] for frame in change.frames], axis=1)
    positions = np.asarray(change.positions, np.int32)
    return _recache(*split(policy), keys, latents, cache, end, positions, at=at, skip=change.skip)


def _block(policy, keys, noise, cache, step: Step, slots: int, trace: bool):
    start, at = _place(policy.layout, slots, step.start, step.start + step.count)
    positions = np.asarray(step.positions, np.int32)
    made = sample_block(
        *split(policy),
        keys,
        noise,
        cache,
        start,
        positions,
        at=at,
        aligned=step.aligned,
        trace=trace,
    )
    return made if trace else (*made, None)


def _place(layout: Layout, slots: int, frame: int, stop: int) -> tuple[jax.Array, int | None]:
    """A frame as (traced, None) where the cache is full at `stop`, so that one program serves all;
    else (0, static).
    """
    full = slots == layout.capacity and stop > slots and frame > 0
    return (jnp.int32(frame), None) if full else (jnp.int32(0), frame)


def split(policy: Policy) -> tuple:
    """A policy as arguments of the programs below: a static part, and arrays."""
    static = (policy.graphdef, policy.layout, policy.sampler, policy.mesh)
    return static, policy.params, policy.adapter, policy.lora_scale


def empty_cache(policy: Policy, batch: int, slots: int, latent_hw: tuple[int, int]) -> kv.Cache:
    """A cache of `slots` frames, split over the samples."""
    return _empty(policy.config, batch, slots, latent_hw, policy.mesh)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _empty(config, batch, slots, latent_hw, mesh):
    cache = kv.empty_cache(config, batch, slots, latent_hw)
    return jax.lax.with_sharding_constraint(cache, sharding.batch_sharding(mesh, axis=1))


_program = functools.partial(jax.jit, donate_argnames="cache")


@functools.partial(_program, static_argnames=("static", "at", "aligned", "trace", "partial"))
def sample_block(
    static,
    params,
    adapter,
    lora_scale,
    text,
    noise,
    cache,
    start,
    positions,
    *,
    at,
    aligned,
    trace,
    partial=False,
):
    """rollout.rollout_block at frame `at`, or at the traced `start` where that is None; see
    `split`.
    """
    graphdef, layout, sampler, mesh = static
    latents, cache, record = sharding.on_mesh(mesh, rollout.rollout_block)(
        graphdef,
        params,
        adapter,
        text,
        noise,
        cache,
        start if at is None else at,
        layout=layout,
        sampler=sampler,
        lora_scale=lora_scale,
        positions=positions,
        aligned=aligned,
        partial=partial,
    )
    return (latents, cache, record) if trace else (latents, cache)


@functools.partial(_program, static_argnames=("static", "at", "t", "aligned", "partial"))
def cache_block(
    static,
    params,
    adapter,
    lora_scale,
    text,
    latents,
    cache,
    start,
    positions=None,
    *,
    at,
    t=0.0,
    aligned=True,
    partial=False,
):
    """rollout.cache_block, as `sample_block`."""
    graphdef, layout, sampler, mesh = static
    return sharding.on_mesh(mesh, rollout.cache_block)(
        graphdef,
        params,
        adapter,
        text,
        latents,
        cache,
        start if at is None else at,
        layout=layout,
        sampler=sampler,
        lora_scale=lora_scale,
        t=t,
        positions=positions,
        aligned=aligned,
        partial=partial,
    )


@functools.partial(_program, static_argnames=("static", "at", "skip"))
def _recache(
    static, params, adapter, lora_scale, text, latents, cache, end, positions, *, at, skip
):
    graphdef, layout, sampler, mesh = static
    return sharding.on_mesh(mesh, rollout.recache)(
        graphdef,
        params,
        adapter,
        text,
        latents,
        cache,
        end if at is None else at,
        positions,
        layout=layout,
        sampler=sampler,
        lora_scale=lora_scale,
        skip=skip,
    )


@functools.partial(
    _program, static_argnames=("at", "layout", "keep", "every", "config", "latent_hw")
)
def _restart(cache, end, at, layout, keep, every, config, latent_hw):
    return kv.restart(cache, layout, end if at is None else at, keep, config, latent_hw, every)
