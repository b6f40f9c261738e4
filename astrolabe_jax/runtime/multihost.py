"""Several processes of one run: they start together, share what only one of them knows, and end
together.

Every process runs the same program on the same files (a file system that all of them see) and joins
the same computations in the same order. So whatever decides what comes next must be equal on all of
them: a signal, an error or the content of a file that one process has met goes through a function
of this module, which all of them call. With one process these functions do nothing.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

# Seconds that a failing process gives the others to fail as well. Process 0 waits twice as long:
# none lives without it.
_GRACE = 1.0


class PeerError(OSError):
    """Another process has failed; the message is its number and its error."""


def join(distributed: bool, coordinator: str | None, count: int | None, index: int | None) -> None:
    """Join the other processes of a run, and return when all are there.

    Must be called before the first array exists. Without any argument there is one process, and
    nothing is done.

    Args:
      distributed: whether the pod or cluster, one that jax.distributed knows, says where the others
        are; otherwise the next three do.
      coordinator: HOST:PORT of process 0, at which the others find it.
      count: the number of processes.
      index: the number of this process, from 0.

    Raises:
      ValueError: if flags are missing or wrong, naming them, or if the others are not found.
    """
    flags = {"--coordinator": coordinator, "--processes": count, "--process": index}
    missing = [flag for flag, value in flags.items() if value is None]
    if not distributed and len(missing) == len(flags):
        return
    if 0 < len(missing) < len(flags):
        raise ValueError(
            f"{', '.join(missing)} missing; several processes take {', '.join(flags)}, all of them"
        )
    if count is not None and index is not None and not 0 <= index < count:
        raise ValueError(
            f"--process is {index}; expected a number from 0 to --processes - 1, {count - 1}"
        )
    # It would take SIGTERM, which preemption.py listens to.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, count, index)
    except (ValueError, RuntimeError) as error:
        reason = (
            f"no cluster was found ({error}); start every process with {', '.join(flags)}"
            if missing
            else f"the others were not found: {error}"
        )
        raise ValueError(f"--distributed: {reason}") from None


@contextlib.contextmanager
def exit_together() -> Iterator[None]:
    """End this process at once on an error or an exit inside, and with it the others.

    At its ordinary end jax.distributed would wait for the others, and they for this one's part of a
    computation. When a process is gone the others fail: those in a computation with it by an error
    (at once on CPUs), all others when jax.distributed misses it, at once if it was process 0, else
    after about 100 seconds.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            print(
                f"error: process {jax.process_index()} cannot go on; has another process ended? "
                f"{str(error).splitlines()[0]}",
                file=sys.stderr,
            )
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(_GRACE if jax.process_index() else 2 * _GRACE)
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def first_nonempty(text: str) -> str:
    """Return the first text of any process, in their order, that is not empty; or an empty one.

    `text` is this process's. All processes call it, and get the same.
    """
    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(content)))
    if not sizes.any():
        return ""
    # Filled up to a power of two: few lengths mean few compiled programs.
    padded = np.zeros(1 << max(int(sizes.max()) - 1, 1).bit_length(), np.uint8)
    padded[: len(content)] = content
    rows = multihost_utils.process_allgather(padded)
    first = int(np.argmax(sizes > 0))
    return rows[first, : sizes[first]].tobytes().decode()


def on_all(action: Callable[[], Any]) -> Any:
    """Run `action` on every process and return its result; an error on one is an error on all.

    `action` must not compute with the other processes. Raises what it raised here, and PeerError on
    the other processes.
    """
    try:
        result = action()
    except Exception as error:
        first_nonempty(f"process {jax.process_index()}: {error}")
        raise
    fault = first_nonempty("")
    if fault:
        raise PeerError(fault)
    return result


def on_primary(action: Callable[[], Any]) -> Any:
    """Run `action` on process 0 alone, and return its result, which JSON can hold, on all.

    The others wait for it. Raises what `action` raised on process 0, and PeerError on the others.
    """
    if jax.process_count() == 1:
        return action()
    primary = jax.process_index() == 0
    result = on_all(lambda: action() if primary else None)
    text = first_nonempty(json.dumps(result) if primary else "")
    return result if primary else json.loads(text)
