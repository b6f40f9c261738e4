"""What a reward on every k-th frame says of a policy's videos, against the same reward on all
frames.

    python -m experiments.frame_stride.measure --reward=hpsv3 --options='{"path": "rewards/hpsv3"}'
    --strides=1,2,4,8 \
        --config=configs/self_forcing.py

Samples an epoch's videos of the recipe with its base, and scores them with each stride. Prints, for
each: frames and seconds; the mean change of the score (bias) and what is left of the change
(error), both in deviations of the score between the videos of a prompt, which is what advantages
are measured in; and the mean rank correlation within prompts.
"""

import json
import tempfile
import time

import jax
import numpy as np
from absl import app, flags
from scipy.stats import spearmanr

from astrolabe_jax import prompts
from astrolabe_jax.config_checks import error_prefix
from astrolabe_jax.rewards import registry as rewards
from astrolabe_jax.run import prepare
from astrolabe_jax.runtime import cli
from astrolabe_jax.runtime.files import parse_json
from astrolabe_jax.runtime.progress import Progress
from astrolabe_jax.streaming import windows
from astrolabe_jax.types import RngStream

_REWARD = flags.DEFINE_string("reward", "hpsv3", "a reward that has the option frame_stride")
_OPTIONS = flags.DEFINE_string("options", "{}", "JSON of its other options")
_STRIDES = flags.DEFINE_list(
    "strides", ["1", "2", "4", "8"], "the first is what the others are compared with"
)


def main(config: flags.FlagHolder) -> None:
    cli.set_up()
    try:
        settings = with_strides(_REWARD.value, _OPTIONS.value, _STRIDES.value)
        with tempfile.TemporaryDirectory() as workdir:
            run = prepare(config.value, workdir)
    except (ValueError, OSError) as error:
        cli.fail(error, 2)
    given = run.config.prompts
    batch = prompts.draw(
        run.train_prompts, run.config.seed, 0, given.prompts_per_epoch, given.samples_per_prompt, 1
    )
    progress = Progress()
    jax.set_mesh(run.mesh)
    length = run.base.vae.config.latent_frames(run.config.video.frames)
    videos = windows.encode_videos(run, batch, RngStream.HELD_OUT, 0, length, progress)
    pieces = []
    for pixels, scores in windows.score_videos(
        run, run.adapter, videos, length, progress, "videos"
    ):
        for wait in scores:
            wait()
        pieces.append(pixels)
    frames = np.concatenate(pieces)
    setting = rewards.Setting(run.mesh, run.config.video.fps)
    whole = None
    for stride, options in settings.items():
        (loaded,) = rewards.load({_REWARD.value: options}, setting)
        loaded.scorer.score(loaded.scorer.params, frames[:1], batch.texts[:1])  # compiles
        begin = time.perf_counter()
        scores = np.asarray(
            loaded.scorer.score(loaded.scorer.params, frames, batch.texts)[_REWARD.value],
            np.float64,
        )
        seconds = time.perf_counter() - begin
        whole = scores if whole is None else whole
        counts = {
            "stride": stride,
            "frames": len(range(0, frames.shape[1], stride)),
            "seconds": round(seconds, 2),
        }
        print(json.dumps(counts | compared(scores, whole, batch.index)), flush=True)


def with_strides(reward: str, options: str, strides: list[str]) -> dict[int, dict]:
    """Return the options of a reward with each stride.

    Raises ValueError, naming the flag, for what they are not, and for a reward or files that are
    not there.
    """
    if not strides or not all(stride.isdecimal() and int(stride) for stride in strides):
        raise ValueError(f"--strides is {','.join(strides)!r}; expected numbers, as in 1,2,4")
    with error_prefix("--options"):
        others = parse_json(options)
        if not isinstance(others, dict):
            raise ValueError(f"expected a JSON object, not {options!r:.40}")
    found = {
        int(stride): others | {"weight": 1.0, "frame_stride": int(stride)} for stride in strides
    }
    for given in found.values():
        rewards.validate({reward: given})
        for line in rewards.directory_faults({reward: given}):
            raise ValueError(line)
    return found


def compared(scores: np.ndarray, whole: np.ndarray, groups: np.ndarray) -> dict[str, float]:
    """Of scores [N] against those of all frames; groups [N]: the prompt of each video."""
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    spread = np.sqrt(np.mean([whole[member].var() for member in members]))
    change = (scores - whole) / spread
    within = np.concatenate([change[member] - change[member].mean() for member in members])
    ranks = [spearmanr(scores[member], whole[member]).statistic for member in members]
    return {"bias": change.mean(), "error": within.std(), "rank_correlation": float(np.mean(ranks))}


if __name__ == "__main__":
    holder = cli.define()
    flags.mark_flags_as_required(["config"])
    app.run(lambda argv: main(holder), flags_parser=cli.parse)
