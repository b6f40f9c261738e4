"""python -m astrolabe_jax.main --config=configs/moving_shapes.py --workdir=runs/demo [--config.FIELD=VALUE ...]"""

import jax
from absl import app, flags

from astrolabe_jax import recipes

CONFIG = recipes.define()
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; the run in it is continued", required=True)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "join a cluster before starting; not supported yet")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Prepares (status 2: what was asked for cannot be done) and trains (status 1: a number was not finite)."""
    if len(argv) > 1:
        recipes.fail(f"unexpected argument {argv[1]!r}; flags start with --", 2)
    recipes.set_up()
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    from astrolabe_jax import prepare, stop, train  # after jax.distributed: no array may exist before it

    with stop.listening() as check:
        try:
            run = prepare.prepare(CONFIG.value, WORKDIR.value)
            point = train.resume(run)
        except (ValueError, OSError) as error:
            recipes.fail(error, 2)
        try:
            train.train(run, point, check)
        except train.REFUSED as error:
            recipes.fail(error, 1)


if __name__ == "__main__":
    app.run(main, flags_parser=recipes.parse)
