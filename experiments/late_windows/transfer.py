"""Scores adapters on long held-out videos, window by window, as a run of
configs/moving_shapes_long.py does.

    python -m experiments.late_windows.transfer LORA [LORA ...]
    --config=configs/moving_shapes_long.py

Prints a line of JSON for each adapter: means with 95 % intervals, and the gain over the base on the
same noise.
"""

import json
import math
import tempfile
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from astrolabe_jax import report, sharding
from astrolabe_jax.convert.lora import load_lora
from astrolabe_jax.evaluate import evaluate
from astrolabe_jax.geometry import open_base
from astrolabe_jax.run import prepare
from astrolabe_jax.runtime import cli
from astrolabe_jax.runtime.progress import Progress


def read_adapters(paths: list[str], config: ConfigDict) -> list[tuple[str, dict[str, Any]]]:
    """Return the adapters with their paths; all are checked, and no weights of the base are read.

    Raises:
      ValueError, OSError: naming the adapter that is none, or that does not fit config.lora.
    """
    if not paths:
        raise ValueError("no adapter is given; expected LORA [LORA ...] in front of --config")
    sizes, _ = open_base(config)
    lora = config.lora
    adapters = []
    for path in paths:
        adapter, scale = load_lora(path, sizes["transformer"], lora.rank, np.dtype(lora.dtype))
        if not math.isclose(scale, lora.alpha / lora.rank):
            raise ValueError(
                f"{path} has alpha / rank {scale:g}, config.lora.alpha / rank is "
                f"{lora.alpha / lora.rank:g}; give adapters of one strength, and set "
                "config.lora.alpha to theirs"
            )
        adapters.append((path, adapter))
    return adapters


def main(paths: list[str], config: flags.FlagHolder) -> None:
    """Score the base and each adapter, and print a line for each."""
    cli.set_up()
    with tempfile.TemporaryDirectory() as workdir:
        try:
            adapters = read_adapters(paths, config.value)
            run = prepare(config.value, workdir)
        except (ValueError, OSError) as error:
            cli.fail(error, 2)
        jax.set_mesh(run.mesh)
        progress = Progress()
        base, _ = evaluate(run, sharding.replicate(run.mesh, run.adapter), progress, "base")
        print(json.dumps({"adapter": "none", **report.table(base)}), flush=True)
        for path, adapter in adapters:
            scores, _ = evaluate(run, sharding.replicate(run.mesh, adapter), progress, path)
            gain = {name: report.mean_and_interval(scores[name] - base[name]) for name in base}
            print(json.dumps({"adapter": path, **report.table(scores), "gain": gain}), flush=True)


if __name__ == "__main__":
    given = cli.define()
    flags.mark_flag_as_required("config")
    app.run(
        lambda argv: main(argv[1:], given),
        flags_parser=lambda argv: cli.parse(argv, positional=True),
    )
