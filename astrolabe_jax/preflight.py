"""Check everything that can be before weights are loaded: all faults in one list."""

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from astrolabe_jax import checkpoint, prompts
from astrolabe_jax.arithmetic import eval_frames, repeats, window_starts
from astrolabe_jax.config import flatten
from astrolabe_jax.config_checks import error_prefix, validate
from astrolabe_jax.convert import base as bases
from astrolabe_jax.convert import hub
from astrolabe_jax.convert.lora import load_lora
from astrolabe_jax.convert.parts import PARTS
from astrolabe_jax.geometry import (
    geometry_of,
    latent_length,
    layout_of,
    open_base,
    rules_of,
    scene_reader,
)
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.rewards import registry
from astrolabe_jax.rollout import Sampler
from astrolabe_jax.runtime import files, multihost
from astrolabe_jax.runtime.progress import counted, log, warn
from astrolabe_jax.streaming import scenes
from astrolabe_jax.types import Timeline

T = TypeVar("T")


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
        faults.found.extend(registry.reach_faults(config.rewards))
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
    fitted = faults.attempt(geometry_of, config, sizes)
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

    Of the files that are missing only the number is in the error, unless one has a name close to
    another.
    """
    log("\n".join([f"files of {config.name}:", *file_rows(config)]))
    missing = {
        (field, str(path))
        for field, path, size in _needed_files(config)
        if size is None and not path.exists() and not str(path).startswith("~")
    }

    def is_told(error: Exception) -> bool:
        told = str(error)
        return "did you mean" not in told and any(
            told.startswith(field.partition(",")[0]) and path in told for field, path in missing
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
        state = "not what is needed" if path.exists() else "missing"
        missing = f"{state}; {source}" if source else state
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
            with contextlib.suppress(ValueError):
                path = bases.place_of(given)
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
            path = files.local_directory(text)
            found = [path] if path.is_file() else path.rglob("*")
            size = sum(file.stat().st_size for file in found if file.is_file())
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


@error_prefix("config.lora.init")
def _given_adapter(config: ConfigDict, net: Any) -> dict | None:
    """Return the adapter of config.lora.init; None where it is empty."""
    lora = config.lora
    if not lora.init:
        return None
    adapter, scale = load_lora(lora.init, net, lora.rank, jnp.dtype(lora.dtype))
    if scale <= 0:
        advice = (
            f"merge it into the base first (convert merge BASE {lora.init} --to FILE), and train "
            "on that (config.transformer)"
            if scale
            else "it changes nothing, so leave config.lora.init out, or give another adapter"
        )
        raise ValueError(
            f"{lora.init} has alpha / rank {scale:g}; expected a positive one, as that of "
            f"config.lora: {advice}"
        )
    if not math.isclose(scale, lora.alpha / lora.rank):
        raise ValueError(
            f"{lora.init} has alpha / rank {scale:g}, config.lora.alpha / rank is "
            f"{lora.alpha / lora.rank:g}; set config.lora.alpha to {scale * lora.rank!r}"
        )
    return adapter


def _hash(pieces: Iterable[bytes]) -> str:
    return hashlib.sha256(b"\n".join(pieces)).hexdigest()
