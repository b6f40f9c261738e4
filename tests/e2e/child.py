"""The real program in a process that kills itself, or tells where it is: python -m tests.e2e.child
WHERE FLAGS...

WHERE is `-`, or SIGNAL:MODULE.FUNCTION:N, which sends itself the signal when that function is
called for the N-th time, or a file, to which a line is added when a phase begins or ends: `begin 2
update` in the second epoch.
"""

import contextlib
import importlib
import os
import signal
import sys

from absl import app

from astrolabe_jax import main
from astrolabe_jax.runtime import cli


def arm(where: str) -> None:
    name, target, count = where.split(":")
    module, function = target.rsplit(".", 1)
    module = importlib.import_module(module)
    original, calls = getattr(module, function), []

    def armed(*args, **kwargs):
        calls.append(None)
        if len(calls) == int(count):
            os.kill(os.getpid(), signal.Signals[name])
        return original(*args, **kwargs)

    setattr(module, function, armed)


def tell(path: str) -> None:
    from astrolabe_jax import train
    from astrolabe_jax.runtime.progress import Progress

    phase = Progress.phase
    run_epoch = train.epoch
    epochs = [0]

    def line(what, progress, name):
        with open(path, "ab", buffering=0) as file:  # in one piece, whatever happens next
            file.write(f"{what} {epochs[-1]} {progress.prefix}{name}\n".encode())

    @contextlib.contextmanager
    def telling_phase(progress, name):
        with phase(progress, name):
            line("begin", progress, name)
            yield
        line("end", progress, name)

    def telling_epoch(run, state, *others):
        epochs.append(state.epoch + 1)
        return run_epoch(run, state, *others)

    Progress.phase = telling_phase
    train.epoch = telling_epoch


if __name__ == "__main__":
    where = sys.argv.pop(1)
    if where != "-":
        (arm if ":" in where else tell)(where)
    app.run(main.main, flags_parser=cli.parse)
