"""Videos from prompts: blocks are decoded and written as they are made, so that length costs time,
not memory.

    python -m astrolabe_jax.sample --config=configs/self_forcing.py --prompt="a cat walks"
    --output_dir=out python -m astrolabe_jax.sample --config=configs/longlive.py
    --prompt_file=prompts.txt --lora=runs/longlive/lora \
        --output_dir=out --frames=957 --config.model.positions=relative

A prompt may be a list of scenes, "a cat[5s] | a dog[10s#]" (scenes.py). A file holds one prompt a
line, or, named .jsonl, one video a line, {"prompts": [...], "switch_frames": [...]}, with the
latent frames where its prompts change.

OUTPUT_DIR/videos/00000.mp4     the video of prompt 0; while it is made, 00000.partial.mp4 can be
                                watched
OUTPUT_DIR/results.jsonl        one line a video: prompt, scenes, seed, length, path, and scores if
                                asked for, whose
                                means are in average_scores.json

The same command goes on where it was stopped: videos that are there and were made with the same
settings stay.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from astrolabe_jax import encode, prepare, prompts, sharding
from astrolabe_jax import stream as streams
from astrolabe_jax.config import flatten, validate_sampling
from astrolabe_jax.convert.base import Base
from astrolabe_jax.convert.lora import load_lora
from astrolabe_jax.decode import decode_chunk
from astrolabe_jax.generate import finite
from astrolabe_jax.models import layers
from astrolabe_jax.models.lora import merge_adapter
from astrolabe_jax.models.tokenizer import token_ids
from astrolabe_jax.report import TICK_SECONDS, clock, say
from astrolabe_jax.requests import Asked, Given, Request, Terms, read_given, read_requests
from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.rewards.panel import RewardRunner
from astrolabe_jax.rollout import noise_from_keys
from astrolabe_jax.runtime import cli
from astrolabe_jax.runtime.files import read_jsonl, write_atomic
from astrolabe_jax.runtime.media import Mp4Writer
from astrolabe_jax.runtime.preemption import Stopped, listening
from astrolabe_jax.stream import Policy
from astrolabe_jax.streaming.scenes import Rules, Shot, cache_slots
from astrolabe_jax.types import PromptBatch, Purpose

# Sections of the config that a video depends on; of `sampler` all but the batch.
CONTENT = ("seed", "model.", "sampler.", "video.", "scenes.")
NO_CONTENT = ("sampler.batch", "model.remat", "video.decode_chunk")


class Model(NamedTuple):
    """Everything that is loaded once."""

    config: ConfigDict
    base: Base
    policy: Policy
    rules: Rules
    latent_size: tuple[int, int, int]  # C, H, W
    given: jax.Array | None  # latents [T0, C, H, W] that begin every video
    identity: dict[str, Any]  # what a video depends on, besides its request
    panel: RewardRunner | None  # the rewards that score it


def load(
    config: ConfigDict, lora: tuple[dict, float] | None, given: Given, score: bool = False
) -> Model:
    """The model of a config, on its devices, with an adapter and its scale merged in, and its
    rewards if they `score`.

    Raises ValueError or OSError.
    """
    layout, denoising = prepare.layout_of(config), prepare.sampler_of(config)
    mesh = sharding.make_mesh(config.mesh)
    base = prepare.load_base(config, mesh)
    net, latents, identity = base.transformer, None, {"base": base.fingerprint}
    if lora:
        adapter, scale = lora
        identity["lora"] = [_hash(jax.tree.leaves(adapter)), scale]
        net = net._replace(params=_merged(net.params, adapter, scale))
        base = base._replace(transformer=net)
    if given.count:
        identity["given"] = _hash([given.pixels if given.latents is None else given.latents])
        latents = given.latents if given.latents is not None else _encoded(base, given.pixels, mesh)
    fields = {name: value for name, value in flatten(config).items() if name.startswith(CONTENT)}
    identity |= {name: value for name, value in fields.items() if name not in NO_CONTENT}
    policy = Policy(net.graphdef, net.params, None, 1.0, net.config, layout, denoising, mesh)
    sizes = {"vae": base.vae.config, "transformer": net.config}
    size = prepare.latent_size(config, sizes)
    panel = prepare.load_panel(config, mesh) if score else None
    return Model(config, base, policy, prepare.rules_of(config), size, latents, identity, panel)


def _merged(params: dict, adapter: dict, scale: float) -> dict:
    """W + scale a b, in place and where it lies."""
    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.jit(merge_adapter, donate_argnums=0, out_shardings=places)(params, adapter, scale)


def _encoded(base: Base, pixels: np.ndarray, mesh: Mesh) -> jax.Array:
    """Pixels [T, height, width, 3] uint8 -> latents [T0, C, H, W], chunk by chunk."""
    vae, stride, stream, latents = base.vae, base.vae.config.temporal_stride, None, []

    @jax.jit
    def step(params, frames, stream):
        return layers.merge(vae.graphdef, params).encode(
            frames.astype(jnp.float32) / 127.5 - 1, stream
        )

    for start in (0, *range(1, len(pixels), stride)):
        frames = pixels[None, start : start + stride if start else 1]
        made, stream = step(vae.params, sharding.replicate(mesh, frames), stream)
        latents.append(made[0])
    return jnp.concatenate(latents)


def make(
    model: Model,
    requests: Sequence[Request],
    size: int,
    show: Callable[[int], None],
    score: bool,
    directory: Path,
) -> list[dict]:
    """Makes the videos of `requests`, which differ in their prompts alone, at once; returns their
    rows of results.

    size: videos that the programs are compiled for, at least as many. show(frames) is called for
    every few frames that are handed to the encoders. Raises FloatingPointError, naming the prompt,
    for latents that are not finite.
    """
    scores: list[dict] = [{} for _ in requests]  # of each video: (shot, scene) -> {reward: value}
    paths = [directory / f"{request.name}.mp4" for request in requests]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(Mp4Writer(path, model.config.video.fps)) for path in paths]
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(len(requests)))
        # the last block, while the next one is sampled
        encoding: list[concurrent.futures.Future] = []
        held: list[np.ndarray] = []  # frames of the present scene, if they are to be scored
        for number, scene, frames, ends in _frames(model, requests, size):
            for video in encoding:
                video.result()
            encoding = [
                pool.submit(writer.add, video)
                for writer, video in zip(writers, frames, strict=True)
            ]
            if score:
                held.append(frames)
            if score and ends:
                texts = [request.shots[number].prompts[scene] for request in requests]
                scored = model.panel.score_async(np.concatenate(held, 1), texts)()
                for name, values in scored.items():
                    for row, value in zip(scores, values, strict=True):
                        row.setdefault((number, scene), {})[name] = float(value)
                held.clear()
            show(frames.shape[0] * frames.shape[1])
        for video in encoding:
            video.result()
    return [_row(model, *made, score) for made in zip(requests, paths, scores, strict=True)]


def _frames(
    model: Model, requests: Sequence[Request], size: int
) -> Iterator[tuple[int, int, np.ndarray, bool]]:
    """(shot, scene, frames [B, T, height, width, 3] uint8, whether the scene ends with them), block
    by block.

    The next block is under way while the last one is fetched.
    """
    videos = np.resize(np.arange(len(requests)), size)  # the batch is filled up
    batch = PromptBatch(
        tuple(request.prompt for request in requests),
        np.array([request.index for request in requests], np.int32),
        np.array([request.candidate for request in requests], np.int32),
    )
    keys = prompts.sample_keys(batch, model.config.seed, Purpose.SAMPLE, 0)[videos]
    keys = sharding.shard_batch(model.policy.mesh, keys)
    begin, waiting = 0, None
    for number, shot in enumerate(requests[0].shots):
        left = shot.frames
        texts = [requests[video].shots[number].prompts for video in videos]
        for scene, ends, fine, made in _decoded(
            model, shot, texts, keys, begin, None if number else model.given
        ):
            if waiting is not None:
                yield _fetched(waiting, requests)
            count = min(left, made.shape[1])  # of the last block only what is asked for
            waiting, left = (number, scene, fine, made[:, :count], ends), left - count
        begin += shot.latent_frames
    yield _fetched(waiting, requests)


def _fetched(waiting: tuple, requests: Sequence[Request]) -> tuple:
    number, scene, fine, frames, ends = waiting
    # the batch may be filled up
    for request, good in zip(requests, sharding.to_host(fine), strict=False):
        if not good:  # decoded, they would be black
            raise FloatingPointError(
                f"the latents of video {request.name} are not finite in scene {scene + 1} of shot "
                f"{number + 1}, {request.prompt!r}; check the adapter, or use model.dtype=float32"
            )
    return number, scene, sharding.to_host(frames)[: len(requests)], ends


def _decoded(
    model: Model, shot: Shot, texts: Sequence[Sequence[str]], keys, begin: int, given
) -> Iterator[tuple[int, bool, jax.Array, jax.Array]]:
    """(scene, whether it ends there, [B] finite, frames on the devices) of each piece of a shot.

    texts: the prompts of the scenes of each video. begin: frame of the video, in latents, that is
    the shot's first.
    """
    policy, vae, chunk = model.policy, model.base.vae, model.config.video.decode_chunk
    (channels, *latent_hw), vae_stream = model.latent_size, None
    if given is not None:
        given = sharding.shard_batch(
            policy.mesh, np.repeat(np.asarray(given)[None], len(texts), axis=0)
        )

    def text(scene):
        placed = sharding.shard_batch(
            policy.mesh, _embeddings(model, [prompts_[scene] for prompts_ in texts])
        )
        return streams.encode_text(
            policy.graphdef, policy.params, None, 1.0, placed, mesh=policy.mesh
        )

    def noise(step):
        count = len(policy.sampler.steps_at(step.start))
        shape = (count, step.count, channels, *latent_hw)
        return _noise(keys, np.int32(begin + step.frame), shape=shape, mesh=policy.mesh)

    slots = cache_slots(policy.layout, model.rules, shot.latent_frames)
    pieces = streams.stream(
        policy, text, shot.steps, noise, slots, len(texts), tuple(latent_hw), given
    )
    last = {step.scene: step.frame for step in shot.steps}
    for piece in pieces:
        scene = piece.step.scene if piece.step else shot.steps[0].scene
        made = []
        for start in range(0, piece.latents.shape[1], chunk):
            latents = piece.latents[:, start : start + chunk]
            frames, vae_stream = decode_chunk(
                vae.graphdef, vae.params, latents, vae_stream, mesh=policy.mesh
            )
            made.append(frames)
        ends = piece.step is not None and last[scene] == piece.step.frame
        yield (
            scene,
            ends,
            finite(piece.latents),
            jnp.concatenate(made, axis=1) if len(made) > 1 else made[0],
        )


def _embeddings(model: Model, texts: Sequence[str]) -> np.ndarray:
    """[B, S, E]; every distinct prompt is encoded once."""
    distinct, net = list(dict.fromkeys(texts)), model.base.text
    made = encode.encode_prompts(
        net.graphdef, net.params, model.base.tokenizer, distinct, net.config, model.policy.mesh
    )
    return made[[distinct.index(text) for text in texts]]


@functools.partial(jax.jit, static_argnames=("shape", "mesh"))
def _noise(keys, frame, *, shape, mesh):
    """[steps, B, P, C, H, W] for the block at `frame`, shape (steps, P, C, H, W)."""
    steps, count, *size = shape
    draw = noise_from_keys(keys, tuple(size))
    noise = jnp.stack([draw(frame, step, count) for step in range(steps)])
    return jax.lax.with_sharding_constraint(noise, sharding.batch_sharding(mesh, axis=1))


def batch_size(model: Model, videos: int) -> int:
    """Videos made at once, as many on every device: at most sampler.batch, and what a device may
    hold.
    """
    devices, limit = model.policy.mesh.size, model.config.mesh.samples_per_device
    each = max(model.config.sampler.batch // devices, 1)
    each = each if limit == -1 else min(each, limit)
    return min(each, -(-videos // devices)) * devices


def _row(model: Model, request: Request, path: Path, scores: dict, score: bool) -> dict[str, Any]:
    """A line of results.jsonl."""
    stride, begin, scenes = model.base.vae.config.temporal_stride, 0, []
    for number, shot in enumerate(request.shots):
        starts = {step.scene: step.frame for step in reversed(shot.steps)}
        starts[0] = 0  # given frames belong to the first scene
        pixels = [
            begin + (1 + stride * (frame - 1) if frame else 0)
            for _, frame in sorted(starts.items())
        ]
        for scene, (first, stop) in enumerate(
            zip(pixels, [*pixels[1:], begin + shot.frames], strict=True)
        ):
            described = {
                "prompt": shot.prompts[scene],
                "first_frame": first,
                "frames": stop - first,
            }
            scenes.append(described | ({"scores": scores[number, scene]} if score else {}))
        begin += shot.frames
    means = {
        name: float(np.mean([scene["scores"][name] for scene in scenes]))
        for name in (scenes[0].get("scores") or ())
    }
    fps = model.config.video.fps
    metadata = {
        "seed": model.config.seed,
        "candidate": request.candidate,
        "frames": request.frames,
        "fps": fps,
    }
    metadata |= {"seconds": request.frames / fps, "scenes": scenes}
    return {
        "sample_id": request.name,
        "prompt": request.prompt,
        "metadata": metadata,
        "scores": means,
        "video_path": str(path),
        "key": key_of(model, request, score),
    }


def key_of(model: Model, request: Request, score: bool) -> str:
    """A hash of all that a row of results depends on."""
    scored = (
        sorted((name, rewards.options(value)) for name, value in model.config.rewards.items())
        if score
        else None
    )
    asked = [
        request.index,
        request.candidate,
        request.prompt,
        [shot._asdict() for shot in request.shots],
        scored,
    ]
    return hashlib.sha256(json.dumps([model.identity, asked], sort_keys=True).encode()).hexdigest()


def run(
    model: Model,
    requests: Sequence[Request],
    directory: Path,
    score: bool,
    check: Callable[[], None],
) -> None:
    """Makes what is not there yet, batch by batch. `check` is called before every block and may
    raise Stopped.
    """
    videos = directory / "videos"
    wanted = {request.name: key_of(model, request, score) for request in requests}
    found = {row.get("sample_id"): row for row in read_jsonl(directory / "results.jsonl")}
    rows = {
        name: found[name]
        for name, key in wanted.items()
        if name in found and found[name].get("key") == key and (videos / f"{name}.mp4").is_file()
    }
    left = [request for request in requests if request.name not in rows]
    if rows:
        say(f"{len(rows)} of {len(requests)} videos are there already")
    if others := [request.name for request in left if (videos / f"{request.name}.mp4").exists()]:
        say(
            f"{len(others)} videos of other settings are replaced in {videos}, {others[0]}.mp4 "
            "first"
        )
    _write_rows(directory, rows)  # so that no row tells of a video that is replaced
    meter = Meter(left, check)
    for batch, size in _batches(model, left):
        for row in make(model, batch, size, meter, score, videos):
            rows[row["sample_id"]] = row
        _write_rows(directory, rows)
    if score:
        scores = [row["scores"] for row in rows.values()]
        means = {name: float(np.mean([row[name] for row in scores])) for name in scores[0]}
        write_atomic(
            directory / "average_scores.json", json.dumps(means, indent=1, allow_nan=False).encode()
        )
    meter.closing(directory)


def _write_rows(directory: Path, rows: dict[str, dict]) -> None:
    lines = [json.dumps(rows[name], allow_nan=False) + "\n" for name in sorted(rows)]
    write_atomic(directory / "results.jsonl", "".join(lines).encode())


def _batches(model: Model, requests: Sequence[Request]) -> Iterator[tuple[list[Request], int]]:
    """Requests that differ in their prompts alone, as many as are made at once, and how many that
    is.
    """
    alike: dict[tuple, list[Request]] = {}
    for request in requests:
        alike.setdefault(tuple(shot._replace(prompts=()) for shot in request.shots), []).append(
            request
        )
    for group in alike.values():
        size = batch_size(model, len(group))
        for start in range(0, len(group), size):
            yield group[start : start + size], size


class Meter:
    """Counts frames, and says every TICK_SECONDS how far it is and how long it will take."""

    def __init__(self, requests: Sequence[Request], check: Callable[[], None]):
        self._videos, self._count, self._check = (
            len(requests),
            sum(request.frames for request in requests),
            check,
        )
        self._began = self._spoken = time.monotonic()
        self._done = 0
        # after the first frames, which compile the programs
        self._first: tuple[float, int] | None = None

    def __call__(self, frames: int) -> None:
        """So many more frames are written."""
        now, self._done = time.monotonic(), self._done + frames
        self._first = self._first or (now, self._done)
        if now - self._spoken >= TICK_SECONDS and now > self._first[0]:
            rate = (self._done - self._first[1]) / (now - self._first[0])
            self._spoken = now
            left = clock((self._count - self._done) / rate) if rate else "?"
            say(f"  {self._done} of {self._count} frames, {rate:.1f} frames/s, {left} left")
        self._check()

    def closing(self, directory: Path) -> None:
        """What was made, in what time."""
        seconds = time.monotonic() - self._began
        if self._videos:
            rate = f"{self._done / seconds:.1f} frames/s with the first block"
            if self._first and self._done > self._first[1]:
                steady = (self._done - self._first[1]) / (time.monotonic() - self._first[0])
                rate += f", {steady:.1f} after it"
            say(f"{self._videos} videos, {self._done} frames in {clock(seconds)} ({rate})")
        say(f"  {directory / 'videos'}, {directory / 'results.jsonl'}")


def _hash(arrays: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def main(argv: list[str], given: dict[str, flags.FlagHolder]) -> None:
    """Status 2 for what cannot be done, before anything is compiled; 1 for what goes wrong later;
    one message each.
    """
    if len(argv) > 1:
        cli.fail(f"unexpected argument {argv[1]!r}; flags start with --", 2)
    cli.set_up()
    options = {name: flag.value for name, flag in given.items()}
    config, directory = options["config"], Path(options["output_dir"])
    try:
        validate_sampling(config, jax.device_count(), jax.default_backend())
        sizes, tokenizer = prepare.open_base(config)
        layout, size = prepare.layout_of(config), prepare.latent_size(config, sizes)
        first = read_given(
            options["image"],
            options["video"],
            options["latents"],
            config,
            layout,
            sizes["vae"],
            size,
        )
        asked = Asked(*(options[name] for name in Asked._fields))
        stride, most = sizes["vae"].temporal_stride, sizes["text_encoder"].text_len
        rules, tokens = prepare.rules_of(config), lambda prompt: len(token_ids(tokenizer, prompt))
        requests = read_requests(
            config, asked, Terms(layout, rules, stride, first.count, tokens, most)
        )
        adapter = load_lora(options["lora"], sizes["transformer"]) if options["lora"] else None
        (directory / "videos").mkdir(parents=True, exist_ok=True)
        model = load(config, adapter, first, score=asked.score)
    except (ValueError, OSError) as error:
        cli.fail(error, 2)
    say(_opening(model, requests))
    with listening() as check:
        try:
            run(model, requests, directory, options["score"], check)
        # a reward, a full disk, a broken adapter
        except (ValueError, OSError, FloatingPointError) as error:
            cli.fail(error, 1)
        except Stopped as stopped:
            say(
                f"{stopped}: the videos that are done are in {directory}; run the same command to "
                "go on"
            )


def _opening(model: Model, requests: Sequence[Request]) -> str:
    config, lengths = model.config, sorted({request.frames for request in requests})
    net = model.base.transformer.config
    spans = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else str(lengths[0])
    return (
        f"{len(requests)} videos of {spans} frames ({lengths[-1] / config.video.fps:.2f} s) of "
        f"{config.video.height}x{config.video.width}, at most {batch_size(model, len(requests))} "
        f"at once, on {model.policy.mesh.size} x {jax.devices()[0].device_kind}; {net.num_layers} "
        f"layers of {net.dim}, seed {config.seed}"
    )


def define() -> dict[str, flags.FlagHolder]:
    """The flags of this program."""
    text = flags.DEFINE_string
    given = {
        "config": cli.define(),
        "prompt": text("prompt", None, "one prompt, or scenes: 'a cat[5s] | a dog[10s#]'"),
        "prompt_file": text(
            "prompt_file",
            None,
            "one prompt a line; .jsonl: prompts and switch_frames; world:NAME/SPLIT",
        ),
        "output_dir": text("output_dir", None, "where videos/ and results.jsonl go", required=True),
        "lora": text(
            "lora", None, "adapter: a PEFT directory, a run's lora/, or a file of weights"
        ),
        "candidates": flags.DEFINE_integer("candidates", 1, "videos per prompt", lower_bound=1),
        "frames": flags.DEFINE_integer(
            "frames", 0, "frames per video; 0: the durations', or video.frames", lower_bound=0
        ),
        "image": text("image", None, "picture that every video begins with"),
        "video": text("video", None, "video whose end every video begins with"),
        "latents": text(
            "latents", None, ".npy of latents [frames, C, H, W] that every video begins with"
        ),
        "score": flags.DEFINE_bool(
            "score", False, "score every scene with config.rewards; keeps its frames in memory"
        ),
    }
    flags.mark_flag_as_required("config")
    return given


if __name__ == "__main__":
    flag_holders = define()
    app.run(lambda argv: main(argv, flag_holders), flags_parser=cli.parse)
