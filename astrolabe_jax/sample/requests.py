"""Reads what `python -m astrolabe_jax.sample` is asked for, before any weights are read.

That is videos, by their shots, and the frames that they begin with.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from astrolabe_jax import prompts
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.models.wan.vae import VaeConfig
from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.runtime.media import read_png, read_video, resized
from astrolabe_jax.streaming.scenes import (
    Rules,
    Scene,
    Shot,
    is_plain,
    parse,
    parse_published,
    scenes_by_frame,
    shots,
)


class Request(NamedTuple):
    """One video to make."""

    index: int  # of its prompt
    candidate: int  # among the videos of this prompt
    prompt: str  # as it was given
    shots: tuple[Shot, ...]

    @property
    def name(self) -> str:
        """Stem of its file: the prompt's number, and the video's from the second one on."""
        return f"{self.index:05d}" + (f"-{self.candidate}" if self.candidate else "")

    @property
    def frames(self) -> int:
        """Pixel frames."""
        return sum(shot.frames for shot in self.shots)


class GivenFrames(NamedTuple):
    """The frames that every video begins with, as pixels or as latents."""

    count: int = 0  # latent frames
    pixels: np.ndarray | None = None  # [T, height, width, 3] uint8
    latents: np.ndarray | None = None  # [count, C, H, W]


class Options(NamedTuple):
    """What the user asks for."""

    prompt: str | None = None  # exactly one of these two
    prompt_file: str | None = None
    candidates: int = 1  # videos per prompt
    frames: int = 0  # pixel frames of each video, or 0
    score: bool = False  # so the rewards must understand the prompts


class Limits(NamedTuple):
    """What the model can do."""

    layout: Layout
    rules: Rules  # how scenes follow each other
    stride: int  # pixel frames of a latent frame
    given: int  # latent frames that videos begin with
    count_tokens: Callable[[str], int]  # of a prompt
    max_tokens: int


class _Video(NamedTuple):
    """One video as it is asked for."""

    where: str  # it stands: a flag, or a line of a file
    text: str
    scenes: list[Scene]
    frames: int  # pixel frames, 0 for those of the durations


def read_requests(config: ConfigDict, options: Options, limits: Limits) -> list[Request]:
    """Return the videos that are asked for.

    Raises:
      ValueError: naming the prompt, and in it the scene or the character.
      OSError: for files.
    """
    if (options.prompt is None) == (options.prompt_file is None):
        raise ValueError("give either --prompt or --prompt_file")
    if options.score:
        rewards.validate(config.rewards)
    requests = []
    for index, video in enumerate(_videos(config, options, limits)):
        try:
            planned = shots(
                video.scenes,
                limits.layout,
                limits.rules,
                config.video.fps,
                limits.stride,
                video.frames,
                limits.given,
            )
            for number, scene in enumerate(video.scenes, start=1):
                _check_tokens(scene.prompt, number, limits)
                if options.score:
                    rewards.check_prompt(config.rewards, scene.prompt)
        except ValueError as error:
            raise ValueError(f"{video.where}: {error}") from None
        for candidate in range(options.candidates):
            requests.append(Request(index, candidate, video.text, tuple(planned)))
    return requests


def _check_tokens(prompt: str, number: int, limits: Limits) -> None:
    """Raise ValueError if the prompt of scene `number` is too long for the text encoder."""
    count = limits.count_tokens(prompt)
    if count > limits.max_tokens:
        raise ValueError(
            f"scene {number} has {count} tokens, the text encoder takes {limits.max_tokens} with "
            f"the end token; shorten it: {prompt[:60]!r}..."
        )


def _videos(config: ConfigDict, options: Options, limits: Limits) -> Iterator[_Video]:
    """Give every video that is asked for."""
    frames = options.frames or config.video.frames
    if options.prompt_file is None:
        assert options.prompt is not None
        if not options.prompt.strip():
            raise ValueError("--prompt is empty; write a prompt")
        texts = {"--prompt": options.prompt}
    elif options.prompt_file.endswith(".jsonl"):
        _check_length(frames, options, limits)
        yield from _switched_videos(Path(options.prompt_file), limits, config.video.fps, frames)
        return
    else:
        lines = prompts.load(options.prompt_file, lambda line: 0, 0)
        texts = {f"{options.prompt_file}, line {i}": line for i, line in enumerate(lines, start=1)}
    published = limits.rules.published
    has_scenes = any("|" in text for text in texts.values())
    for where, text in texts.items():
        plain = not has_scenes if published else is_plain(text)
        length = frames if plain or published else options.frames
        try:
            if length:
                _check_length(length, options, limits)
            scenes = [Scene(text.strip(), 0.0, 0, False)]
            if not plain:
                read = parse_published if published else parse
                scenes = read(text, limits.layout.block, config.video.fps, limits.stride)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        yield _Video(where, text, scenes, length)


def _check_length(frames: int, options: Options, limits: Limits) -> None:
    """Raise ValueError for a number of frames that is not whole blocks; it says which are."""
    layout = limits.layout
    latents = 1 + (frames - 1) // limits.stride
    below = layout.whole(latents)
    above = layout.whole(latents + 1, up=True)
    if frames < 1 or frames != 1 + limits.stride * (below - 1):
        fits = [str(1 + limits.stride * (count - 1)) for count in (below, above) if count]
        name = "--frames" if options.frames else "config.video.frames"
        raise ValueError(
            f"{name} is {frames}; whole blocks of {layout.block} latent frames make "
            f"{' or '.join(fits)} frames"
        )


def _switched_videos(path: Path, limits: Limits, fps: int, frames: int) -> Iterator[_Video]:
    """Give the video of each line of a .jsonl, whose prompts change at stated latent frames."""
    for number, line in enumerate(prompts.load(str(path), lambda line: 0, 0), start=1):
        where = f"{path}, line {number}"
        texts, switches = _read_switched(line, where)
        scenes = _switched_scenes(texts, switches, limits, fps, frames)
        if isinstance(scenes, int):
            raise ValueError(
                f"{where}: prompt {scenes + 1} gets no block of the {frames} frames; give its "
                "switch an earlier frame, or ask for more frames"
            )
        yield _Video(where, " | ".join(texts), scenes, frames)


def _read_switched(line: str, where: str) -> tuple[list[str], list[int]]:
    """Return prompts and switch frames of a line of JSON; ValueError if it is of another form."""
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    known = isinstance(content, dict) and not set(content) - {"prompts", "switch_frames"}
    texts = content.get("prompts") if known else None
    if not _is_list_of(texts, str) or not texts or not all(text.strip() for text in texts):
        raise ValueError(
            f'{where}: expected {{"prompts": ["...", ...], "switch_frames": [40, ...]}}'
        )
    switches = _switches_of(content, len(texts))
    ascending = _is_list_of(switches, int) and sorted(set(switches)) == switches
    if not ascending or len(switches) != len(texts) - 1:
        raise ValueError(
            f"{where}: switch_frames is {switches!r}; expected {len(texts) - 1} latent frames in "
            "ascending order, one for each change of the prompt"
        )
    return [text.strip() for text in texts], switches


def _switches_of(content: dict, prompts: int) -> Any:
    """Return the switch frames of a line; a video of one prompt may leave them out."""
    return content.get("switch_frames", [] if prompts == 1 else None)


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _switched_scenes(
    texts: Sequence[str], switches: Sequence[int], limits: Limits, fps: int, frames: int
) -> list[Scene] | int:
    """Return scenes of as many blocks as lie between the switches, or the scene that has none."""
    layout = limits.layout
    blocks = layout.blocks(1 + (frames - 1) // limits.stride)
    starts = [block.start for block in blocks if block.start >= limits.given]
    scene_of = scenes_by_frame(switches, starts)
    counts = [scene_of.count(scene) for scene in range(len(texts))]
    if 0 in counts:
        return counts.index(0)
    seconds = limits.stride * layout.block / fps
    return [
        Scene(text, count * seconds, count, False)
        for text, count in zip(texts, counts, strict=True)
    ]


def read_given(
    paths: Mapping[str, str | None],
    config: ConfigDict,
    layout: Layout,
    vae: VaeConfig,
    latent_shape: tuple[int, int, int],
) -> GivenFrames:
    """Read the frames to begin with: a picture, the end of a video, or latents.

    Pictures are resized to config.video. Of a video, taken at its frame rate, the last frames are
    used that are whole blocks.

    Args:
      paths: by the name of the flag, 'image', 'video' or 'latents'; at most one is given.

    Raises:
      ValueError, OSError: naming the flag and the file.
    """
    named = {f"--{flag}": Path(name) for flag, name in paths.items() if name is not None}
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} both say how videos begin; give one")
    for flag, path in named.items():
        if not path.is_file():
            raise FileNotFoundError(f"{flag}: no file {path}")
    if "--latents" in named:
        return _read_latents(named["--latents"], layout, latent_shape)
    if not named:
        return GivenFrames()
    ((flag, path),) = named.items()
    target = (config.video.width, config.video.height)
    if flag == "--image":
        frames = resized(read_png(path), target)[None]
    else:
        frames = read_video(path, config.video.fps, target)
    count = layout.whole(1 + (len(frames) - 1) // vae.temporal_stride)
    if not count:
        least = vae.pixel_frames(layout.lead or layout.block)
        raise ValueError(
            f"{flag}: {path} has {len(frames)} frame{'s' * (len(frames) > 1)}; this model begins "
            f"with whole blocks, of at least {least} frames: give a video of so many, or a model "
            "with blocks of one (framewise)"
        )
    return GivenFrames(count, frames[len(frames) - vae.pixel_frames(count) :])


def _read_latents(path: Path, layout: Layout, size: tuple[int, int, int]) -> GivenFrames:
    """Read latents [frames, C, H, W] from a .npy; ValueError if they are of another form."""
    try:
        values = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"--latents: {path} is no .npy of numbers: {error}") from None
    if values.ndim != 4 or values.shape[1:] != size or not np.issubdtype(values.dtype, np.floating):
        raise ValueError(
            f"--latents: {path} is {values.dtype} {list(values.shape)}; expected float [frames, "
            f"*{list(size)}]"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"--latents: {path} holds numbers that are not finite")
    if not len(values) or layout.whole(len(values)) != len(values):
        raise ValueError(
            f"--latents: {path} has {len(values)} frames, which are not whole blocks of "
            f"{layout.block}"
        )
    return GivenFrames(len(values), None, values.astype(np.float32))
