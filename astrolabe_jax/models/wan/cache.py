"""The key-value cache of a rollout: a pytree of static shape, written in place, never shifted.

The first `kept` frames, the sink, keep slots 0 .. kept - 1. Every later frame f has slot
kept + (f - kept) mod (frames - kept), a ring. Until the ring is full the slot of a frame is its
number, so a growing window is read as an exact-length slice; once it is full every slot holds a
visible frame. The order of keys does not matter to attention, so neither phase needs a mask. Keys
are stored rotated, except those of a moving sink (docs/models.md, KV cache).
"""

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax.models.wan.attention import KeyValues
from astrolabe_jax.models.wan.config import Layout, WanConfig
from astrolabe_jax.models.wan.rope import combine, inverse, rope_table, rotate, take_rows

Cache = KeyValues  # of every layer, [layers, B, slots * L, A, K]


class View(NamedTuple):
    """What one call writes and reads: a block of frames in a cache of `slots` frames."""

    layout: Layout
    frame_tokens: int  # L
    slots: int
    # First frame, in the cache's count. A Python int reads exactly the frames that exist; a traced
    # one is allowed once the cache is full, and anywhere if the view is `partial`.
    start: int | jax.Array | np.int32
    frames: int  # of the block
    aligned: bool = True  # the block is one of layout.blocks; not so where a `restart` moved them
    partial: bool = False  # `start` is traced and the cache may not be full
    positions: jax.Array | np.ndarray | None = (
        None  # [frames] rotary positions; None: the frames' numbers
    )

    @property
    def end(self) -> int | jax.Array | np.int32:
        """One past the block's last frame."""
        return self.start + self.frames

    @property
    def growing(self) -> bool:
        """Whether every frame up to the block's end still has its own slot."""
        return isinstance(self.start, int) and self.start + self.frames <= self.slots

    @property
    def visible_tokens(self) -> jax.Array | None:
        """How many of the keys that `read` gives are there, first ones first; None for all of
        them.
        """
        return self.frame_tokens * jnp.minimum(self.end, self.slots) if self.partial else None

    @property
    def raw_frames(self) -> int:
        """Leading frames of the block whose keys are stored un-rotated: those of a moving sink."""
        if not self.layout.sink_moves or not isinstance(self.start, int):
            return 0
        return min(max(self.layout.kept - self.start, 0), self.frames)

    @property
    def frozen_frames(self) -> int:
        """Leading frames of the block that only its first pass writes: those in sink slots of the
        published buffer.
        """
        start = self.start if isinstance(self.start, int) else None
        if not self.layout.faithful_sinks or start == 0:
            return 0
        # once full, the newest block comes last
        slot = start if start is not None and self.growing else self.slots - self.frames
        return min(max(self.layout.sink - slot, 0), self.frames)


def empty_cache(config: WanConfig, batch: int, slots: int, latent_hw: tuple[int, int]) -> Cache:
    """Return a cache of `slots` frames, all zero."""
    h, w = config.grid(latent_hw)
    shape = (config.num_layers, batch, slots * h * w, config.num_heads, config.head_dim)
    return Cache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def frames_of(cache: Cache, frame_tokens: int) -> int:
    """Slots of the cache."""
    return cache.k.shape[2] // frame_tokens


def write(cache: Cache, layer, k, v, view: View, first_pass=True) -> Cache:
    """Put a block's keys and values [B, P L, A, K] into its slots of one layer.

    With layout.faithful_sinks a later pass of a later block leaves sink slots as they are
    (docs/models.md, Faithful sinks).
    """
    length = view.frame_tokens
    frozen = view.frozen_frames
    unit = gcd(view.frames if view.growing else _unit(view), frozen)

    def put(buffer, new):
        for i in range(0, view.frames, unit):
            at = (layer, 0, _slot(view.start + i, view.layout, view.slots) * length, 0, 0)
            piece = new[None, :, i * length : (i + unit) * length].astype(buffer.dtype)
            if i < frozen:
                piece = jnp.where(first_pass, piece, jax.lax.dynamic_slice(buffer, at, piece.shape))
            buffer = jax.lax.dynamic_update_slice(buffer, piece, at)
        return buffer

    return Cache(put(cache.k, k), put(cache.v, v))


def read(cache: Cache, layer, view: View, sink_table=None) -> tuple[jax.Array, jax.Array]:
    """Return keys (rotated) and values [B, M, A, K] of all frames the block sees, in slot order.

    sink_table: rotary table of the sink frames at their present positions, where the sink moves.
    """
    length = view.frame_tokens
    k, v = (jax.lax.dynamic_index_in_dim(part, layer, keepdims=False) for part in cache)
    ranges = _visible_slots(view)
    keys = [k[:, lo * length : hi * length] for lo, hi in ranges]
    values = [v[:, lo * length : hi * length] for lo, hi in ranges]
    if sink_table is not None:
        raw = min(view.layout.kept, ranges[0][1]) * length
        sink = rotate(keys[0][:, :raw], take_rows(sink_table, slice(raw)))
        keys = [sink, keys[0][:, raw:], *keys[1:]]
    return jnp.concatenate(keys, axis=1), jnp.concatenate(values, axis=1)


def past_frames(
    cache: Cache, layer, layout: Layout, start, frame_tokens: int, recent: int
) -> KeyValues:
    """Return the stored keys, and values, of the sink and of the frames before `start`.

    They are [B, (kept + recent) L, A, K]. Places of frames that do not exist hold anything.

    Args:
      start: frames so far, traced.
      recent: frames before `start`.
    """
    slots = frames_of(cache, frame_tokens)
    before = jnp.clip(start - recent + jnp.arange(recent), 0)
    places = jnp.concatenate([jnp.arange(layout.kept), _slot(before, layout, slots)])

    def take(part):
        part = jax.lax.dynamic_index_in_dim(part, layer, keepdims=False)
        framed = part.reshape(part.shape[0], slots, frame_tokens, *part.shape[2:])
        return framed[:, places].reshape(part.shape[0], -1, *part.shape[2:])

    return KeyValues(take(cache.k), take(cache.v))


def place_frames(cache: Cache, k, v, layout: Layout, frames, frame_tokens: int) -> Cache:
    """Put stored keys and values [layers, B, n L, A, K] of `frames` [n] into their slots.

    Negative frames are left out. A frame that a later one evicts must not be among them. `frames`
    may be traced.
    """
    slots = frames_of(cache, frame_tokens)
    places = jnp.where(frames < 0, slots, _slot(frames, layout, slots))

    def put(buffer, new):
        framed = (*buffer.shape[:2], -1, frame_tokens, *buffer.shape[3:])
        new = new.reshape(framed).astype(buffer.dtype)
        return buffer.reshape(framed).at[:, :, places].set(new, mode="drop").reshape(buffer.shape)

    return Cache(put(cache.k, k), put(cache.v, v))


def place_visible(cache: Cache, k, v, layout: Layout, end: int) -> Cache:
    """Put keys and values of a whole video to frame `end` into the cache, as `place_frames` does.

    They are those of the frames that a rollout would have left.
    """
    length = k.shape[2] // end
    frames = np.arange(end)
    frames = frames[(frames < layout.kept) | (frames >= end - (layout.capacity - layout.kept))]
    tokens = _tokens_of(frames, length)
    return place_frames(cache, k[:, :, tokens], v[:, :, tokens], layout, frames, length)


def restart(
    cache: Cache,
    layout: Layout,
    end,
    keep: Sequence[int],
    config: WanConfig,
    latent_hw,
    every: bool = False,
) -> Cache:
    """Begin a new count of frames: what lies in place keep[i] becomes frame i.

    The next block is frame len(keep). Places are those of the published buffer: the sink, then the
    frames of the window, oldest first. Where positions are relative the keys move to those of the
    new count. A growing window does not read the other places, so they are left as they are, unless
    `every` place is to keep its content, as in the published buffer. `end`: frames so far in the
    old count; a Python int, or traced once the cache is full.
    """
    h, w = config.grid(latent_hw)
    slots = frames_of(cache, h * w)
    places = np.array([*keep, *range(len(keep), slots)][: slots if every else len(keep)], np.int32)
    if not len(places):
        return cache
    frames = _frames_in_order(layout, end, slots)
    tokens = _tokens_of(_slot(frames, layout, slots)[places], h * w)
    k, v = (part[:, :, tokens] for part in cache)
    if layout.positions == "relative":
        now = np.arange(len(places))
        before = rope_table(frames[places], (h, w), config.head_dim)
        after = rope_table(now, (h, w), config.head_dim)
        turn = combine(
            stored_table(after, now, layout), inverse(stored_table(before, places, layout))
        )
        k = jax.vmap(rotate, in_axes=(0, None))(k, turn)
    at = (0,) * 5
    return Cache(
        jax.lax.dynamic_update_slice(cache.k, k, at), jax.lax.dynamic_update_slice(cache.v, v, at)
    )


def rewrite(cache: Cache, layer, k, v, view: View, skip: int) -> Cache:
    """Put keys and values [B, n L, A, K] into every place of one layer that is in use.

    view: the last n frames, n = min(end, slots). The first `skip` places keep what they hold.
    """
    length = view.frame_tokens
    slots = _slot(_frames_in_order(view.layout, view.end, view.slots), view.layout, view.slots)
    tokens = _tokens_of(jnp.argsort(slots[: view.frames])[skip:], length)

    def put(buffer, new):
        new = new[None, :, tokens].astype(buffer.dtype)
        return jax.lax.dynamic_update_slice(buffer, new, (layer, 0, skip * length, 0, 0))

    return Cache(put(cache.k, k), put(cache.v, v))


def stored_table(table, frames, layout):
    """Return the rotary table of keys as they are cached, for `frames` [n], which may be traced.

    A moving sink is not rotated.
    """
    if not layout.sink_moves:
        return table
    cos, sin = table
    raw = jnp.repeat(frames < layout.kept, cos.shape[0] // frames.shape[0])[:, None]
    return jnp.where(raw, 1.0, cos), jnp.where(raw, 0.0, sin)


def _tokens_of(places, frame_tokens: int):
    """Return the tokens of places [n] of frames: [n L]."""
    return (places[:, None] * frame_tokens + np.arange(frame_tokens)[None]).reshape(-1)


def _frames_in_order(layout, end, slots):
    """Return the frame [slots] in each place of the published buffer.

    It is the place itself until the buffer is full.
    """
    place = jnp.arange(slots)
    growing = isinstance(end, int) and end <= slots
    return place if growing else jnp.where(place < layout.kept, place, end - slots + place)


def _slot(frame, layout, slots):
    """Return the slot of a frame in the cache, int or traced, or the slots of frames [n]."""
    if isinstance(frame, int) and frame < layout.kept:
        return frame
    ring = layout.kept + (frame - layout.kept) % (slots - layout.kept)
    return ring if isinstance(frame, int) else jnp.where(frame < layout.kept, frame, ring)


def _unit(view):
    """Return the frames written in one piece: the block, if none straddles the ring's end.

    Such a piece never crosses the end of the ring or the sink.
    """
    if view.slots != view.layout.capacity:
        raise ValueError(
            f"the cache of {view.slots} frames is full and smaller than the window of "
            f"{view.layout.capacity}; give it as many slots"
        )
    kept = view.layout.kept
    unit = gcd(view.layout.block, view.layout.capacity - kept, abs(kept - view.layout.lead))
    return unit if view.aligned and view.frames > 1 else 1


def _visible_slots(view):
    """Return the slot ranges that hold the frames the block sees."""
    if not view.growing:
        return ((0, view.slots),)
    end = max(view.end, view.layout.sink) if view.layout.faithful_sinks else view.end
    return view.layout.visible(min(end, view.slots))
