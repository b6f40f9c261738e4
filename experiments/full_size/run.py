"""The 1.3B model at its real size with random weights: file, conversion, and a video at 480x832.

    python -m experiments.full_size.run --directory=/tmp/full_size [--frames=9]
    [--steps=1000,750,500,250]

Each stage runs in a process of its own, whose peak memory is printed:

    write    writes a checkpoint in the Self-Forcing layout and a VAE in Wan's, with random numbers
             in float32; torch itself writes them
    import   runs python -m astrolabe_jax.convert import on both, to bfloat16
    sample   makes a video twice through transformer and VAE, block by block; its prompt is random
             numbers. The first time programs are compiled, the second time counts

It needs the test extra (torch), 15 GB of disk, and 20 GB of memory on a CPU for 9 frames, which are
one block.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from astrolabe_jax import sharding
from astrolabe_jax.config import get_config
from astrolabe_jax.convert import base as bases
from astrolabe_jax.convert import engine, nets, parts
from astrolabe_jax.convert.nets import make_config, sizes_of
from astrolabe_jax.decode import decode_video
from astrolabe_jax.models.wan.config import Layout
from astrolabe_jax.rollout import Sampler
from astrolabe_jax.runtime import cli
from astrolabe_jax.schedule import Schedule, warp
from astrolabe_jax.streaming import streams
from astrolabe_jax.streaming.scenes import Rules, Scene, shots
from astrolabe_jax.types import Policy, PromptBatch, VideoBatch

CHECKPOINT = "self_forcing_dmd.pt"
VAE = "Wan2.1_VAE.pth"
BASE = "base"
HEIGHT = 480
WIDTH = 832
CHANNELS = 16


def write(directory: Path) -> None:
    """Write both files, with the names, shapes and nesting of the published ones."""
    import torch  # an oracle of the tests, here for its file format alone

    def tensors(part, prefix):
        config = parts.SIZES["wan_1.3b"][part]
        rules = nets.rules(parts.PARTS[part], config)
        named = {}
        for name, shape in engine.source_shapes(rules, parts.shapes(part, config).params).items():
            is_scale = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
            centre = 1.0 if is_scale else 0.0
            named[prefix + name] = centre + 0.02 * torch.randn(shape)
        return named

    torch.manual_seed(0)
    torch.save({"generator_ema": tensors("transformer", "model.")}, directory / CHECKPOINT)
    torch.save(tensors("vae", ""), directory / VAE)


def sample(directory: Path, frames: int, steps: tuple[int, ...], dtype: str) -> None:
    """Make a video of `frames` pixel frames twice, and print what each took."""
    numerics = {"dtype": dtype, "param_dtype": "bfloat16"}
    mesh = sharding.make_mesh(get_config().mesh, jax.devices()[:1])
    nets = {}
    for part in ("transformer", "vae"):
        config = make_config(parts.PARTS[part], sizes_of(parts.SIZES["wan_1.3b"][part]), **numerics)
        where = bases.weights_of(str(directory / BASE), part)
        nets[part] = bases.read_net(
            part, where, config, lambda part, path, leaf: sharding.replicate(mesh, leaf)
        )
    net = nets["transformer"]
    layout = Layout(block=3)
    sampler = Sampler(warp(steps, Schedule()))
    policy = Policy(net.params, None, net.graphdef, net.config, layout, sampler)
    (shot,) = shots([Scene("", 0.0, 0, False)], layout, Rules(), 16, 4, frames=frames)
    text = np.random.default_rng(0).standard_normal((1, 512, net.config.text_dim))
    text[:, 40:] = 0  # a prompt of 40 tokens
    zero = np.zeros(1, np.int32)
    keys = jax.random.key(0)[None]
    batch = PromptBatch(("",), zero, zero)
    videos = VideoBatch(batch, (shot.timeline,), {"": 0}, text.astype(np.float32), keys)
    slots = min(layout.capacity, shot.latent_frames)
    for measured in (False, True):  # the first time every block traces and compiles its program
        state = streams.begin(
            policy.config, policy.layout, 1, slots, (CHANNELS, HEIGHT // 8, WIDTH // 8)
        )
        blocks = streams.sample_blocks(policy, videos, state, range(len(videos.blocks)))
        make(nets["vae"], blocks, measured)


def make(vae: nets.Net, blocks: Iterator[streams.SampledBlock], measured: bool) -> None:
    """Sample and decode the blocks of a video one by one, and print what each took, and all."""
    seconds = {"transformer": [], "vae": []}
    decoder = None
    began = time.monotonic()
    shown = []
    while block := timed(seconds["transformer"], lambda: next(blocks, None)):

        def decode(latents=block.latents, decoder=decoder):
            return decode_video(vae, latents, decoder, 1)

        chunks, decoder = timed(seconds["vae"], decode)
        shown.append(sum(chunk.shape[1] for chunk in chunks))
        finite = bool(np.isfinite(np.asarray(block.latents, np.float32)).all())
        print(
            json.dumps(
                {"block": block.plan.frame // 3, "finite": finite, "frames": shown[-1]}
                | {name: round(times[-1], 2) for name, times in seconds.items()}
            ),
            flush=True,
        )
    seconds["transformer"].pop()  # which found no further block
    report(seconds, shown, time.monotonic() - began, measured)


def timed(times: list[float], function: Callable):
    """Return function(), and append its seconds until the devices are done to `times`."""
    began = time.monotonic()
    result = jax.block_until_ready(function())
    times.append(time.monotonic() - began)
    return result


def report(seconds: dict[str, list[float]], shown: list[int], total: float, measured: bool) -> None:
    """Print frames per second, counted in three ways.

    Args:
      seconds: of each block, by net.
      shown: pixel frames of each block.
      total: seconds of all.
      measured: whether the programs had been compiled before.
    """
    later = slice(1, None) if len(shown) > 1 else slice(None)
    net, vae = (statistics.median(times[later]) for times in seconds.values())
    frames = statistics.median(shown[later])
    memory = jax.devices()[0].memory_stats() or {}
    figures = {
        "device": jax.devices()[0].device_kind,
        "programs": "compiled before" if measured else "traced and compiled, or loaded, meanwhile",
        "seconds per block, median of the later ones": {
            "transformer": round(net, 3),
            "vae": round(vae, 3),
        },
        "frames/s, transformer alone": round(frames / net, 3),
        "frames/s, with VAE": round(frames / (net + vae), 3),
        "frames/s, end to end with the first block": round(sum(shown) / total, 3),
        "peak device memory, GiB": round(memory.get("peak_bytes_in_use", 0) / 2**30, 2),
    }
    print(json.dumps(figures, indent=1), flush=True)


def stage(name: str, command: list[str]) -> None:
    """Run a stage in a process of its own, and print its time and peak memory."""
    began = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    subprocess.run([sys.executable, *command], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    bound = "at most " if peak == before else ""
    print(
        f"{name}: {time.monotonic() - began:.0f} s, peak resident memory "
        f"{bound}{peak / 2**20:.2f} GiB",
        flush=True,
    )


def main(argv: list[str]) -> None:
    """Run all stages, or, called by itself, one of them."""
    values = flags.FLAGS
    directory = Path(values.directory)
    directory.mkdir(parents=True, exist_ok=True)
    steps = tuple(int(step) for step in values.steps)
    if values.stage == "write":
        write(directory)
    elif values.stage == "sample":
        sample(directory, values.frames, steps, values.dtype)
    else:
        itself = [
            "-m",
            "experiments.full_size.run",
            f"--directory={directory}",
            f"--dtype={values.dtype}",
        ]
        convert = [
            "-m",
            "astrolabe_jax.convert",
            "import",
            "--dtype=bfloat16",
            f"--to={directory / BASE}",
        ]
        if not (directory / VAE).exists():
            stage("write", [*itself, "--stage=write"])
            for name in (CHECKPOINT, VAE):
                print(f"{name}: {os.path.getsize(directory / name) / 1e9:.2f} GB", flush=True)
        for part, name in (("transformer", CHECKPOINT), ("vae", VAE)):
            if not (directory / BASE / part).exists():
                stage(f"import {name}", [*convert, str(directory / name)])
        options = [f"--frames={values.frames}", f"--steps={','.join(values.steps)}"]
        stage("sample", [*itself, "--stage=sample", *options])


flags.DEFINE_string("directory", None, "where files go", required=True)
flags.DEFINE_string("stage", "", "one stage alone: write or sample")
flags.DEFINE_integer("frames", 9, "pixel frames of the video, 9 + 12 n")
flags.DEFINE_list("steps", ["1000", "750", "500", "250"], "denoising steps")
flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "compute dtype")

if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse)
