"""Several processes of one run: they start together, agree on what only one of them knows, and end
together.

Every process runs the same program on the same files (a file system that all of them see) and joins
the same computations in the same order. So whatever decides what comes next must be equal on all of
them: a signal, an error or the content of a file that one has met goes through a function of this
module, which all of them call. With one process these functions do nothing.
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

# seconds for the others to meet the same end; then process 0, without which none lives, may go
_GRACE = 1.0


class PeerError(OSError):
    """Another process has failed; the message is its number and what it said."""


def join(distributed: bool, coordinator: str | None, count: int | None, index: int | None) -> None:
    """Joins the other processes of a run; to be called before the first array exists. Returns when
    all are there.

    distributed: a pod or a cluster that jax.distributed knows says where the others are; else all
    of coordinator (HOST:PORT of process 0, at which the others find it), count and index (from 0)
    do. None of the four: one process. Raises ValueError, naming the flags.
    """
    given = {"--coordinator": coordinator, "--processes": count, "--process": index}
    missing = [flag for flag, value in given.items() if value is None]
    if len(missing) == len(given):
        if not distributed:
            return
    elif missing:
        raise ValueError(
            f"{', '.join(missing)} missing; several processes take {', '.join(given)}, all of them"
        )
    elif not 0 <= index < count:
        raise ValueError(
            f"--process is {index}; expected a number from 0 to --processes - 1, {count - 1}"
        )
    # It would take SIGTERM, which stop.py listens to.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, count, index)
    except (ValueError, RuntimeError) as error:
        advice = f"start every process with {', '.join(given)}"
        what = (
            f"no cluster was found ({error}); {advice}"
            if missing
            else f"the others were not found: {error}"
        )
        raise ValueError(f"--distributed: {what}") from None


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """An error or an exit inside ends this process at once, and with it the others.

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
            reason = str(error).splitlines()[0]
            told = (
                f"process {jax.process_index()} cannot go on; has another process ended? {reason}"
            )
            print(f"error: {told}", file=sys.stderr)
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(_GRACE if jax.process_index() else 2 * _GRACE)
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def anywhere(text: str) -> str:
    """The first text of any process that is not empty; `text` is this one's."""
    if jax.process_count() == 1:
        return text
    mine = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    if not sizes.any():
        return ""
    rows = multihost_utils.process_allgather(_padded(mine, sizes.max()))
    first = int(np.argmax(sizes > 0))
    return rows[first, : sizes[first]].tobytes().decode()


def together(action: Callable[[], Any]) -> Any:
    """action() on every process, which must not compute with the others; an error on one is an
    error on all.

    Raises what action raised here, and PeerError on the other processes.
    """
    result = raised = None
    try:
        result = action()
    except Exception as error:
        raised = error
    told = anywhere(
        f"process {jax.process_index()}: {raised or type(raised).__name__}"
        if raised is not None
        else ""
    )
    if raised is not None:
        raise raised
    if told:
        raise PeerError(told)
    return result


def by_first(action: Callable[[], Any]) -> Any:
    """The result, which JSON can hold, of action() on process 0, on all processes; the others wait
    for it.

    Raises what action raised on process 0, and PeerError on the other processes.
    """
    if jax.process_count() == 1:
        return action()
    result = raised = None
    if jax.process_index() == 0:
        try:
            result = action()
        except Exception as error:
            raised = error
    message = {"error": f"process 0: {raised}"} if raised is not None else {"result": result}
    content = np.frombuffer(json.dumps(message).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    sent = multihost_utils.broadcast_one_to_all(_padded(content[:size], size))
    if raised is not None:
        raise raised
    if jax.process_index() == 0:
        return result
    message = json.loads(sent[:size].tobytes())
    if "error" in message:
        raise PeerError(message["error"])
    return message["result"]


def _padded(content: np.ndarray, size: int) -> np.ndarray:
    """Bytes filled up to the power of two that holds `size`: few lengths, few compiled programs."""
    padded = np.zeros(1 << max(int(size) - 1, 1).bit_length(), np.uint8)
    padded[: len(content)] = content
    return padded
