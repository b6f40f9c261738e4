"""The kind of the devices that programs are traced for: those that are here, or planned ones."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_PLANNED: contextvars.ContextVar[str] = contextvars.ContextVar("planned", default="")


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
