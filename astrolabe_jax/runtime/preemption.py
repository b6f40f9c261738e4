"""A polite end on SIGTERM and Ctrl-C: the run notices at the next phase, saves, and exits.

A signal to one of several processes ends all of them, at the same phase.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

from astrolabe_jax.runtime import multihost

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """Somebody asked the run to end; the message is the signal's name."""


@contextlib.contextmanager
def listening() -> Iterator[Callable[[], None]]:
    """Listen to signals while inside; give a function that raises Stopped once one has come.

    All processes must call the function equally often. A second signal acts at once.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    received: list[str] = []

    def restore_handlers():
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def note(number, _):
        name = signal.Signals(number).name
        received.append(name)
        # not print, which the signal may have interrupted
        os.write(2, f"{name}: ending at the next phase; send it again to end at once\n".encode())
        restore_handlers()

    def check():
        name = multihost.first_nonempty(received[0] if received else "")
        if name:
            raise Stopped(name)

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield check
    finally:
        restore_handlers()
