"""What `python -m astrolabe_jax.sample` is asked for: videos, by their shots, and frames that they
begin with.

Everything is checked here, before any weights are read.
"""

import json
from collections.abc import Callable, Iterator, Sequence
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
        """Of its file: the number of the prompt, and, from its second video on, that of the
        video.
        """
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


class Asked(NamedTuple):
    """What the user asks for."""

    prompt: str | None = None  # exactly one of these two
    prompt_file: str | None = None
    candidates: int = 1  # videos per prompt
    frames: int = 0  # pixel frames of each video, or 0
    score: bool = False  # so the rewards must understand the prompts


class Terms(NamedTuple):
    """What the model makes of it."""

    layout: Layout
    rules: Rules
    stride: int  # pixel frames of a latent frame
    given: int  # latent frames that are there before
    tokens: Callable[[str], int]  # of a prompt
    most: int  # of them


def read_requests(config: ConfigDict, asked: Asked, terms: Terms) -> list[Request]:
    """The videos that are asked for.

    Raises ValueError that names the prompt, and in it the scene or the character; OSError for
    files.
    """
    if (asked.prompt is None) == (asked.prompt_file is None):
        raise ValueError("give either --prompt or --prompt_file")
    if asked.score:
        rewards.validate(config.rewards)
    requests = []
    for index, (where, text, scenes, frames) in enumerate(_scenes(config, asked, terms)):
        try:
            made = shots(
                scenes,
                terms.layout,
                terms.rules,
                config.video.fps,
                terms.stride,
                frames,
                terms.given,
            )
            for number, scene in enumerate(scenes, start=1):
                _check_prompt(config, scene.prompt, number, asked, terms)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        requests += [
            Request(index, candidate, text, tuple(made)) for candidate in range(asked.candidates)
        ]
    return requests


def _check_prompt(config: ConfigDict, prompt: str, number: int, asked: Asked, terms: Terms) -> None:
    if (count := terms.tokens(prompt)) > terms.most:
        raise ValueError(
            f"scene {number} has {count} tokens, the text encoder takes {terms.most} with the end "
            f"token; shorten it: {prompt[:60]!r}..."
        )
    if asked.score:
        rewards.check_prompt(config.rewards, prompt)


def _scenes(
    config: ConfigDict, asked: Asked, terms: Terms
) -> Iterator[tuple[str, str, list[Scene], int]]:
    """(where it stands, text, scenes, pixel frames or 0 for those of the durations) of every
    video.
    """
    fps, frames, block = config.video.fps, asked.frames or config.video.frames, terms.layout.block
    if asked.prompt_file is not None and asked.prompt_file.endswith(".jsonl"):
        _check_length(frames, asked, terms)
        for where, texts, switches in _read_switched(Path(asked.prompt_file)):
            yield (
                where,
                " | ".join(texts),
                _switched(texts, switches, terms, fps, frames, where),
                frames,
            )
        return
    if asked.prompt is None:
        texts = [line for line in prompts.load(asked.prompt_file, lambda line: 0, 0)]
        places = [f"{asked.prompt_file}, line {i}" for i in range(1, len(texts) + 1)]
    elif asked.prompt.strip():
        texts, places = [asked.prompt], ["--prompt"]
    else:
        raise ValueError("--prompt is empty; write a prompt")
    several = any("|" in text for text in texts)
    for where, text in zip(places, texts, strict=True):
        plain = not several if terms.rules.published else is_plain(text)
        length = frames if plain or terms.rules.published else asked.frames
        try:
            if length:
                _check_length(length, asked, terms)
            if plain:
                scenes = [Scene(text.strip(), 0.0, 0, False)]
            else:
                scenes = (parse_published if terms.rules.published else parse)(
                    text, block, fps, terms.stride
                )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        yield where, text, scenes, length


def _check_length(frames: int, asked: Asked, terms: Terms) -> None:
    """Refuses a number of frames that is not whole blocks, and says which are."""
    latents = 1 + (frames - 1) // terms.stride
    below, above = terms.layout.whole(latents), terms.layout.whole(latents + 1, up=True)
    if frames < 1 or frames != 1 + terms.stride * (below - 1):
        fits = [str(1 + terms.stride * (count - 1)) for count in (below, above) if count]
        name = "--frames" if asked.frames else "config.video.frames"
        whole = (
            f"whole blocks of {terms.layout.block} latent frames make {' or '.join(fits)} frames"
        )
        raise ValueError(f"{name} is {frames}; {whole}")


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
            content.get(name) if isinstance(content, dict) else None
            for name in ("prompts", "switch_frames")
        )
        if (
            not _are(texts, str)
            or not all(text.strip() for text in texts)
            or set(content) - {"prompts", "switch_frames"}
        ):
            raise ValueError(
                f'{where}: expected {{"prompts": ["...", ...], "switch_frames": [40, ...]}}'
            )
        if len(texts) == 1 and switches is None:
            switches = []
        if (
            not _are(switches, int, empty=True)
            or sorted(set(switches)) != switches
            or len(switches) != len(texts) - 1
        ):
            raise ValueError(
                f"{where}: switch_frames is {switches!r}; expected {len(texts) - 1} latent frames "
                "in ascending order, one for each change of the prompt"
            )
        made.append((where, [text.strip() for text in texts], switches))
    return made


def _are(values: Any, kind: type, empty: bool = False) -> bool:
    return (
        isinstance(values, list)
        and (empty or bool(values))
        and all(type(value) is kind for value in values)
    )


def _switched(
    texts: Sequence[str], switches: Sequence[int], terms: Terms, fps: int, frames: int, where: str
) -> list[Scene]:
    """Scenes of as many blocks as lie between the switches."""
    blocks = [
        block
        for block in terms.layout.blocks(1 + (frames - 1) // terms.stride)
        if block.start >= terms.given
    ]
    scene_of = scenes_by_frame(switches, [block.start for block in blocks])
    counts = [scene_of.count(scene) for scene in range(len(texts))]
    if 0 in counts:
        raise ValueError(
            f"{where}: prompt {counts.index(0) + 1} gets no block of the {frames} frames; give its "
            "switch an earlier frame, or ask for more frames"
        )
    seconds = terms.stride * terms.layout.block / fps
    return [
        Scene(text, count * seconds, count, False)
        for text, count in zip(texts, counts, strict=True)
    ]


def read_given(
    image: str | None,
    video: str | None,
    latents: str | None,
    config: ConfigDict,
    layout: Layout,
    vae: VaeConfig,
    size: tuple[int, int, int],
) -> Given:
    """The frames to begin with: a picture, the end of a video, or latents; at most one of them.
    ValueError or OSError.

    Pictures are resized to config.video. Of a video, taken at its frame rate, the last frames are
    used that are whole blocks.
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
    return Given(count, frames[len(frames) - vae.pixel_frames(count) :])


def _read_latents(path: Path, layout: Layout, size: tuple[int, int, int]) -> Given:
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
    return Given(len(values), None, values.astype(np.float32))
