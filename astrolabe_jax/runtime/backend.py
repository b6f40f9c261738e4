"""The kind of the devices that programs are traced for: those that are here, or planned ones."""

import contextlib
import contextvars
import resource
from collections.abc import Iterator

import jax

_PLANNED: contextvars.ContextVar[str] = contextvars.ContextVar("planned", default="")
# Settings of JAX that change the numbers, of a run that goes on too.
FIXED = {
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_enable_x64": False,
}
PRECISION = "jax_default_matmul_precision"


@contextlib.contextmanager
def settings_kept() -> Iterator[list[str]]:
    """Set back what is changed within of the settings that change the numbers; give their names,
    which are there afterwards.
    """
    before = {name: getattr(jax.config, name) for name in (*FIXED, PRECISION)}
    changed: list[str] = []
    try:
        yield changed
    finally:
        for name, value in before.items():
            if getattr(jax.config, name) != value:
                changed.append(name)
                jax.config.update(name, value)


def current() -> str:
    """Return 'cpu', 'gpu' or 'tpu'."""
    return _PLANNED.get() or jax.default_backend()


@contextlib.contextmanager
def planned(kind: str) -> Iterator[None]:
    """Let programs choose, within, what they would on devices of this kind.

    What JAX has traced for another kind before would be taken: clear its caches.
    """
    before = _PLANNED.set(kind)
    try:
        yield
    finally:
        _PLANNED.reset(before)


def peak_bytes() -> int:
    """Return the most bytes that were in use so far, of a device if it tells, or of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
