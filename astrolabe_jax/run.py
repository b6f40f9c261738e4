"""From a config and a directory to a run: everything is read and checked before compilation."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from astrolabe_jax import checkpoint, prompts, sharding
from astrolabe_jax.config import eval_frames, flatten, repeats, window_starts
from astrolabe_jax.config_checks import validate
from astrolabe_jax.convert import base as bases
from astrolabe_jax.convert import hub
from astrolabe_jax.convert.lora import load_lora
from astrolabe_jax.convert.parts import PARTS
from astrolabe_jax.models.lora import init_adapter
from astrolabe_jax.models.tokenizer import load_tokenizer
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.models.wan.vae import VaeConfig
from astrolabe_jax.rewards import panel, registry
from astrolabe_jax.rollout import Sampler
from astrolabe_jax.runtime import files, multihost
from astrolabe_jax.runtime.progress import counted, log, warn
from astrolabe_jax.schedule import Schedule, warp
from astrolabe_jax.streaming import scenes
from astrolabe_jax.types import Policy, RngStream, Timeline
from astrolabe_jax.update import training_layout

T = TypeVar("T")


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
    with error_prefix("workdir"):
        directory = multihost.on_all(lambda: files.local_directory(workdir))
    run = multihost.on_all(lambda: _read(config, directory))
    multihost.refuse_differences(run.fingerprint | {"workdir": str(workdir)})
    holder = multihost.on_primary(lambda: checkpoint.claim(run.workdir, run.fingerprint))
    multihost.on_all(lambda: checkpoint.check_shared(run.workdir, holder))
    return run


class Checked(NamedTuple):
    """What is known of a run before anything is loaded."""

    sizes: dict[str, Any]  # of the nets
    layout: Layout
    sampler: Sampler
    latent_shape: tuple[int, int, int, int]
    prompts: dict[str, tuple[str, ...]]  # train, test
    starts: tuple[int, ...]
    adapter: dict | None  # of config.lora.init
    fingerprint: dict[str, Any]  # without the hashes of weights


class Faults:
    """Collects the errors of checks that go on after each other's."""

    def __init__(self):
        self.found: list[ValueError | OSError] = []

    def attempt(self, action: Callable[..., T], *arguments: Any) -> T | None:
        """Return what `action` returns; None if it raises a ValueError or OSError, which is
        kept.
        """
        try:
            return action(*arguments)
        except (ValueError, OSError) as error:
            self.found.append(error)

    def refuse(self) -> None:
        """Raise the error that there was, or one ValueError that lists them."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            lines = (str(error).replace("\n", "\n  ") for error in self.found)
            raise ValueError("\n  ".join([f"{len(self.found)} things are wrong:", *lines]))


def check(config: ConfigDict, workdir: Path) -> Checked:
    """Check everything that can be before weights are loaded.

    Raises:
      ValueError, OSError: with all faults, each naming the field, file or line.
    """
    faults = Faults()
    checked = _check(config, workdir, faults)
    faults.refuse()
    assert checked, "what was not checked has a fault"
    return checked


def _check(config: ConfigDict, workdir: Path, faults: Faults) -> Checked | None:
    """Do what `check` does, and leave the faults in `faults`."""
    faults.attempt(validate, config, registry.TABLE, jax.device_count(), jax.default_backend())
    sensible = not faults.found
    if sensible:
        faults.attempt(registry.validate, config.rewards)
    rewards_fit = not faults.found
    for line in registry.directory_faults(config.rewards):
        faults.found.append(ValueError(line))
    if rewards_fit:
        faults.attempt(registry.reach, config.rewards)
    opened = faults.attempt(open_base, config) if sensible else None
    checked = opened and _check_model(config, *opened, faults)
    told = ("config.rewards", "config.base") if sensible else ("config.rewards",)
    for field, path, size in [] if opened else _needed_files(config):
        if size is None and not field.startswith(told):
            faults.found.append(FileNotFoundError(f"{field}: no {path}"))
    fingerprint = checked.fingerprint if checked else {}
    faults.attempt(checkpoint.check_workdir, workdir, fingerprint)
    return checked


def _check_model(
    config: ConfigDict, sizes: dict[str, Any], tokenizer: Any, faults: Faults
) -> Checked | None:
    """Check the weights' headers, the adapter, the geometry and the prompts."""
    for part in sizes:
        faults.attempt(_check_weights, config, part, sizes[part])
    adapter = faults.attempt(_given_adapter, config, sizes["transformer"])
    least = {
        "train": config.prompts.prompts_per_epoch // repeats(config),
        "test": 1,
    }
    lists = {
        name: faults.attempt(_prompts, config, name, tokenizer, sizes, count)
        for name, count in least.items()
    }
    fitted = faults.attempt(geometry, config, sizes)
    found = {name: lines for name, lines in lists.items() if lines is not None}
    if not fitted or len(found) < len(lists):
        return None
    _warn_of_overlap(found)
    starts = faults.attempt(_window_starts, config, fitted[0], sizes, found)
    leaves = jax.tree.leaves(adapter)
    fingerprint = {
        **{f"prompts.{name}": _hash(map(str.encode, lines)) for name, lines in found.items()},
        **({"lora.init": _hash(leaf.tobytes() for leaf in leaves)} if config.lora.init else {}),
        **{f"config.{field}": value for field, value in flatten(config).items()},
    }
    return Checked(sizes, *fitted, found, starts or (), adapter, fingerprint)


def tell(config: ConfigDict, workdir: str) -> None:
    """Print the files of a run, and that nothing is wrong; raise what `check` does.

    Of the files that are missing only the number is in the error.
    """
    log("\n".join([f"files of {config.name}:", *file_rows(config)]))
    missing = {(field, str(path)) for field, path, size in _needed_files(config) if size is None}

    def is_told(error: Exception) -> bool:
        return any(
            str(error).startswith(field.partition(",")[0]) and path in str(error)
            for field, path in missing
        )

    def refuse() -> None:
        faults = Faults()
        with error_prefix("workdir"):
            directory = files.local_directory(workdir)
        _check(config, directory, faults)
        others = [error for error in faults.found if not is_told(error)]
        if len(others) < len(faults.found):
            count = counted(len({path for _, path in missing}), "path")
            others.append(FileNotFoundError(f"missing: {count}, see the list above"))
        faults.found = others
        faults.refuse()

    multihost.on_all(refuse)
    log("nothing is missing or wrong, as far as can be told before weights are read")


def file_rows(config: ConfigDict) -> list[str]:
    """Return a line for each file or directory that a run needs: field, path, and size, or how to
    get what is missing.
    """
    rows = []
    for field, path, size in _needed_files(config):
        source = hub.where(str(path))
        missing = f"missing; {source}" if source else "missing"
        state = missing if size is None else f"{size / 2**20:,.1f} MiB"
        rows.append(f"  {field:32} {path}: {state}")
    return rows


def where_to_get(config: ConfigDict, error: Exception) -> str:
    """Return what to add to an error about the base: how to get its files, if any are missing."""
    missing = any(size is None for *_, size in _needed_files(config))
    if not missing or not str(error).startswith(("config.base", "config.transformer")):
        return ""
    return (
        "; `python -m astrolabe_jax.main --config=... --workdir=... --check` prints all files of a "
        "recipe, and where those that are missing are published"
    )


def _needed_files(config: ConfigDict) -> Iterator[tuple[str, Path, int | None]]:
    """Yield field, path and bytes of what a run needs; None bytes for what is not there."""
    for part in PARTS if config.base.strip() else ():
        field, given = _weights_given(config, part)
        try:
            path = bases.weights_of(given, part)
            size = sum(file.stat().st_size for file in bases.files_of(path))
        except (OSError, ValueError):
            path = Path(given)
            size = None
        yield f"{field}, {part}", path, size
    named = {
        "config.lora.init": config.lora.init,
        **{f"config.prompts.{name}": config.prompts[name] for name in ("train", "test")},
        **{
            f"config.rewards.{name}": str(registry.options(value).get("path", ""))
            for name, value in config.rewards.items()
        },
    }
    for field, text in named.items():
        if text and not text.startswith(prompts.WORLD_PREFIX):
            path = Path(text)
            files = [path] if path.is_file() else path.rglob("*")
            size = sum(file.stat().st_size for file in files if file.is_file())
            yield field, path, size if path.exists() else None


def _weights_given(config: ConfigDict, part: str) -> tuple[str, str]:
    """Return the field that names the weights of a part of the base, and its value."""
    own = part == "transformer" and config.transformer
    return ("config.transformer", own) if own else ("config.base", config.base)


def _check_weights(config: ConfigDict, part: str, net: Any) -> None:
    """Raise for weights of a part that are not there, or of another net, by their header."""
    field, given = _weights_given(config, part)
    with error_prefix(field):
        bases.check_net(part, bases.weights_of(given, part), net)


def _read(config: ConfigDict, workdir: Path) -> Run:
    """Do all of `prepare` but for the working directory, without the other processes."""
    checked = check(config, workdir)
    mesh = sharding.make_mesh(config.mesh)
    base = load_base(config, mesh)
    adapter = checked.adapter or _fresh_adapter(config, base.transformer.config)
    reward_runner = load_rewards(config, mesh)
    return Run(
        config,
        workdir,
        {"base": base.fingerprint} | checked.fingerprint | reward_runner.identity,
        base,
        checked.layout,
        checked.sampler,
        mesh,
        checked.latent_shape,
        checked.prompts["train"],
        checked.prompts["test"],
        adapter,
        checked.starts,
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


def load_base(
    config: ConfigDict,
    mesh: sharding.AnyMesh,
    change: bases.PlaceLeaf | None = None,
) -> bases.Base:
    """Return the base model of a config, with its parameters on the mesh.

    `change` may change each leaf of a part before it is placed.

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
            place=lambda part, path, leaf: _place(
                config, mesh, part, path, change(part, path, leaf) if change else leaf
            ),
            **numerics(config),
        )


def _place(
    config: ConfigDict, mesh: sharding.AnyMesh, part: str, path: tuple, leaf: np.ndarray
) -> jax.Array:
    """Place a leaf of the base on the mesh.

    Those of the VAE are whole on every device; the large nets are split over `fsdp`.
    """
    if part == "vae":
        return sharding.replicate(mesh, leaf)
    placed = sharding.shard_param(mesh, path, leaf)
    away = part == "text_encoder" and encoder_on_host(config)
    return sharding.moved_to_host(placed) if away else placed


def encoder_on_host(config: ConfigDict) -> bool:
    """Return whether the text encoder is on the devices only while it encodes."""
    place = config.prompts.encoder
    return place == "host" or (place == "auto" and jax.default_backend() != "cpu")


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


def timeline_of(run: Run, prompt: str, frames: int) -> Timeline:
    """Return the timeline of the first `frames` latent frames of a video of `prompt`.

    Where windows are trained, a prompt may have scenes; elsewhere it is taken literally.
    """
    read = scene_reader(run.config, run.layout, run.base.vae.config)
    return scenes.timeline_of(read(prompt), frames, run.layout, rules_of(run.config))


def scene_reader(
    config: ConfigDict, layout: Layout, vae: VaeConfig
) -> Callable[[str], list[scenes.Scene]]:
    """Return what gives the scenes of a prompt of a training, see `timeline_of`."""
    if not config.streaming.window:
        return lambda prompt: [scenes.literal(prompt)]
    rules = rules_of(config)
    fps = config.video.fps
    return lambda prompt: scenes.read(prompt, layout, rules, fps, vae.temporal_stride)


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
    shown = latent_length("config.eval.frames", eval_frames(config), layout, sizes["vae"])
    read = scene_reader(config, layout, sizes["vae"])
    for name, length in (("train", frames), ("test", shown)):
        first = None
        seen = set()  # lengths and cuts of scenes, which are all that timelines depend on
        for number, line in enumerate(lists[name], start=1):
            shape = () if scenes.is_plain(line) else tuple(scene[1:] for scene in read(line))
            if shape in seen:
                continue
            seen.add(shape)
            with error_prefix(f"config.prompts.{name}: line {number}"):
                timeline = scenes.timeline_of(read(line), length, layout, rules_of(config))
                first = first or timeline
                _check_timeline(config, timeline, first, sizes["vae"].pixel_frames(length))
                if name == "train":
                    starts = _without_change(config, starts, timeline)
    return starts


def _check_timeline(config: ConfigDict, timeline: Timeline, first: Timeline, frames: int) -> None:
    """Raise ValueError for a timeline that cannot be sampled with others, such as `first`.

    frames: pixel frames of the video.
    """
    streaming = config.streaming
    reencodes = streaming.prefix != "rollout_old" or streaming.recache_on_update
    restarts = any(
        block.change is not None and block.change.keep is not None for block in timeline.blocks
    )
    for broken, fault in (
        (
            timeline.blocks[-1].scene != len(timeline.prompts) - 1,
            f"the {frames} frames of a video are over before its last scene; raise "
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
            below = video[name] // step * step
            fits = [str(size) for size in (below, below + step) if size]
            raise ValueError(
                f"config.video.{name} is {video[name]}; this model takes multiples of {step} "
                f"pixels, {' or '.join(fits)}"
            )
    return net.in_channels, video.height // vae.spatial_stride, video.width // vae.spatial_stride


def _prompts(
    config: ConfigDict, name: str, tokenizer: Any, sizes: dict[str, Any], least: int
) -> tuple[str, ...]:
    """Return the prompts of config.prompts.NAME, at least `least`.

    Process 0 checks each one: of a list of millions that takes seconds.
    """
    source = config.prompts[name]
    with error_prefix(f"config.prompts.{name}"):
        lines = prompts.load(source, config.prompts.switch_frames)
        if len(lines) < least:
            raise ValueError(
                f"{source} has {counted(len(lines), 'prompt')}, an epoch takes {least} "
                "different ones; add prompts or lower config.prompts.prompts_per_epoch"
            )
        if jax.process_index() == 0:
            read = scene_reader(config, layout_of(config), sizes["vae"])
            prompts.check(
                source,
                lines,
                lambda line: [scene.prompt for scene in read(line)],
                tokenizer,
                sizes["text_encoder"].text_len,
                registry.prompt_check(config.rewards),
            )
            _log_scenes(config, source, lines)
    return lines


def _log_scenes(config: ConfigDict, source: str, lines: Sequence[str]) -> None:
    """Log how many prompts have scenes, or would have them where scenes are read."""
    count = sum(not scenes.is_plain(line) for line in lines)
    if not count:
        return
    if config.streaming.window:
        log(f"{source}: {count} of {len(lines)} prompts have scenes")
    else:
        warn(
            f"{source}: {count} of {len(lines)} prompts have a | or a duration, which is "
            "text where whole videos are trained, and a scene string to sample; write \\| and \\[ "
            "where it is text"
        )


def _warn_of_overlap(lists: Mapping[str, Sequence[str]]) -> None:
    """Log a warning if held-out prompts are trained on."""
    if jax.process_index():
        return
    trained = set(lists["train"])
    both = [prompt for prompt in lists["test"] if prompt in trained]
    if both:
        warn(
            f"config.prompts.test: {len(both)} of {len(lists['test'])} held-out prompts "
            f"are training prompts, {both[0][:60]!r} first; their scores do not tell how the "
            "policy does on new ones"
        )


def _fresh_adapter(config: ConfigDict, net: Any) -> dict:
    """Return the adapter that every policy starts from where none is given."""
    key = jax.random.fold_in(jax.random.key(config.seed), RngStream.ADAPTER)
    adapter = init_adapter(net, config.lora.rank, key, jnp.dtype(config.lora.dtype))
    return jax.tree.map(np.asarray, adapter)


@error_prefix("config.lora.init")
def _given_adapter(config: ConfigDict, net: Any) -> dict | None:
    """Return the adapter of config.lora.init; None where it is empty."""
    lora = config.lora
    if not lora.init:
        return None
    adapter, scale = load_lora(lora.init, net, lora.rank, jnp.dtype(lora.dtype))
    if scale != lora.alpha / lora.rank:
        raise ValueError(
            f"{lora.init} has alpha / rank {scale:g}, config.lora.alpha / rank is "
            f"{lora.alpha / lora.rank:g}; set config.lora.alpha to {scale * lora.rank:g}"
        )
    return adapter


def _hash(pieces: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\n".join(pieces)).hexdigest()
