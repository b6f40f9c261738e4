"""Sampling a window of a long video: candidates that share their past, against candidates from
frame 0 on.

    python -m experiments.streaming_memory.cost [--start=219] [--base=DIRECTORY]

Both are what an epoch runs, windows.collect, on the same prompt, with every program compiled
before. Passes are counted where they are made: a pass is one block of one video through the
transformer once. Neither decodes or scores: the whole videos would have far more of that.
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from astrolabe_jax import prompts, rollout, sharding
from astrolabe_jax.run import Run, prepare
from astrolabe_jax.runtime import cli
from astrolabe_jax.runtime.progress import Progress
from astrolabe_jax.streaming import windows
from astrolabe_jax.types import RngStream
from configs import moving_shapes_long

CANDIDATES = 24
WINDOW = 21
SIZES = {
    "prompts.train": "world:moving_shapes/train",  # of one scene
    "prompts.test": "world:moving_shapes/test",
    "prompts.prompts_per_epoch": 1,
    "prompts.samples_per_prompt": CANDIDATES,
    "optimizer.microbatch": CANDIDATES,
    "optimizer.steps_per_pass": 1,
    "sampler.batch": CANDIDATES,
    "streaming.window": WINDOW,
    "streaming.score_frames": 0,
    "streaming.selection": "last",
    "streaming.prompts_per_device": 1,
    # the past is not decoded, so that its time is that of the rollout
    "streaming.reward": "window_alone",
}


def setting(start: int, **changes) -> ConfigDict:
    """The config of a run whose windows begin at latent frame `start`; `changes` as {field:
    value}.
    """
    config = moving_shapes_long.get_config()
    frames = 1 + 4 * (start + WINDOW - 1)
    config.update_from_flattened_dict({**SIZES, "video.frames": frames, **changes})
    return config


def measure(config: ConfigDict, start: int, times: int = 3) -> dict[str, dict[str, float]]:
    """'clip' and 'sequence' -> passes, and the least seconds of so many epochs' sampling, taken in
    turn.
    """
    with tempfile.TemporaryDirectory() as directory, undecoded():
        runs = {}
        for kind in ("clip", "sequence"):
            own = config.copy_and_resolve_references()
            own.streaming.sampling = kind
            runs[kind] = prepare(own, Path(directory) / kind)
        epochs = [
            {kind: _sampled(run, start, epoch) for kind, run in runs.items()}
            for epoch in range(1 + times)
        ]
    later = epochs[1:]  # the first compiles
    return {
        kind: {
            "passes": later[0][kind]["passes"],
            "seconds": min(epoch[kind]["seconds"] for epoch in later),
        }
        for kind in runs
    }


def _sampled(run: Run, start: int, epoch: int) -> dict[str, float]:
    """Sample an epoch's videos in the window at `start`: return its passes and seconds."""
    settings = run.config.prompts
    progress = Progress({}, lambda: None, lambda line: None)
    batch = prompts.draw(
        run.train_prompts,
        run.config.seed,
        epoch,
        settings.prompts_per_epoch,
        settings.samples_per_prompt,
        1,
    )
    with jax.set_mesh(run.mesh):
        length = run.latent_shape[0]
        videos = windows.encode_videos(run, batch, RngStream.ROLLOUT, epoch, length, progress)
        adapter = sharding.replicate(run.mesh, run.adapter)
        began = time.monotonic()
        with counted() as passes:
            # waits for the latents
            windows.collect(run, adapter, videos, start, [], progress, "sampling")
    return {"passes": sum(passes), "seconds": time.monotonic() - began}


@contextlib.contextmanager
def undecoded() -> Iterator[None]:
    """Within it videos are neither decoded nor scored: their frames are black, and few."""

    def decode_video(vae, latents, state, chunk):
        return [np.zeros((latents.shape[0], 1, 1, 1, 3), np.uint8)], state

    def score_async(run, frames, *_):
        return lambda: {"total": np.zeros(len(frames))}

    with (
        mock.patch.object(windows, "decode_video", decode_video),
        mock.patch.object(windows, "score_async", score_async),
    ):
        yield


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Collect the passes of every call of the two programs that run the transformer on blocks."""
    passes: list[int] = []
    sample_block = rollout.sample_block
    cache_block = rollout.cache_block

    def counted_sample(policy, text, noise, *rest):
        # noise [steps, B, ...]: the denoising passes, and the clean one
        passes.append((noise.shape[0] + 1) * noise.shape[1])
        return sample_block(policy, text, noise, *rest)

    def counted_cache(policy, text, latents, *rest):
        passes.append(latents.shape[0])
        return cache_block(policy, text, latents, *rest)

    with (
        mock.patch.object(rollout, "sample_block", counted_sample),
        mock.patch.object(rollout, "cache_block", counted_cache),
    ):
        yield passes


def main(argv: list[str]) -> None:
    """Print both and their ratios."""
    values = flags.FLAGS
    try:
        made = measure(setting(values.start, base=values.base), values.start)
    except (ValueError, OSError) as error:
        cli.fail(error, 2)
    made["clip / sequence"] = {
        name: clip / made["sequence"][name] for name, clip in made["clip"].items()
    }
    for kind, row in made.items():
        print(f"{kind:16} {row['passes']:10.4g} passes {row['seconds']:10.4g} s", flush=True)


flags.DEFINE_integer(
    "start", 219, "latent frame at which the window begins, whole blocks of 3", lower_bound=0
)
flags.DEFINE_string("base", "moving_shapes", "name of a shipped base, or its directory")

if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse)
