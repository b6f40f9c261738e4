"""From a config and the sizes of its nets: blocks, denoising steps, shapes of latents, scenes."""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from astrolabe_jax.arithmetic import window_starts
from astrolabe_jax.config_checks import error_prefix
from astrolabe_jax.convert import base as bases
from astrolabe_jax.models.tokenizer import load_tokenizer
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.models.wan.vae import VaeConfig
from astrolabe_jax.rollout import Sampler
from astrolabe_jax.runtime.progress import counted
from astrolabe_jax.schedule import Schedule, warp
from astrolabe_jax.streaming import scenes
from astrolabe_jax.update import training_layout


def numerics(config: ConfigDict) -> dict[str, Any]:
    """Return what a run chooses about nets whose sizes are given: keywords of bases.configs."""
    return {name: config.model[name] for name in ("dtype", "param_dtype", "remat", "attention")}


@error_prefix("config.base")
def open_base(config: ConfigDict) -> tuple[dict[str, Any], Any]:
    """Return the sizes of the nets of config.base (bases.configs) and its tokenizer.

    No weights are read.
    """
    sizes = bases.configs(config.base, config.model.size, **numerics(config))
    return sizes, load_tokenizer(bases.tokenizer_of(config.base))


def geometry_of(
    config: ConfigDict, sizes: Mapping[str, Any]
) -> tuple[Layout, Sampler, tuple[int, int, int, int]]:
    """Return blocks, denoising steps and the shape (F, C, H, W) of sampled latents.

    Args:
      sizes: of the nets, from bases.configs.

    Raises:
      ValueError: naming the fields that do not fit each other.
    """
    layout = layout_of(config)
    sampler = sampler_of(config)
    size = latent_size(config, sizes)
    frames = latent_length("config.video.frames", config.video.frames, layout, sizes["vae"])
    last = max(window_starts(config, frames))
    window = config.streaming.window or frames
    with error_prefix("config.loss.mask_block"):
        training_layout(config, layout).check_frames(window)
    return layout, sampler, (last + window, *size)


def latent_length(name: str, frames: int, layout: Layout, vae: VaeConfig) -> int:
    """Return the latent frames of so many pixel frames.

    Raises ValueError, naming the field or flag `name` that they were given by, and the nearest
    numbers that are whole blocks.
    """
    stride = vae.temporal_stride
    latents = 1 + (frames - 1) // stride
    whole = (layout.whole(latents), layout.whole(latents + 1, up=True))
    fits = [vae.pixel_frames(count) for count in whole if count > 0]
    if frames not in fits:
        raise ValueError(
            f"{name} is {frames}; whole blocks of {counted(layout.block, 'latent frame')} make "
            f"{' or '.join(map(str, fits))} frames"
        )
    with error_prefix(f"{name} is {frames}"):
        layout.check_frames(latents)
    return latents


def latent_size(config: ConfigDict, sizes: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return (C, H, W) of a latent frame.

    Raises:
      ValueError: for heights and widths that the VAE or the patches do not divide.
    """
    video = config.video
    vae = sizes["vae"]
    net = sizes["transformer"]
    unit = [vae.spatial_stride * patch for patch in net.patch_size[1:]]
    for name, step in zip(("height", "width"), unit, strict=True):
        if video[name] % step:
            below = video[name] // step * step
            fits = [str(size) for size in (below, below + step) if size]
            raise ValueError(
                f"config.video.{name} is {video[name]}; this model takes multiples of {step} "
                f"pixels, {' or '.join(fits)}"
            )
    return net.in_channels, video.height // vae.spatial_stride, video.width // vae.spatial_stride


@error_prefix("config.model")
def layout_of(config: ConfigDict) -> Layout:
    """Return blocks, window and sink."""
    model = config.model
    return Layout(
        model.block,
        model.window,
        model.sink,
        model.positions,
        model.independent_first_frame,
        model.max_global,
        model.faithful_sinks,
    )


@error_prefix("config.sampler")
def sampler_of(config: ConfigDict) -> Sampler:
    """Return the denoising steps."""
    settings = config.sampler
    schedule = Schedule(shift=settings.shift)
    steps = tuple(map(float, settings.steps))
    return Sampler(
        warp(steps, schedule) if settings.warp else steps,
        settings.context_noise,
        schedule,
        settings.sigma_source,
    )


def rules_of(config: ConfigDict) -> scenes.Rules:
    """Return how scenes follow each other."""
    settings = config.scenes
    return scenes.Rules(settings.transition, settings.cut, settings.global_sink, settings.published)


def scene_reader(
    config: ConfigDict, layout: Layout, vae: VaeConfig
) -> Callable[[str], list[scenes.Scene]]:
    """Return what gives the scenes of a prompt of a training, see `timeline_of`."""
    if not config.streaming.window:
        return lambda prompt: [scenes.literal(prompt)]
    rules = rules_of(config)
    fps = config.video.fps
    return lambda prompt: scenes.read(prompt, layout, rules, fps, vae.temporal_stride)
