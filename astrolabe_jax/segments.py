"""Long videos in segments: streams of blocks that carry their past with them, and the candidates
that fork from them.

A stream is a video that has come to some frame: the keys in sight, the decoder's memory and the
latents that may be asked for again; none of it grows with the video (spec/streaming.md 4, 5, 7).
Streams are advanced together, a block at a time, by programs in which the frame is a traced number,
so that each is compiled once. The candidates of a prompt begin with its stream's past and go on
with noise of their own.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax import sharding, stream
from astrolabe_jax.config import clip_length, piece, rounds
from astrolabe_jax.decode import decode_chunk
from astrolabe_jax.generate import encode_distinct, joined, judge, refuse_non_finite
from astrolabe_jax.models.layers import merge
from astrolabe_jax.models.wan import cache as kv
from astrolabe_jax.models.wan.transformer import KeyValues
from astrolabe_jax.prepare import Run, story_of
from astrolabe_jax.report import Progress
from astrolabe_jax.rewards.panel import Scores
from astrolabe_jax.rollout import noise_from_keys
from astrolabe_jax.streaming.scenes import Step, Story
from astrolabe_jax.types import PromptBatch, Purpose
from astrolabe_jax.update import Batch, History, TrainState, Work


class Streams(NamedTuple):
    """What a set of streams carries from block to block."""

    cache: kv.Cache  # [layers, streams, slots L, A, K]
    vae: Any  # the decoder's memory (vae.VaeState); None at frame 0, or where no past is decoded
    first: jax.Array  # [streams, kept, C, H, W] clean latents of the sink
    # [streams, capacity, C, H, W] the last ones, newest last; anything where there are fewer
    recent: jax.Array


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


class Pasts(NamedTuple):
    """The streams of an epoch at its window's start, one for each round (config.rounds); none for
    'sequence'.
    """

    streams: list[Streams]
    # all latents before the window, [streams, start, C, H, W], where gradients go back there
    whole: list[jax.Array]


class Segment(NamedTuple):
    """The videos of an epoch: what is learnt from, and what it is learnt behind."""

    # [N, F, C, H, W]: of the window, or from frame 0 to its end where sampling is 'sequence'
    latents: jax.Array
    scores: dict[str, np.ndarray]  # [N] of every reward and its parts
    pasts: Pasts


def begins_at(run: Run, epoch: int) -> int:
    """The frame at which an epoch's window begins, from the seed alone: the same on all devices
    (streaming.md 4).
    """
    streaming, starts = run.config.streaming, run.starts
    if streaming.mode == "progressive":
        return starts[epoch % len(starts)]
    return starts[_random(run, Purpose.WINDOW, epoch, 1)[0] % len(starts)]


def drawing(run: Run, epoch: int) -> int:
    """The number of the drawing of prompts that an epoch takes: progressive streams keep theirs to
    their end.
    """
    return (
        epoch // len(run.starts)
        if run.starts and run.config.streaming.mode == "progressive"
        else epoch
    )


def cast_of(run: Run, batch: PromptBatch, keys: jax.Array, frames: int, progress: Progress) -> Cast:
    """The stories of a batch's videos over `frames` latent frames, their prompts encoded once
    each.
    """
    stories = {
        text: story_of(run.config, run.layout, text, frames) for text in dict.fromkeys(batch.texts)
    }
    prompts = list(dict.fromkeys(prompt for story in stories.values() for prompt in story.prompts))
    embeddings = encode_distinct(run, prompts, progress)
    rows = {prompt: row for row, prompt in enumerate(prompts)}
    return Cast(tuple(stories[text] for text in batch.texts), rows, embeddings, keys)


def begin(run: Run, count: int) -> Streams:
    """So many streams at frame 0."""
    layout, (_, *latent) = run.layout, run.latent_shape
    cache = stream.empty_cache(policy_of(run, {}), count, layout.capacity, tuple(latent[1:]))
    first, recent = _blank(
        run.mesh, (count, layout.kept, *latent), (count, layout.capacity, *latent)
    )
    return Streams(cache, None, first, recent)


def film(
    run: Run,
    adapter: dict,
    cast: Cast,
    streams: Streams,
    blocks: range,
    decode: bool = True,
    watch: bool = False,
) -> Take:
    """Samples `blocks` of the streams, whose memory is taken. decode: also advance the decoder;
    watch: see its frames.

    The streams must have come to the first of these blocks and, where prompts change before it,
    have entered it.
    """
    policy, keys = policy_of(run, adapter), sharding.shard_batch(run.mesh, cast.keys)
    made, frames = [], []
    for number, step, text in _told(policy, cast, blocks):
        if number > blocks[0]:
            streams = _changed(policy, cast, text, streams, number, run.latent_shape[2:])
        latents, streams = block(policy, text, keys, streams, step, run.latent_shape[1:])
        streams, seen = _advance(run, streams, latents, step, decode or watch)
        made.append(latents)
        frames += seen if watch else []
    return Take(streams, jnp.concatenate(made, axis=1), on_host(frames) if watch else None)


def enter(run: Run, adapter: dict, cast: Cast, streams: Streams, number: int) -> Streams:
    """Streams before a block, for which prompts may have changed; they are copied where they have.

    The keys in sight follow a change as config.scenes says, for the streams that it is about
    (spec/streaming.md 9).
    """
    policy = policy_of(run, adapter)
    return _changed(
        policy, cast, _text(policy, cast, cast.at(number)), streams, number, run.latent_shape[2:]
    )


def block(
    policy: stream.Policy,
    text: KeyValues,
    keys: jax.Array,
    streams: Streams,
    step: Step,
    shape: tuple[int, int, int],
) -> tuple[jax.Array, Streams]:
    """Samples a block of latents (C, H, W) of the streams: [streams, P, C, H, W], and the keys
    behind it.
    """
    noise = _noise(
        keys, np.int32(step.frame), len(policy.sampler.steps), step.count, shape, policy.mesh
    )
    latents, cache = stream.sample_block(
        *stream.split(policy),
        text,
        noise,
        streams.cache,
        np.int32(step.start),
        _positions(step),
        at=None,
        aligned=step.aligned,
        trace=False,
        partial=True,
    )
    return latents, streams._replace(cache=cache)


def proceed(
    run: Run,
    adapter: dict,
    cast: Cast,
    streams: Streams,
    latents: jax.Array,
    blocks: range,
    decode: bool,
) -> Streams:
    """Streams, whose memory is taken, behind given `latents` [streams, F, C, H, W] of these blocks
    (streaming.md 5.2).

    Only the clean passes are run, with the policy `adapter`; decode: also advance the decoder.
    """
    policy = policy_of(run, adapter)
    for i, (number, step, text) in enumerate(_told(policy, cast, blocks)):
        if number > blocks[0]:
            streams = _changed(policy, cast, text, streams, number, run.latent_shape[2:])
        part = latents[:, i * step.count : (i + 1) * step.count]
        cache, _ = stream.cache_block(
            *stream.split(policy),
            text,
            part,
            streams.cache,
            np.int32(step.start),
            _positions(step),
            at=None,
            t=run.sampler.context_noise,
            aligned=step.aligned,
            partial=True,
        )
        streams, _ = _advance(run, streams._replace(cache=cache), part, step, decode)
    return streams


def recached(run: Run, adapter: dict, cast: Cast, streams: Streams, block: int) -> Streams:
    """The keys in sight made anew, in one pass from their latents, before a block
    (config.streaming).
    """
    policy, step = policy_of(run, adapter), cast.stories[0].steps[block]
    text = _text(policy, cast, cast.at(block))
    recent = streams.recent[:, -(run.layout.capacity - run.layout.kept) :]
    cache = _reencode(
        *stream.split(policy),
        text,
        streams.first,
        recent,
        np.int32(step.start),
        run.sampler.context_noise,
    )
    return streams._replace(cache=cache)


def fork(run: Run, streams: Streams, each: int) -> Streams:
    """`each` candidates of every stream, adjacent, with memory of their own."""
    return _fork(streams, each, mesh=run.mesh)


def windows(frames: int, window: int) -> list[tuple[int, int]]:
    """First and end frame of the windows that a video of so many frames is cut into; the last may
    be shorter.
    """
    return [(start, min(start + window, frames)) for start in range(0, frames, window)]


def blocks_of(run: Run, first: int, stop: int) -> range:
    """The blocks of the frames from `first` to `stop`."""
    return range(first // run.layout.block, stop // run.layout.block)


def sample(
    run: Run,
    adapter: dict,
    batch: PromptBatch,
    cast: Cast,
    start: int,
    begun: list[Streams],
    progress: Progress,
    what: str,
) -> Segment:
    """Samples, decodes and scores an epoch's videos in the window that begins at frame `start`.

    begun: the streams of each round, where they have come to `start` before; else they are made.
    Raises RewardError for a reward that is not finite, FloatingPointError for latents that are not.
    """
    config, streaming = run.config, run.config.streaming
    if streaming.sampling == "sequence":
        return _sample_sequences(run, adapter, batch, cast, start, progress, what)
    count, number = rounds(config, run.mesh.size)
    each = len(batch.texts) // (count * number)
    share = piece(config, config.sampler.batch, run.mesh.size) // number
    places = np.arange(len(batch.texts)).reshape(count, number, each)  # of candidates in the batch
    blocks = blocks_of(run, start, start + streaming.window)
    parts, scores, order, pasts = [], [], [], Pasts([], [])
    for r in range(count):
        own = cast.part(_firsts(batch.index, places[r, :, 0]))
        past, whole, before = _come_to(
            run, adapter, own, start, begun[r] if begun else None, progress
        )
        for i in range(0, each, share):
            chosen = places[r, :, i : i + share].reshape(-1)
            with progress.phase("rollout"):
                forked = fork(run, past, share)
                take = film(run, adapter, cast.part(chosen), forked, blocks, decode=False)
                latents = jax.block_until_ready(take.latents)
            pixels = _seen(
                run, latents, forked.vae if _decodes(run) else None, cast, blocks, chosen, progress
            )
            pixels = np.concatenate(
                [*(np.repeat(part, share, axis=0) for part in before), pixels], axis=1
            )
            scores.append(_judged(run, pixels, cast.part(chosen), start, chosen, progress))
            parts.append(latents)
            order.append(chosen)
            progress.tick(what, len(parts), count * each // share)
        pasts.streams.append(past if streaming.mode == "progressive" else _needed(run, past))
        pasts.whole.extend(whole)
    back = np.argsort(np.concatenate(order))
    latents = _sorted(parts, back, mesh=run.mesh)
    return Segment(latents, {name: values[back] for name, values in joined(scores).items()}, pasts)


def _firsts(index: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The first candidate of the prompt of each of these places: a prompt's past is its, on
    whichever devices.
    """
    return np.array([np.flatnonzero(index == index[place])[0] for place in places])


def _decodes(run: Run) -> bool:
    """Whether the decoder goes along with the past."""
    return run.config.streaming.reward != "window_alone"


def _needed(run: Run, past: Streams) -> Streams:
    """Of a past, what the loss reads."""
    streaming = run.config.streaming
    cached = streaming.prefix == "rollout_old" and streaming.backprop == "detach"
    return past._replace(vae=None, cache=past.cache if cached else None)


def _come_to(
    run: Run, adapter: dict, own: Cast, start: int, begun: Streams | None, progress: Progress
):
    """Streams at frame `start`, all latents before it where gradients go back there, and its frames
    where scored.
    """
    streaming, past = run.config.streaming, begin(run, len(own.stories)) if begun is None else begun
    full = streaming.reward == "full"
    with progress.phase("past"):
        if not start:
            return past, [], []
        whole, frames, first = [], [], start // run.layout.block
        if begun is None:
            past, latents, seen = film(run, adapter, own, past, range(first), _decodes(run), full)
            whole, frames = (
                [latents] if streaming.backprop == "full" else [],
                [seen] if full else [],
            )
        past = enter(run, adapter, own, past, first)
        if begun is not None and streaming.recache_on_update:
            past = recached(run, adapter, own, past, first)
        jax.block_until_ready(past.cache)
    return past, whole, frames


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
        scores.append(_judged(run, pixels, cast.part(chosen), start, chosen, progress))
        parts.append(latents)
        progress.tick(what, len(parts), len(batch.texts) // size)
    latents = _sorted(parts, np.arange(len(batch.texts)), mesh=run.mesh)
    return Segment(latents, joined(scores), Pasts([], []))


def _judged(
    run: Run, pixels: np.ndarray, cast: Cast, start: int, numbers: Sequence[int], progress: Progress
) -> Callable[[], Scores]:
    """Begins to score videos that end with the window from `start` on: [B] of the whole, or the
    means of their clips.

    pixels [B, T, height, width, 3]. A clip is judged by the prompt that it begins with, the whole
    by the window's.
    """
    streaming, stride = run.config.streaming, run.base.vae.config.temporal_stride
    # latent frames; the first one of a video is one frame, not `stride`
    count = -(-pixels.shape[1] // stride)
    lacking, first = stride * count - pixels.shape[1], start + streaming.window - count
    waiting = []
    for begin, stop in windows(count, streaming.score_frames or count):
        clip = pixels[:, max(stride * begin - lacking, 0) : stride * stop - lacking]
        prompts = cast.at((first + begin if streaming.score_frames else start) // run.layout.block)
        waiting.append(judge(run, clip, prompts, numbers, progress))

    def mean() -> Scores:
        clips = [wait() for wait in waiting]
        return {name: np.mean([clip[name] for clip in clips], axis=0) for name in clips[0]}

    return mean


def watch(
    run: Run,
    adapter: dict,
    batch: PromptBatch,
    cast: Cast,
    frames: int,
    progress: Progress,
    what: str,
) -> Iterator[tuple[np.ndarray, list[Callable[[], Scores]]]]:
    """Whole videos of `frames` latent frames, a piece after the other, scored window by window.

    Yields the frames [B, T, height, width, 3] uint8 of a piece, and the scores [B] of each window;
    the last one may be shorter. Errors as in `sample`.
    """
    size, count = piece(run.config, run.config.sampler.batch, run.mesh.size), len(batch.texts)
    starts = range(0, count, size)
    for i, first in enumerate(starts):
        numbers = np.arange(first, min(first + size, count))
        part = cast.part(np.resize(numbers, size))  # the last piece is filled up
        streams, clips, scores = begin(run, size), [], []
        for window in windows(frames, clip_length(run.config)):
            blocks = blocks_of(run, *window)
            with progress.phase("rollout"):
                streams = enter(run, adapter, part, streams, blocks[0])
                take = film(run, adapter, part, streams, blocks, watch=True)
            streams, prompts = take.streams, part.at(blocks[0])[: len(numbers)]
            refuse_non_finite(take.latents, prompts, numbers)
            clips.append(take.frames[: len(numbers)])
            scores.append(judge(run, clips[-1], prompts, numbers, progress))
        yield np.concatenate(clips, axis=1), scores
        progress.tick(what, i + 1, len(starts))


def work_on(
    run: Run,
    cast: Cast,
    pasts: Pasts,
    start: int,
    order: np.ndarray,
    state: TrainState,
    batch: Batch,
    i: int,
) -> Iterator[Work]:
    """The parts of microbatch i, which holds the samples `order`, for update.update
    (spec/streaming.md 5.3).
    """
    config, streaming = run.config, run.config.streaming
    if streaming.sampling == "clip":
        count, number = rounds(config, run.mesh.size)
        turn = int(order[0]) // (
            config.prompts.prompts_per_epoch * config.prompts.samples_per_prompt // count
        )
        yield Work(
            history=_history(run, cast, pasts, turn, start)
            if start or streaming.backprop == "detach"
            else None
        )
    elif streaming.backprop == "full":
        yield Work()
    else:
        own, streams, stop = cast.part(order), begin(run, len(order)), start + streaming.window
        for number, frames in enumerate(windows(stop, streaming.window)):
            blocks = blocks_of(run, *frames)
            yield Work(
                frames, number, History(np.int32(frames[0]), _places(own, blocks), streams.cache)
            )
            if frames[1] < stop:
                seen = batch.latents[i, :, slice(*frames)]
                streams = proceed(run, state.old, own, streams, seen, blocks, decode=False)


def _history(run: Run, cast: Cast, pasts: Pasts, turn: int, start: int) -> History:
    """What the loss reads of the past of a round's videos; see streaming.prefix and
    streaming.backprop.
    """
    blocks, streams = (
        blocks_of(run, start, start + run.config.streaming.window),
        pasts.streams[turn],
    )
    positions, begins = _places(cast, blocks), cast.stories[0].steps[blocks[0]].start
    if run.config.streaming.backprop == "full":
        return History(np.int32(begins), positions, whole=pasts.whole[turn])
    if run.config.streaming.prefix == "rollout_old":
        return History(np.int32(begins), positions, streams.cache)
    return History(np.int32(begins), positions, first=streams.first, recent=streams.recent)


def go_on(
    run: Run,
    adapter: dict,
    batch: PromptBatch,
    cast: Cast,
    segment: Segment,
    total: np.ndarray,
    epoch: int,
) -> list[Streams]:
    """Progressive streams behind an epoch's window, each with one of its candidates (5.2); none at
    the video's end.

    total [N]: rewards; adapter: the policy that will sample next. The memory of the segment's
    streams is taken.
    """
    start, window = begins_at(run, epoch), run.config.streaming.window
    if run.config.streaming.mode != "progressive" or start == run.starts[-1]:
        return []
    count, number = rounds(run.config, run.mesh.size)
    chosen, after = continuation(run, batch, total, epoch), []
    places = np.arange(len(batch.texts)).reshape(count, number, -1)[:, :, 0]
    for past, place in zip(segment.pasts.streams, places, strict=True):
        taken = np.array([chosen[line] for line in batch.index[place].tolist()])
        latents = sharding.shard_batch(run.mesh, sharding.to_host(segment.latents[taken]))
        own, blocks = cast.part(_firsts(batch.index, place)), blocks_of(run, start, start + window)
        after.append(proceed(run, adapter, own, past, latents, blocks, _decodes(run)))
    return jax.block_until_ready(after)


def continuation(run: Run, batch: PromptBatch, total: np.ndarray, epoch: int) -> dict[int, int]:
    """Which video each prompt goes on with: line of the prompt -> place in the batch."""
    chosen, kind = {}, run.config.streaming.continuation
    lines = list(dict.fromkeys(batch.index.tolist()))
    drawn = _random(run, Purpose.CONTINUATION, epoch, len(lines))
    for line, bits in zip(lines, drawn, strict=True):
        places = np.flatnonzero(batch.index == line)
        pick = {
            "first": 0,
            "best": np.argmax(total[places]),
            "uniform": int(bits % np.uint64(len(places))),
        }[kind]
        chosen[line] = int(places[pick])
    return chosen


def gathered(run: Run, streams: list[Streams]) -> Streams | None:
    """The streams of all rounds as one for each prompt, whatever the devices: what is saved."""
    if not streams:
        return None
    count, number = rounds(run.config, run.mesh.size)
    copies = count * number // run.config.prompts.prompts_per_epoch
    return _gathered(streams, copies, places=_saved_places(run))


def dealt(run: Run, saved: Streams | None) -> list[Streams]:
    """The inverse of `gathered`, on these devices."""
    if saved is None:
        return []
    count, number = rounds(run.config, run.mesh.size)
    copies = count * number // run.config.prompts.prompts_per_epoch
    return _dealt(saved, count, copies, mesh=run.mesh)


def shapes(run: Run, start: int, progressive: bool) -> Streams | None:
    """Of what `gathered` gives at frame `start`: shapes, dtypes and shardings."""
    if not start:
        return None
    layout, (_, *latent), groups = (
        run.layout,
        run.latent_shape,
        run.config.prompts.prompts_per_epoch,
    )
    net, vae = run.base.transformer, run.base.vae
    cache = jax.eval_shape(
        lambda: kv.empty_cache(net.config, groups, layout.capacity, tuple(latent[1:]))
    )
    first, recent = (
        jax.ShapeDtypeStruct((groups, n, *latent), jnp.float32)
        for n in (layout.kept, layout.capacity)
    )
    memory = None
    if progressive and _decodes(run):
        one = jax.ShapeDtypeStruct((groups, 1, *latent), jnp.float32)
        _, memory = jax.eval_shape(lambda p, x: merge(vae.graphdef, p).decode(x), vae.params, one)
    made = Streams(cache, memory, first, recent)
    made = made if progressive else _needed(run, made)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        made,
        _placing(made, *_saved_places(run)),
    )


def whole_shapes(run: Run, start: int) -> list[jax.ShapeDtypeStruct]:
    """Of Pasts.whole where gradients go back to frame 0."""
    count, number = rounds(run.config, run.mesh.size)
    place = sharding.batch_sharding(run.mesh)
    return [
        jax.ShapeDtypeStruct((number, start, *run.latent_shape[1:]), jnp.float32, sharding=place)
    ] * count


def untouched(
    run: Run, adapter: dict, cast: Cast, batch: PromptBatch, start: int, begun: list[Streams]
) -> Pasts:
    """The pasts that an epoch whose samples were saved had, where nothing had to be sampled for
    them.
    """
    if run.config.streaming.sampling == "sequence":
        return Pasts([], [])
    count, number = rounds(run.config, run.mesh.size)
    places = np.arange(len(batch.texts)).reshape(count, number, -1)[:, :, 0]
    quiet = Progress({}, lambda: None, lambda line: None)
    made = [
        _come_to(
            run,
            adapter,
            cast.part(_firsts(batch.index, places[r])),
            start,
            begun[r] if begun else None,
            quiet,
        )
        for r in range(count)
    ]
    return Pasts([past for past, _, _ in made], [])


def _saved_places(run: Run):
    """Shardings of saved streams, along axis 0 and axis 1."""
    if run.config.prompts.prompts_per_epoch % run.mesh.size:
        return (sharding.replicated(run.mesh),) * 2
    return sharding.batch_sharding(run.mesh), sharding.batch_sharding(run.mesh, axis=1)


def _placing(streams: Streams, outer, inner) -> Streams:
    """A sharding for every array: streams lie along axis 1 of the cache, and axis 0 of the rest."""
    rest = jax.tree.map(lambda _: outer, streams._replace(cache=None))
    return rest._replace(cache=jax.tree.map(lambda _: inner, streams.cache))


@functools.partial(jax.jit, static_argnames=("copies", "places"))
def _gathered(streams, copies: int, *, places):
    axes = _placing(streams[0], 0, 1)
    joined = jax.tree.map(
        lambda axis, *parts: jax.lax.slice_in_dim(
            jnp.concatenate(parts, axis), 0, None, copies, axis
        ),
        axes,
        *streams,
    )
    return jax.lax.with_sharding_constraint(joined, _placing(joined, *places))


@functools.partial(jax.jit, static_argnames=("count", "copies", "mesh"))
def _dealt(saved, count: int, copies: int, *, mesh):
    axes = _placing(saved, 0, 1)
    spread = jax.tree.map(lambda axis, part: jnp.repeat(part, copies, axis), axes, saved)

    def turn(r):
        def one(axis, part):
            size = part.shape[axis] // count
            return jax.lax.slice_in_dim(part, r * size, (r + 1) * size, axis=axis)

        part = jax.tree.map(one, axes, spread)
        places = sharding.batch_sharding(mesh), sharding.batch_sharding(mesh, axis=1)
        return jax.lax.with_sharding_constraint(part, _placing(part, *places))

    return [turn(r) for r in range(count)]


def _places(cast: Cast, blocks: range) -> np.ndarray:
    """Rotary positions of the frames of some blocks."""
    return np.concatenate([_positions(cast.stories[0].steps[block]) for block in blocks])


def _random(run: Run, purpose: Purpose, epoch: int, count: int) -> np.ndarray:
    """count uint64 of a counter-based generator's raw output, which no numpy release changes."""
    key = np.array([run.config.seed, (purpose << 32) | epoch], np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def policy_of(run: Run, adapter: dict) -> stream.Policy:
    """What streams are sampled from."""
    net = run.base.transformer
    return stream.Policy(
        net.graphdef,
        net.params,
        adapter,
        run.lora_scale,
        net.config,
        run.layout,
        run.sampler,
        run.mesh,
    )


def _told(
    policy: stream.Policy, cast: Cast, blocks: range
) -> Iterator[tuple[int, Step, KeyValues]]:
    """Number, step and text of each block; texts are encoded once for as long as nobody's prompt
    changes.
    """
    spoken = text = None
    for number in blocks:
        if (prompts := cast.at(number)) != spoken:
            spoken, text = prompts, _text(policy, cast, prompts)
        yield number, cast.stories[0].steps[number], text


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
    slots = policy.layout.capacity
    # frames that are no longer among the recent ones
    gone = cast.stories[0].steps[block].frame - slots
    frames = {
        f: streams.first[:, f] if f < gone else streams.recent[:, f - gone] for f in change.frames
    }
    cache, _ = stream.changed(
        policy, text, jax.tree.map(jnp.copy, streams.cache), change, frames, slots, latent_hw
    )
    if not all(changes):
        cache = _where(np.array([bool(change) for change in changes]), cache, streams.cache)
    return streams._replace(cache=cache)


def _advance(
    run: Run, streams: Streams, latents, step: Step, decode: bool
) -> tuple[Streams, list[jax.Array]]:
    """The streams behind a block whose keys are in the cache, and its frames if it is decoded."""
    first, recent = _remember(streams.first, streams.recent, latents, np.int32(step.frame))
    memory, frames = streams.vae, []
    if decode:
        frames, memory = decoded(run, latents, memory)
    return streams._replace(vae=memory, first=first, recent=recent), frames


def decoded(run: Run, latents, memory):
    """Frames of latents, config.video.decode_chunk at a time, and the decoder's memory behind
    them.
    """
    vae, chunk, frames = run.base.vae, run.config.video.decode_chunk, []
    for i in range(0, latents.shape[1], chunk):
        part, memory = decode_chunk(
            vae.graphdef, vae.params, latents[:, i : i + chunk], memory, mesh=run.mesh
        )
        frames.append(part)
    return frames, memory


def _seen(
    run: Run, latents, memory, cast: Cast, blocks: range, chosen, progress: Progress
) -> np.ndarray:
    with progress.phase("decode"):
        refuse_non_finite(latents, cast.part(chosen).at(blocks[0]), chosen)
        return on_host(decoded(run, latents, memory)[0])


def on_host(frames: Sequence[jax.Array]) -> np.ndarray:
    """Frames that come one after another, as one array."""
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
        return lambda part: jax.lax.with_sharding_constraint(
            jnp.repeat(part, each, axis=axis), place
        )

    cache = jax.tree.map(repeat(1), streams.cache)
    return Streams(cache, *jax.tree.map(repeat(0), (streams.vae, streams.first, streams.recent)))


@functools.partial(jax.jit, static_argnames="static")
def _reencode(static, params, adapter, lora_scale, text, first, recent, start, t):
    graphdef, layout, _, mesh = static

    def encode(params, adapter, text, first, recent):
        model = merge(graphdef, params)
        return model.reencode(first, recent, t, text, start, adapter, lora_scale, layout=layout)

    return sharding.on_mesh(mesh, encode)(params, adapter, text, first, recent)


@jax.jit
def _where(chosen, one, other):
    return jax.tree.map(lambda a, b: jnp.where(chosen.reshape(1, -1, 1, 1, 1), a, b), one, other)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _blank(mesh, one, other):
    place = sharding.batch_sharding(mesh)
    return tuple(
        jax.lax.with_sharding_constraint(jnp.zeros(shape, jnp.float32), place)
        for shape in (one, other)
    )


@functools.partial(jax.jit, static_argnames="mesh")
def _sorted(parts, back, *, mesh):
    """Latents of pieces as one batch, in the order of the videos."""
    latents = jnp.concatenate(parts)[back].astype(jnp.float32)
    return jax.lax.with_sharding_constraint(latents, sharding.batch_sharding(mesh))
