"""The real program in a process that kills itself: python -m tests.e2e.child WHERE FLAGS...

WHERE is `-`, or SIGNAL:MODULE.FUNCTION:N, which sends itself the signal when that function is called for the N-th time.
"""

import importlib
import os
import signal
import sys

from absl import app

from astrolabe_jax import main, recipes


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


if __name__ == "__main__":
    where = sys.argv.pop(1)
    if where != "-":
        arm(where)
    app.run(main.main, flags_parser=recipes.parse)
