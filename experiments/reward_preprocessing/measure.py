"""Times the preparation of a video for HPSv3: the way of the published code against ours, in one
process.

    python -m experiments.reward_preprocessing.measure [--frames 81] [--repeats 3] [--chunk 4]

The published way takes a frame at a time: PIL resizes it, and the processor of Hugging Face scales,
normalises and patches it, with numpy. Ours is the jitted function that the scorers run, on so many
frames at a time. Both start from the same uint8 frames of 480 x 832, and end in the patches of all
of them. Compiling is not counted.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from astrolabe_jax.rewards import images
from astrolabe_jax.rewards.qwen2_vl import patches
from astrolabe_jax.runtime import cli

HEIGHT, WIDTH = 480, 832
SIZE = patches.smart_resize(HEIGHT, WIDTH)


def published(
    frames: np.ndarray, processor: Qwen2VLImageProcessorPil, chunk: int = 4
) -> np.ndarray:
    """HPSv3's batches of four pictures -> [F, rows, 1176]."""
    found = []
    for start in range(0, len(frames), chunk):
        pictures = [Image.fromarray(frame) for frame in frames[start : start + chunk]]
        resized = [picture.resize(SIZE[::-1], Image.Resampling.BICUBIC) for picture in pictures]
        found.append(processor(resized, return_tensors="np")["pixel_values"])
    return np.concatenate(found).reshape(len(frames), -1, 1176)


@functools.partial(jax.jit, static_argnums=1)
def prepared(frames: jax.Array, rounding: str) -> jax.Array:
    """Frames [N, height, width, 3] -> patches [N, rows, 1176]."""
    return patches.prepared(frames[:, None], patches.Preparation(SIZE, rounding))


def ours(frames: np.ndarray, rounding: str, chunk: int) -> list[jax.Array]:
    """The patches of all chunks; the last one is filled up."""
    filled = [
        np.resize(frames[start : start + chunk], (chunk, HEIGHT, WIDTH, 3))
        for start in range(0, len(frames), chunk)
    ]
    return jax.block_until_ready([prepared(part, rounding) for part in filled])


def timed(work: Callable, repeats: int) -> dict[str, float]:
    """Medians of seconds, on the clock and of the processors, after one run that is not counted."""
    work()
    walls, used = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        walls.append(time.perf_counter() - wall)
        used.append(time.process_time() - cpu)
    return {
        "wall_s": round(statistics.median(walls), 3),
        "cpu_s": round(statistics.median(used), 3),
    }


def main(argv: list[str]) -> None:
    """Print a JSON line for the published way, and for each of ours."""
    given = flags.FLAGS
    small = np.random.default_rng(0).integers(
        0, 256, (given.frames, HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8
    )
    frames = small.repeat(8, axis=1).repeat(8, axis=2)
    processor = Qwen2VLImageProcessorPil()
    wanted = published(frames[:2], processor)
    lines = {"published": timed(lambda: published(frames, processor), given.repeats)}
    for rounding in ("pil", "torch"):
        for chunk in given.chunk:
            name = f"ours, {rounding}, {chunk} frames at a time"
            lines[name] = timed(lambda r=rounding, c=chunk: ours(frames, r, c), given.repeats)
            levels = (
                np.abs(np.asarray(prepared(frames[:2], rounding)) - wanted).max()
                * 255
                * max(images.CLIP_STD)
            )
            lines[name] |= {"levels_apart": round(float(levels), 3)}
            for clock in ("wall_s", "cpu_s"):
                lines[name][clock.replace("_s", "_ratio")] = round(
                    lines["published"][clock] / lines[name][clock], 2
                )
    for name, line in lines.items():
        print(json.dumps({"what": name, "frames": given.frames, **line}), flush=True)


flags.DEFINE_integer("frames", 81, "of the video", lower_bound=1)
flags.DEFINE_integer("repeats", 3, "how often each way is timed", lower_bound=1)
flags.DEFINE_multi_integer("chunk", [1, 4, 9], "frames at a time; once for each", lower_bound=1)

if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse)
