"""Scores adapters on long held-out videos, window by window, as a run of
configs/moving_shapes_long.py does.

    python -m experiments.late_windows.transfer LORA [LORA ...]
    --config=configs/moving_shapes_long.py

Prints a line of JSON for each adapter: means with 95 % intervals, and the gain over the base on the
same noise.
"""

import json
import tempfile

import jax
import numpy as np
from absl import app, flags

from astrolabe_jax import report, sharding
from astrolabe_jax.convert.lora import load_lora
from astrolabe_jax.evaluate import evaluate
from astrolabe_jax.run import prepare
from astrolabe_jax.runtime import cli
from astrolabe_jax.runtime.progress import Progress


def main(paths: list[str], config: flags.FlagHolder) -> None:
    cli.set_up()
    with tempfile.TemporaryDirectory() as workdir:
        run = prepare(config.value, workdir)
        jax.set_mesh(run.mesh)
        progress = Progress()
        base, _ = evaluate(run, sharding.replicate(run.mesh, run.adapter), progress, "base")
        print(json.dumps({"adapter": "none", **report.table(base)}), flush=True)
        for path in paths:
            lora = run.config.lora
            adapter, scale = load_lora(
                path, run.base.transformer.config, lora.rank, np.dtype(lora.dtype)
            )
            if scale != lora.alpha / lora.rank:
                raise ValueError(
                    f"{path} has alpha / rank {scale:g}, config.lora {lora.alpha / lora.rank:g}"
                )
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
