"""The causal Wan video DiT: one network for every family, sizes from WanConfig (docs/models.md).

There are three ways to run it. `__call__` is the uncached block-causal forward over all frames.
`context` is the same over a clean video; it returns the keys and values that a noisy forward reads.
`step` runs one block against the key-value cache of a rollout.

Adapters are given in the form of `lora.scaled`, or as None for the base.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from astrolabe_jax.models.attention import attention
from astrolabe_jax.models.chunks import in_chunks
from astrolabe_jax.models.layers import XAVIER, LayerNorm, Linear, RMSNorm, layer_norm, stacked
from astrolabe_jax.models.wan import cache as kv
from astrolabe_jax.models.wan.attention import (
    KeyValues,
    PastKeys,
    block_causal_attention,
    window_attention,
)
from astrolabe_jax.models.wan.config import Layout, WanConfig
from astrolabe_jax.models.wan.rope import rope_table, rotate, sinusoid
from astrolabe_jax.sharding import per_device

# Bytes that a device holds between the two linears of a feed-forward: those of a block of a rollout
# at 480x832, and an eighth of a window's, whose gradient would hold them five times.
_MOST_HIDDEN = 128 * 2**20


class Past(NamedTuple):
    """What a window sees of the frames before it (docs/streaming.md, Whose keys)."""

    cache: kv.Cache  # of a rollout to frame `start`: one row a prompt, or one a sample
    start: (
        jax.Array | np.int32
    )  # [] int32, frames so far in the cache's count; traced: one program for all
    # [W] int32 rotary positions of the window, of which x may be the first frames; None: the
    # numbers of the frames
    positions: jax.Array | np.ndarray | None = None


class Attention(nnx.Module):
    """The four projections and two norms of an attention layer; the softmax itself is in
    attention.py.
    """

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        def linear():
            return Linear(config.dim, config.dim, param_dtype=config.param_dtype, rngs=rngs)

        self.q = linear()
        self.k = linear()
        self.v = linear()
        self.o = linear()
        self.norm_q = RMSNorm(config.dim, eps=config.eps, param_dtype=config.param_dtype)
        self.norm_k = RMSNorm(config.dim, eps=config.eps, param_dtype=config.param_dtype)
        self.num_heads = config.num_heads

    def queries(self, x, lora):
        """x [B, N, D] -> [B, N, A, K]; the norm runs over the whole width, before the split into
        heads.
        """
        return self._heads(self.norm_q(self.q(x, lora.get("q"))))

    def keys_values(self, x, lora):
        """x [B, N, D] -> two of [B, N, A, K]; values are not normalised."""
        return KeyValues(
            self._heads(self.norm_k(self.k(x, lora.get("k")))),
            self._heads(self.v(x, lora.get("v"))),
        )

    def output(self, y, lora):
        """y [B, N, A, K] -> [B, N, D]."""
        return self.o(y.reshape(*y.shape[:2], -1), lora.get("o"))

    def _heads(self, x):
        return x.reshape(*x.shape[:2], self.num_heads, -1)


class FeedForward(nnx.Module):
    """Linear, tanh GELU, Linear."""

    def __init__(
        self, config: WanConfig, n_in: int, n_hidden: int, kernel_init=XAVIER, *, rngs: nnx.Rngs
    ):
        options = {"param_dtype": config.param_dtype, "kernel_init": kernel_init, "rngs": rngs}
        self.fc1 = Linear(n_in, n_hidden, **options)
        self.fc2 = Linear(n_hidden, config.dim, **options)

    def __call__(self, x, lora, activation=nnx.gelu):
        return self.fc2(activation(self.fc1(x, lora.get("0"))), lora.get("2"))


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention and feed-forward, modulated per frame."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.modulation = nnx.Param(_modulation(config, 6, rngs))
        self.self_attn = Attention(config, rngs=rngs)
        self.norm3 = LayerNorm(config.dim, eps=config.eps, param_dtype=config.param_dtype)
        self.cross_attn = Attention(config, rngs=rngs)
        self.ffn = FeedForward(config, config.dim, config.ffn_dim, rngs=rngs)
        self.config = config

    def __call__(self, x, e0, text, adapter, attend):
        """One layer. x [B, N, D], e0 [B, F, 6, D], text (k, v) [B, S, A, K], adapter: this layer's
        tree, or None.

        attend(q, k, v) -> (y [B, N, A, K], kept): the self-attention of this way of running; kept
        is passed through.
        """
        lora = {part: _lora_of(adapter, part) for part in ("self_attn", "cross_attn", "ffn")}
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulate_by(self.modulation, e0)
        a = _per_frame(layer_norm(x, self.config.eps), shift1, scale1)
        q = self.self_attn.queries(a, lora["self_attn"])
        k, v = self.self_attn.keys_values(a, lora["self_attn"])
        y, kept = attend(q, k, v)
        x = x + _gate(self.self_attn.output(y, lora["self_attn"]), gate1)
        q = self.cross_attn.queries(self.norm3(x), lora["cross_attn"])
        y = attention(q, *text, backend=self.config.attention)
        x = x + self.cross_attn.output(y, lora["cross_attn"])
        b = _per_frame(layer_norm(x, self.config.eps), shift2, scale2)
        y = in_chunks(
            lambda b: self.ffn(b, lora["ffn"]),
            b,
            per_device(b.shape[0]) * self.config.ffn_dim * b.dtype.itemsize,
            _MOST_HIDDEN,
        )
        return x + _gate(y, gate2), kept


class Head(nnx.Module):
    """Modulated LayerNorm and the linear map from tokens to patches."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.modulation = nnx.Param(_modulation(config, 2, rngs))
        self.linear = Linear(
            config.dim,
            config.patch_dim,
            param_dtype=config.param_dtype,
            kernel_init=nnx.initializers.zeros_init(),
            rngs=rngs,
        )
        self.eps = config.eps

    def __call__(self, x, e):
        """x [B, N, D], e [B, F, D] -> [B, N, patch]."""
        shift, scale = _modulate_by(self.modulation, e[:, :, None, :])
        return self.linear(_per_frame(layer_norm(x, self.eps), shift, scale))


class WanTransformer(nnx.Module):
    """The network. Build it through graphdef_of for shapes only, or directly with rngs for random
    weights.
    """

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        small = nnx.initializers.normal(0.02)
        self.patch_embedding = Linear(
            config.patch_dim, config.dim, param_dtype=config.param_dtype, rngs=rngs
        )
        self.text_embedding = FeedForward(config, config.text_dim, config.dim, small, rngs=rngs)
        self.time_embedding = FeedForward(config, config.freq_dim, config.dim, small, rngs=rngs)
        self.time_projection = Linear(
            config.dim, 6 * config.dim, param_dtype=config.param_dtype, rngs=rngs
        )
        self.blocks = stacked(
            lambda rngs: TransformerBlock(config, rngs=rngs), config.num_layers, rngs
        )
        self.head = Head(config, rngs=rngs)
        self.config = config

    def encode_text(self, text, adapter=None) -> KeyValues:
        """Return the cross-attention keys and values of prompts, to be passed to every call.

        They are [layers, B, text_len, A, K]. All rows are attended to, as in the published models
        (docs/models.md, Text embedding).

        Args:
          text: embeddings [B, S, E], zero beyond the prompt; fewer than config.text_len rows are
            padded with zeros.

        Raises:
          ValueError: for more rows, or another width.
        """
        rows = text.shape[1]
        limit = self.config.text_len
        if rows > limit or text.shape[2] != self.config.text_dim:
            raise ValueError(
                f"text embeddings are {text.shape}, expected [B, at most {limit}, "
                f"{self.config.text_dim}]"
            )
        text = jnp.pad(text, ((0, 0), (0, limit - rows), (0, 0))).astype(self.config.dtype)
        tokens = self.text_embedding(text, {})
        graphdef, layers = nnx.split(self.blocks.cross_attn)

        def body(_, xs):
            layer, adapter = xs
            cross_attn = nnx.merge(graphdef, layer)
            return None, cross_attn.keys_values(tokens, _lora_of(adapter, "cross_attn"))

        _, keys_values = jax.lax.scan(body, None, (layers, adapter))
        return keys_values

    def __call__(
        self,
        x,
        t,
        text: KeyValues,
        adapter=None,
        *,
        layout: Layout,
        context: KeyValues | None = None,
        past: Past | None = None,
    ):
        """Return the velocity [B, F, C, H, W] (dtype of x) of a block-causal forward.

        Args:
          x: noisy latents [B, F, C, H, W]; the last block may be short.
          t: timesteps [B, F] in [0, 1000].
          text: from `encode_text` with the same adapter.
          layout: blocks, window and sink.
          context: from `context`. Earlier blocks are then read clean (teacher forcing), and each
            block sees only itself noisy.
          past: x are the frames behind it, whole blocks of a longer video.
        """
        attend = self._training_attention(x, layout, past)
        velocity, _, _ = self._run(x, t, text, adapter, attend, context=context)
        return velocity

    def context(
        self,
        clean,
        text: KeyValues,
        adapter=None,
        *,
        layout: Layout,
        t=0.0,
        past: Past | None = None,
    ) -> KeyValues:
        """Return keys and values [layers, B, F L, A, K] of a clean video, run block-causally.

        They equal what a rollout of the same frames leaves in its cache. Pass them to `__call__` as
        they are, or under stop_gradient.

        Args:
          clean: latents [B, F, C, H, W].
          t: timestep at which they are read, the rollout's context noise: a scalar, or [B].
          past: as in `__call__`.
        """
        attend = self._training_attention(clean, layout, past, keep=True)
        _, _, kept = self._run(clean, _every_frame(t, clean), text, adapter, attend)
        return kept

    def reencode(
        self,
        first,
        recent,
        t,
        text: KeyValues,
        start,
        adapter=None,
        *,
        layout: Layout,
    ) -> kv.Cache:
        """Return a cache like that of a rollout to frame `start`, from latents alone, in one pass.

        It is not the rollout's cache: that one has seen frames that are evicted by now
        (docs/streaming.md, Re-encoding).

        Args:
          first: [B, sink, C, H, W], the frames of the sink.
          recent: [B, n, C, H, W], the n frames before `start`, whole blocks; anything where there
            are fewer.
          t: timestep at which they are read, a scalar or [B].

        Raises:
          ValueError: unless n is whole blocks, as the window less the sink must be, too.
        """
        batch, count = recent.shape[:2]
        sink = layout.kept
        whole = count % layout.block == 0 and (layout.capacity - sink) % layout.block == 0
        if not whole or first.shape[1] != sink:
            raise ValueError(
                f"a window of {layout.capacity} frames with a sink of {sink} cannot be encoded "
                f"again from {first.shape[1]} + {count} frames: beside the sink it must be whole "
                f"blocks of {layout.block}"
            )
        length = math.prod(self.config.grid(recent.shape[3:]))
        cache = kv.empty_cache(self.config, batch, layout.capacity, recent.shape[3:])
        if sink:
            made = self.context(first, text, adapter, layout=layout, t=t)
            cache = kv.place_frames(cache, made.k, made.v, layout, np.arange(sink), length)
        frames = start - count + jnp.arange(count)
        past = Past(cache, start - count, jnp.clip(frames, 0))
        attend = self._training_attention(recent, layout, past, keep=True, recent=0)
        _, _, made = self._run(recent, _every_frame(t, recent), text, adapter, attend)
        return kv.place_frames(cache, made.k, made.v, layout, frames, length)

    def step(self, x, t, text: KeyValues, cache: kv.Cache, view: kv.View, adapter=None, first=True):
        """Run one block through the cache once.

        Returns the velocity [B, P, C, H, W] and the cache with the block's keys written.

        Args:
          x: latents [B, P, C, H, W] of the block.
          t: its timestep, a scalar or [B].
          view: where the block stands in the cache.
          first: whether this is the block's first pass; it matters to faithful sinks only.
        """
        grid = self.config.grid(x.shape[3:])
        frames = view.start + jnp.arange(view.frames)
        positions = frames if view.positions is None else view.positions
        table = rope_table(positions, grid, self.config.head_dim)
        stored_table = kv.stored_table(table, frames, view.layout) if view.partial else table
        moves = view.layout.sink_moves
        sink_table = self._sink_table(view.layout, view.end, grid) if moves else None

        def attend(q, k, v, *, cache, layer, **_):
            k = _stored_keys(k, stored_table, view.raw_frames * view.frame_tokens)
            cache = kv.write(cache, layer, k, v, view, first)
            keys, values = kv.read(cache, layer, view, sink_table)
            y = attention(
                rotate(q, table),
                keys,
                values,
                backend=self.config.attention,
                length=view.visible_tokens,
            )
            return y, (cache, None)

        return self._run(x, _every_frame(t, x), text, adapter, attend, cache=cache)[:2]

    def recache(self, x, t, text: KeyValues, cache: kv.Cache, view: kv.View, adapter=None, skip=0):
        """Compute the cached keys anew, for another prompt (docs/streaming.md, Scene changes).

        Returns the velocity [B, n, C, H, W] and the cache. The frames attend to each other without
        a mask.

        Args:
          x: [B, n, C, H, W], clean, one frame for every place of the cache that is in use.
          t: their timestep, a scalar or [B].
          view: the n frames as one block, with their rotary positions. Its start is a Python int,
            or traced once the cache is full.
          skip: first places, of the sink, that keep their keys; the frames with those places only
            look on.
        """
        grid = self.config.grid(x.shape[3:])
        table = rope_table(view.positions, grid, self.config.head_dim)
        moves = view.layout.sink_moves
        sink_table = self._sink_table(view.layout, view.end, grid) if moves else None
        raw_frames = min(view.layout.kept, view.frames) if moves else 0

        def attend(q, k, v, *, cache, layer, **_):
            k = _stored_keys(k, table, raw_frames * view.frame_tokens)
            cache = kv.rewrite(cache, layer, k, v, view, skip)
            keys, values = kv.read(cache, layer, view, sink_table)

            def one_frame(queries):  # all at once would need the scores of the whole window
                return attention(queries, keys, values, backend=self.config.attention)

            framed = rotate(q, table).reshape(q.shape[0], view.frames, -1, *q.shape[2:])
            y = jax.lax.map(one_frame, jnp.moveaxis(framed, 1, 0))
            return jnp.moveaxis(y, 0, 1).reshape(q.shape), (cache, None)

        return self._run(x, _every_frame(t, x), text, adapter, attend, cache=cache)[:2]

    def _sink_table(self, layout, end, grid):
        """Return the rotary table of a moving sink, for the block that ends at `end`."""
        return rope_table(layout.shift(end) + jnp.arange(layout.kept), grid, self.config.head_dim)

    def _training_attention(
        self, x, layout: Layout, past: Past | None, keep: bool = False, recent=None
    ) -> Callable:
        """Return the self-attention of a forward over x without a cache of its own.

        keep: also return the keys as a rollout stores them, and values. recent: see
        `_window_attention`.
        """
        frames = x.shape[1]
        grid = self.config.grid(x.shape[3:])
        run = (
            self._video_attention(frames, grid, layout)
            if past is None
            else self._window_attention(frames, grid, layout, past, recent)
        )

        def attend(q, k, v, *, cache, layer, context):
            y, stored = run(q, k, v, layer, context)
            return y, (cache, KeyValues(stored, v) if keep else None)

        return attend

    def _window_attention(self, frames, grid, layout, past: Past, recent: int | None) -> Callable:
        """Return the self-attention of `frames` frames behind a past.

        recent: frames that are read of the past besides the sink; None: all that are in sight.
        """
        if frames % layout.block:
            raise ValueError(f"a window of {frames} frames is not whole blocks of {layout.block}")
        length = grid[0] * grid[1]
        if recent is None:
            recent = max(layout.capacity - layout.kept - layout.block, 0)
        numbers = past.start + jnp.arange(frames)
        positions = numbers if past.positions is None else past.positions[:frames]
        table = rope_table(positions, grid, self.config.head_dim)
        stored_table = kv.stored_table(table, numbers, layout)
        stops = range(layout.block, frames + 1, layout.block) if layout.sink_moves else ()
        sink_tables = [self._sink_table(layout, past.start + stop, grid) for stop in stops]

        def run(q, k, v, layer, context):
            k = rotate(k, stored_table)
            before = kv.past_frames(past.cache, layer, layout, past.start, length, recent)
            y = window_attention(
                rotate(q, table),
                KeyValues(k, v),
                PastKeys(before, past.start, length),
                layout,
                functools.partial(attention, backend=self.config.attention),
                context,
                sink_tables,
            )
            return y, k

        return run

    def _video_attention(self, frames, grid, layout) -> Callable:
        """Return the self-attention of a whole video of `frames` frames."""
        blocks = layout.blocks(frames)
        table = rope_table(jnp.arange(frames), grid, self.config.head_dim)
        sink = min(layout.kept, frames) if layout.sink_moves else 0
        sink_tables = [
            rope_table(block.shift + jnp.arange(sink), grid, self.config.head_dim)
            for block in blocks
            if sink
        ]

        def run(q, k, v, layer, context):
            k = _stored_keys(k, table, sink * math.prod(grid))
            y = block_causal_attention(
                rotate(q, table),
                KeyValues(k, v),
                blocks,
                functools.partial(attention, backend=self.config.attention),
                context,
                sink_tables,
            )
            return y, k

        return run

    def _run(self, x, t, text, adapter, attend, *, cache=None, context=None):
        """Return the velocity of x, the cache, and what `attend` keeps of every layer.

        The cache, if any, is carried through the scan over the layers, so that it is updated in
        place. t: timesteps [B, F].
        """
        tokens = self._embed(x)
        e, e0 = self._time(t)
        graphdef, layers = nnx.split(self.blocks)

        def body(carry, xs):
            x, cache = carry
            params, layer, text, adapter, context = xs

            attend_here = functools.partial(attend, cache=cache, layer=layer, context=context)
            x, (cache, kept) = nnx.merge(graphdef, params)(x, e0, text, adapter, attend_here)
            return (x, cache), kept

        if self.config.remat and cache is None:
            body = jax.checkpoint(body, prevent_cse=False)
        (tokens, cache), kept = jax.lax.scan(
            body,
            (tokens, cache),
            (layers, jnp.arange(self.config.num_layers), text, adapter, context),
        )
        return self._unembed(self.head(tokens, e), x), cache, kept

    def _embed(self, x):
        """Latents [B, F, C, H, W] -> tokens [B, F h w, D] in the compute dtype."""
        x = jnp.asarray(x)
        batch, frames, channels, height, width = x.shape
        if channels != self.config.in_channels:
            raise ValueError(
                f"latents have {channels} channels, expected [B, F, {self.config.in_channels}, H, "
                "W]"
            )
        h, w = self.config.grid((height, width))
        _, p, q = self.config.patch_size
        # channel slowest
        patches = x.reshape(batch, frames, channels, h, p, w, q).transpose(0, 1, 3, 5, 2, 4, 6)
        return self.patch_embedding(
            patches.reshape(batch, frames * h * w, -1).astype(self.config.dtype)
        )

    def _time(self, t):
        """Timesteps [B, F] -> time embedding e [B, F, D] for the head and e0 [B, F, 6, D] for the
        blocks.
        """
        features = sinusoid(t, self.config.freq_dim).astype(self.config.dtype)
        e = self.time_embedding(features, {}, nnx.silu)
        return e, self.time_projection(nnx.silu(e)).reshape(*e.shape[:2], 6, -1)

    def _unembed(self, patches, like):
        """Patches [B, F h w, p q C], channel fastest, -> latents with the shape and dtype of
        `like`.
        """
        batch, frames, channels, height, width = like.shape
        h, w = self.config.grid((height, width))
        _, p, q = self.config.patch_size
        patches = patches.reshape(batch, frames, h, w, p, q, channels).transpose(
            0, 1, 6, 2, 4, 3, 5
        )
        return patches.reshape(like.shape).astype(like.dtype)


def _stored_keys(k, table, raw: int):
    """Return keys as they are cached: rotated, but for the first `raw` tokens, of a moving sink."""
    if raw == 0:
        return rotate(k, table)
    cos, sin = table
    return jnp.concatenate([k[:, :raw], rotate(k[:, raw:], (cos[raw:], sin[raw:]))], axis=1)


def _every_frame(t, x):
    """Return a timestep, a scalar or [B], for every frame of x: [B, F]."""
    return jnp.broadcast_to(jnp.asarray(t, jnp.float32).reshape(-1, 1), x.shape[:2])


def _modulation(config, rows, rngs):
    return (jax.random.normal(rngs.params(), (1, rows, config.dim)) * config.dim**-0.5).astype(
        config.param_dtype
    )


def _modulate_by(modulation, e):
    """modulation [1, n, D] + e [B, F, n or 1, D], split into n of [B, F, 1, D]."""
    total = modulation[...].astype(e.dtype)[:, None] + e
    return jnp.split(total, total.shape[2], axis=2)


def _per_frame(x, shift, scale):
    """x (1 + scale) + shift with one shift and scale for each frame. x [B, F L, D], shift and scale
    [B, F, 1, D].
    """
    framed = x.reshape(*shift.shape[:2], -1, x.shape[-1])
    return (framed * (1 + scale) + shift).reshape(x.shape)


def _gate(y, gate):
    return (y.reshape(*gate.shape[:2], -1, y.shape[-1]) * gate).reshape(y.shape)


def _lora_of(adapter, part: str):
    """Return one part's pairs of a layer's adapter: {'self_attn.q': pair, ...} -> {'q': pair, ...}.

    They are none for no adapter.
    """
    return {
        name.removeprefix(f"{part}."): pair
        for name, pair in (adapter or {}).items()
        if name.startswith(f"{part}.")
    }
