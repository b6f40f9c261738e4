"""From a config and a directory to a run: everything is read and checked before compilation."""

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from astrolabe_jax import checkpoint, prompts, sharding
from astrolabe_jax.config import eval_frames, flatten, repeats, window_starts
from astrolabe_jax.config_checks import validate
from astrolabe_jax.convert import base as bases
from astrolabe_jax.convert.lora import load_lora
from astrolabe_jax.models.lora import init_adapter
from astrolabe_jax.models.tokenizer import load_tokenizer, token_ids
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.rewards import panel, registry
from astrolabe_jax.rollout import Sampler
from astrolabe_jax.runtime import multihost
from astrolabe_jax.schedule import Schedule, warp
from astrolabe_jax.streaming import scenes
from astrolabe_jax.types import Policy, RngStream, Timeline
from astrolabe_jax.update import training_layout


class Run(NamedTuple):
    """What stays the same from the first epoch to the last.

    A run that is only planned (plan.py) has shapes in place of arrays, and no prompts.
    """

    config: ConfigDict
    workdir: Path
    fingerprint: dict[str, Any]  # what makes two runs the same, see checkpoint.claim
    base: bases.Base  # with its parameters on the mesh
    layout: Layout  # blocks, window, sink
    sampler: Sampler  # denoising steps
    mesh: Any  # Mesh, or AbstractMesh if it is only planned
    latent_shape: tuple[int, int, int, int]  # (F, C, H, W), F to the end of the last window
    train_prompts: tuple[str, ...]
    test_prompts: tuple[str, ...]
    adapter: Any  # of every policy before the first epoch, on the host; None: merged in the base
    starts: tuple[int, ...]  # latent frames at which a trained window may begin; whole videos: 0
    reward_runner: panel.RewardRunner  # the rewards, ready to score

    @property
    def lora_scale(self) -> float:
        """alpha / R."""
        return self.config.lora.alpha / self.config.lora.rank

    @property
    def window(self) -> int:
        """Latent frames that an epoch trains on: the window, or the whole video."""
        return self.config.streaming.window or self.latent_shape[0]

    def policy(self, adapter: dict | None) -> Policy:
        """Return what videos are sampled from."""
        net = self.base.transformer
        return Policy(
            net.params,
            adapter,
            net.graphdef,
            net.config,
            self.layout,
            self.sampler,
            self.lora_scale,
        )


@contextlib.contextmanager
def error_prefix(field: str) -> Iterator[None]:
    """Put the field at fault in front of an error's message."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{field}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def prepare(config: ConfigDict, workdir: Path | str) -> Run:
    """Check the config, the base model, the prompts and the directory, and load what a run needs.

    All processes of a run call it, and read the same files.

    Raises:
      ValueError, OSError: naming the field, file or line at fault, and the next step; on all
        processes, if on one.
    """
    run = multihost.on_all(lambda: _read(config, Path(workdir)))
    mine = run.fingerprint | {"workdir": str(workdir)}
    first = multihost.on_primary(lambda: mine)
    multihost.on_all(lambda: _refuse_other_settings(first, mine))
    multihost.on_primary(lambda: checkpoint.claim(run.workdir, run.fingerprint))
    return run


def _read(config: ConfigDict, workdir: Path) -> Run:
    """Do all of `prepare` but for the working directory, without the other processes."""
    validate(config, registry.TABLE, jax.device_count(), jax.default_backend())
    registry.validate(config.rewards)
    registry.reach(config.rewards)
    sizes, tokenizer = open_base(config)
    layout, sampler, latent_shape = geometry(config, sizes)
    lists = {
        "train": _prompts(
            config, "train", tokenizer, sizes, config.prompts.prompts_per_epoch // repeats(config)
        ),
        "test": _prompts(config, "test", tokenizer, sizes, 1),
    }
    mesh = sharding.make_mesh(config.mesh)
    base = load_base(config, mesh)
    adapter = _first_adapter(config, base)
    leaves = jax.tree.leaves(adapter)
    identity = {
        "base": base.fingerprint,
        **{f"prompts.{name}": _hash(map(str.encode, lines)) for name, lines in lists.items()},
        **({"lora.init": _hash(leaf.tobytes() for leaf in leaves)} if config.lora.init else {}),
        **{f"config.{field}": value for field, value in flatten(config).items()},
    }
    starts = _window_starts(config, layout, sizes, lists)
    reward_runner = load_rewards(config, mesh)
    return Run(
        config,
        workdir,
        identity | reward_runner.identity,
        base,
        layout,
        sampler,
        mesh,
        latent_shape,
        lists["train"],
        lists["test"],
        adapter,
        starts,
        reward_runner,
    )


def load_rewards(config: ConfigDict, mesh: jax.sharding.Mesh) -> panel.RewardRunner:
    """Return the rewards of a config, their weights on the mesh.

    Raises:
      ValueError, OSError: naming the reward and what is at fault.
    """
    scoring = config.scoring
    if scoring.overlap == "all" and jax.process_count() > 1:
        raise ValueError(
            "config.scoring.overlap is 'all' with several processes, which must start programs in "
            "one order; expected host or none"
        )
    return panel.RewardRunner(
        registry.load(config.rewards, registry.Setting(mesh, config.video.fps)),
        scoring.overlap,
        scoring.weights,
        scoring.timeout,
    )


def _refuse_other_settings(first: dict[str, Any], mine: dict[str, Any]) -> None:
    """Raise ValueError unless the processes were started alike.

    They would compute different things together.
    """
    for name in sorted({*first, *mine}):
        if first.get(name) != mine.get(name):
            raise ValueError(
                f"{name} is {mine.get(name)!r} here and {first.get(name)!r} in process 0; start "
                "all processes alike"
            )


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


def load_base(config: ConfigDict, mesh: sharding.AnyMesh) -> bases.Base:
    """Return the base model of a config, with its parameters on the mesh.

    Raises:
      ValueError, OSError: naming the field and the file at fault.
    """
    with error_prefix(
        "config.base and config.transformer" if config.transformer else "config.base"
    ):
        return bases.load_base(
            config.base,
            size=config.model.size,
            transformer=config.transformer,
            place=functools.partial(_place, mesh),
            **numerics(config),
        )


def _place(mesh: sharding.AnyMesh, part: str, path: tuple, leaf: np.ndarray) -> jax.Array:
    """Place a leaf of the base on the mesh.

    Those of the VAE are whole on every device; the large nets are split over `fsdp`.
    """
    return (
        sharding.replicate(mesh, leaf) if part == "vae" else sharding.shard_param(mesh, path, leaf)
    )


def geometry(
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
    with error_prefix("config.video.frames"):
        frames = sizes["vae"].latent_frames(config.video.frames)
    with error_prefix("config.video.frames and config.model"):
        layout.check_frames(frames)
    last = max(window_starts(config, frames))
    window = config.streaming.window or frames
    with error_prefix("config.loss.mask_block"):
        training_layout(config, layout).check_frames(window)
    return layout, sampler, (last + window, *size)


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


def timeline_of(config: ConfigDict, layout: Layout, prompt: str, frames: int) -> Timeline:
    """Return the timeline of the first `frames` latent frames of a video of `prompt`.

    Where windows are trained, a prompt may be a scene string; elsewhere it is taken literally.
    """
    return scenes.timeline_of(scenes_of(config, layout, prompt), frames, layout, rules_of(config))


def scenes_of(config: ConfigDict, layout: Layout, prompt: str) -> list[scenes.Scene]:
    """Return the scenes of a prompt, see `timeline_of`."""
    if not config.streaming.window:
        return [scenes.Scene(prompt, 0.0, 0, False)]
    parse = scenes.parse_published if config.scenes.published else scenes.parse
    return parse(prompt, layout.block, config.video.fps)


def _window_starts(
    config: ConfigDict,
    layout: Layout,
    sizes: Mapping[str, Any],
    lists: Mapping[str, Sequence[str]],
) -> tuple[int, ...]:
    """Return where windows may begin: in none does a prompt of the training list change.

    Raises ValueError for scenes that cannot be trained on, with the line at fault.
    """
    frames = sizes["vae"].latent_frames(config.video.frames)
    starts = window_starts(config, frames)
    if not config.streaming.window:
        return starts
    with error_prefix("config.eval.frames"):
        shown = sizes["vae"].latent_frames(eval_frames(config))
        layout.check_frames(shown)
    for name, length in (("train", frames), ("test", shown)):
        first = None
        for number, line in enumerate(lists[name], start=1):
            with error_prefix(f"config.prompts.{name}: line {number}"):
                timeline = timeline_of(config, layout, line, length)
                first = first or timeline
                _check_timeline(config, timeline, first, length)
                if name == "train":
                    starts = _without_change(config, starts, timeline)
    return starts


def _check_timeline(config: ConfigDict, timeline: Timeline, first: Timeline, frames: int) -> None:
    """Raise ValueError for a timeline that cannot be sampled with others, such as `first`."""
    streaming = config.streaming
    reencodes = streaming.prefix != "rollout_old" or streaming.recache_on_update
    restarts = any(
        block.change is not None and block.change.keep is not None for block in timeline.blocks
    )
    for broken, fault in (
        (
            timeline.blocks[-1].scene != len(timeline.prompts) - 1,
            f"the {frames} latent frames of a video are over before its last scene; raise "
            "config.video.frames, or for held-out videos config.eval.frames",
        ),
        (
            timeline.changes and (streaming.sampling == "sequence" or streaming.backprop == "full"),
            "its prompt changes; expected streaming.sampling 'clip' and streaming.backprop "
            "'detach'",
        ),
        (
            restarts and reencodes,
            "a flush or a hard cut leaves frames that are not the last ones, whose keys cannot be "
            "made anew; expected scenes.transition 'recache', or streaming.prefix 'rollout_old' "
            "without recache_on_update",
        ),
        (
            _places(timeline) != _places(first),
            f"its prompt changes at the latent frames {timeline.changes}, that of line 1 at "
            f"{first.changes}; flushes and hard cuts must come at the same frames in all lines; or "
            "use scenes.transition 'recache' and no #",
        ),
    ):
        if broken:
            raise ValueError(fault)


def _places(timeline: Timeline) -> list:
    """Return where the blocks stand in the cache, and what it keeps before them."""
    return [
        (block.start, block.positions, block.aligned, block.change and block.change.keep)
        for block in timeline.blocks
    ]


def _without_change(
    config: ConfigDict, starts: tuple[int, ...], timeline: Timeline
) -> tuple[int, ...]:
    """Return those starts from which no prompt of a timeline changes inside of the window."""
    window = config.streaming.window
    changes = timeline.changes
    left = tuple(s for s in starts if not any(s < change < s + window for change in changes))
    if not left or (left != starts and config.streaming.mode == "progressive"):
        raise ValueError(
            f"its prompt changes at the latent frames {changes}, inside of a window of {window} "
            f"from {next(s for s in starts if s not in left)}; let scenes begin where windows do"
        )
    return left


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
            raise ValueError(
                f"config.video.{name} is {video[name]}; this model takes multiples of {step} pixels"
            )
    return net.in_channels, video.height // vae.spatial_stride, video.width // vae.spatial_stride


def _prompts(
    config: ConfigDict, name: str, tokenizer: Any, sizes: dict[str, Any], least: int
) -> tuple[str, ...]:
    """Return the prompts of config.prompts.NAME, at least `least`, each one checked."""
    layout = layout_of(config)

    def check(line: str) -> None:
        for scene in scenes_of(config, layout, line):
            registry.check_prompt(list(config.rewards), scene.prompt)

    def tokens(line: str) -> int:
        return max(
            len(token_ids(tokenizer, scene.prompt)) for scene in scenes_of(config, layout, line)
        )

    with error_prefix(f"config.prompts.{name}"):
        lines = prompts.load(config.prompts[name], tokens, sizes["text_encoder"].text_len, check)
        if len(lines) < least:
            raise ValueError(
                f"{config.prompts[name]} has {len(lines)} prompts, an epoch takes {least} "
                "different ones; add prompts or lower config.prompts.prompts_per_epoch"
            )
    return lines


def _first_adapter(config: ConfigDict, base: bases.Base) -> dict:
    """Return the adapter that every policy starts from: fresh, or from config.lora.init."""
    lora = config.lora
    net = base.transformer.config
    dtype = jnp.dtype(lora.dtype)
    if not lora.init:
        key = jax.random.fold_in(jax.random.key(config.seed), RngStream.ADAPTER)
        return jax.tree.map(np.asarray, init_adapter(net, lora.rank, key, dtype))
    with error_prefix("config.lora.init"):
        adapter, scale = load_lora(lora.init, net, lora.rank, dtype)
        if scale != lora.alpha / lora.rank:
            raise ValueError(
                f"{lora.init} has alpha / rank {scale:g}, config.lora.alpha / rank is "
                f"{lora.alpha / lora.rank:g}; set config.lora.alpha"
            )
    return adapter


def _hash(pieces: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\n".join(pieces)).hexdigest()
