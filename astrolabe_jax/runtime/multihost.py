"""Several processes of one run: they start together, share what only one of them knows, and end
together.

Every process runs the same program on the same files (a file system that all of them see) and joins
the same computations in the same order. So whatever decides what comes next must be equal on all of
them: a signal, an error or the content of a file that one process has met goes through a function
of this module, which all of them call. With one process these functions do nothing.
"""

import collections
import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

import astrolabe_jax
from astrolabe_jax.runtime import roll_call

# Seconds that a failing process gives the others to fail as well. Process 0 waits twice as long:
# none lives without it.
_GRACE = 1.0

_APART = "apart"  # name of the threads of `start_apart`
# Seconds that JAX may take to join processes that have met.
_LEAST_WAIT = 60
_LONGEST_WAIT = 1_000_000  # seconds that --join_timeout may be
_PACKAGE = Path(__file__).parents[1]
# Packages that compute, or hold the code that does.
_LIBRARIES = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax-checkpoint")
# What JAX raises where a backend is not there.
_NO_BACKEND = (RuntimeError, AssertionError)
# Flags of XLA that may differ: where it writes, and how many devices a CPU is, which is looked at.
_HARMLESS = re.compile(r"--xla_(dump|force_host_platform_device_count)")


class PeerError(OSError):
    """Another process has failed; the message is its number and its error."""


def join(
    distributed: bool,
    coordinator: str | None,
    count: int | None,
    index: int | None,
    limit: float = 300.0,
) -> None:
    """Join the other processes of a run, and return when all are there and were started alike.

    Must be called before the first array exists. Without any argument there is one process, and
    only its devices are looked at.

    Args:
      distributed: whether the pod or cluster, one that jax.distributed knows, says where the others
        are; otherwise the next three do.
      coordinator: HOST:PORT of process 0, at which the others find it.
      count: the number of processes.
      index: the number of this process, from 0.
      limit: seconds in which all must have come, at most _LONGEST_WAIT.

    Raises:
      ValueError: if flags are missing or wrong, naming them, if the others are not found, or if
        there are no devices, or unequal ones.
      PeerError: if another process has other code or another environment.
    """
    flags = {"--coordinator": coordinator, "--processes": count, "--process": index}
    missing = [flag for flag, value in flags.items() if value is None]
    alone = not distributed and len(missing) == len(flags)
    if count is not None and count < 1:
        raise ValueError(f"--processes is {count}; expected how many there are, at least 1")
    if not 0 <= limit <= _LONGEST_WAIT:  # nor nan
        raise ValueError(
            f"--join_timeout is {limit:g}; expected seconds, from 0 to {_LONGEST_WAIT:,}"
        )
    if 0 < len(missing) < len(flags):
        raise ValueError(
            f"{', '.join(missing)} missing; several processes take {', '.join(flags)}, all of them"
        )
    if count is not None and index is not None and not 0 <= index < count:
        raise ValueError(
            f"--process is {index}; expected a number from 0 to --processes - 1, {count - 1}"
        )
    with contextlib.ExitStack() as stack:
        if coordinator is not None and count is not None and index is not None:
            stack.enter_context(roll_call.meet(coordinator, count, index, limit))
        if not alone:
            # It would take SIGTERM, which preemption.py listens to.
            jax.config.update("jax_enable_preemption_service", False)
            # it would warn of proxies, which roll_call.py keeps away
            jax.config.update("jax_check_proxy_envs", False)
            try:
                wait = max(int(limit), _LEAST_WAIT)
                jax.distributed.initialize(coordinator, count, index, initialization_timeout=wait)
            except (ValueError, RuntimeError) as error:
                reason = (
                    f"no cluster was found ({error}); start every process with {', '.join(flags)}"
                    if missing
                    else f"the others were not found: {error}"
                )
                raise ValueError(f"--distributed: {reason}") from None
        find_devices()
    if not alone:
        _refuse_unequal_devices()
        refuse_differences(_environment())


def find_devices() -> None:
    """Raise ValueError unless JAX finds the devices that it is asked for."""
    try:
        jax.devices()
    except _NO_BACKEND as error:
        reason = " ".join(str(error).split())[:300] or "JAX does not find such devices here"
        raise ValueError(
            f"JAX_PLATFORMS is {jax.config.values['jax_platforms']!r}: {reason}; unset it, set it "
            "to what this machine has, such as cpu, or install JAX for it (.[cuda] or .[tpu])"
        ) from None


def _refuse_unequal_devices() -> None:
    """Raise ValueError, on all processes, unless each has equally many devices."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    usual = counts[0]
    for index, number in sorted(counts.items()):
        if number != usual:
            raise ValueError(
                f"process {index} has {number} device{'s'[: number != 1]} and process 0 has "
                f"{usual}; expected equally many in each (this is process {jax.process_index()})"
            )


def _environment() -> dict[str, str]:
    """Return what must be equal on all processes, or they would compute different things."""
    code = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        code.update(f"{path.relative_to(_PACKAGE)}\n".encode() + path.read_bytes())
    flags = os.environ.get("XLA_FLAGS", "").split()
    return {
        "the code of astrolabe_jax": f"{astrolabe_jax.__version__}, sha256 {code.hexdigest()[:12]}",
        **{f"the version of {name}": importlib.metadata.version(name) for name in _LIBRARIES},
        "the version of Python": ".".join(map(str, sys.version_info[:2])),
        "XLA_FLAGS": " ".join(sorted(flag for flag in flags if not _HARMLESS.match(flag))),
        "LIBTPU_INIT_ARGS": os.environ.get("LIBTPU_INIT_ARGS", ""),
        "JAX_DEFAULT_MATMUL_PRECISION": str(jax.config.values["jax_default_matmul_precision"]),
    }


def start_apart(work: Callable[[], None]) -> None:
    """Run `work` on a thread of its own, which `exit_together` does not wait for."""
    threading.Thread(target=work, name=_APART, daemon=True).start()


def _works_apart() -> bool:
    return any(thread.name == _APART for thread in threading.enumerate())


@contextlib.contextmanager
def exit_together() -> Iterator[None]:
    """End this process at once on an error or an exit inside, and with it the others.

    At its ordinary end jax.distributed would wait for the others, and they for this one's part of a
    computation. When a process is gone the others fail: those in a computation with it by an error
    (at once on CPUs), all others when jax.distributed misses it, at once if it was process 0, else
    after about 100 seconds.

    One process ends as it would without this, but at once while a thread of `start_apart` works:
    calls of JAX that go on while Python ends would crash it (status 134 or 139).
    """
    several = jax.distributed.is_initialized
    try:
        yield
        roll_call.leave()
    except BaseException as error:
        roll_call.leave()
        if not several() and not _works_apart():
            raise
        if several() and _is_of_others(error):
            print(
                f"error: process {jax.process_index()} cannot go on; has another process ended? "
                f"{str(error).splitlines()[0]}",
                file=sys.stderr,
            )
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        _end(error.code if isinstance(error, SystemExit) else 1, _GRACE if several() else 0.0)
    if _works_apart():
        if several():
            jax.distributed.shutdown()  # waits for the others
        _end(0)


def _is_of_others(error: BaseException) -> bool:
    """Return whether JAX raises an error in a computation where another process is gone.

    It is a ValueError of Gloo's, on CPUs, where a program is not waited for but called.
    """
    return isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)


def _end(status: Any, grace: float = 0.0) -> NoReturn:
    """End this process without what Python does at its end; process 0 gives twice the grace."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
            stream.flush()
    time.sleep(2 * grace if grace and _is_primary() else grace)
    os._exit(status if isinstance(status, int) else int(status is not None))


def _is_primary() -> bool:
    """Return whether this is process 0; one without devices counts as another."""
    try:
        return jax.process_index() == 0
    except _NO_BACKEND:
        return False


def first_nonempty(text: str) -> str:
    """Return the first text of any process, in their order, that is not empty; or an empty one.

    `text` is this process's. All processes call it, and get the same.
    """
    if jax.process_count() == 1:
        return text
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = _gathered(np.int32(len(content)))
    if not sizes.any():
        return ""
    # Filled up to a power of two: few lengths mean few compiled programs.
    padded = np.zeros(1 << max(int(sizes.max()) - 1, 1).bit_length(), np.uint8)
    padded[: len(content)] = content
    rows = _gathered(padded)
    first = int(np.argmax(sizes > 0))
    return rows[first, : sizes[first]].tobytes().decode()


def _gathered(array: Any) -> np.ndarray:
    """Return the arrays of all processes, [processes, ...]; JaxRuntimeError if one is gone."""
    try:
        return multihost_utils.process_allgather(array)
    except ValueError as error:  # so that nobody takes it for a fault of the user's
        raise jax.errors.JaxRuntimeError(str(error)) from None


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


def refuse_differences(mine: Mapping[str, Any]) -> None:
    """Raise ValueError unless what JSON can hold of this process is equal on process 0.

    They would compute different things together. All processes call it; the others get a
    PeerError.
    """
    first = on_primary(lambda: dict(mine))

    def compare() -> None:
        for name in sorted({*first, *mine}):
            if first.get(name) != mine.get(name):
                raise ValueError(
                    f"{name} is {mine.get(name)!r} here and {first.get(name)!r} in process 0; "
                    "start all processes alike"
                )

    on_all(compare)
