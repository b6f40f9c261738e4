"""Score a video with the rewards of a config, to see that they work here before a run needs them.

    python -m astrolabe_jax.rewards --config=configs/self_forcing.py:hpsv3 --video=a.mp4 \
        --prompt="a cat" [--golden=golden.json [--record]] [--config.FIELD=VALUE ...]

Prints every reward with its parts, the seconds of a first call (with compilation) and of a second
one, and the memory of its weights. --golden compares with the scores that the file has for these
weights, frames and prompt, recorded with --record on a machine that is trusted; status 1 if one
differs by more than --tolerance.
"""

import hashlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from astrolabe_jax import sharding
from astrolabe_jax.config_checks import error_prefix, validate_scoring
from astrolabe_jax.plan import naming_memory
from astrolabe_jax.preflight import Faults
from astrolabe_jax.rewards import registry
from astrolabe_jax.rewards.panel import RewardRunner
from astrolabe_jax.runtime import backend, cli, media, multihost
from astrolabe_jax.runtime.files import local_file, read_json, write_json
from astrolabe_jax.runtime.progress import compilation, counted
from astrolabe_jax.types import Scores

MIB = 2**20


def timed(runner: RewardRunner, frames: np.ndarray, prompt: str) -> tuple[Scores, float]:
    """Return the scores of one video, and the seconds that they take; raise RewardError."""
    began = time.monotonic()
    scores = runner.score_async(frames[None], [prompt])()
    return scores, time.monotonic() - began


def golden_key(name: str, loaded: registry.Loaded, frames: np.ndarray, prompt: str) -> str:
    """Return a hash of what a recorded score is the score of."""
    digest = hashlib.sha256(np.ascontiguousarray(frames).tobytes())
    digest.update(json.dumps([name, loaded.scorer.identity, list(frames.shape), prompt]).encode())
    return digest.hexdigest()


def record(path: Path, recorded: dict, scores: Mapping[str, tuple[str, float]]) -> None:
    """Add scores, {golden_key: (reward, score)}, to a file and what is recorded there."""
    recorded |= {key: {"reward": name, "score": score} for key, (name, score) in scores.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, recorded)
    print(f"recorded {counted(len(scores), 'score')} in {path}")


def agrees(
    path: Path, recorded: dict, scores: Mapping[str, tuple[str, float]], tolerance: float
) -> bool:
    """Print each score beside its recorded one, and return whether none differs."""
    same = bool(recorded.keys() & scores.keys())  # nothing compared is no agreement
    for key, (name, score) in scores.items():
        if key in recorded:
            golden = recorded[key]["score"]
            error = abs(score - golden)
            verdict = "agrees with" if error <= tolerance else "DIFFERS from"
            print(f"  {name}: {score:.6f} {verdict} the recorded {golden:.6f} by {error:.2g}")
            same &= error <= tolerance
        else:
            print(
                f"  {name}: {path} has no score of these weights, frames and prompt; --record adds "
                "it"
            )
    return same


def main(holders: Mapping[str, flags.FlagHolder]) -> None:
    """Score a video and print the scores.

    The status is 2 for what cannot be scored, 1 for a reward that fails or differs from its
    recorded score.
    """
    cli.set_up()
    compilation()  # says when it is long
    config = holders["config"].value
    if holders["record"].value and not holders["golden"].value:
        cli.fail("--record takes --golden, the file to record in", 2)
    prompt = holders["prompt"].value
    path = holders["video"].value
    golden = holders["golden"].value and Path(holders["golden"].value).expanduser()
    try:
        if not prompt.strip():
            raise ValueError("--prompt is empty; write what the video should show")
        with error_prefix("--golden"):
            new = golden and holders["record"].value and not golden.exists()
            recorded = _read_golden(golden) if golden and not new else {}
        validate_scoring(config, jax.device_count())
        registry.validate(config.rewards)
        faults = Faults()
        faults.found.extend(registry.reach_faults(config.rewards))
        faults.refuse()
        registry.check_prompt(list(config.rewards), prompt)
        # as training gives them to the rewards
        size = (config.video.width, config.video.height)
        frames = media.read_video(path, config.video.fps, size)
        began = time.monotonic()
        setting = registry.Setting(sharding.make_mesh(config.mesh), config.video.fps)
        with naming_memory(config, ("rewards",)):
            groups = registry.load(config.rewards, setting)
    except (ValueError, OSError) as error:
        cli.fail(error, 2)
    print(
        f"{path}: {counted(len(frames), 'frame')} of {frames.shape[1]}x{frames.shape[2]} at "
        f"{config.video.fps} a second; rewards loaded in {time.monotonic() - began:.1f} s on "
        f"{setting.mesh.size} x {jax.devices()[0].device_kind}"
    )
    found: dict[str, tuple[str, float]] = {}
    try:
        with naming_memory(config, ("rewards",)):
            for group in groups:
                runner = RewardRunner([group], timeout=config.scoring.timeout)
                found |= _print_scores(group, runner, frames, prompt)
    except registry.RewardError as error:
        cli.fail(error, 1)
    if golden and holders["record"].value:
        try:
            record(golden, recorded, found)
        except OSError as error:
            cli.fail(f"--golden: {golden} cannot be written ({error.strerror})", 1)
    elif golden and not agrees(golden, recorded, found, holders["tolerance"].value):
        sys.exit(1)


def _read_golden(path: Path) -> dict[str, Any]:
    """Return what `record` has written; ValueError or OSError, naming the file, if it has not."""
    recorded = read_json(local_file(path, "a file that --record has written"))
    for entry in recorded.values():
        if not isinstance(entry, dict) or type(entry.get("score")) not in (int, float):
            raise ValueError(f"{path} was not written by --record; give another")
    return recorded


def _print_scores(
    group: registry.Loaded, runner: RewardRunner, frames: np.ndarray, prompt: str
) -> dict[str, tuple[str, float]]:
    """Print what one call scores and takes; return {golden_key: (reward, score)}.

    Raises RewardError.
    """
    _, first = timed(runner, frames, prompt)
    scores, again = timed(runner, frames, prompt)
    print(
        f"{' + '.join(group.names)}: {first:.2f} s, then {again:.2f} s; weights "
        f"{runner.weights / MIB:,.0f} MiB, peak {backend.peak_bytes() / MIB:,.0f}"
    )
    for name, values in scores.items():
        print(f"  {name:32} {values[0]:.6f}")
    return {
        golden_key(name, group, frames, prompt): (name, float(scores[name][0]))
        for name in group.names
    }


if __name__ == "__main__":
    flag_holders = {
        "config": cli.define(),
        "video": flags.DEFINE_string("video", None, "a video file", required=True),
        "prompt": flags.DEFINE_string("prompt", None, "what it should show", required=True),
        "golden": flags.DEFINE_string("golden", None, "file of recorded scores to compare with"),
        "record": flags.DEFINE_bool("record", False, "record the scores in --golden instead"),
        "tolerance": flags.DEFINE_float(
            "tolerance", 1e-3, "difference that is still agreement", lower_bound=0
        ),
    }
    flags.mark_flag_as_required("config")

    def run(_: list[str]) -> None:
        with multihost.exit_together():  # also beside a reward that hangs
            main(flag_holders)

    app.run(run, flags_parser=cli.parse)
