"""Score a policy on held-out prompts, with the same prompts and noise every time."""

from collections.abc import Sequence

import numpy as np

from astrolabe_jax import advantages, decode, prompts
from astrolabe_jax.arithmetic import clip_length, eval_frames, piece
from astrolabe_jax.config import reward_weights
from astrolabe_jax.run import Run, timeline_of
from astrolabe_jax.runtime.progress import Progress, warn
from astrolabe_jax.streaming import windows
from astrolabe_jax.types import Evaluation, PromptBatch, RngStream, Timeline


def held_out(run: Run) -> PromptBatch:
    """Return the videos of every evaluation of this run."""
    return prompts.held_out(run.test_prompts, run.config.seed, run.config.eval.videos)


def evaluate(
    run: Run, adapter: dict, progress: Progress, label: str
) -> tuple[Evaluation, np.ndarray]:
    """Return the scores of every held-out video, and the frames of the first ones.

    The frames are [eval.shown, T, height, width, 3] uint8.
    """
    batch = held_out(run)
    length = _length(run)
    videos = windows.encode_videos(run, batch, RngStream.HELD_OUT, 0, length, progress)
    waiting = []
    frames = []
    for pixels, scores in windows.score_videos(run, adapter, videos, length, progress, label):
        waiting.append(scores)
        if sum(map(len, frames)) < run.config.eval.shown:
            frames.append(pixels)
    return _evaluation(run, waiting), np.concatenate(frames)[: run.config.eval.shown]


def ceiling(run: Run, progress: Progress) -> Evaluation | None:
    """Return the scores of real videos of the held-out prompts after a round trip through the VAE.

    A policy that imitates real videos perfectly would score this: its decoder can draw no better.
    None where there are no real videos, or they have another size than those of the run.
    """
    world = prompts.world_of(run.config.prompts.test)
    if world is None or not run.config.eval.ceiling:
        return None
    batch = held_out(run)
    size = piece(run.config, run.config.sampler.batch, run.mesh.size)
    waiting = []
    for first in range(0, len(batch.texts), size):
        part = batch.take(np.arange(first, min(first + size, len(batch.texts))))
        timelines = [timeline_of(run, text, _length(run)) for text in part.texts]
        real = np.stack(
            [
                world.sample(_scenes(run, timeline), _generator(run, part, j))
                for j, timeline in enumerate(timelines)
            ]
        )
        size_asked = (run.config.video.height, run.config.video.width)
        if real.shape[2:4] != size_asked:
            sizes = ["x".join(map(str, sides)) for sides in (real.shape[2:4], size_asked)]
            warn(f"real videos are {sizes[0]}, those of the run {sizes[1]}: there is no ceiling")
            return None
        waiting.append(_score_real(run, timelines, real, first, progress))
    return _evaluation(run, waiting)


def _score_real(
    run: Run, timelines: Sequence[Timeline], videos: np.ndarray, first: int, progress: Progress
) -> list[windows.WaitForScores]:
    """Begin to score real videos [B, T, height, width, 3] after a round trip, clip by clip.

    first: number of the first one among the held-out videos.
    """
    vae = run.base.vae
    stride = vae.config.temporal_stride
    size = piece(run.config, run.config.sampler.batch, run.mesh.size)
    padded = videos[np.resize(np.arange(len(videos)), size)]
    numbers = range(first, first + len(videos))
    length = _length(run)
    encoder = None
    decoder = None
    waiting = []
    for begin, end in windows.split(length, clip_length(run.config) or length):
        clip = padded[:, max(stride * begin - stride + 1, 0) : stride * end - stride + 1]
        with progress.phase("encode"):
            latents, encoder = decode.encode_video(vae, clip, encoder, end - begin, run.mesh)
        with progress.phase("decode"):
            windows.refuse_non_finite(latents, [t.prompts[0] for t in timelines], numbers)
            decoded, decoder = decode.decode_video(
                vae, latents, decoder, run.config.video.decode_chunk
            )
            frames = windows.to_host(decoded)[: len(videos)]
        texts = [_prompt_at(timeline, begin) for timeline in timelines]
        waiting.append(windows.score_async(run, frames, texts, numbers, progress))
    return waiting


def _prompt_at(timeline: Timeline, frame: int) -> str:
    """Return the prompt of a latent frame."""
    block = [plan for plan in timeline.blocks if plan.frame <= frame][-1]
    return timeline.prompts[block.scene]


def _length(run: Run) -> int:
    """Return the latent frames of a held-out video."""
    return run.base.vae.config.latent_frames(eval_frames(run.config))


def _scenes(run: Run, timeline: Timeline) -> list[tuple[str, int]]:
    """Return the scenes of a real video: each a prompt and its pixel frames."""
    stride = run.base.vae.config.temporal_stride
    starts = [stride * change - stride + 1 for change in timeline.changes]
    counts = np.diff([0, *starts, eval_frames(run.config)])
    return [(p, int(n)) for p, n in zip(timeline.prompts, counts, strict=True)]


def _generator(run: Run, batch: PromptBatch, j: int) -> np.random.Generator:
    """Return what the path of a real video is drawn from."""
    return np.random.default_rng(
        [run.config.seed, RngStream.REAL, batch.index[j], batch.candidate[j]]
    )


def _evaluation(run: Run, waiting: Sequence[Sequence[windows.WaitForScores]]) -> Evaluation:
    """Return the means over the clips of each video, and what single clips have (types.Evaluation).

    waiting: for each piece of the held-out videos, the scores of its clips.
    """
    length = _length(run)
    clips = [_total(run, pieces) for pieces in zip(*waiting, strict=True)]
    if len(clips) == 1:
        return clips[0]
    begins = [begin for begin, _ in windows.split(length, clip_length(run.config))]
    late = [clip["total"] for begin, clip in zip(begins, clips, strict=True) if 2 * begin >= length]
    return {
        **{name: np.mean([clip[name] for clip in clips], axis=0) for name in clips[0]},
        "late": np.mean(late or [clips[-1]["total"]], axis=0),
        **{f"total/{begin}": clip["total"] for begin, clip in zip(begins, clips, strict=True)},
    }


def _total(run: Run, pieces: Sequence[windows.WaitForScores]) -> Evaluation:
    """Return the rewards of one clip of all videos, and their weighted sum."""
    scores = windows.joined(pieces)
    weights = reward_weights(run.config)
    values = {name: scores[name].astype(np.float64) for name in weights}
    return values | {"total": advantages.total_reward(values, weights)}
