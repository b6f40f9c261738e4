"""Train: python -m astrolabe_jax.main --config=configs/moving_shapes.py --workdir=runs/demo"""

from absl import app, flags

from astrolabe_jax.runtime import cli, multihost, preemption

CONFIG = cli.define()
WORKDIR = flags.DEFINE_string(
    "workdir", None, "directory of the run; the run in it is continued", required=True
)
CHECK = flags.DEFINE_bool("check", False, "print its files, and what is wrong or missing, and end")
flags.mark_flag_as_required("config")
JOIN = cli.define_joining()


def main(_: list[str]) -> None:
    """Prepare the run and train.

    Ends with status 2 for what cannot be done, before anything is compiled, and with status 1 for a
    run that could not go on.
    """
    with multihost.exit_together():
        cli.set_up(lambda: multihost.join(*(flag.value for flag in JOIN)))
        # after joining: no array may exist before it
        import jax

        from astrolabe_jax import plan, preflight, run, train

        with preemption.listening() as check:
            try:
                multihost.refuse_differences({"--check": CHECK.value})
                with plan.naming_memory(CONFIG.value):
                    if CHECK.value:
                        return preflight.tell(CONFIG.value, WORKDIR.value)
                    prepared = run.prepare(CONFIG.value, WORKDIR.value)
                    jax.set_mesh(prepared.mesh)
                    state = train.resume(prepared)
            except (ValueError, OSError) as error:
                cli.fail(error, 2)
            try:
                with plan.naming_memory(CONFIG.value):
                    train.train(prepared, state, check)
            except train.REFUSED as error:
                cli.fail(error, 1)


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse)
