"""What `python -m astrolabe_jax.sample` is asked for: videos, by their shots, and frames that they begin with.

Everything is checked here, before any weights are read.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from astrolabe_jax import prompts, rewards
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.models.wan.vae import VaeConfig
from astrolabe_jax.pictures import read_png, read_video
from astrolabe_jax.scenes import Rules, Scene, Shot, is_plain, parse, parse_published, scenes_by_frame, shots


class Request(NamedTuple):
    """One video to make."""

    index: int  # of its prompt
    candidate: int  # among the videos of this prompt
    prompt: str  # as it was given
    shots: tuple[Shot, ...]

    @property
    def name(self) -> str:
        """Of its file: the number of the prompt, and, from its second video on, that of the video."""
        return f"{self.index:05d}" + (f"-{self.candidate}" if self.candidate else "")

    @property
    def frames(self) -> int:
        """Pixel frames."""
        return sum(shot.frames for shot in self.shots)


class Given(NamedTuple):
    """The frames that every video begins with, as pixels or as latents; `count` latent frames."""

    count: int = 0
    pixels: np.ndarray | None = None  # [T, height, width, 3] uint8
    latents: np.ndarray | None = None  # [count, C, H, W]


class Limits(NamedTuple):
    """How long a prompt may be."""

    tokens: Callable[[str], int]
    most: int


def read_requests(
    config: ConfigDict,
    prompt: str | None,
    prompt_file: str | None,
    candidates: int,
    frames: int,
    layout: Layout,
    stride: int,
    given: int,
    limits: Limits,
    score: bool,
) -> list[Request]:
    """The videos that are asked for, `candidates` of each prompt.

    prompt, prompt_file: exactly one. frames: pixel frames of each video, or 0. stride: pixel frames of a latent frame.
    given: latent frames that are there before. score: the rewards must understand the prompts.

    Raises ValueError that names the prompt, and in it the scene or the character; OSError for files.
    """
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give either --prompt or --prompt_file")
    if score:
        rewards.validate(config.rewards)
    rules = Rules(**config.scenes)
    requests = []
    for index, (where, text, scenes, length) in enumerate(
        _scenes(config, prompt, prompt_file, frames, layout, stride, given)
    ):
        try:
            made = shots(scenes, layout, rules, config.video.fps, stride, length, given)
            for number, scene in enumerate(scenes, start=1):
                _check_prompt(config, scene.prompt, number, limits, score)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        requests += [Request(index, candidate, text, tuple(made)) for candidate in range(candidates)]
    return requests


def _check_prompt(config: ConfigDict, prompt: str, number: int, limits: Limits, score: bool) -> None:
    if (count := limits.tokens(prompt)) > limits.most:
        raise ValueError(
            f"scene {number} has {count} tokens, the text encoder takes {limits.most} with the end token; shorten it: "
            f"{prompt[:60]!r}..."
        )
    if score:
        rewards.check_prompt(config.rewards, prompt)


def _scenes(
    config: ConfigDict,
    prompt: str | None,
    prompt_file: str | None,
    frames: int,
    layout: Layout,
    stride: int,
    given: int,
) -> list[tuple[str, str, list[Scene], int]]:
    """(where it stands, text, scenes, pixel frames or 0 for those of the durations) of every video."""
    fps, length = config.video.fps, frames or config.video.frames
    if prompt_file is not None and prompt_file.endswith(".jsonl"):
        _check_length(length, layout, stride, frames)
        return [
            (where, " | ".join(texts), _switched(texts, switches, layout, stride, fps, length, given, where), length)
            for where, texts, switches in _read_switched(Path(prompt_file))
        ]
    if prompt is not None:
        if not prompt.strip():
            raise ValueError("--prompt is empty; write a prompt")
        texts = [prompt]
    else:
        texts = prompts.load(prompt_file, lambda line: 0, 0)
    if config.scenes.published:
        _check_length(length, layout, stride, frames)
        several = any("|" in text for text in texts)  # else nothing is parsed
        return [
            (f"prompt {i}", text, parse_published(text, layout.block, fps, stride) if several else [_one(text)], length)
            for i, text in enumerate(texts)
        ]
    made = []
    for i, text in enumerate(texts):
        where = f"--prompt, {text[:60]!r}" if prompt is not None else f"{prompt_file}, line {i + 1}"
        try:
            scenes = [_one(text.strip())] if is_plain(text) else parse(text, layout.block, fps, stride)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if is_plain(text) or frames:
            _check_length(length, layout, stride, frames)
        made.append((where, text, scenes, length if is_plain(text) else frames))
    return made


def _one(text: str) -> Scene:
    return Scene(text, 0.0, 0, False)


def _check_length(frames: int, layout: Layout, stride: int, asked: int) -> None:
    """Refuses a number of frames that is not whole blocks, and says which are."""
    name = "--frames" if asked else "config.video.frames"
    first = layout.independent_first_frame
    block = stride * layout.block
    after = 1 if first else 1 - stride  # pixel frames of k blocks: after + k block
    if frames < 1 or (frames - after) % block:
        fits = sorted(
            {
                max(after + (frames - after) // block * block, after + block),
                after + (frames - after) // block * block + block,
            }
        )
        raise ValueError(
            f"{name} is {frames}; blocks of {layout.block} latent frames make {' or '.join(map(str, fits))} frames"
        )


def _read_switched(path: Path) -> list[tuple[str, list[str], list[int]]]:
    """(place, prompts, switch frames) of each line of a .jsonl."""
    made = []
    for i, line in enumerate(prompts.load(str(path), lambda line: 0, 0), start=1):
        where = f"{path}, line {i}"
        try:
            content = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        texts, switches = (
            content.get(name) if isinstance(content, dict) else None for name in ("prompts", "switch_frames")
        )
        if (
            not _are(texts, str)
            or not all(text.strip() for text in texts)
            or set(content) - {"prompts", "switch_frames"}
        ):
            raise ValueError(f'{where}: expected {{"prompts": ["...", ...], "switch_frames": [40, ...]}}')
        if len(texts) == 1 and switches is None:
            switches = []
        if not _are(switches, int, empty=True) or sorted(set(switches)) != switches or len(switches) != len(texts) - 1:
            raise ValueError(
                f"{where}: switch_frames is {switches!r}; expected {len(texts) - 1} latent frames in ascending order, "
                "one for each change of the prompt"
            )
        made.append((where, [text.strip() for text in texts], switches))
    return made


def _are(values: Any, kind: type, empty: bool = False) -> bool:
    return isinstance(values, list) and (empty or bool(values)) and all(type(value) is kind for value in values)


def _switched(
    texts: Sequence[str],
    switches: Sequence[int],
    layout: Layout,
    stride: int,
    fps: int,
    frames: int,
    given: int,
    where: str,
) -> list[Scene]:
    """Scenes of as many blocks as lie between the switches."""
    blocks = [block for block in layout.blocks(1 + (frames - 1) // stride) if block.start >= given]
    scene_of = scenes_by_frame(switches, [block.start for block in blocks])
    counts = [scene_of.count(scene) for scene in range(len(texts))]
    if 0 in counts:
        raise ValueError(
            f"{where}: prompt {counts.index(0) + 1} gets no block of the {frames} frames; give its switch an "
            "earlier frame, or ask for more frames"
        )
    block = stride * layout.block
    return [Scene(text, count * block / fps, count, False) for text, count in zip(texts, counts, strict=True)]


def read_given(
    image: str | None,
    video: str | None,
    latents: str | None,
    config: ConfigDict,
    layout: Layout,
    vae: VaeConfig,
    size: tuple[int, int, int],
) -> Given:
    """The frames to begin with: a picture, the end of a video, or latents; at most one of them. ValueError or OSError.

    Pictures are resized to config.video. Of a video the last frames are taken that are whole blocks.
    """
    named = {"--image": image, "--video": video, "--latents": latents}
    named = {flag: Path(name) for flag, name in named.items() if name is not None}
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} both say how videos begin; give one")
    for flag, path in named.items():
        if not path.is_file():
            raise FileNotFoundError(f"{flag}: no file {path}")
    if "--latents" in named:
        return _read_latents(named["--latents"], layout, size)
    if not named:
        return Given()
    ((flag, path),) = named.items()
    frames = read_png(path)[None] if flag == "--image" else read_video(path)
    count = _whole_blocks(layout, 1 + (len(frames) - 1) // vae.temporal_stride)
    if not count:
        least = vae.pixel_frames(1 if layout.independent_first_frame else layout.block)
        raise ValueError(
            f"{flag}: {path} has {len(frames)} frame{'s' * (len(frames) > 1)}; this model begins with whole blocks, "
            f"of at least {least} frames: give a video of so many, or a model with blocks of one (framewise)"
        )
    frames = frames[len(frames) - vae.pixel_frames(count) :]
    target = (config.video.width, config.video.height)
    resized = [np.asarray(Image.fromarray(frame).resize(target, Image.Resampling.BICUBIC)) for frame in frames]
    return Given(count, np.stack(resized))


def _read_latents(path: Path, layout: Layout, size: tuple[int, int, int]) -> Given:
    try:
        values = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"--latents: {path} is no .npy of numbers: {error}") from None
    if values.ndim != 4 or values.shape[1:] != size or not np.issubdtype(values.dtype, np.floating):
        raise ValueError(
            f"--latents: {path} is {values.dtype} {list(values.shape)}; expected float [frames, *{list(size)}]"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"--latents: {path} holds numbers that are not finite")
    if _whole_blocks(layout, len(values)) != len(values):
        raise ValueError(f"--latents: {path} has {len(values)} frames, which are not whole blocks of {layout.block}")
    return Given(len(values), None, values.astype(np.float32))


def _whole_blocks(layout: Layout, frames: int) -> int:
    """The most latent frames, at most `frames`, that are whole blocks."""
    first = 1 if layout.independent_first_frame else 0
    return max(first + (frames - first) // layout.block * layout.block, 0)
