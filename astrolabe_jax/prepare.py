"""From a config and a directory to a run: everything is read and checked here, before anything is
compiled.
"""

import contextlib
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from astrolabe_jax import checkpoint, prompts, sharding
from astrolabe_jax.config import eval_frames, flatten, repeats, validate, window_starts
from astrolabe_jax.convert import base as bases
from astrolabe_jax.convert.base import Base
from astrolabe_jax.convert.lora import load_lora
from astrolabe_jax.models.lora import init_adapter
from astrolabe_jax.models.tokenizer import load_tokenizer, token_ids
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.rewards.panel import RewardRunner
from astrolabe_jax.rollout import Sampler
from astrolabe_jax.runtime import multihost
from astrolabe_jax.schedule import Schedule, warp
from astrolabe_jax.streaming import scenes
from astrolabe_jax.streaming.scenes import Rules, Story
from astrolabe_jax.types import Purpose
from astrolabe_jax.update import training_layout


class Run(NamedTuple):
    """What stays the same from the first epoch to the last."""

    config: ConfigDict
    workdir: Path
    identity: dict[str, Any]  # what makes two runs the same, see checkpoint.claim
    base: Base  # with its parameters on the mesh
    layout: Layout
    sampler: Sampler
    mesh: Mesh
    latent_shape: tuple[int, int, int, int]  # F, C, H, W
    train_prompts: tuple[str, ...]
    test_prompts: tuple[str, ...]
    adapter: dict  # of every policy before the first epoch; on the host
    # latent frames at which a trained window may begin; () where whole videos are trained
    starts: tuple[int, ...]
    panel: RewardRunner  # the rewards, ready to score

    @property
    def lora_scale(self) -> float:
        """alpha / R."""
        return self.config.lora.alpha / self.config.lora.rank


def prepare(config: ConfigDict, workdir: Path | str) -> Run:
    """Checks the config, the base model, the prompts and the working directory, and loads what a
    run needs.

    All processes of a run call it, and read the same files. Raises ValueError or OSError whose
    message names the field, file or line at fault, and the next step; on all processes, if on one.
    """
    run = multihost.together(lambda: _read(config, Path(workdir)))
    mine = run.identity | {"workdir": str(workdir)}
    first = multihost.by_first(lambda: mine)
    multihost.together(lambda: _refuse_other_settings(first, mine))
    multihost.by_first(lambda: checkpoint.claim(run.workdir, run.identity))
    return run


def _read(config: ConfigDict, workdir: Path) -> Run:
    """All of `prepare` but for the working directory; without the other processes."""
    validate(config, rewards.TABLE, jax.device_count(), jax.default_backend())
    rewards.validate(config.rewards)
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
    identity = {"base": base.fingerprint}
    identity |= {
        f"prompts.{name}": _hash(line.encode() for line in lines) for name, lines in lists.items()
    }
    if config.lora.init:
        identity["lora.init"] = _hash(leaf.tobytes() for leaf in jax.tree.leaves(adapter))
    identity |= {f"config.{field}": value for field, value in flatten(config).items()}
    starts = _window_starts(config, layout, sizes, lists)
    train, test = lists["train"], lists["test"]
    panel = load_panel(config, mesh)
    identity |= panel.identity
    return Run(
        config,
        workdir,
        identity,
        base,
        layout,
        sampler,
        mesh,
        latent_shape,
        train,
        test,
        adapter,
        starts,
        panel,
    )


def load_panel(config: ConfigDict, mesh: Mesh) -> RewardRunner:
    """The rewards of a config, their weights on the mesh. Raises ValueError or OSError."""
    scoring = config.scoring
    if scoring.overlap == "all" and jax.process_count() > 1:
        raise ValueError(
            "config.scoring.overlap is 'all' with several processes, which must start programs in "
            "one order; expected host or none"
        )
    loaded = rewards.load(config.rewards, rewards.Setting(mesh, config.video.fps))
    return RewardRunner(loaded, scoring.overlap, scoring.weights, scoring.timeout)


def _refuse_other_settings(first: dict[str, Any], mine: dict[str, Any]) -> None:
    """ValueError unless the processes were started alike: they would compute different things
    together.
    """
    for name in sorted({*first, *mine}):
        if first.get(name) != mine.get(name):
            raise ValueError(
                f"{name} is {mine.get(name)!r} here and {first.get(name)!r} in process 0; start "
                "all processes alike"
            )


def numerics(config: ConfigDict) -> dict[str, Any]:
    """What a run chooses about nets whose sizes are given: the keywords of bases.configs."""
    return {name: config.model[name] for name in ("dtype", "param_dtype", "remat", "attention")}


def open_base(config: ConfigDict) -> tuple[dict[str, Any], Any]:
    """The sizes of the nets of config.base (bases.configs) and its tokenizer; no weights are
    read.
    """
    with blame("config.base"):
        sizes = bases.configs(config.base, config.model.size, **numerics(config))
        return sizes, load_tokenizer(bases.tokenizer_of(config.base))


def load_base(config: ConfigDict, mesh: Mesh) -> Base:
    """The base model of a config, with its parameters on the mesh. Raises ValueError or OSError."""
    with blame("config.base and config.transformer" if config.transformer else "config.base"):
        return bases.load_base(
            config.base,
            size=config.model.size,
            transformer=config.transformer,
            place=functools.partial(_place, mesh),
            **numerics(config),
        )


def _place(mesh: Mesh, part: str, path: tuple, leaf: np.ndarray) -> jax.Array:
    """A leaf of the base on the mesh: those of the VAE whole on every device, the large nets split
    over `fsdp`.
    """
    if part == "vae":
        return sharding.replicate(mesh, leaf)
    return sharding.shard_param(mesh, path, leaf)


def geometry(
    config: ConfigDict, sizes: Mapping[str, Any]
) -> tuple[Layout, Sampler, tuple[int, int, int, int]]:
    """Blocks, denoising steps and the shape (F, C, H, W) of sampled latents for nets of these sizes
    (bases.configs).

    Raises ValueError, naming the fields, where they do not fit each other.
    """
    layout, sampler, size = layout_of(config), sampler_of(config), latent_size(config, sizes)
    with blame("config.video.frames"):
        frames = sizes["vae"].latent_frames(config.video.frames)
    with blame("config.video.frames and config.model"):
        layout.check_frames(frames)
    last = max(window_starts(config, frames), default=None)
    with blame("config.loss.mask_block"):
        training_layout(config, layout).check_frames(config.streaming.window or frames)
    return layout, sampler, (frames if last is None else last + config.streaming.window, *size)


def layout_of(config: ConfigDict) -> Layout:
    """Blocks, window and sink."""
    model = config.model
    with blame("config.model"):
        return Layout(
            model.block,
            model.window,
            model.sink,
            model.positions,
            model.independent_first_frame,
            model.max_global,
            model.faithful_sinks,
        )


def sampler_of(config: ConfigDict) -> Sampler:
    """The denoising steps."""
    settings = config.sampler
    schedule = Schedule(shift=settings.shift)
    steps = tuple(float(t) for t in settings.steps)
    with blame("config.sampler"):
        steps = warp(steps, schedule) if settings.warp else steps
        return Sampler(steps, None, settings.context_noise, schedule, settings.sigma_source)


def rules_of(config: ConfigDict) -> Rules:
    """How scenes follow each other."""
    scenes = config.scenes
    return Rules(scenes.transition, scenes.cut, scenes.global_sink, scenes.published)


def story_of(config: ConfigDict, layout: Layout, prompt: str, frames: int) -> Story:
    """What a prompt tells in the first `frames` latent frames of a long video."""
    return scenes.story(prompt, frames, layout, rules_of(config), config.video.fps)


def _window_starts(
    config: ConfigDict, layout: Layout, sizes: Mapping[str, Any], lists: Mapping[str, Sequence[str]]
) -> tuple[int, ...]:
    """Where windows may begin: nowhere does a prompt of the training list change inside of one
    (streaming.md 9).

    Raises ValueError for scenes that cannot be trained on, with the line at fault.
    """
    frames = sizes["vae"].latent_frames(config.video.frames)
    starts = window_starts(config, frames)
    if not starts:
        return ()
    with blame("config.eval.frames"):
        shown = sizes["vae"].latent_frames(eval_frames(config))
        layout.check_frames(shown)
    for name, length in (("train", frames), ("test", shown)):
        first = None
        for number, line in enumerate(lists[name], start=1):
            with blame(f"config.prompts.{name}: line {number}"):
                told = story_of(config, layout, line, length)
                first = first or told
                _check_story(config, told, first, length)
                if name == "train":
                    starts = _without_change(config, starts, told)
    return starts


def _check_story(config: ConfigDict, told: Story, first: Story, frames: int) -> None:
    """ValueError for a story that streams cannot tell together with others, such as that of the
    first line.
    """
    streaming = config.streaming
    if told.steps[-1].scene != len(told.prompts) - 1:
        raise ValueError(
            f"the {frames} latent frames of a video are over before its last scene; raise "
            "config.video.frames, or for held-out videos config.eval.frames"
        )
    if told.changes and (streaming.sampling == "sequence" or streaming.backprop == "full"):
        raise ValueError(
            "its prompt changes; expected streaming.sampling 'clip' and streaming.backprop 'detach'"
        )
    if any(step.change and step.change.keep is not None for step in told.steps) and (
        streaming.prefix != "rollout_old" or streaming.recache_on_update
    ):
        raise ValueError(
            "a flush or a hard cut leaves frames that are not the last ones, whose keys cannot be "
            "made anew; expected scenes.transition 'recache', or streaming.prefix 'rollout_old' "
            "without recache_on_update"
        )
    if _places(told) != _places(first):
        raise ValueError(
            f"its prompt changes at the latent frames {told.changes}, that of line 1 at "
            f"{first.changes}; flushes and hard cuts must come at the same frames in all lines; or "
            "use scenes.transition 'recache' and no #"
        )


def _places(told: Story) -> list:
    """Where the blocks stand in the cache, and what it keeps before them: alike for all that is
    sampled together.
    """
    keeps = [step.change and step.change.keep for step in told.steps]
    return [
        (step.start, step.positions, step.aligned, keep)
        for step, keep in zip(told.steps, keeps, strict=True)
    ]


def _without_change(config: ConfigDict, starts: tuple[int, ...], told: Story) -> tuple[int, ...]:
    window = config.streaming.window
    left = tuple(s for s in starts if not any(s < change < s + window for change in told.changes))
    if not left or (left != starts and config.streaming.mode == "progressive"):
        raise ValueError(
            f"its prompt changes at the latent frames {told.changes}, inside of a window of "
            f"{window} from {next(s for s in starts if s not in left)}; let scenes begin where "
            "windows do"
        )
    return left


def latent_size(config: ConfigDict, sizes: Mapping[str, Any]) -> tuple[int, int, int]:
    """(C, H, W) of a latent frame; refuses heights and widths that the VAE or the patches do not
    divide.
    """
    video, vae, net = config.video, sizes["vae"], sizes["transformer"]
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
    def parts(line: str) -> Sequence[str]:
        """The prompts of a line, which has scenes where windows of long videos are trained."""
        return (
            story_of(config, layout_of(config), line, 1).prompts
            if config.streaming.window
            else (line,)
        )

    def check(line: str) -> None:
        for part in parts(line):
            rewards.check_prompt(list(config.rewards), part)

    def tokens(line: str) -> int:
        return max(len(token_ids(tokenizer, part)) for part in parts(line))

    with blame(f"config.prompts.{name}"):
        lines = prompts.load(config.prompts[name], tokens, sizes["text_encoder"].text_len, check)
        if len(lines) < least:
            raise ValueError(
                f"{config.prompts[name]} has {len(lines)} prompts, an epoch takes {least} "
                "different ones; add prompts or lower config.prompts.prompts_per_epoch"
            )
    return lines


def _first_adapter(config: ConfigDict, base: Base) -> dict:
    """The adapter that every policy starts from: fresh, or read from config.lora.init."""
    lora, net = config.lora, base.transformer.config
    dtype = jnp.dtype(lora.dtype)
    if not lora.init:
        key = jax.random.fold_in(jax.random.key(config.seed), Purpose.ADAPTER)
        return jax.tree.map(np.asarray, init_adapter(net, lora.rank, key, dtype))
    with blame("config.lora.init"):
        adapter, scale = load_lora(lora.init, net, lora.rank, dtype)
        if scale != lora.alpha / lora.rank:
            raise ValueError(
                f"{lora.init} has alpha / rank {scale:g}, config.lora.alpha / rank is "
                f"{lora.alpha / lora.rank:g}; set config.lora.alpha"
            )
    return adapter


def _hash(pieces: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\n".join(pieces)).hexdigest()


@contextlib.contextmanager
def blame(field: str) -> Iterator[None]:
    """Puts the field at fault in front of an error's message."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{field}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None
