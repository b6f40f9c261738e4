"""Videos from prompts: blocks are decoded and written as they are sampled.

So length costs time, not memory. `python -m astrolabe_jax.sample` (sample/__main__.py) is how it is
run; sample/requests.py reads what is asked for.
"""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from astrolabe_jax import encode, geometry, prompts, sharding
from astrolabe_jax import run as runs
from astrolabe_jax.config import flatten
from astrolabe_jax.convert.parts import PlaceLeaf
from astrolabe_jax.decode import decode_video, encode_video
from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.rewards.panel import RewardRunner
from astrolabe_jax.runtime.files import read_jsonl, write_atomic, write_json
from astrolabe_jax.runtime.media import Mp4Writer
from astrolabe_jax.runtime.progress import Progress, counted, log
from astrolabe_jax.sample.requests import GivenFrames, Request
from astrolabe_jax.streaming import scenes, streams
from astrolabe_jax.types import PromptBatch, RngStream, Scores, VideoBatch

# Sections of the config that a video depends on; of `sampler` all but the batch.
CONTENT = ("seed", "model.", "sampler.", "video.", "scenes.")
NO_CONTENT = ("sampler.batch", "model.remat", "video.decode_chunk")
RESULTS = "results.jsonl"
VIDEOS = "videos"  # folder of the results
LOCK = "results.lock"  # held by the process that writes there
_NAME = re.compile(r"\d{5,}(-\d+)?")  # Request.name
GIVEN_TIMESTEP = 0.0  # at which given frames are read into the cache, whatever context_noise is


class VideoPart(NamedTuple):
    """Some frames of the videos that are made at once."""

    shot: int  # number of the shot in the video
    scene: int  # number of the scene in the shot
    ends: bool  # whether the scene ends with them
    finite: jax.Array  # [B] bool, of the latents
    frames: Any  # [B, T, height, width, 3] uint8; on the devices until they are fetched


def load(
    config: ConfigDict,
    lora: tuple[PlaceLeaf, str] | None,
    given: GivenFrames,
    directory: Path,
    score: bool = False,
) -> runs.Run:
    """Load the model of a config, with all that a LoRA changes added to its weights.

    Nothing is compiled.

    Args:
      lora: what adds it to leaves as they are read, and its fingerprint.
      given: frames that begin every video.
      directory: of the results.
      score: also load the rewards of the config.

    Raises:
      ValueError, OSError: naming the field or file at fault.
    """
    mesh = sharding.make_mesh(config.mesh)
    base = runs.load_base(config, mesh, lora and lora[0])
    net = base.transformer
    return runs.Run(
        config=config,
        workdir=directory,
        fingerprint={"base": base.fingerprint} | settings(config, lora, given),
        base=base,
        layout=geometry.layout_of(config),
        sampler=geometry.sampler_of(config),
        mesh=mesh,
        latent_shape=(
            0,
            *geometry.latent_size(config, {"vae": base.vae.config, "transformer": net.config}),
        ),
        train_prompts=(),
        test_prompts=(),
        adapter=None,
        starts=(0,),
        reward_runner=runs.load_rewards(config, mesh) if score else RewardRunner([]),
    )


def settings(
    config: ConfigDict, lora: tuple[PlaceLeaf, str] | None, given: GivenFrames
) -> dict[str, Any]:
    """Return all that videos depend on but requests and weights of the base; it survives JSON."""
    first = given.pixels if given.latents is None else given.latents
    return {
        **({"lora": lora[1]} if lora else {}),
        **({} if first is None else {"given": _hash([first])}),
        **{
            name: value
            for name, value in flatten(config).items()
            if name.startswith(CONTENT) and name not in NO_CONTENT
        },
    }


def given_latents(run: runs.Run, given: GivenFrames) -> np.ndarray | None:
    """Return the latents [T0, C, H, W] that begin every video, if any; pixels are encoded."""
    if given.pixels is None:
        return given.latents
    copies = np.repeat(given.pixels[None], run.mesh.size, axis=0)  # one a device
    chunk = run.config.video.decode_chunk
    encoded, _ = encode_video(run.base.vae, copies, None, chunk, run.mesh)
    return sharding.to_host(encoded)[0]


def make_videos(
    run: runs.Run,
    given: np.ndarray | None,
    requests: Sequence[Request],
    size: int,
    add: Callable[[int], None],
    keep: Callable[[dict[str, dict]], None],
) -> None:
    """Make the videos of `requests`, which differ in their prompts alone, at once.

    Args:
      given: latents [T0, C, H, W] that begin every video, if any.
      size: videos that the programs are compiled for, at least as many.
      add: called with every few frames that are handed to the encoders.
      keep: called with their rows of results.jsonl by name, before the videos take their places.

    Raises:
      FloatingPointError: naming the prompt, for latents that are not finite.
    """
    scores: dict[tuple[int, int], Scores] = {}  # by shot and scene
    paths = [run.workdir / VIDEOS / f"{request.name}.mp4" for request in requests]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(Mp4Writer(path, run.config.video.fps)) for path in paths]
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(len(requests)))
        # the last part, while the next one is sampled
        encoding: Iterable[None] = ()
        scene_frames: list[np.ndarray] = []
        for part in _parts(run, given, requests, size):
            list(encoding)  # waits for it, and raises what went wrong
            encoding = pool.map(Mp4Writer.add, writers, part.frames)
            if run.reward_runner.names:
                scene_frames.append(part.frames)
                if part.ends:
                    frames = np.concatenate(scene_frames, axis=1)
                    texts = [
                        request.shots[part.shot].timeline.prompts[part.scene]
                        for request in requests
                    ]
                    wait = run.reward_runner.score_async(frames, texts, check=lambda: add(0))
                    scores[part.shot, part.scene] = wait()
                    scene_frames.clear()
            add(part.frames.shape[0] * part.frames.shape[1])
        list(encoding)
        rows = {}
        for i, (request, path, writer) in enumerate(zip(requests, paths, writers, strict=True)):
            of_video = {place: _of_video(found, i) for place, found in scores.items()}
            rows[request.name] = _row(run, request, path, writer.finish(), of_video)
        keep(rows)


def _of_video(scores: Scores, i: int) -> dict[str, float]:
    return {name: float(values[i]) for name, values in scores.items()}


def _parts(
    run: runs.Run, given: np.ndarray | None, requests: Sequence[Request], size: int
) -> Iterator[VideoPart]:
    """Give the frames of the videos, block by block; the next block is under way meanwhile."""
    sampled = _sampled(run, given, requests, size)
    waiting = next(sampled)
    for part in sampled:
        yield _fetched(waiting, requests)
        waiting = part
    yield _fetched(waiting, requests)


def _fetched(part: VideoPart, requests: Sequence[Request]) -> VideoPart:
    """Fetch a part of the videos; FloatingPointError if its latents are not finite."""
    # the batch may be filled up
    for request, finite in zip(requests, sharding.to_host(part.finite), strict=False):
        if not finite:  # decoded, they would be black
            raise FloatingPointError(
                f"the latents of video {request.name} are not finite in scene {part.scene + 1} of "
                f"shot {part.shot + 1}, {request.prompt!r}; check the adapter, or use "
                "model.dtype=float32"
            )
    return part._replace(frames=sharding.to_host(part.frames)[: len(requests)])


def _sampled(
    run: runs.Run, given: np.ndarray | None, requests: Sequence[Request], size: int
) -> Iterator[VideoPart]:
    """Sample and decode the videos, a block at a time; every prompt is encoded once a shot."""
    # the batch is filled up
    filled = list(itertools.islice(itertools.cycle(requests), size))
    batch = PromptBatch(
        tuple(request.prompt for request in filled),
        np.array([request.index for request in filled], np.int32),
        np.array([request.candidate for request in filled], np.int32),
    )
    keys = prompts.sample_keys(batch, run.config.seed, RngStream.SAMPLE, 0)
    first_frame = 0
    for number, shot in enumerate(requests[0].shots):
        timelines = tuple(request.shots[number].timeline for request in filled)
        distinct = list(dict.fromkeys(prompt for t in timelines for prompt in t.prompts))
        videos = VideoBatch(
            batch,
            timelines,
            {prompt: row for row, prompt in enumerate(distinct)},
            encode.encode_prompts(run.base.text, run.base.tokenizer, distinct, run.mesh),
            keys,
            first_frame=first_frame,
        )
        last_blocks = {plan.scene: plan.frame for plan in shot.timeline.blocks}
        left = shot.frames
        decoder = None
        for block in _shot_blocks(run, given, shot, videos):
            decoded, decoder = decode_video(
                run.base.vae, block.latents, decoder, run.config.video.decode_chunk
            )
            # of the last block only what is asked for
            frames = jnp.concatenate(decoded, axis=1)[:, :left]
            left -= frames.shape[1]
            yield VideoPart(
                number,
                block.plan.scene,
                last_blocks[block.plan.scene] == block.plan.frame,
                streams.finite(block.latents),
                frames,
            )
        first_frame += shot.latent_frames


def _shot_blocks(
    run: runs.Run, given: np.ndarray | None, shot: scenes.Shot, videos: VideoBatch
) -> Iterator[streams.SampledBlock]:
    """Give the blocks of a shot, the given ones first."""
    policy = run.policy(None)
    count = len(videos.timelines)
    slots = scenes.cache_slots(policy.layout, geometry.rules_of(run.config), shot.latent_frames)
    state = streams.begin(policy.config, policy.layout, count, slots, run.latent_shape[1:])
    first = streams.blocks_between(videos, 0, shot.given)
    if first and given is not None:
        latents = sharding.place_batch(np.repeat(given[None], count, axis=0))
        for block in streams.cache_blocks(policy, videos, state, latents, first, GIVEN_TIMESTEP):
            state = block.state
            yield block
    yield from streams.sample_blocks(
        policy, videos, state, range(first.stop, len(shot.timeline.blocks))
    )


def batch_size(run: runs.Run, videos: int) -> int:
    """Return how many videos are made at once, as many on every device.

    They are at most sampler.batch, and what a device may hold.
    """
    devices = run.mesh.size
    limits = [max(run.config.sampler.batch // devices, 1), -(-videos // devices)]
    if run.config.mesh.samples_per_device != -1:
        limits.append(run.config.mesh.samples_per_device)
    return min(limits) * devices


def _row(run: runs.Run, request: Request, path: Path, size: int, scores: dict) -> dict[str, Any]:
    """Return a line of results.jsonl about a video of `size` bytes that will be at `path`."""
    begin = 0
    shown = []
    for number, shot in enumerate(request.shots):
        changes = [
            begin + run.base.vae.config.pixel_frames(frame) for frame in shot.timeline.changes
        ]
        bounds = itertools.pairwise([begin, *changes, begin + shot.frames])
        for scene, (first, end) in enumerate(bounds):
            found = {"scores": scores[number, scene]} if scores else {}
            shown.append(
                {
                    "prompt": shot.timeline.prompts[scene],
                    "first_frame": first,
                    "frames": end - first,
                    **found,
                }
            )
        begin += shot.frames
    without_weights = {name: run.fingerprint[name] for name in run.fingerprint if name != "base"}
    return {
        "sample_id": request.name,
        "prompt": request.prompt,
        "metadata": {
            "seed": run.config.seed,
            "candidate": request.candidate,
            "frames": request.frames,
            "fps": run.config.video.fps,
            "seconds": request.frames / run.config.video.fps,
            "scenes": shown,
        },
        "scores": _means([scene.get("scores", {}) for scene in shown]),
        "video_path": str(path),
        "settings": settings_key(without_weights, request),
        "key": key_of(run, request),
        "bytes": size,
    }


def _means(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in scores])) for name in scores[0]}


def settings_key(of_all: Mapping[str, Any], request: Request) -> str:
    """Return a hash of what a video depends on without weights; `of_all` is what `settings` gives.

    So it is known before anything is loaded.
    """
    asked = [request.index, request.candidate, request.prompt, request.shots]
    content = json.dumps([of_all, asked], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def key_of(run: runs.Run, request: Request) -> str:
    """Return a hash of all that a row of results depends on."""
    scored: dict[str, Any] = {}
    if run.reward_runner.names:
        options = {name: rewards.options(value) for name, value in run.config.rewards.items()}
        scored = {"rewards": options, "identity": run.reward_runner.identity}
    return settings_key({**run.fingerprint, **scored}, request)


def refuse_others(directory: Path, field: str, asked: Mapping[str, str]) -> None:
    """Raise ValueError if a directory holds results of another command.

    Args:
      directory: of the results.
      field: of a row of results.jsonl that tells them apart.
      asked: what the rows of this command have there, by the names of the videos.
    """
    rows = _rows(directory)
    others = {
        name: "of another command"
        for name, row in rows.items()
        if name not in asked or row.get(field, asked[name]) != asked[name]
    }
    # a row is written before its video has its name, so one without a row is not ours, or lost it
    lost = f"without a line in {RESULTS}"
    others |= dict.fromkeys(_names(directory) - rows.keys(), lost)
    if others:
        first = min(others)
        raise ValueError(
            f"{directory} holds {counted(len(others), 'video')} {others[first]}, {first[:60]}.mp4 "
            "first; give another --output_dir, or --overwrite to replace them"
        )


def check_places(directory: Path, names: Iterable[str]) -> None:
    """Raise ValueError for what is no file where one is to be written, before anything is made."""
    videos = directory / VIDEOS
    places = [directory / RESULTS, *(videos / f"{name}.mp4" for name in names)]
    wrong = [path for path in places if path.is_dir()]
    wrong += [videos] if videos.exists() and not videos.is_dir() else []
    if wrong:
        there, expected = ("file", "directory") if wrong[0] == videos else ("directory", "file")
        raise ValueError(
            f"{wrong[0]} is a {there}, in place of a {expected} of the results; move it away, or "
            "give another --output_dir"
        )


def sample(
    run: runs.Run, given: np.ndarray | None, requests: Sequence[Request], check: Callable[[], None]
) -> None:
    """Make the videos that are not there yet, batch by batch.

    `check` is called for every few frames and may raise Stopped.
    """
    directory = run.workdir
    videos = directory / VIDEOS
    keys = {request.name: key_of(run, request) for request in requests}
    before = _rows(directory)
    rows = {
        name: before[name]
        for name, key in keys.items()
        if name in before and before[name].get("key") == key
        if _is_whole(videos / f"{name}.mp4", before[name].get("bytes"))
    }
    left = [request for request in requests if request.name not in rows]
    if rows:
        log(f"{len(rows)} of {counted(len(requests), 'video')} made before")
    gone = sorted(_names(directory) - rows.keys())
    for name in gone:
        (videos / f"{name}.mp4").unlink()
    if gone:
        log(f"{counted(len(gone), 'video')} removed from {videos}, {gone[0]}.mp4 first")

    def keep(made: dict[str, dict]) -> None:
        rows.update(made)
        lines = [json.dumps(rows[name], allow_nan=False) + "\n" for name in sorted(rows)]
        write_atomic(directory / RESULTS, "".join(lines).encode())

    keep({})  # no row tells of a video that went
    add = Progress(check=check).counter(
        counted(len(left), "video"), sum(request.frames for request in left), "frames"
    )
    for batch, size in _batches(run, left):
        make_videos(run, given, batch, size, add, keep)
    if run.reward_runner.names:
        means = _means([row["scores"] for row in rows.values()])
        write_json(directory / "average_scores.json", means)
    log(f"  {videos}, {directory / RESULTS}")


def _rows(directory: Path) -> dict[str, dict]:
    """Return the rows of the results by the names of their videos."""
    return {str(row.get("sample_id")): row for row in read_jsonl(directory / RESULTS)}


def _names(directory: Path) -> set[str]:
    """Return the names of the videos that are there, of this command or of another."""
    stems = {path.stem for path in (directory / VIDEOS).glob("*.mp4") if not path.is_dir()}
    return {stem for stem in stems if _NAME.fullmatch(stem)}


def _is_whole(path: Path, size: int | None) -> bool:
    """Return whether a video is there with the bytes that it was written with."""
    return path.is_file() and path.stat().st_size == size


def _batches(run: runs.Run, requests: Sequence[Request]) -> Iterator[tuple[list[Request], int]]:
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
