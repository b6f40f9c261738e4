"""Long videos in segments: streams of blocks that carry their past with them, and the candidates that fork from them.

A stream is a video that has come to some frame: the keys in sight, the decoder's memory and the latents that may be
asked for again; none of it grows with the video (spec/streaming.md 4, 5, 7). Streams are advanced together, a block at
a time, by programs in which the frame is a traced number, so that each is compiled once. The candidates of a prompt
begin with its stream's past and go on with noise of their own.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax import sharding, stream
from astrolabe_jax.config import piece, rounds
from astrolabe_jax.decode import decode_chunk
from astrolabe_jax.generate import encode_distinct, judge, refuse_non_finite
from astrolabe_jax.models.wan import cache as kv
from astrolabe_jax.models.wan.transformer import KeyValues
from astrolabe_jax.prepare import Run, story_of
from astrolabe_jax.report import Progress
from astrolabe_jax.rollout import noise_from_keys
from astrolabe_jax.scenes import Step, Story
from astrolabe_jax.types import PromptBatch
from astrolabe_jax.update import History


class Streams(NamedTuple):
    """What a set of streams carries from block to block."""

    cache: kv.Cache  # [layers, streams, slots L, A, K]
    vae: Any  # the decoder's memory (vae.Stream); None at frame 0, or where no past is decoded
    first: jax.Array  # [streams, kept, C, H, W] clean latents of the sink
    recent: jax.Array  # [streams, capacity, C, H, W] the last ones, newest last; anything where there are fewer


class Cast(NamedTuple):
    """Who plays in a set of streams."""

    stories: tuple[Story, ...]  # one for each stream
    rows: Mapping[str, int]  # prompt of a scene -> its row of `embeddings`
    embeddings: np.ndarray  # [G, S, E]
    keys: jax.Array  # [streams] of the noise

    def at(self, block: int) -> list[str]:
        """The prompt of each stream in a block."""
        return [story.prompts[story.steps[block].scene] for story in self.stories]

    def part(self, streams: np.ndarray) -> "Cast":
        """The same for these streams, in this order; a stream may be there several times."""
        stories = tuple(self.stories[i] for i in streams)
        return self._replace(stories=stories, keys=self.keys[streams])


class Take(NamedTuple):
    """Some blocks of a set of streams."""

    streams: Streams  # after them
    latents: jax.Array  # [streams, F, C, H, W]
    frames: np.ndarray | None  # [streams, T, height, width, 3] uint8, where they are asked for


class Segment(NamedTuple):
    """The videos of an epoch: what is learnt from, and what it is learnt behind."""

    latents: jax.Array  # [N, F, C, H, W]: of the window, or from frame 0 to its end where sampling is 'sequence'
    scores: dict[str, np.ndarray]  # [N] of every reward and its parts
    streams: list[Streams]  # of each round, at the window's start; none where sampling is 'sequence'
    whole: list[jax.Array]  # of each round, all latents before the window, [streams, start, C, H, W]; or none


def cast_of(run: Run, batch: PromptBatch, keys: jax.Array, frames: int, progress: Progress) -> Cast:
    """The stories of a batch's videos over `frames` latent frames, their prompts encoded once each."""
    stories = {text: story_of(run.config, run.layout, text, frames) for text in dict.fromkeys(batch.texts)}
    prompts = list(dict.fromkeys(prompt for story in stories.values() for prompt in story.prompts))
    embeddings = encode_distinct(run, prompts, progress)
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    return Cast(tuple(stories[text] for text in batch.texts), rows, embeddings, keys)


def begin(run: Run, count: int) -> Streams:
    """So many streams at frame 0."""
    layout, (_, *latent) = run.layout, run.latent_shape
    cache = stream.empty_cache(_policy(run, {}), count, layout.capacity, tuple(latent[1:]))
    first, recent = _blank(run.mesh, (count, layout.kept, *latent), (count, layout.capacity, *latent))
    return Streams(cache, None, first, recent)


def film(
    run: Run, adapter: dict, cast: Cast, streams: Streams, blocks: range, decode: bool = True, watch: bool = False
) -> Take:
    """Samples `blocks` of the streams, whose memory is taken. decode: also advance the decoder; watch: see its frames.

    The streams must have come to the first of these blocks. At a change of prompts the keys in sight follow it as
    config.scenes says, for those streams whose prompt changes (spec/streaming.md 9).
    """
    policy, shape = _policy(run, adapter), run.latent_shape[1:]
    made, frames, spoken, text = [], [], None, None
    for block in blocks:
        prompts, step = cast.at(block), cast.stories[0].steps[block]
        if prompts != spoken:
            spoken, text = prompts, _text(policy, cast, prompts)
        streams = _changed(policy, cast, text, streams, block, shape[1:])
        noise = _noise(cast.keys, jnp.int32(step.frame), len(run.sampler.steps), step.count, shape, run.mesh)
        latents, cache = stream.sample_block(
            *stream.split(policy), text, noise, streams.cache, jnp.int32(step.start), _positions(step), at=None,
            aligned=step.aligned, trace=False, partial=True,
        )  # fmt: skip
        streams, seen = _advance(run, streams._replace(cache=cache), latents, step, decode or watch)
        made.append(latents)
        frames += [sharding.to_host(part) for part in seen] if watch else []
    return Take(streams, jnp.concatenate(made, axis=1), np.concatenate(frames, axis=1) if watch else None)


def proceed(run: Run, adapter: dict, cast: Cast, streams: Streams, latents: jax.Array, blocks: range) -> Streams:
    """Streams, whose memory is taken, behind given `latents` [streams, F, C, H, W] of these blocks (streaming.md 5.2).

    Only the clean passes are run, with the policy `adapter`.
    """
    policy, shape = _policy(run, adapter), run.latent_shape[1:]
    for i, block in enumerate(blocks):
        step, text = cast.stories[0].steps[block], _text(policy, cast, cast.at(block))
        streams = _changed(policy, cast, text, streams, block, shape[1:])
        part = latents[:, i * step.count : (i + 1) * step.count]
        cache, _ = stream.cache_block(
            *stream.split(policy), text, part, streams.cache, jnp.int32(step.start), _positions(step), at=None,
            t=run.sampler.context_noise, aligned=step.aligned, partial=True,
        )  # fmt: skip
        streams, _ = _advance(
            run, streams._replace(cache=cache), part, step, run.config.streaming.reward != "window_alone"
        )
    return streams


def recached(run: Run, adapter: dict, cast: Cast, streams: Streams, block: int) -> Streams:
    """The keys in sight made anew, in one pass from their latents, before a block (config.streaming)."""
    policy, step = _policy(run, adapter), cast.stories[0].steps[block]
    text = _text(policy, cast, cast.at(block))
    recent = streams.recent[:, run.layout.kept :]
    cache = _reencode(
        *stream.split(policy), text, streams.first, recent, jnp.int32(step.start), run.sampler.context_noise
    )
    return streams._replace(cache=cache)


def fork(run: Run, streams: Streams, each: int) -> Streams:
    """`each` candidates of every stream, adjacent, with memory of their own."""
    return _fork(streams, each, mesh=run.mesh)


def blocks_of(run: Run, first: int, stop: int) -> range:
    """The blocks of the frames from `first` to `stop`."""
    return range(first // run.layout.block, stop // run.layout.block)


def sample(
    run: Run, adapter: dict, batch: PromptBatch, cast: Cast, start: int, begun: list[Streams], progress: Progress,
    what: str,
) -> Segment:  # fmt: skip
    """Samples, decodes and scores an epoch's videos in the window that begins at frame `start`.

    begun: the streams of each round, where they have come to `start` before; else they are made. Raises RewardError for
    a reward that is not finite, FloatingPointError for latents that are not.
    """
    config = run.config
    if config.streaming.sampling == "sequence":
        return _sample_sequences(run, adapter, batch, cast, start, progress, what)
    count, number = rounds(config, run.mesh.size)
    each = len(batch.texts) // (count * number)
    share = piece(config, config.sampler.batch, run.mesh.size) // number
    places = np.arange(len(batch.texts)).reshape(count, number, each)  # of candidates in the batch
    parts, scores, kept, whole, order = [], [], [], [], []
    for r in range(count):
        past, seen, frames = (begun[r], [], []) if begun else _pasts(run, adapter, cast, places[r], start, progress)
        for i in range(0, each, share):
            chosen = places[r, :, i : i + share].reshape(-1)
            with progress.phase("rollout"):
                forked = fork(run, past, share)
                blocks = blocks_of(run, start, start + config.streaming.window)
                take = film(run, adapter, cast.part(chosen), forked, blocks, decode=False)
                latents = jax.block_until_ready(take.latents)
            memory = forked.vae if config.streaming.reward != "window_alone" else None
            pixels = _seen(run, latents, memory, cast, blocks, chosen, progress)
            if config.streaming.reward == "full":
                pixels = np.concatenate([np.repeat(part, share, axis=0) for part in frames] + [pixels], axis=1)
            scores.append(judge(run, pixels, cast.part(chosen).at(blocks[0]), chosen, progress))
            parts.append(latents)
            order.append(chosen)
            progress.tick(what, len(parts), count * each // share)
        kept.append(past)
        whole += seen
    back = np.argsort(np.concatenate(order))
    latents = _sorted(parts, back, mesh=run.mesh)
    return Segment(latents, {k: np.concatenate([s[k] for s in scores])[back] for k in scores[0]}, kept, whole)


def _pasts(run, adapter, cast, places, start, progress):
    """The streams of a round at frame `start`, the latents before it where gradients go back there, and its frames."""
    streaming, own = run.config.streaming, cast.part(places[:, 0])
    # A prompt's past is that of its first candidate, on whichever devices it is made.
    firsts = {story: int(place) for place, story in reversed([*zip(places[:, 0], own.stories, strict=True)])}
    own = cast.part(np.array([firsts[story] for story in own.stories]))
    full, alone = streaming.reward == "full", streaming.reward == "window_alone"
    past, seen, frames = begin(run, len(places)), [], []
    with progress.phase("past"):
        if start:
            past, latents, pixels = film(run, adapter, own, past, blocks_of(run, 0, start), not alone, full)
            jax.block_until_ready(latents)
            seen = [latents] if streaming.backprop == "full" else []
            frames = [pixels] if full else []
    return past, seen, frames


def _sample_sequences(run, adapter, batch, cast, start, progress, what) -> Segment:
    """Every video from frame 0 on by itself (spec/streaming.md 5.3)."""
    config, stop = run.config, start + run.config.streaming.window
    size, blocks = piece(config, config.sampler.batch, run.mesh.size), blocks_of(run, 0, stop)
    parts, scores = [], []
    for first in range(0, len(batch.texts), size):
        chosen = np.arange(first, first + size)
        with progress.phase("rollout"):
            take = film(run, adapter, cast.part(chosen), begin(run, size), blocks, decode=False)
            latents = jax.block_until_ready(take.latents)
        pixels = _seen(run, latents, None, cast, blocks, chosen, progress)
        prompts = cast.part(chosen).at(blocks_of(run, start, stop)[0])
        scores.append(judge(run, pixels, prompts, chosen, progress))
        parts.append(latents)
        progress.tick(what, len(parts), len(batch.texts) // size)
    latents = _sorted(parts, np.arange(len(batch.texts)), mesh=run.mesh)
    return Segment(latents, {name: np.concatenate([s[name] for s in scores]) for name in scores[0]}, [], [])


def watch(
    run: Run, adapter: dict, batch: PromptBatch, cast: Cast, frames: int, progress: Progress, what: str
) -> Iterator[tuple[np.ndarray, list[dict[str, np.ndarray]]]]:
    """Whole videos of `frames` latent frames, a piece after the other, scored window by window.

    Yields the frames [B, T, height, width, 3] uint8 of a piece, and the scores [B] of each window; the last one may be
    shorter. Errors as in `sample`.
    """
    size, count = piece(run.config, run.config.sampler.batch, run.mesh.size), len(batch.texts)
    starts = range(0, count, size)
    for i, first in enumerate(starts):
        numbers = np.arange(first, min(first + size, count))
        part = cast.part(np.resize(numbers, size))  # the last piece is filled up
        streams, clips, scores = begin(run, size), [], []
        for start in range(0, frames, run.config.streaming.window):
            blocks = blocks_of(run, start, min(start + run.config.streaming.window, frames))
            with progress.phase("rollout"):
                take = film(run, adapter, part, streams, blocks, watch=True)
            streams, prompts = take.streams, part.at(blocks[0])[: len(numbers)]
            refuse_non_finite(take.latents, prompts, numbers)
            clips.append(take.frames[: len(numbers)])
            scores.append(judge(run, clips[-1], prompts, numbers, progress))
        yield np.concatenate(clips, axis=1), scores
        progress.tick(what, i + 1, len(starts))


def history(run: Run, cast: Cast, segment: Segment, turn: int, start: int) -> History:
    """What the loss reads of the past of a round's videos; see streaming.prefix and streaming.backprop."""
    steps = [cast.stories[0].steps[block] for block in blocks_of(run, start, start + run.config.streaming.window)]
    positions = np.concatenate([_positions(step) for step in steps])
    streams = segment.streams[turn]
    if run.config.streaming.backprop == "full":
        return History(start, positions, whole=segment.whole[turn])
    if run.config.streaming.prefix == "rollout_old":
        return History(jnp.int32(steps[0].start), positions, streams.cache)
    return History(jnp.int32(steps[0].start), positions, first=streams.first, recent=streams.recent)


def _policy(run: Run, adapter: dict) -> stream.Policy:
    net = run.base.transformer
    return stream.Policy(
        net.graphdef, net.params, adapter, run.lora_scale, net.config, run.layout, run.sampler, run.mesh
    )


def _text(policy: stream.Policy, cast: Cast, prompts: Sequence[str]) -> KeyValues:
    rows = np.array([cast.rows[prompt] for prompt in prompts])
    placed = sharding.shard_batch(policy.mesh, cast.embeddings[rows])
    return stream.encode_text(
        policy.graphdef, policy.params, policy.adapter, policy.lora_scale, placed, mesh=policy.mesh
    )


def _positions(step: Step) -> np.ndarray:
    return np.asarray(step.positions, np.int32)


def _changed(policy, cast, text, streams: Streams, block: int, latent_hw) -> Streams:
    """The streams before a block, at which the prompts of some may change."""
    changes = [story.steps[block].change for story in cast.stories]
    change = next((change for change in changes if change), None)
    if change is None:
        return streams
    slots, kept = policy.layout.capacity, policy.layout.kept
    end = cast.stories[0].steps[block].frame
    frames = {end - slots + i: streams.recent[:, i] for i in range(slots)}
    frames |= {i: streams.first[:, i] for i in range(kept) if i < end - slots}
    everybody = all(changes)
    cache = streams.cache if everybody else jax.tree.map(jnp.copy, streams.cache)
    cache, _ = stream.changed(policy, text, cache, change, frames, slots, latent_hw)
    if not everybody:
        cache = _where(np.array([bool(change) for change in changes]), cache, streams.cache)
    return streams._replace(cache=cache)


def _advance(run: Run, streams: Streams, latents, step: Step, decode: bool) -> tuple[Streams, list[jax.Array]]:
    """The streams behind a block whose keys are in the cache, and its frames if it is decoded."""
    first, recent = _remember(streams.first, streams.recent, latents, jnp.int32(step.frame))
    memory, frames = streams.vae, []
    if decode:
        frames, memory = _decoded(run, latents, memory)
    return streams._replace(vae=memory, first=first, recent=recent), frames


def _decoded(run: Run, latents, memory):
    """Frames of latents, config.video.decode_chunk at a time, and the decoder's memory behind them."""
    vae, chunk, frames = run.base.vae, run.config.video.decode_chunk, []
    for i in range(0, latents.shape[1], chunk):
        part, memory = decode_chunk(vae.graphdef, vae.params, latents[:, i : i + chunk], memory, mesh=run.mesh)
        frames.append(part)
    return frames, memory


def _seen(run: Run, latents, memory, cast: Cast, blocks: range, chosen, progress: Progress) -> np.ndarray:
    with progress.phase("decode"):
        refuse_non_finite(latents, cast.part(chosen).at(blocks[0]), chosen)
        frames, _ = _decoded(run, latents, memory)
        return np.concatenate([sharding.to_host(part) for part in frames], axis=1)


@functools.partial(jax.jit, static_argnames=("steps", "frames", "shape", "mesh"))
def _noise(keys, frame, steps: int, frames: int, shape, mesh):
    """Noise [steps, streams, P, C, H, W] of the block at `frame` (traced)."""
    draw = noise_from_keys(keys, shape)
    noise = jnp.stack([draw(frame, j, frames) for j in range(steps)])
    return jax.lax.with_sharding_constraint(noise, sharding.batch_sharding(mesh, axis=1))


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _remember(first, recent, latents, frame):
    """The latents of the sink and the last ones, behind a block that begins at `frame` (traced)."""
    for i in range(latents.shape[1]):
        here = (jnp.arange(first.shape[1]) == frame + i).reshape(1, -1, 1, 1, 1)
        first = jnp.where(here, latents[:, i : i + 1].astype(first.dtype), first)
    recent = jnp.concatenate([recent, latents.astype(recent.dtype)], axis=1)[:, latents.shape[1] :]
    return first, recent


@functools.partial(jax.jit, static_argnames=("each", "mesh"))
def _fork(streams: Streams, each: int, *, mesh):
    def repeat(axis):
        place = sharding.batch_sharding(mesh, axis)
        return lambda part: jax.lax.with_sharding_constraint(jnp.repeat(part, each, axis=axis), place)

    cache = jax.tree.map(repeat(1), streams.cache)
    return Streams(cache, *jax.tree.map(repeat(0), (streams.vae, streams.first, streams.recent)))


@functools.partial(jax.jit, static_argnames="static")
def _reencode(static, params, adapter, lora_scale, text, first, recent, start, t):
    graphdef, layout, _, mesh = static

    def encode(params, adapter, text, first, recent):
        model = stream.rollout.merge(graphdef, params)
        return model.reencode(first, recent, t, text, start, adapter, lora_scale, layout=layout)

    return sharding.on_mesh(mesh, encode)(params, adapter, text, first, recent)


@jax.jit
def _where(chosen, one, other):
    return jax.tree.map(lambda a, b: jnp.where(chosen.reshape(1, -1, 1, 1, 1), a, b), one, other)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _blank(mesh, one, other):
    place = sharding.batch_sharding(mesh)
    return tuple(jax.lax.with_sharding_constraint(jnp.zeros(shape, jnp.float32), place) for shape in (one, other))


@functools.partial(jax.jit, static_argnames="mesh")
def _sorted(parts, back, *, mesh):
    """Latents of pieces as one batch, in the order of the videos."""
    latents = jnp.concatenate(parts)[back].astype(jnp.float32)
    return jax.lax.with_sharding_constraint(latents, sharding.batch_sharding(mesh))
