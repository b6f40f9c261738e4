"""Reads what `python -m astrolabe_jax.sample` is asked for, before any weights are read.

That is videos, by their shots, and the frames that they begin with.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from astrolabe_jax import prompts
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.models.wan.vae import VaeConfig
from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.run import error_prefix
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


class Limits(NamedTuple):
    """What the model can do."""

    layout: Layout
    rules: Rules  # how scenes follow each other
    stride: int  # pixel frames of a latent frame
    given: int  # latent frames that videos begin with
    count_tokens: Callable[[str], int]  # of a prompt
    max_tokens: int


# As it is asked for: the flag or the line of a file where it stands, its text, its scenes, and its
# pixel frames, 0 for those of the durations.
_Video = tuple[str, str, list[Scene], int]


def read_requests(config: ConfigDict, options: Mapping[str, Any], limits: Limits) -> list[Request]:
    """Return the videos that are asked for.

    Args:
      options: `prompt` or `prompt_file`, `candidates`, `frames` and `score`, as the flags say.

    Raises:
      ValueError: naming the prompt, and in it the scene or the character.
      OSError: for files.
    """
    if (options["prompt"] is None) == (options["prompt_file"] is None):
        raise ValueError("give either --prompt or --prompt_file")
    if options["score"]:
        rewards.validate(config.rewards)
        rewards.reach(config.rewards)
    requests = []
    for index, (where, text, scenes, frames) in enumerate(_videos(config, options, limits)):
        with error_prefix(where):
            planned = shots(
                scenes,
                limits.layout,
                limits.rules,
                config.video.fps,
                limits.stride,
                frames,
                limits.given,
            )
            for number, scene in enumerate(scenes, start=1):
                count = limits.count_tokens(scene.prompt)
                if count > limits.max_tokens:
                    raise ValueError(
                        f"scene {number} has {count} tokens, the text encoder takes "
                        f"{limits.max_tokens} with the end token; shorten it: "
                        f"{scene.prompt[:60]!r}..."
                    )
                if options["score"]:
                    rewards.check_prompt(config.rewards, scene.prompt)
        requests += [
            Request(index, candidate, text, tuple(planned))
            for candidate in range(options["candidates"])
        ]
    return requests


def _videos(config: ConfigDict, options: Mapping[str, Any], limits: Limits) -> Iterator[_Video]:
    """Give every video that is asked for."""
    frames = options["frames"] or config.video.frames
    file = options["prompt_file"]
    if file is None:
        if not options["prompt"].strip():
            raise ValueError("--prompt is empty; write a prompt")
        texts = {"--prompt": options["prompt"]}
    else:
        texts = {
            f"{file}, line {number}": line
            for number, line in enumerate(prompts.load(file, lambda line: 0, 0), start=1)
        }
        if file.endswith(".jsonl"):
            _check_length(frames, options, limits)
            for where, line in texts.items():
                scenes = _switched_scenes(where, line, limits, config.video.fps, frames)
                yield where, " | ".join(scene.prompt for scene in scenes), scenes, frames
            return
    published = limits.rules.published
    read = parse_published if published else parse
    has_scenes = any("|" in text for text in texts.values())
    for where, text in texts.items():
        plain = not has_scenes if published else is_plain(text)
        length = frames if plain or published else options["frames"]
        with error_prefix(where):
            if length:
                _check_length(length, options, limits)
            scenes = [Scene(text.strip(), 0.0, 0, False)]
            if not plain:
                scenes = read(text, limits.layout.block, config.video.fps, limits.stride)
        yield where, text, scenes, length


def _check_length(frames: int, options: Mapping[str, Any], limits: Limits) -> None:
    """Raise ValueError for a number of frames that is not whole blocks; it says which are."""
    layout = limits.layout
    latents = 1 + (frames - 1) // limits.stride
    whole = (layout.whole(latents), layout.whole(latents + 1, up=True))
    fits = [1 + limits.stride * (count - 1) for count in whole if count > 0]
    if frames not in fits:
        name = "--frames" if options["frames"] else "config.video.frames"
        raise ValueError(
            f"{name} is {frames}; whole blocks of {layout.block} latent frames make "
            f"{' or '.join(map(str, fits))} frames"
        )


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
    # a video of one prompt may leave them out
    switches = content.get("switch_frames", [] if len(texts) == 1 else None)
    if (
        not _is_list_of(switches, int)
        or sorted(set(switches)) != switches
        or len(switches) != len(texts) - 1
    ):
        raise ValueError(
            f"{where}: switch_frames is {switches!r}; expected {len(texts) - 1} latent frames in "
            "ascending order, one for each change of the prompt"
        )
    return [text.strip() for text in texts], switches


def _is_list_of(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def _switched_scenes(where: str, line: str, limits: Limits, fps: int, frames: int) -> list[Scene]:
    """Return the scenes of a line of a .jsonl, whose prompts change at stated latent frames.

    They have as many blocks as lie between the switches; ValueError for a scene that has none.
    """
    texts, switches = _read_switched(line, where)
    layout = limits.layout
    starts = [
        block.start
        for block in layout.blocks(1 + (frames - 1) // limits.stride)
        if block.start >= limits.given
    ]
    scene_of = scenes_by_frame(switches, starts)
    counts = [scene_of.count(scene) for scene in range(len(texts))]
    if 0 in counts:
        raise ValueError(
            f"{where}: prompt {counts.index(0) + 1} gets no block of the {frames} frames; give its "
            "switch an earlier frame, or ask for more frames"
        )
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
    if not named:
        return GivenFrames()
    ((flag, path),) = named.items()
    if not path.is_file():
        raise FileNotFoundError(f"{flag}: no file {path}")
    if flag == "--latents":
        return _read_latents(path, layout, latent_shape)
    target = (config.video.width, config.video.height)
    frames = (
        resized(read_png(path), target)[None]
        if flag == "--image"
        else read_video(path, config.video.fps, target)
    )
    count = layout.whole(1 + (len(frames) - 1) // vae.temporal_stride)
    if not count:
        raise ValueError(
            f"{flag}: {path} has {len(frames)} frame{'s' * (len(frames) > 1)}; this model begins "
            f"with whole blocks, of at least {vae.pixel_frames(layout.lead or layout.block)} "
            "frames: give a video of so many, or a model with blocks of one (framewise)"
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
