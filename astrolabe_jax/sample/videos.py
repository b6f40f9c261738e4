"""Videos from prompts: blocks are decoded and written as they are sampled.

So length costs time, not memory. `python -m astrolabe_jax.sample` (sample/__main__.py) is how it is
run; sample/requests.py reads what is asked for.
"""

import concurrent.futures
import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from astrolabe_jax import encode, prompts, sharding
from astrolabe_jax import run as runs
from astrolabe_jax.config import flatten
from astrolabe_jax.convert.base import Base
from astrolabe_jax.decode import decode_video, encode_video
from astrolabe_jax.models.lora import merge_adapter
from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.rewards.panel import RewardRunner
from astrolabe_jax.run import Run
from astrolabe_jax.runtime.files import read_jsonl, write_atomic
from astrolabe_jax.runtime.media import Mp4Writer
from astrolabe_jax.runtime.progress import Progress, log
from astrolabe_jax.sample.requests import GivenFrames, Request
from astrolabe_jax.streaming import streams
from astrolabe_jax.streaming.scenes import Shot, cache_slots
from astrolabe_jax.types import PromptBatch, RngStream, Timeline, VideoBatch

# Sections of the config that a video depends on; of `sampler` all but the batch.
CONTENT = ("seed", "model.", "sampler.", "video.", "scenes.")
NO_CONTENT = ("sampler.batch", "model.remat", "video.decode_chunk")
VIDEOS = "videos"  # folder of the results
GIVEN_TIMESTEP = 0.0  # at which given frames are read into the cache, whatever context_noise is


class VideoPart(NamedTuple):
    """Some frames of the videos that are made at once."""

    shot: int  # number of the shot in the video
    scene: int  # number of the scene in the shot
    frames: np.ndarray  # [B, T, height, width, 3] uint8
    ends: bool  # whether the scene ends with them


def load(
    config: ConfigDict,
    lora: tuple[dict, float] | None,
    given: GivenFrames,
    directory: Path,
    score: bool = False,
) -> tuple[Run, np.ndarray | None]:
    """Load the model of a config, with an adapter and its scale merged in.

    Args:
      directory: of the results.
      score: also load the rewards of the config.

    Returns:
      the run, and the latents [T0, C, H, W] that begin every video, if any.

    Raises:
      ValueError, OSError: naming the field or file at fault.
    """
    mesh = sharding.make_mesh(config.mesh)
    base = runs.load_base(config, mesh)
    net = base.transformer
    fingerprint: dict[str, Any] = {"base": base.fingerprint}
    if lora:
        adapter, scale = lora
        fingerprint["lora"] = [_hash(jax.tree.leaves(adapter)), scale]
        net = net._replace(params=_merged(net.params, adapter, scale))
        base = base._replace(transformer=net)
    latents = given.latents
    if given.pixels is not None:
        fingerprint["given"] = _hash([given.pixels])
        latents = _encoded(base, given.pixels, config.video.decode_chunk, mesh)
    elif latents is not None:
        fingerprint["given"] = _hash([latents])
    fields = {name: value for name, value in flatten(config).items() if name.startswith(CONTENT)}
    fingerprint |= {name: value for name, value in fields.items() if name not in NO_CONTENT}
    sizes = {"vae": base.vae.config, "transformer": net.config}
    run = Run(
        config=config,
        workdir=directory,
        fingerprint=fingerprint,
        base=base,
        layout=runs.layout_of(config),
        sampler=runs.sampler_of(config),
        mesh=mesh,
        latent_shape=(0, *runs.latent_size(config, sizes)),
        train_prompts=(),
        test_prompts=(),
        adapter=None,
        starts=(0,),
        reward_runner=runs.load_rewards(config, mesh) if score else RewardRunner([]),
    )
    return run, latents


def _merged(params: dict, adapter: dict, scale: float) -> dict:
    """Return parameters with W + scale a b, in place and where they lie."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    merge = jax.jit(merge_adapter, donate_argnums=0, out_shardings=shardings)
    return merge(params, adapter, scale)


def _encoded(base: Base, pixels: np.ndarray, chunk: int, mesh: sharding.AnyMesh) -> np.ndarray:
    """Return the latents [T0, C, H, W] of frames [T, height, width, 3] uint8."""
    copies = np.repeat(pixels[None], mesh.size, axis=0)  # one a device
    latents, _ = encode_video(base.vae, copies, None, chunk, mesh)
    return sharding.to_host(latents)[0]


def make_videos(
    run: Run,
    given: np.ndarray | None,
    requests: Sequence[Request],
    size: int,
    add: Callable[[int], None],
) -> list[dict]:
    """Make the videos of `requests`, which differ in their prompts alone, at once.

    Args:
      given: latents [T0, C, H, W] that begin every video, if any.
      size: videos that the programs are compiled for, at least as many.
      add: called with every few frames that are handed to the encoders.

    Returns:
      their rows of results.jsonl.

    Raises:
      FloatingPointError: naming the prompt, for latents that are not finite.
    """
    # of each video: (shot, scene) -> {reward: value}
    scores: list[dict] = [{} for _ in requests]
    videos = run.workdir / VIDEOS
    paths = [videos / f"{request.name}.mp4" for request in requests]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(Mp4Writer(path, run.config.video.fps)) for path in paths]
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(len(requests)))
        # the last part, while the next one is sampled
        encoding: list[concurrent.futures.Future] = []
        scene_frames: list[np.ndarray] = []
        for part in _parts(run, given, requests, size):
            for video in encoding:
                video.result()
            encoding = [
                pool.submit(writer.add, video)
                for writer, video in zip(writers, part.frames, strict=True)
            ]
            if run.reward_runner.names:
                scene_frames.append(part.frames)
                if part.ends:
                    frames = np.concatenate(scene_frames, axis=1)
                    _add_scores(run, requests, part, frames, scores)
                    scene_frames.clear()
            add(part.frames.shape[0] * part.frames.shape[1])
        for video in encoding:
            video.result()
    return [
        _row(run, request, path, found)
        for request, path, found in zip(requests, paths, scores, strict=True)
    ]


def _add_scores(
    run: Run,
    requests: Sequence[Request],
    part: VideoPart,
    frames: np.ndarray,
    scores: Sequence[dict],
) -> None:
    """Score a scene of every video, and add what comes out to `scores`."""
    texts = [request.shots[part.shot].timeline.prompts[part.scene] for request in requests]
    for name, values in run.reward_runner.score_async(frames, texts)().items():
        for row, value in zip(scores, values, strict=True):
            row.setdefault((part.shot, part.scene), {})[name] = float(value)


class _Waiting(NamedTuple):
    """A VideoPart on the devices."""

    shot: int
    scene: int
    finite: jax.Array  # [B] bool, of the latents
    frames: jax.Array
    ends: bool


def _parts(
    run: Run, given: np.ndarray | None, requests: Sequence[Request], size: int
) -> Iterator[VideoPart]:
    """Give the frames of the videos, block by block; the next block is under way meanwhile."""
    waiting = None
    for part in _sampled(run, given, requests, size):
        if waiting is not None:
            yield _fetched(waiting, requests)
        waiting = part
    if waiting is not None:
        yield _fetched(waiting, requests)


def _fetched(part: _Waiting, requests: Sequence[Request]) -> VideoPart:
    """Fetch a part of the videos; FloatingPointError if its latents are not finite."""
    # the batch may be filled up
    for request, finite in zip(requests, sharding.to_host(part.finite), strict=False):
        if not finite:  # decoded, they would be black
            raise FloatingPointError(
                f"the latents of video {request.name} are not finite in scene {part.scene + 1} of "
                f"shot {part.shot + 1}, {request.prompt!r}; check the adapter, or use "
                "model.dtype=float32"
            )
    frames = sharding.to_host(part.frames)[: len(requests)]
    return VideoPart(part.shot, part.scene, frames, part.ends)


def _sampled(
    run: Run, given: np.ndarray | None, requests: Sequence[Request], size: int
) -> Iterator[_Waiting]:
    """Sample and decode the videos, a block at a time."""
    rows = np.resize(np.arange(len(requests)), size)  # the batch is filled up
    batch = PromptBatch(
        tuple(request.prompt for request in requests),
        np.array([request.index for request in requests], np.int32),
        np.array([request.candidate for request in requests], np.int32),
    )
    keys = prompts.sample_keys(batch, run.config.seed, RngStream.SAMPLE, 0)[rows]
    chunk = run.config.video.decode_chunk
    first_frame = 0
    for number, shot in enumerate(requests[0].shots):
        timelines = [requests[int(row)].shots[number].timeline for row in rows]
        videos = _video_batch(run, batch.take(rows), timelines, keys)
        videos = videos._replace(first_frame=first_frame)
        last_blocks = {plan.scene: plan.frame for plan in shot.timeline.blocks}
        left = shot.frames
        decoder = None
        for block in _shot_blocks(run, given, shot, videos):
            decoded, decoder = decode_video(run.base.vae, block.latents, decoder, chunk)
            # of the last block only what is asked for
            frames = jnp.concatenate(decoded, axis=1)[:, :left]
            left -= frames.shape[1]
            ends = last_blocks[block.plan.scene] == block.plan.frame
            finite = streams.finite(block.latents)
            yield _Waiting(number, block.plan.scene, finite, frames, ends)
        first_frame += shot.latent_frames


def _video_batch(
    run: Run, batch: PromptBatch, timelines: Sequence[Timeline], keys: jax.Array
) -> VideoBatch:
    """Return what a shot of the videos is sampled from; every prompt is encoded once."""
    distinct = list(dict.fromkeys(prompt for t in timelines for prompt in t.prompts))
    embeddings = encode.encode_prompts(run.base.text, run.base.tokenizer, distinct, run.mesh)
    places = {prompt: row for row, prompt in enumerate(distinct)}
    return VideoBatch(batch, tuple(timelines), places, embeddings, keys)


def _shot_blocks(
    run: Run, given: np.ndarray | None, shot: Shot, videos: VideoBatch
) -> Iterator[streams.SampledBlock]:
    """Give the blocks of a shot, the given ones first."""
    policy = run.policy(None)
    count = len(videos.timelines)
    slots = cache_slots(policy.layout, runs.rules_of(run.config), shot.latent_frames)
    state = streams.begin(policy.config, policy.layout, count, slots, run.latent_shape[1:])
    first = streams.blocks_between(videos, 0, shot.given)
    if first and given is not None:
        latents = sharding.place_batch(np.repeat(given[None], count, axis=0))
        for block in streams.cache_blocks(policy, videos, state, latents, first, GIVEN_TIMESTEP):
            state = block.state
            yield block
    rest = range(first.stop, len(shot.timeline.blocks))
    yield from streams.sample_blocks(policy, videos, state, rest)


def batch_size(run: Run, videos: int) -> int:
    """Return how many videos are made at once, as many on every device.

    They are at most sampler.batch, and what a device may hold.
    """
    devices = run.mesh.size
    limit = run.config.mesh.samples_per_device
    each = max(run.config.sampler.batch // devices, 1)
    if limit != -1:
        each = min(each, limit)
    return min(each, -(-videos // devices)) * devices


def _row(run: Run, request: Request, path: Path, scores: dict) -> dict[str, Any]:
    """Return a line of results.jsonl."""
    stride = run.base.vae.config.temporal_stride
    begin = 0
    scenes = []
    for number, shot in enumerate(request.shots):
        starts = {plan.scene: plan.frame for plan in reversed(shot.timeline.blocks)}
        pixels = [
            begin + (1 + stride * (frame - 1) if frame else 0)
            for _, frame in sorted(starts.items())
        ]
        ends = [*pixels[1:], begin + shot.frames]
        for scene, (first, end) in enumerate(zip(pixels, ends, strict=True)):
            row: dict[str, Any] = {
                "prompt": shot.timeline.prompts[scene],
                "first_frame": first,
                "frames": end - first,
            }
            if run.reward_runner.names:
                row["scores"] = scores[number, scene]
            scenes.append(row)
        begin += shot.frames
    names = scenes[0].get("scores") or ()
    means = {name: float(np.mean([scene["scores"][name] for scene in scenes])) for name in names}
    fps = run.config.video.fps
    metadata = {
        "seed": run.config.seed,
        "candidate": request.candidate,
        "frames": request.frames,
        "fps": fps,
        "seconds": request.frames / fps,
        "scenes": scenes,
    }
    return {
        "sample_id": request.name,
        "prompt": request.prompt,
        "metadata": metadata,
        "scores": means,
        "video_path": str(path),
        "key": key_of(run, request),
    }


def key_of(run: Run, request: Request) -> str:
    """Return a hash of all that a row of results depends on."""
    scored = None
    if run.reward_runner.names:
        settings = run.config.rewards.items()
        scored = sorted((name, rewards.options(value)) for name, value in settings)
        scored.append(("identity", run.reward_runner.identity))
    asked = [request.index, request.candidate, request.prompt, request.shots, scored]
    content = json.dumps([run.fingerprint, asked], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def sample(
    run: Run, given: np.ndarray | None, requests: Sequence[Request], check: Callable[[], None]
) -> None:
    """Make the videos that are not there yet, batch by batch.

    `check` is called for every few frames and may raise Stopped.
    """
    directory = run.workdir
    videos = directory / VIDEOS
    keys = {request.name: key_of(run, request) for request in requests}
    before = {row.get("sample_id"): row for row in read_jsonl(directory / "results.jsonl")}
    rows = {
        name: before[name]
        for name, key in keys.items()
        if name in before and before[name].get("key") == key and (videos / f"{name}.mp4").is_file()
    }
    left = [request for request in requests if request.name not in rows]
    if rows:
        log(f"{len(rows)} of {len(requests)} videos are there already")
    others = [request.name for request in left if (videos / f"{request.name}.mp4").exists()]
    if others:
        log(
            f"{len(others)} videos of other settings are replaced in {videos}, {others[0]}.mp4 "
            "first"
        )
    _write_rows(directory, rows)  # so that no row tells of a video that is replaced
    frames = sum(request.frames for request in left)
    add = Progress(check=check).counter(f"{len(left)} videos", frames, "frames")
    for batch, size in _batches(run, left):
        for row in make_videos(run, given, batch, size, add):
            rows[row["sample_id"]] = row
        _write_rows(directory, rows)
    if run.reward_runner.names:
        scores = [row["scores"] for row in rows.values()]
        means = {name: float(np.mean([row[name] for row in scores])) for name in scores[0]}
        content = json.dumps(means, indent=1, allow_nan=False)
        write_atomic(directory / "average_scores.json", content.encode())
    log(f"  {videos}, {directory / 'results.jsonl'}")


def _write_rows(directory: Path, rows: dict[str, dict]) -> None:
    lines = [json.dumps(rows[name], allow_nan=False) + "\n" for name in sorted(rows)]
    write_atomic(directory / "results.jsonl", "".join(lines).encode())


def _batches(run: Run, requests: Sequence[Request]) -> Iterator[tuple[list[Request], int]]:
    """Give the requests that are made at once, and how many videos the programs are for.

    They differ in their prompts alone.
    """
    alike: dict[tuple, list[Request]] = {}
    for request in requests:
        key = tuple((shot.timeline.blocks, shot[1:]) for shot in request.shots)
        alike.setdefault(key, []).append(request)
    for group in alike.values():
        size = batch_size(run, len(group))
        for start in range(0, len(group), size):
            yield group[start : start + size], size


def _hash(arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
