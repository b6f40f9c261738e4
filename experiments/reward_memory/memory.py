"""Memory of a language-model reward on one device, compiled from shapes for a device that need not
be there.

    python -m experiments.reward_memory.memory --target=h200 --rewards=hpsv3,hpsv3:int8,videoalign
    python -m experiments.reward_memory.memory --target=v5e:4x4 --fsdp=16

A call scores `--batch` frames of HPSv3, or videos of VideoAlign, on each device.
Targets, and what must be installed for them: experiments/streaming_memory/memory.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from astrolabe_jax import sharding
from astrolabe_jax.convert import nets
from astrolabe_jax.models import layers
from astrolabe_jax.rewards.qwen2_vl import weights
from astrolabe_jax.rewards.qwen2_vl.config import HPSV3, PATCH_VALUES, VIDEOALIGN
from astrolabe_jax.runtime import cli
from experiments.streaming_memory.memory import Call, Program, compiled, compiling_for, size_of

# config, grid of patches, reward tokens, tokens in all: an image's or video's, the instruction's
# and a long prompt's
REWARDS = {"hpsv3": (HPSV3, (1, 24, 42), 1, 960), "videoalign": (VIDEOALIGN, (5, 24, 42), 3, 2240)}
KINDS = [f"{name}{kernels}" for name in REWARDS for kernels in ("", ":int8")]


def measure(reward: str, target: str, batch: int, fsdp: int, execute: bool) -> tuple[Program, int]:
    """The program of a reward, 'hpsv3' or 'hpsv3:int8' and so on, and the bytes of its whole
    net.
    """
    name, _, kernels = reward.partition(":")
    config, grid, outputs, length = REWARDS[name]
    config = dataclasses.replace(config, quantised=kernels == "int8")
    graphdef, params, _ = nets.shapes(weights.spec_of(name, config), config)
    with compiling_for(target, fsdp) as devices:
        mesh = sharding.make_mesh(ConfigDict({"data": -1, "fsdp": fsdp}), devices)
        samples = batch * mesh.size
        inputs = sharding.shard_batch(
            mesh,
            (
                jax.ShapeDtypeStruct((samples, int(np.prod(grid)), PATCH_VALUES), jnp.float32),
                jax.ShapeDtypeStruct((samples, length), jnp.int32),
                jax.ShapeDtypeStruct((samples, outputs), jnp.int32),
            ),
        )

        def score(params, patches, ids, where):
            return layers.merge(graphdef, params)(patches, grid, ids, where)

        call = Call(
            jax.jit(sharding.on_mesh(mesh, score)), (sharding.shard_params(mesh, params), *inputs)
        )
        return compiled(call, 0 if execute else None), size_of(params)


def main(argv: list[str]) -> None:
    """Print a line for each reward."""
    values = flags.FLAGS
    if values.run and values.target != "here":
        cli.fail(
            f"--run runs on the devices that are here, not on {values.target}; give --target=here",
            2,
        )
    for reward in values.rewards:
        try:
            program, whole = measure(reward, values.target, values.batch, values.fsdp, values.run)
        except ValueError as error:
            cli.fail(error, 2)
        held, temporaries, net = (
            count / 2**30 for count in (program.arguments, program.temporaries, whole)
        )
        line = (
            f"{values.target} x {values.fsdp}, {reward}, {values.batch} a device: net {net:.2f} "
            f"GiB, held on a device {held:.2f}, temporaries {temporaries:.2f}, peak "
            f"{held + temporaries:.2f}; {program.seconds:.0f} s"
        )
        if ran := program.execution:
            line += f"; ran: {ran.seconds:.3f} s, peak {ran.peak / 2**30:.2f}"
        print(line, flush=True)


flags.DEFINE_string("target", "h200", "here, h200, or the name of a TPU's topology")
flags.DEFINE_list("rewards", KINDS, f"what to compile: some of {', '.join(KINDS)}")
flags.DEFINE_integer("batch", 4, "samples of a call on each device", lower_bound=1)
flags.DEFINE_integer("fsdp", 1, "devices, over which the net is split", lower_bound=1)
flags.DEFINE_bool("run", False, "also run what is compiled, on the devices that are here")
flags.register_validator(
    "rewards", lambda names: set(names) <= set(KINDS), f"expected some of {', '.join(KINDS)}"
)

if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse)
