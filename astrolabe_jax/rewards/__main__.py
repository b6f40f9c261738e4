"""Scores a video with the rewards of a config, to see that they work here before a run depends on
them.

    python -m astrolabe_jax.rewards --config=configs/self_forcing.py:hpsv3 --video=a.mp4 --prompt="a
    cat"
        [--golden=golden.json [--record]] [--config.FIELD=VALUE ...]

Prints every reward with its parts, the seconds of a first call (with compilation) and of a second
one, and the memory of its weights. --golden compares with the scores that the file has for these
weights, frames and prompt, recorded with --record on a machine that is trusted; status 1 if one
differs by more than --tolerance.
"""

import hashlib
import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from astrolabe_jax import rewards, sharding
from astrolabe_jax.rewards.panel import Panel
from astrolabe_jax.runtime import cli, media
from astrolabe_jax.runtime.files import read_json, write_atomic

MIB = 2**20


def peak() -> int:
    """The most bytes that were in use so far, of a device if it tells, or of the process."""
    told = jax.local_devices()[0].memory_stats() or {}
    return told.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measured(
    loaded: rewards.Loaded, frames: np.ndarray, prompt: str
) -> tuple[dict[str, float], list[float]]:
    """Scores of one video, and the seconds of two calls."""
    seconds, scores = [], {}
    for _ in range(2):
        began = time.monotonic()
        scores = rewards.score(loaded, frames[None], [prompt])
        seconds.append(time.monotonic() - began)
    return {name: float(values[0]) for name, values in scores.items()}, seconds


def golden_key(name: str, loaded: rewards.Loaded, frames: np.ndarray, prompt: str) -> str:
    """What a recorded score is the score of."""
    digest = hashlib.sha256(np.ascontiguousarray(frames).tobytes())
    digest.update(json.dumps([name, loaded.scorer.identity, list(frames.shape), prompt]).encode())
    return digest.hexdigest()


def compared(
    path: Path, found: Mapping[str, tuple[str, float]], tolerance: float, record: bool
) -> bool:
    """Records scores {key: (reward, score)} in a file of them, or compares; whether none
    differs.
    """
    known = read_json(path) if path.exists() else {}
    if record:
        known |= {key: {"reward": name, "score": score} for key, (name, score) in found.items()}
        write_atomic(path, (json.dumps(known, indent=2) + "\n").encode())
        print(f"recorded {len(found)} scores in {path}")
        return True
    same = True
    for key, (name, score) in found.items():
        if key not in known:
            print(
                f"  {name}: {path} has no score of these weights, frames and prompt; --record adds "
                "it"
            )
            continue
        error = abs(score - known[key]["score"])
        same &= error <= tolerance
        told = "agrees with" if error <= tolerance else "DIFFERS from"
        print(f"  {name}: {score:.6f} {told} the recorded {known[key]['score']:.6f} by {error:.2g}")
    return same


def main(argv: list[str], given: Mapping[str, flags.FlagHolder]) -> None:
    """Status 2 for what cannot be scored, 1 for a reward that fails or differs from its recorded
    score.
    """
    if len(argv) > 1:
        cli.fail(f"unexpected argument {argv[1]!r}; flags start with --", 2)
    cli.set_up()
    config, prompt, path = given["config"].value, given["prompt"].value, Path(given["video"].value)
    try:
        frames = media.read_video(path, config.video.fps)
        rewards.validate(config.rewards)
        rewards.check_prompt(list(config.rewards), prompt)
        began = time.monotonic()
        setting = rewards.Setting(sharding.make_mesh(config.mesh), config.video.fps)
        groups = rewards.load(config.rewards, setting)
    except (ValueError, OSError) as error:
        cli.fail(error, 2)
    print(
        f"{path}: {len(frames)} frames of {frames.shape[1]}x{frames.shape[2]} at "
        f"{config.video.fps} a second; rewards loaded in {time.monotonic() - began:.1f} s on "
        f"{setting.mesh.size} x {jax.devices()[0].device_kind}"
    )
    found: dict[str, tuple[str, float]] = {}
    for group in groups:
        try:
            scores, (first, again) = measured(group, frames, prompt)
        except rewards.RewardError as error:
            cli.fail(error, 1)
        memory = f"weights {Panel([group]).weights / MIB:,.0f} MiB, peak {peak() / MIB:,.0f}"
        print(f"{' + '.join(group.names)}: {first:.2f} s, then {again:.2f} s; {memory}")
        for name, score in scores.items():
            print(f"  {name:32} {score:.6f}")
            if name in group.names:
                found[golden_key(name, group, frames, prompt)] = name, score
    golden = given["golden"].value
    if golden and not compared(
        Path(golden), found, given["tolerance"].value, given["record"].value
    ):
        sys.exit(1)


if __name__ == "__main__":
    holders = {
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
    app.run(lambda argv: main(argv, holders), flags_parser=cli.parse)
