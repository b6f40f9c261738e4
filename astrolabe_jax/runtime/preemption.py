"""A polite end on SIGTERM, SIGHUP and Ctrl-C: the run notices at the next phase, or the next piece
of a long one, saves, and exits.

A signal to one of several processes ends all of them, at the same place.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

from astrolabe_jax.runtime import multihost

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """Somebody asked the run to end; the message is the signal's name."""


@contextlib.contextmanager
def listening() -> Iterator[Callable[[], None]]:
    """Listen to signals while inside; give a function that raises Stopped once one has come.

    All processes must call the function equally often. A second signal ends the process at once. A
    hangup that the program was started to ignore (nohup) stays ignored.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    if handlers[signal.SIGHUP] is signal.SIG_IGN:
        del handlers[signal.SIGHUP]
    received: list[str] = []

    def note(number, _):
        name = signal.Signals(number).name
        if received:
            _say(f"{name}: ended at once; what was saved before stays")
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(name)
        _say(f"{name}: ending at the next phase; send it again to end at once")

    def check():
        name = multihost.first_nonempty(received[0] if received else "")
        if name:
            raise Stopped(name)

    for number in handlers:
        signal.signal(number, note)
    try:
        yield check
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    """Write a line to the standard error, if anybody reads it.

    Not by print, which the signal may have interrupted.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())
