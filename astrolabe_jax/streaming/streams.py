"""The driver of blocks: every video, whole or in windows, is sampled here, a block at a time.

    state = begin(policy, videos, slots, latent_shape)
    for block in sample_blocks(policy, videos, state, range(7)):
        state = block.state                     # block.latents [B, P, C, H, W]

Videos of one batch are advanced together. A StreamState carries what a video needs of its past: the
keys in sight, the decoder's memory, and the latents that may be asked for again. Training,
evaluation, sampling and planning all come through this file (docs/streaming.md).
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax import rollout, sharding
from astrolabe_jax.models.wan import cache as kv
from astrolabe_jax.models.wan.attention import KeyValues
from astrolabe_jax.models.wan.config import Layout, WanConfig
from astrolabe_jax.types import BlockPlan, CacheChange, Place, Policy, StreamState, VideoBatch

NoiseOf = Callable[[BlockPlan], jax.Array]


class SampledBlock(NamedTuple):
    """One block of a set of videos."""

    plan: BlockPlan
    latents: jax.Array  # [B, P, C, H, W]
    state: StreamState  # after it; the next block takes its memory


@functools.partial(jax.jit, static_argnums=range(5))
def begin(
    config: WanConfig, layout: Layout, count: int, slots: int, latent_shape: tuple[int, int, int]
) -> StreamState:
    """Return the state of `count` videos at frame 0.

    Args:
      config, layout: of the policy.
      slots: frames of the cache.
      latent_shape: (C, H, W).
    """
    state = StreamState(
        kv.empty_cache(config, count, slots, latent_shape[1:]),
        None,
        # at least frame 0, which a flush keeps
        jnp.zeros((count, max(layout.kept, 1), *latent_shape), jnp.float32),
        jnp.zeros((count, slots, *latent_shape), jnp.float32),
    )
    return jax.tree.map(sharding.by_sample, state, by_axis(state, 0, 1))


def by_axis(state: StreamState, outer: Any, inner: Any) -> Any:
    """Return a value for every array: `inner` for the cache, whose axis 1 is the streams'."""
    cache = jax.tree.map(lambda _: inner, state.cache)
    return jax.tree.map(lambda _: outer, state._replace(cache=None))._replace(cache=cache)


def sample_blocks(
    policy: Policy,
    videos: VideoBatch,
    state: StreamState,
    blocks: Sequence[int],
    noise_of: NoiseOf | None = None,
) -> Iterator[SampledBlock]:
    """Sample some blocks of the videos, one after the other.

    The caller has already applied the change of prompts before the first of them, if there is one
    (`change_prompts`).

    Args:
      state: behind the blocks before these. Its cache's memory is taken.
      blocks: their numbers, ascending, without gaps.
      noise_of: noise [steps, B, P, C, H, W] of a block; by default it is drawn from videos.keys.
    """
    draw = noise_of or _noise_from_keys(policy, videos, state)
    for number, text in zip(blocks, _texts(policy, videos, blocks), strict=True):
        plan = videos.blocks[number]
        if number > blocks[0]:
            state = _change_prompts(policy, videos, state, number, text)
        place = _place_of(policy.layout, videos, state, plan)
        latents, cache = rollout.sample_block(policy, text, draw(plan), state.cache, place)
        state = _remember(state._replace(cache=cache), latents, plan)
        yield SampledBlock(plan, latents, state)


def cache_blocks(
    policy: Policy,
    videos: VideoBatch,
    state: StreamState,
    latents: jax.Array,
    blocks: Sequence[int],
    t: float,
) -> Iterator[SampledBlock]:
    """Put given latents [B, F, C, H, W] of some blocks into the videos, by clean passes alone.

    Behind latents that the policy has sampled itself, the state is that of sampling, bit for bit.

    Args:
      state: behind the blocks before these. Its memory is taken.
      t: timestep at which the latents are read.
    """
    begin = videos.blocks[blocks[0]].frame
    for number, text in zip(blocks, _texts(policy, videos, blocks), strict=True):
        plan = videos.blocks[number]
        if number > blocks[0]:
            state = _change_prompts(policy, videos, state, number, text)
        part = latents[:, plan.frame - begin : plan.frame - begin + plan.count]
        place = _place_of(policy.layout, videos, state, plan)
        cache = rollout.cache_block(policy, text, part, state.cache, place, t)
        state = _remember(state._replace(cache=cache), part, plan)
        yield SampledBlock(plan, part, state)


def change_prompts(
    policy: Policy, videos: VideoBatch, state: StreamState, block: int
) -> StreamState:
    """Return the state before a block for which prompts may have changed.

    The cache of `state` is left alone; its other memory is shared with the result, and where no
    prompt changes the result is `state` itself.

    The keys in sight follow a change as config.scenes says, for the videos that it is about
    (docs/streaming.md, Scene changes).
    """
    if not any(timeline.blocks[block].change for timeline in videos.timelines):
        return state
    own = state._replace(cache=jax.tree.map(jnp.copy, state.cache))
    return _change_prompts(policy, videos, own, block, next(_texts(policy, videos, [block])))


def refresh_cache(
    policy: Policy, videos: VideoBatch, state: StreamState, block: int
) -> StreamState:
    """Return the state with its keys computed anew, in one pass from their latents, before a block.

    The other memory is shared with `state`.
    """
    layout = policy.layout
    cache = rollout.reencode(
        policy,
        next(_texts(policy, videos, [block])),
        state.first[:, : layout.kept],
        state.recent[:, -(layout.capacity - layout.kept) :],
        np.int32(videos.blocks[block].start),
    )
    return state._replace(cache=cache)


@functools.partial(jax.jit, static_argnames="each")
def fork(state: StreamState, each: int) -> StreamState:
    """Return `each` copies of every video's state, adjacent, with memory of their own."""

    return jax.tree.map(
        lambda part, axis: sharding.by_sample(jnp.repeat(part, each, axis=axis), axis),
        state,
        by_axis(state, 0, 1),
    )


def block_at(videos: VideoBatch, frame: int) -> int:
    """Return the number of the block that a latent frame is in."""
    return sum(plan.frame <= frame for plan in videos.blocks) - 1


def blocks_between(videos: VideoBatch, begin: int, end: int) -> range:
    """Return the numbers of the blocks of the latent frames from `begin` to `end`."""
    return range(block_at(videos, begin - 1) + 1, block_at(videos, end - 1) + 1)


@jax.jit
def finite(latents: jax.Array) -> jax.Array:
    """Return whether each sample has finite numbers alone: [B, ...] -> [B] bool."""
    return jnp.isfinite(latents).all(axis=range(1, latents.ndim))


def positions_of(plans: Sequence[BlockPlan]) -> np.ndarray:
    """Return the rotary positions of the frames of some blocks, int32."""
    return np.concatenate([np.asarray(plan.positions, np.int32) for plan in plans])


def _texts(policy: Policy, videos: VideoBatch, blocks: Sequence[int]) -> Iterator[KeyValues]:
    """Give each block's prompts as the policy reads them, encoded anew only where they change."""
    for prompts, alike in itertools.groupby(blocks, videos.prompts_at):
        rows = np.array([videos.rows[prompt] for prompt in prompts])
        text = rollout.encode_text(policy, sharding.place_batch(videos.embeddings[rows]))
        for _ in alike:
            yield text


def _noise_from_keys(policy: Policy, videos: VideoBatch, state: StreamState) -> NoiseOf:
    keys = sharding.place_batch(videos.keys)
    shape = state.recent.shape[2:]

    def noise_of(plan: BlockPlan) -> jax.Array:
        frame = np.int32(videos.first_frame + plan.frame)
        return rollout.block_noise(keys, frame, len(policy.sampler.steps), plan.count, shape)

    return noise_of


def _place_of(layout: Layout, videos: VideoBatch, state: StreamState, plan: BlockPlan) -> Place:
    """Return where a block stands in the cache of a state."""
    positions = np.asarray(plan.positions, np.int32)
    if videos.traced:
        return Place(np.int32(plan.start), positions, aligned=plan.aligned, partial=True)
    return place_at(layout, state.recent.shape[1], plan.start, plan.count, positions, plan.aligned)


def place_at(
    layout: Layout,
    slots: int,
    start: int,
    count: int,
    positions: np.ndarray | None,
    aligned: bool = True,
) -> Place:
    """Return the place of `count` frames from `start` on, in a cache of `slots` frames.

    It is static while the cache fills. Once it is full it is traced, so that one compiled program
    serves the rest of the video.
    """
    full = slots == layout.capacity and start + count > slots and start > 0
    return Place(
        np.int32(start) if full else None, positions, 0 if full else start, aligned=aligned
    )


def _change_prompts(
    policy: Policy,
    videos: VideoBatch,
    state: StreamState,
    block: int,
    text: KeyValues,
) -> StreamState:
    """Apply the changes before a block to the videos that have one; the memory of `state` is
    taken.
    """
    changes = [timeline.blocks[block].change for timeline in videos.timelines]
    change = next((change for change in changes if change), None)
    if change is None:
        return state
    own = state if all(changes) else state._replace(cache=jax.tree.map(jnp.copy, state.cache))
    cache = _change_cache(policy, own, change, videos.blocks[block].frame, text)
    if not all(changes):
        cache = _where(np.array([bool(change) for change in changes]), cache, state.cache)
    return state._replace(cache=cache)


def _change_cache(
    policy: Policy,
    state: StreamState,
    change: CacheChange,
    frame: int,
    text: KeyValues,
) -> kv.Cache:
    """Apply one change to the caches of all videos, before the block that begins at `frame`."""
    slots = state.recent.shape[1]
    if change.keep is not None:
        place = place_at(policy.layout, slots, change.end, 0, None)
        return _restart(
            policy, state.cache, place, change.keep, state.recent.shape[3:], change.every
        )
    gone = frame - slots  # frames before it are no longer among the recent ones
    latents = [state.first[:, f] if f < gone else state.recent[:, f - gone] for f in change.frames]
    positions = np.asarray(change.positions, np.int32)
    place = place_at(policy.layout, slots, change.end - len(latents), len(latents), positions)
    stacked = jnp.stack(latents, axis=1)
    return rollout.recache(policy, text, stacked, state.cache, place, change.skip)


@functools.partial(jax.jit, static_argnames=("keep", "latent_hw", "every"), donate_argnames="cache")
def _restart(policy: Policy, cache: kv.Cache, place: Place, keep, latent_hw, every: bool):
    return kv.restart(cache, policy.layout, place.frame, keep, policy.config, latent_hw, every)


def _remember(state: StreamState, latents: jax.Array, plan: BlockPlan) -> StreamState:
    """Return the state with the latents of a block among those that may be asked for again."""
    first, recent = _updated_latents(state.first, state.recent, latents, np.int32(plan.frame))
    return state._replace(first=first, recent=recent)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _updated_latents(first, recent, latents, frame):
    """Return first and recent latents behind a block that begins at `frame` (traced)."""
    for i in range(latents.shape[1]):
        here = (jnp.arange(first.shape[1]) == frame + i).reshape(1, -1, 1, 1, 1)
        first = jnp.where(here, latents[:, i : i + 1].astype(first.dtype), first)
    recent = jnp.concatenate([recent, latents.astype(recent.dtype)], axis=1)
    return first, recent[:, latents.shape[1] :]


@jax.jit
def _where(chosen, one, other):
    return jax.tree.map(lambda a, b: jnp.where(chosen.reshape(1, -1, 1, 1, 1), a, b), one, other)
