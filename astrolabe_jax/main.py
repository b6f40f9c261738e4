"""python -m astrolabe_jax.main --config=configs/moving_shapes.py --workdir=runs/demo [--config.FIELD=VALUE ...]"""

import os

import jax
from absl import app, flags, logging

from astrolabe_jax import recipes

CONFIG = recipes.define()
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; the run in it is continued", required=True)
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "join a cluster before starting; not supported yet")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    """Prepares (status 2: what was asked for cannot be done) and trains (status 1: a number was not finite)."""
    if len(argv) > 1:
        recipes.fail(f"unexpected argument {argv[1]!r}; flags start with --", 2)
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would warn that torch is missing; nothing needs it
    cache = os.path.join(os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache")), "astrolabe_jax", "xla")
    jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", cache))
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
