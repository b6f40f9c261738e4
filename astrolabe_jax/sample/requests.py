"""Reads what `python -m astrolabe_jax.sample` is asked for, before any weights are read.

That is videos, by their shots, and the frames that they begin with.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from astrolabe_jax import prompts
from astrolabe_jax.config import MOST_VIDEOS
from astrolabe_jax.config_checks import error_prefix
from astrolabe_jax.geometry import latent_length
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.models.wan.vae import VaeConfig
from astrolabe_jax.preflight import Faults
from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.runtime.files import local_file
from astrolabe_jax.runtime.media import VIDEO, read_picture, read_video
from astrolabe_jax.runtime.progress import counted, log
from astrolabe_jax.streaming.scenes import (
    GivenError,
    Rules,
    Scene,
    Shot,
    is_plain,
    is_switched,
    read,
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
    name: str = ""  # flag and file


class Limits(NamedTuple):
    """What the model can do."""

    layout: Layout
    rules: Rules  # how scenes follow each other
    vae: VaeConfig
    given: GivenFrames  # that videos begin with
    tokenizer: Any
    max_tokens: int  # of a prompt


def read_requests(config: ConfigDict, options: Mapping[str, Any], limits: Limits) -> list[Request]:
    """Return the videos that are asked for.

    Args:
      options: `prompt` or `prompt_file`, `switch_frames`, `candidates`, `frames` and `score`, as
        the flags say.

    Raises:
      ValueError: naming the prompt, and in it the scene or the character.
      OSError: for files.
    """
    if (options["prompt"] is None) == (options["prompt_file"] is None):
        raise ValueError("give either --prompt or --prompt_file")
    if options["score"]:
        rewards.validate(config.rewards)
        faults = Faults()
        faults.found.extend(map(ValueError, rewards.directory_faults(config.rewards)))
        faults.found.extend(rewards.reach_faults(config.rewards))
        faults.refuse()
    source, texts = _texts(config, options)
    prompts.check(
        source,
        texts,
        lambda text: [scene.prompt for scene in _scenes(text, texts, config, limits)],
        limits.tokenizer,
        limits.max_tokens,
        rewards.prompt_check(config.rewards if options["score"] else ()),
    )
    asked = len(texts) * options["candidates"]
    if asked > MOST_VIDEOS:
        raise ValueError(f"{asked:,} videos are asked for; expected at most {MOST_VIDEOS:,}")
    requests = []
    for index, text in enumerate(texts):
        place = prompts.place(source, index + 1)
        try:
            scenes = _scenes(text, texts, config, limits)
            planned = shots(
                scenes,
                limits.layout,
                limits.rules,
                config.video.fps,
                limits.vae.temporal_stride,
                _frames(text, config, options, limits),
                limits.given.count,
            )
        except GivenError as error:
            where = "" if place.startswith("--") else f" ({place})"
            raise ValueError(f"{limits.given.name} {error}{where}") from None
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        title = " | ".join(scene.prompt for scene in scenes) if is_switched(text) else text
        requests += [
            Request(index, candidate, title, tuple(planned))
            for candidate in range(options["candidates"])
        ]
    return requests


def _texts(config: ConfigDict, options: Mapping[str, Any]) -> tuple[str, Sequence[str]]:
    """Return where the prompts are from, and the prompts."""
    switches = config.prompts.switch_frames
    flag = options["switch_frames"]
    if flag is not None:
        if not all(frame.isdecimal() for frame in flag):
            raise ValueError(
                f"--switch_frames is {','.join(flag)!r}; expected latent frames, as in 40,80"
            )
        switches = [int(frame) for frame in flag]
    if options["prompt_file"] is None:
        source = "--prompt"
        texts = (options["prompt"].strip(),)
        if not texts[0]:
            raise ValueError("--prompt is empty; write a prompt")
    else:
        source = options["prompt_file"]
        texts = prompts.load(source, switches)
    if flag is not None and not any(map(is_switched, texts)):
        raise ValueError(
            f"--switch_frames: {source} has no list of prompts; they belong to a .jsonl with lines "
            '{"prompts": ["...", ...]}'
        )
    return source, texts


def _scenes(text: str, texts: Sequence[str], config: ConfigDict, limits: Limits) -> list[Scene]:
    """Return the scenes of one of the prompts; the published rules read all of them or none."""
    published = limits.rules.published and not is_switched(text)
    if published and not any("|" in other for other in texts):
        return [Scene(text, 0.0, 0, False)]
    stride = limits.vae.temporal_stride
    return read(text, limits.layout, limits.rules, config.video.fps, stride, limits.given.count)


def _frames(text: str, config: ConfigDict, options: Mapping[str, Any], limits: Limits) -> int:
    """Return the pixel frames of a video; 0: as many as the durations of its scenes give.

    Raises ValueError for a number that is not whole blocks.
    """
    name = "--frames" if options["frames"] else "config.video.frames"
    has_length = limits.rules.published or is_plain(text) or is_switched(text)
    if name == "config.video.frames" and not has_length:
        return 0
    frames = options["frames"] or config.video.frames
    latent_length(name, frames, limits.layout, limits.vae)
    return frames


def read_given(
    paths: Mapping[str, str | None],
    config: ConfigDict,
    layout: Layout,
    vae: VaeConfig,
    latent_shape: tuple[int, int, int],
) -> GivenFrames:
    """Read the frames to begin with: a picture, the end of a video, or latents.

    Pictures are brought to the size in config.video, as media.fitted does. Of a video, taken at its
    frame rate, the last frames are used that are whole blocks.

    Args:
      paths: by the name of the flag, 'image', 'video' or 'latents'; at most one is given.

    Raises:
      ValueError, OSError: naming the flag and the file.
    """
    named = {flag: name for flag, name in paths.items() if name is not None}
    if len(named) > 1:
        flags = " and ".join(f"--{flag}" for flag in named)
        raise ValueError(f"{flags} both say how videos begin; give one")
    if not named:
        return GivenFrames()
    ((flag, text),) = named.items()
    with error_prefix(f"--{flag}"):
        path = local_file(text, _EXPECTED[flag])
        if flag == "latents":
            given = _read_latents(path, layout, latent_shape)
        else:
            target = (config.video.width, config.video.height)
            if flag == "image":
                frames = read_picture(path, target)[None]
            else:
                frames = read_video(path, config.video.fps, target, end=True)
            given = _last_blocks(path, frames, layout, vae)
    return given._replace(name=f"--{flag} {path}")


# No picture has such latents, whose deviation is about 1.
_LARGEST_LATENT = 1000
_EXPECTED = {
    "image": "one picture file (.png, .jpg, .webp, ...)",
    "video": VIDEO,
    "latents": "one .npy file",
}


def _last_blocks(path: Path, frames: np.ndarray, layout: Layout, vae: VaeConfig) -> GivenFrames:
    """Return the last of the frames that are whole blocks; ValueError if there are too few."""
    count = layout.whole(1 + (len(frames) - 1) // vae.temporal_stride)
    if not count:
        raise ValueError(
            f"{path} has {counted(len(frames), 'frame')}; this model begins with whole blocks, of "
            f"at least {vae.pixel_frames(layout.lead or layout.block)} frames: give a video of so "
            "many, or a model with blocks of one (framewise)"
        )
    used = vae.pixel_frames(count)
    if used < len(frames):
        log(f"{path}: videos begin with the last {used} of its {len(frames)} frames, whole blocks")
    return GivenFrames(count, frames[len(frames) - used :])


def _read_latents(path: Path, layout: Layout, size: tuple[int, int, int]) -> GivenFrames:
    """Read latents [frames, C, H, W] from a .npy; ValueError if they are of another form."""
    channels, height, width = size
    expected = f"expected floats [frames, {channels} channels, height {height}, width {width}]"
    try:
        values = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError):
        with open(path, "rb") as file:
            start = file.read(6)
        what = next(text for begin, text in _NO_NPY.items() if start.startswith(begin))
        raise ValueError(f"{path} is {what}; {expected}, saved with np.save") from None
    if values.ndim != 4 or values.shape[1:] != size or not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"{path} holds {values.dtype} {list(values.shape)}; {expected}")
    with np.errstate(over="ignore"):  # what float32 does not hold is not finite
        latents = values.astype(np.float32)
    if not np.isfinite(latents).all():
        raise ValueError(f"{path} holds numbers that are not finite")
    if (largest := np.abs(latents).max(initial=0)) > _LARGEST_LATENT:
        raise ValueError(
            f"{path} holds numbers up to {largest:.3g}; expected latents that the VAE has "
            "normalised, mostly within 5 of 0"
        )
    if not len(values) or layout.whole(len(values)) != len(values):
        raise ValueError(
            f"{path} has {counted(len(values), 'frame')}; expected whole blocks of {layout.block}"
        )
    return GivenFrames(len(latents), None, latents)


# how files begin that are no array: what they are
_NO_NPY = {
    b"PK": "an archive (.npz of several arrays, or .pt)",
    b"\x93NUMPY": "a .npy that is cut short, or holds no numbers",
    b"": "no .npy file",
}
