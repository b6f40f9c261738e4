"""A polite end on SIGTERM and Ctrl-C: the run notices at the next phase, saves, and exits.

A signal to one of several processes ends all of them, at the same phase.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

from astrolabe_jax.runtime import multihost


class Stopped(Exception):
    """Somebody asked the run to end; the message is the signal's name."""


@contextlib.contextmanager
def listening() -> Iterator[Callable[[], None]]:
    """While inside, gives a function that raises Stopped once a signal has come; a second signal
    acts at once.

    All processes must call the function equally often.
    """
    received: list[str] = []
    signals = (signal.SIGTERM, signal.SIGINT)

    def note(number, _):
        received.append(signal.Signals(number).name)
        os.write(
            2, f"{received[0]}: ending at the next phase; send it again to end at once\n".encode()
        )
        for known, handler in before.items():
            signal.signal(known, handler)

    def check():
        if name := multihost.first_nonempty("".join(received[:1])):
            raise Stopped(name)

    before = {number: signal.getsignal(number) for number in signals}
    for number in signals:
        signal.signal(number, note)
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
