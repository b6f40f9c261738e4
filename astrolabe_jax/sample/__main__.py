"""Makes videos from prompts.

    python -m astrolabe_jax.sample --config=configs/krea14b.py --prompt="a cat" --output_dir=out
    python -m astrolabe_jax.sample --config=configs/longlive.py --prompt_file=prompts.txt \\
        --lora=runs/longlive/lora --output_dir=out --frames=957 --config.model.positions=relative

A prompt may be a list of scenes, "a cat[5s] | a dog[10s#]" (docs/sampling.md, Scene strings). A
file holds one prompt a line, or, named .jsonl, one object a line, {"prompt": ...} or {"prompts":
[...], "switch_frames": [...]}, with the latent frames where its prompts change.

OUTPUT_DIR/videos/00000.mp4     the video of prompt 0; meanwhile 00000.partial.mp4 can be watched
OUTPUT_DIR/results.jsonl        one line a video: prompt, scenes, seed, length, path, and scores if
                                asked for, whose means are in average_scores.json
OUTPUT_DIR/results.lock         who writes there now

The same command goes on where it was stopped: videos that are there and were made with the same
settings stay. A directory with other results is refused, unless --overwrite is given.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from astrolabe_jax import geometry, preflight
from astrolabe_jax import run as runs
from astrolabe_jax.config_checks import error_prefix, validate_sampling
from astrolabe_jax.convert import lora, parts
from astrolabe_jax.plan import naming_memory
from astrolabe_jax.runtime import cli, files, multihost
from astrolabe_jax.runtime.preemption import Stopped, listening
from astrolabe_jax.runtime.progress import counted, log
from astrolabe_jax.sample import videos
from astrolabe_jax.sample.requests import Limits, Request, read_given, read_requests
from astrolabe_jax.streaming.scenes import is_plain

SAMPLING = ("base", "cache", "frames")  # what of report.memory is held here


def prepare(options: Mapping[str, Any]) -> tuple[runs.Run, np.ndarray | None, list[Request]]:
    """Check what is asked for, then load the run.

    Returns:
      the run, the latents that begin every video, if any, and the requests.

    Raises:
      ValueError, OSError, FloatingPointError: before anything is compiled; what costs most is done
        last.
    """
    config = options["config"]
    for flag in ("output_dir", "lora", "prompt_file"):
        if options[flag] == "":
            raise ValueError(f"--{flag} is empty; expected a path")
    validate_sampling(config, jax.device_count(), jax.default_backend())
    if config.prompts.encoder == "auto":
        config.prompts.encoder = "device"  # it would come for every batch and every shot
    sizes, tokenizer = geometry.open_base(config)
    layout = geometry.layout_of(config)
    given = read_given(
        {name: options[name] for name in ("image", "video", "latents")},
        config,
        layout,
        sizes["vae"],
        geometry.latent_size(config, sizes),
    )
    requests = read_requests(
        config,
        options,
        Limits(
            layout,
            geometry.rules_of(config),
            sizes["vae"],
            given,
            tokenizer,
            sizes["text_encoder"].text_len,
        ),
    )
    adapter = None
    if path := options["lora"]:
        with error_prefix("--lora"):
            changes = lora.read_changes(path, sizes["transformer"])
        change = _blaming_lora(lora.leaf_changer(changes, sizes["transformer"]))
        adapter = (change, lora.fingerprint(path))
    directory = files.local_directory(options["output_dir"])
    videos.check_places(directory, [request.name for request in requests])
    if not options["overwrite"]:
        settings = videos.settings(config, adapter, given)
        keys = {request.name: videos.settings_key(settings, request) for request in requests}
        videos.refuse_others(directory, "settings", keys)
    claim(directory)
    run = videos.load(config, adapter, given, directory, score=options["score"])
    if not options["overwrite"]:
        keys = {request.name: videos.key_of(run, request) for request in requests}
        videos.refuse_others(directory, "key", keys)
    return run, videos.given_latents(run, given), requests


def _blaming_lora(change: parts.PlaceLeaf) -> parts.PlaceLeaf:
    """Return `change`, whose faults are of --lora, not of the base to which it is added.

    They are FloatingPointErrors, before which no other name is put.
    """

    def changed(part: str, where: tuple, leaf: np.ndarray) -> Any:
        try:
            return change(part, where, leaf)
        except ValueError as error:
            raise FloatingPointError(f"--lora: {error}") from None

    return changed


def claim(directory: Path) -> None:
    """Make the directory of the results, for this process alone until it ends.

    Raises:
      ValueError, OSError: if another process writes there, or it cannot be written.
    """
    try:
        (directory / videos.VIDEOS).mkdir(parents=True, exist_ok=True)
        files.lock(directory / videos.LOCK)
    except OSError as error:
        raise OSError(
            f"--output_dir {directory} cannot be written ({error.strerror}); give another"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"--output_dir {directory} {error}; wait for its end, or give another --output_dir"
        ) from None


def main(given: Mapping[str, flags.FlagHolder]) -> None:
    """Make the videos.

    Exits with status 2 for what cannot be done, before anything is compiled, and with 1 for what
    goes wrong later; one message each.
    """
    cli.set_up()
    options = {name: flag.value for name, flag in given.items()}
    try:
        with naming_memory(options["config"], SAMPLING):
            run, latents, requests = prepare(options)
    except (ValueError, OSError, FloatingPointError) as error:
        cli.fail(f"{error}{preflight.where_to_get(options['config'], error)}", 2)
    log(_opening(run, requests))
    with jax.set_mesh(run.mesh), listening() as check:
        try:
            with naming_memory(options["config"], SAMPLING):
                videos.sample(run, latents, requests, check)
        # a reward, a full disk, a broken adapter
        except (ValueError, OSError, FloatingPointError) as error:
            cli.fail(error, 1)
        except Stopped as stopped:
            log(
                f"{stopped}: the videos that are done are in {run.workdir}; run the same command "
                "to go on"
            )


def _opening(run: runs.Run, requests: list[Request]) -> str:
    """Return the line about what will be made."""
    config = run.config
    lengths = sorted({request.frames for request in requests})
    shortest = f"{lengths[0]} to " if len(lengths) > 1 else ""
    net = run.base.transformer.config
    texts = {request.index: request.prompt for request in requests}.values()
    scenes = sum(not is_plain(text) for text in texts)
    strings = f", {scenes} of {counted(len(texts), 'prompt')} with scenes" if scenes else ""
    return (
        f"{counted(len(requests), 'video')} of {shortest}{counted(lengths[-1], 'frame')} "
        f"({lengths[-1] / config.video.fps:.2f} s{strings}) of "
        f"{config.video.height}x{config.video.width}, at most "
        f"{videos.batch_size(run, len(requests))} at once, on {run.mesh.size} x "
        f"{jax.devices()[0].device_kind}; {net.num_layers} layers of {net.dim}, seed {config.seed}"
    )


if __name__ == "__main__":
    text = flags.DEFINE_string
    flag_holders = {
        "config": cli.define(),
        "prompt": text("prompt", None, "one prompt, or scenes: 'a cat[5s] | a dog[10s#]'"),
        "prompt_file": text(
            "prompt_file",
            None,
            "one prompt a line; .jsonl: prompt, or prompts and switch_frames; world:NAME/SPLIT",
        ),
        "switch_frames": flags.DEFINE_list(
            "switch_frames",
            None,
            "latent frames where the prompts of a line of a .jsonl change that has none: 40,80",
        ),
        "output_dir": text("output_dir", None, "where videos/ and results.jsonl go", required=True),
        "overwrite": flags.DEFINE_bool(
            "overwrite", False, "replace the results of another command in output_dir"
        ),
        "lora": text("lora", None, "adapter: a PEFT directory, a run's lora/, or a weights file"),
        "candidates": flags.DEFINE_integer("candidates", 1, "videos per prompt", lower_bound=1),
        "frames": flags.DEFINE_integer(
            "frames", 0, "frames per video; 0: the durations', or video.frames", lower_bound=0
        ),
        "image": text("image", None, "picture that every video begins with"),
        "video": text("video", None, "video whose end every video begins with"),
        "latents": text(
            "latents", None, ".npy of latents [frames, C, H, W] that videos begin with"
        ),
        "score": flags.DEFINE_bool(
            "score", False, "score every scene with config.rewards; keeps its frames in memory"
        ),
    }
    flags.mark_flag_as_required("config")

    def run(_: list[str]) -> None:
        with multihost.exit_together():
            main(flag_holders)

    app.run(run, flags_parser=cli.parse)
