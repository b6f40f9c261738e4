"""The collector of an epoch: videos in windows, behind a past that the videos of a prompt share.

A whole video is the window that begins at frame 0. Long videos are trained in windows of a few
blocks: the past of a prompt is sampled once, its candidates fork from it, and gradients end where
the window begins (docs/streaming.md).

    for each round (config.rounds):
        prefix = advance_to(start)                  # rollout of the shared past
        for each piece (config.piece):
            sample_blocks(fork(prefix))             # rollout of the window
            decode, score_async                     # decode, rewards; they overlap the next piece
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from astrolabe_jax import encode, minibatches, prompts, sharding
from astrolabe_jax.arithmetic import clip_length, piece, rounds, samples, shares_prefix
from astrolabe_jax.decode import decode_video
from astrolabe_jax.models.layers import merge
from astrolabe_jax.rewards.registry import RewardError
from astrolabe_jax.run import Run, timeline_of
from astrolabe_jax.runtime import multihost
from astrolabe_jax.runtime.progress import Progress
from astrolabe_jax.streaming import streams
from astrolabe_jax.types import (
    LossPart,
    Policy,
    PrefixContext,
    PromptBatch,
    RngStream,
    Scores,
    Segment,
    StreamState,
    TrainState,
    VideoBatch,
)

WaitForScores = Callable[[], Scores]
VideoNumbers = Sequence[int] | np.ndarray  # of the videos in their epoch or evaluation


def window_start(run: Run, epoch: int) -> int:
    """Return the frame at which an epoch's window begins, from the seed alone."""
    drawn = minibatches.random_bits(run.config, RngStream.WINDOW, epoch, 1)
    return run.starts[(epoch if _progressive(run) else drawn[0]) % len(run.starts)]


def prompt_draw(run: Run, epoch: int) -> int:
    """Return the number of the drawing of prompts that an epoch takes.

    Progressive streams keep their prompts to the end of their videos.
    """
    return epoch // len(run.starts) if _progressive(run) else epoch


def encode_videos(
    run: Run, batch: PromptBatch, stream: RngStream, epoch: int, frames: int, progress: Progress
) -> VideoBatch:
    """Return what the videos of a batch are sampled from: timelines, embeddings, and keys.

    Every distinct prompt is encoded once.

    Args:
      stream, epoch: of the keys.
      frames: latent frames of the timelines.
    """
    timelines = {text: timeline_of(run, text, frames) for text in dict.fromkeys(batch.texts)}
    distinct = dict.fromkeys(
        prompt for timeline in timelines.values() for prompt in timeline.prompts
    )
    with progress.phase("encode"):
        embeddings = encode.encode_prompts(
            run.base.text, run.base.tokenizer, list(distinct), run.mesh
        )
    return VideoBatch(
        batch,
        tuple(timelines[text] for text in batch.texts),
        {prompt: row for row, prompt in enumerate(distinct)},
        embeddings,
        prompts.sample_keys(batch, run.config.seed, stream, epoch),
        traced=bool(run.config.streaming.window),
    )


def begin(run: Run, count: int, frames: int) -> StreamState:
    """Return the state of `count` videos of `frames` latent frames, at frame 0."""
    capacity = run.layout.capacity
    slots = capacity if run.config.streaming.window else min(capacity, frames)
    return streams.begin(
        run.base.transformer.config, run.layout, count, slots, run.latent_shape[1:]
    )


def collect(
    run: Run,
    adapter: dict,
    videos: VideoBatch,
    start: int,
    begun: list[StreamState],
    progress: Progress,
    label: str,
) -> Segment:
    """Sample, decode and score an epoch's videos in the window that begins at frame `start`.

    Args:
      adapter: the policy that samples.
      begun: the streams of each round, where they have come to `start` before; else they are made.
      label: of the progress lines.

    Raises:
      RewardError: for a reward that is not finite.
      FloatingPointError: for latents that are not finite.
    """
    policy = run.policy(adapter)
    shared = shares_prefix(run.config)
    blocks = streams.blocks_between(videos, start if shared else 0, start + run.window)
    places = _places(run, videos)
    share = piece(run.config, run.config.sampler.batch, run.mesh.size) // places.shape[1]
    pieces = []
    waiting = []
    order = []
    prefixes = []
    whole = []
    for round_places, first in zip(places, begun or [None] * len(places), strict=True):
        prefix, latents_before, frames_before = _advance_to(
            run,
            adapter,
            _prefix_videos(run, videos, round_places[:, 0]),
            start if shared else 0,
            first,
            progress,
        )
        for i in range(0, round_places.shape[1], share):
            chosen = round_places[:, i : i + share].reshape(-1)
            part = videos.take(chosen)
            with progress.phase("rollout"):
                state = streams.fork(prefix, share) if shared else prefix
                # the keys of candidates are not kept: their latents are all that is learnt from
                latents = sampled(streams.sample_blocks(policy, part, state, blocks))[0]
                jax.block_until_ready(latents)
            with progress.phase("decode"):
                refuse_non_finite(latents, part.prompts_at(blocks[0]), chosen)
                decoded = _decode(run, latents, state.decoder)[0]
                repeated = [np.repeat(frames, share, axis=0) for frames in frames_before]
                frames = np.concatenate([*repeated, to_host(decoded)], axis=1)
            waiting.append(_score_clips(run, frames, part, start, chosen, progress))
            pieces.append(latents)
            order.append(chosen)
            progress.tick(label, len(pieces), places.size // len(chosen))
        if not _progressive(run):
            prefix = _loss_prefix(run, prefix)  # what else it holds goes before the next round
        if shared:
            prefixes.append(prefix)
        whole.extend(latents_before)
    back = np.argsort(np.concatenate(order))
    return Segment(
        videos,
        start,
        _chosen(pieces, back),
        {name: values[back] for name, values in joined(waiting).items()},
        prefixes,
        whole,
    )


def score_videos(
    run: Run, adapter: dict, videos: VideoBatch, frames: int, progress: Progress, label: str
) -> Iterator[tuple[np.ndarray, list[WaitForScores]]]:
    """Sample whole videos of `frames` latent frames, a piece after the other, scored clip by clip.

    Gives the frames [B, T, height, width, 3] uint8 of a piece, and what waits for the scores [B] of
    each clip; the last clip may be shorter. Errors as in `collect`.
    """
    policy = run.policy(adapter)
    size = piece(run.config, run.config.sampler.batch, run.mesh.size)
    everything = np.arange(len(videos.timelines))
    starts = everything[::size]
    for i, first in enumerate(starts):
        numbers = everything[first : first + size]
        part = videos.take(np.resize(numbers, size))  # the last piece is filled up
        state = begin(run, size, frames)
        clips = []
        scores = []
        for clip in split(frames, clip_length(run.config) or frames):
            blocks = streams.blocks_between(part, *clip)
            with progress.phase("rollout"):
                state = streams.change_prompts(policy, part, state, blocks[0])
                latents, state = sampled(streams.sample_blocks(policy, part, state, blocks))
                jax.block_until_ready(latents)
            texts = part.prompts_at(blocks[0])[: len(numbers)]
            with progress.phase("decode"):
                refuse_non_finite(latents, texts, numbers)
                decoded, decoder = _decode(run, latents, state.decoder)
                clips.append(to_host(decoded)[: len(numbers)])
            state = state._replace(decoder=decoder)
            scores.append(score_async(run, clips[-1], texts, numbers, progress))
        del state
        yield np.concatenate(clips, axis=1), scores
        progress.tick(label, i + 1, len(starts))


def score_async(
    run: Run,
    frames: np.ndarray,
    texts: Sequence[str],
    numbers: VideoNumbers,
    progress: Progress,
) -> WaitForScores:
    """Begin to score B videos; the function that comes back waits for their scores [B].

    This call and the returned function raise RewardError. All processes have the scores of process
    0.

    numbers: of the videos in their epoch or evaluation, for errors.
    """

    def measured(action: Callable) -> Any:
        with progress.phase("rewards"):
            try:
                return action()
            except RewardError as error:
                raise RewardError(f"{error}; nothing was learnt from these videos") from error

    def shared() -> Scores:
        own = measured(wait)
        scores = multihost.on_primary(lambda: {name: own[name].tolist() for name in own})
        return {name: np.array(values, np.float32) for name, values in scores.items()}

    wait = measured(
        lambda: run.reward_runner.score_async(frames, texts, list(numbers), progress.check)
    )
    return shared


def split(frames: int, length: int) -> list[tuple[int, int]]:
    """Return first and end frame of the parts of `length` frames; the last may be shorter."""
    return [(start, min(start + length, frames)) for start in range(0, frames, length)]


def refuse_non_finite(latents: jax.Array, texts: Sequence[str], numbers: VideoNumbers) -> None:
    """Raise FloatingPointError that names the sample whose latents are not finite.

    Decoded, such latents would be black frames, and scored as such.
    """
    bad = np.flatnonzero(~sharding.to_host(streams.finite(latents))[: len(texts)])
    if len(bad):
        index = bad[0]
        others = f" and those of {len(bad) - 1} more" if len(bad) > 1 else ""
        raise FloatingPointError(
            f"the latents of sample {numbers[index]} (prompt {texts[index]!r}){others} are not "
            "finite; they were not scored; lower optimizer.learning_rate or use "
            "model.dtype=float32"
        )


def loss_parts(
    run: Run, segment: Segment, order: np.ndarray, i: int, state: TrainState, latents: jax.Array
) -> Iterator[LossPart]:
    """Give the parts of microbatch i of a step over the samples `order` [m, B], for update.update.

    Args:
      latents: of the microbatch, [B, F, C, H, W].
    """
    streaming = run.config.streaming
    shared = shares_prefix(run.config)
    if shared and (segment.start or streaming.backprop == "detach"):
        number = int(order[i, 0]) * len(segment.prefixes) // len(segment.videos.timelines)
        yield LossPart(prefix=_prefix_context(run, segment, number))
    elif shared or streaming.backprop == "full" or not streaming.window:
        yield LossPart()
    else:
        yield from _sequence_parts(
            run, segment.videos.take(order[i]), segment.start, state, latents
        )


def _sequence_parts(
    run: Run, videos: VideoBatch, start: int, state: TrainState, latents: jax.Array
) -> Iterator[LossPart]:
    """Give the windows of videos that were sampled from frame 0 on, each behind those before it."""
    stop = start + run.window
    stream = begin(run, len(videos.timelines), stop)
    policy = run.policy(state.old)
    for number, (first, end) in enumerate(split(stop, run.window)):
        blocks = streams.blocks_between(videos, first, end)
        yield LossPart(
            (first, end),
            number,
            PrefixContext(
                np.int32(first),
                streams.positions_of(videos.blocks[blocks.start : blocks.stop]),
                stream.cache,
            ),
        )
        if end < stop:
            stream = cache_blocks(policy, videos, stream, latents[:, first:end], blocks)


def _prefix_context(run: Run, segment: Segment, number: int) -> PrefixContext:
    """Return what the loss reads of a round's past (docs/streaming.md, Whose keys)."""
    streaming = run.config.streaming
    blocks = streams.blocks_between(segment.videos, segment.start, segment.start + run.window)
    plans = segment.videos.blocks[blocks.start : blocks.stop]
    context = PrefixContext(np.int32(plans[0].start), streams.positions_of(plans))
    if streaming.backprop == "full":
        return context._replace(whole=segment.whole[number])
    state = segment.prefixes[number]
    if streaming.prefix == "rollout_old":
        return context._replace(cache=state.cache)
    return context._replace(first=state.first[:, : run.layout.kept], recent=state.recent)


def continue_streams(
    run: Run, adapter: dict, segment: Segment, advantage: np.ndarray, epoch: int
) -> list[StreamState]:
    """Return progressive streams behind an epoch's window, each with one of its candidates.

    There are none at the end of the video. The memory of the segment's streams is taken.

    Args:
      adapter: the policy that will sample next.
      advantage: [N], by which the best one is found: of what is maximised.
    """
    if not _progressive(run) or segment.start == run.starts[-1]:
        return []
    videos = segment.videos
    chosen = continuations(run, videos.batch, advantage, epoch)
    policy = run.policy(adapter)
    blocks = streams.blocks_between(videos, segment.start, segment.start + run.window)
    after = []
    for state, places in zip(segment.prefixes, _places(run, videos)[:, :, 0], strict=True):
        taken = np.array([chosen[line] for line in videos.batch.index[places].tolist()])
        latents = _chosen([segment.latents], taken)
        own = _prefix_videos(run, videos, places)
        state = cache_blocks(policy, own, state, latents, blocks)
        if decodes(run):
            state = state._replace(decoder=_decode(run, latents, state.decoder)[1])
        after.append(state)
    return jax.block_until_ready(after)


def cache_blocks(
    policy: Policy, videos: VideoBatch, state: StreamState, latents: jax.Array, blocks: range
) -> StreamState:
    """Return the state behind given latents of some blocks; the memory of `state` is taken."""
    for block in streams.cache_blocks(
        policy, videos, state, latents, blocks, policy.sampler.context_noise
    ):
        state = block.state
    return state


def continuations(
    run: Run, batch: PromptBatch, advantage: np.ndarray, epoch: int
) -> dict[int, int]:
    """Return which video each prompt goes on with: line of the prompt -> place in the batch."""
    lines = list(dict.fromkeys(batch.index.tolist()))
    chosen = {}
    drawn = minibatches.random_bits(run.config, RngStream.CONTINUATION, epoch, len(lines))
    for line, bits in zip(lines, drawn, strict=True):
        places = np.flatnonzero(batch.index == line)
        picks = {
            "first": 0,
            "best": np.argmax(advantage[places]),
            "uniform": int(bits % np.uint64(len(places))),
        }
        chosen[line] = int(places[picks[run.config.streaming.continuation]])
    return chosen


def merge_streams(run: Run, states: list[StreamState]) -> StreamState | None:
    """Return the streams of all rounds as one for each prompt, whatever the devices."""
    return _merged(states, _copies(run), places=_saved_places(run)) if states else None


def split_streams(run: Run, saved: StreamState | None) -> list[StreamState]:
    """Return the inverse of `merge_streams`, on these devices."""
    count, _ = rounds(run.config, run.mesh.size)
    return [] if saved is None else _divided(saved, count, _copies(run))


def _copies(run: Run) -> int:
    """Return how many streams there are of each prompt: devices may hold the same past."""
    count, number = rounds(run.config, run.mesh.size)
    return count * number // run.config.prompts.prompts_per_epoch


def stream_shapes(run: Run, start: int, progressive: bool) -> StreamState | None:
    """Return shapes, dtypes and shardings of what `merge_streams` gives at frame `start`."""
    if not start:
        return None
    groups = run.config.prompts.prompts_per_epoch
    state = jax.eval_shape(lambda: begin(run, groups, 0))
    if progressive and decodes(run):
        vae = run.base.vae

        state = state._replace(
            decoder=jax.eval_shape(
                lambda params, latents: merge(vae.graphdef, params).decode(latents)[1],
                vae.params,
                jax.ShapeDtypeStruct((groups, 1, *run.latent_shape[1:]), jnp.float32),
            )
        )
    state = state if progressive else _loss_prefix(run, state)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        streams.by_axis(state, *_saved_places(run)),
    )


def segment_shapes(run: Run, start: int) -> dict[str, Any]:
    """Return the shapes of what `segment_arrays` gives."""

    def latents(count: int, frames: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            (count, frames, *run.latent_shape[1:]),
            jnp.float32,
            sharding=sharding.batch_sharding(run.mesh),
        )

    frames = run.window if shares_prefix(run.config) else start + run.window
    shapes: dict[str, Any] = {"latents": latents(samples(run.config), frames)}
    if _saves_prefix(run, start):
        shapes["streams"] = stream_shapes(run, start, progressive=False)
        if run.config.streaming.backprop == "full":
            number, streams_of_round = rounds(run.config, run.mesh.size)
            shapes["whole"] = [latents(streams_of_round, start)] * number
    return shapes


def segment_arrays(run: Run, segment: Segment) -> dict[str, Any]:
    """Return the arrays of a segment that are saved before anything is learnt from it."""
    arrays: dict[str, Any] = {"latents": segment.latents}
    if _saves_prefix(run, segment.start):
        arrays["streams"] = merge_streams(run, segment.prefixes)
        if segment.whole:
            arrays["whole"] = segment.whole
    return arrays


def restore_segment(
    run: Run,
    adapter: dict,
    videos: VideoBatch,
    start: int,
    begun: list[StreamState],
    saved: tuple[dict[str, Any], Scores],
) -> Segment:
    """Return the segment of saved arrays (`segment_arrays`) and scores.

    A past that needs no sampling is made anew. Arguments as in `collect`.
    """
    arrays, scores = saved
    prefixes = split_streams(run, arrays.get("streams"))
    if shares_prefix(run.config) and not prefixes:
        quiet = Progress(log=lambda line: None)
        places = _places(run, videos)[:, :, 0]
        prefixes = [
            _advance_to(run, adapter, _prefix_videos(run, videos, of_round), start, first, quiet)[0]
            for of_round, first in zip(places, begun or [None] * len(places), strict=True)
        ]
    return Segment(videos, start, arrays["latents"], scores, prefixes, arrays.get("whole", []))


def _progressive(run: Run) -> bool:
    return run.config.streaming.mode == "progressive"


def _saves_prefix(run: Run, start: int) -> bool:
    """Return whether a segment stores its past: this epoch has sampled it."""
    return shares_prefix(run.config) and not _progressive(run) and start > 0


def _places(run: Run, videos: VideoBatch) -> np.ndarray:
    """Return the places of the videos in their batch: [rounds, streams of a round, candidates]."""
    count, number = rounds(run.config, run.mesh.size)
    return np.arange(len(videos.timelines)).reshape(count, number, -1)


def _prefix_videos(run: Run, videos: VideoBatch, places: np.ndarray) -> VideoBatch:
    """Return the videos whose noise the streams of a round have before the window.

    The past that a prompt's videos share is that of its first candidate, on whichever devices.
    """
    if shares_prefix(run.config):
        index = videos.batch.index
        places = np.array([np.flatnonzero(index == index[place])[0] for place in places])
    return videos.take(places)


def decodes(run: Run) -> bool:
    """Return whether the decoder goes along with the past."""
    return run.config.streaming.reward != "window_alone"


def _loss_prefix(run: Run, state: StreamState) -> StreamState:
    """Return what the loss reads of a past."""
    streaming = run.config.streaming
    cached = streaming.prefix == "rollout_old" and streaming.backprop == "detach"
    return state._replace(decoder=None, cache=state.cache if cached else None)


def _advance_to(
    run: Run,
    adapter: dict,
    own: VideoBatch,
    start: int,
    begun: StreamState | None,
    progress: Progress,
) -> tuple[StreamState, list[jax.Array], list[np.ndarray]]:
    """Advance streams to frame `start` and apply the change of prompts there.

    Also returns all latents before it, where gradients go back there, and all frames, where they
    are scored.
    """
    state = begin(run, len(own.timelines), run.latent_shape[0]) if begun is None else begun
    if not start:
        return state, [], []
    streaming = run.config.streaming
    policy = run.policy(adapter)
    blocks = streams.blocks_between(own, 0, start)
    whole = []
    frames = []
    with progress.phase("past"):
        if begun is None:
            latents, state = sampled(streams.sample_blocks(policy, own, state, blocks))
            if streaming.backprop == "full":
                whole = [latents]
            if decodes(run):
                decoder, frames = _decode_past(run, latents)
                state = state._replace(decoder=decoder)
        state = streams.change_prompts(policy, own, state, blocks.stop)
        if begun is not None and streaming.recache_on_update:
            state = streams.refresh_cache(policy, own, state, blocks.stop)
        jax.block_until_ready(state.cache)
    return state, whole, frames


def _decode_past(run: Run, latents: jax.Array) -> tuple[Any, list[np.ndarray]]:
    """Return the decoder's memory behind latents, and their frames where they are scored.

    A chunk's frames leave the device before the next one's are there.
    """
    decoder = None
    frames = []
    for begin, end in split(latents.shape[1], run.config.video.decode_chunk):
        decoded, decoder = _decode(run, latents[:, begin:end], decoder)
        if run.config.streaming.reward == "full":
            frames.append(to_host(decoded))
    return decoder, frames


def sampled(blocks: Iterator[streams.SampledBlock]) -> tuple[jax.Array, StreamState]:
    """Return the latents [B, F, C, H, W] of some blocks, and the state behind them."""
    done = list(blocks)
    return jnp.concatenate([block.latents for block in done], axis=1), done[-1].state


def _decode(run: Run, latents: jax.Array, decoder: Any) -> tuple[list[jax.Array], Any]:
    """Return the frames of latents, chunk by chunk, and the decoder's memory behind them."""
    return decode_video(run.base.vae, latents, decoder, run.config.video.decode_chunk)


def to_host(frames: Sequence[jax.Array]) -> np.ndarray:
    """Return frames that come one after another as one array."""
    return np.concatenate([sharding.to_host(part) for part in frames], axis=1)


def _score_clips(
    run: Run,
    frames: np.ndarray,
    videos: VideoBatch,
    start: int,
    numbers: np.ndarray,
    progress: Progress,
) -> WaitForScores:
    """Begin to score videos that end with the window from `start` on: the means of their clips.

    A clip is scored for the prompt that it begins with, the whole for the window's.

    Args:
      frames: [B, T, height, width, 3], those before the window included where they are scored.
    """
    length = run.config.streaming.score_frames
    stride = run.base.vae.config.temporal_stride
    # the first latent frame of a video is one frame, not `stride`
    count = -(-frames.shape[1] // stride)
    missing = stride * count - frames.shape[1]
    waiting = []
    for begin, end in split(count, length or count):
        clip = frames[:, max(stride * begin - missing, 0) : stride * end - missing]
        frame = start + run.window - count + begin if length else start
        texts = videos.prompts_at(streams.block_at(videos, frame))
        waiting.append(score_async(run, clip, texts, numbers, progress))

    def mean() -> Scores:
        clips = [wait() for wait in waiting]
        return {name: np.mean([clip[name] for clip in clips], axis=0) for name in clips[0]}

    return mean


def joined(waiting: Sequence[WaitForScores]) -> Scores:
    """Return the scores of several pieces, one after the other."""
    pieces = [wait() for wait in waiting]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _saved_places(run: Run):
    """Return the shardings of saved streams, along axis 0 and axis 1."""
    if run.config.prompts.prompts_per_epoch % run.mesh.size:
        return sharding.replicated(run.mesh), sharding.replicated(run.mesh)
    return sharding.batch_sharding(run.mesh), sharding.batch_sharding(run.mesh, axis=1)


@functools.partial(jax.jit, static_argnames=("copies", "places"))
def _merged(states, copies: int, *, places):
    merged = jax.tree.map(
        lambda axis, *parts: jax.lax.slice_in_dim(
            jnp.concatenate(parts, axis), 0, None, copies, axis
        ),
        streams.by_axis(states[0], 0, 1),
        *states,
    )
    return jax.lax.with_sharding_constraint(merged, streams.by_axis(merged, *places))


@functools.partial(jax.jit, static_argnames=("count", "copies"))
def _divided(saved, count: int, copies: int):
    def of_round(number, axis, leaf):
        part = jnp.split(jnp.repeat(leaf, copies, axis), count, axis)[number]
        return sharding.by_sample(part, axis)

    axes = streams.by_axis(saved, 0, 1)
    return [
        jax.tree.map(functools.partial(of_round, number), axes, saved) for number in range(count)
    ]


@jax.jit
def _chosen(pieces, places):
    """Return latents at these places of all pieces, samples split over all devices."""
    return sharding.take(pieces, places).astype(jnp.float32)
