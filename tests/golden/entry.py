"""What a handler yields, and how a result is compared with the stored output."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np


class Unsupported(Exception):
    """The stored case is one that this code does not run; the runner reports it as a FAIL."""


class Tolerance(NamedTuple):
    """Largest accepted |got - want|, times |want| of the element ('element') or of the array's
    largest ('array').
    """

    value: float
    relative_to: str = "absolute"

    def __str__(self) -> str:
        return f"{self.value:.0e}" + ("" if self.relative_to == "absolute" else " relative")


EXACT = Tolerance(0.0)
FORWARD = Tolerance(2e-5)
ROLLOUT = Tolerance(1e-4)
TABLE = Tolerance(1e-6, "element")  # every value on its own scale
# float32 sums that may cancel: the scale is that of the terms
CONVERSION = Tolerance(1e-6, "array")


class Entry(NamedTuple):
    """One stored output `key`, and how to compute ours; `compute` runs under the runner's
    protection.

    A key that ends with '/' stands for all arrays stored under it: `compute` gives {name: array},
    the worst one counts.
    """

    key: str
    compute: Callable[[], Any]
    tolerance: Tolerance


# what a handler yields: an inner iterator is a group that may fail alone
Entries = Iterator["Entry | Entries"]


def difference(got: Any, want: np.ndarray, tolerance: Tolerance) -> tuple[float, bool, str]:
    """Returns (largest absolute error, accepted, reason of a refusal); text counts its differing
    elements.
    """
    got = np.asarray(got)
    if got.shape != want.shape:
        return np.inf, False, f"shape {got.shape}, expected {want.shape}"
    if want.dtype.kind in "US":
        # of any length: want's would cut ours short
        error = float(np.sum(got.astype(want.dtype.kind) != want))
        return error, error == 0, "" if error == 0 else "text differs"
    if want.size == 0:
        return 0.0, True, ""
    got, want = got.astype(np.float64), want.astype(np.float64)
    same = (got == want) | (np.isnan(got) & np.isnan(want))  # equal infinities included
    with np.errstate(invalid="ignore"):
        error = np.where(same, 0.0, np.nan_to_num(np.abs(got - want), nan=np.inf))
    finite = np.where(np.isfinite(want), np.abs(want), 0.0)
    scale = {"absolute": 1.0, "element": finite, "array": finite.max()}[tolerance.relative_to]
    accepted = bool(np.all(error <= tolerance.value * scale))
    return float(error.max()), accepted, "" if accepted else "outside the tolerance"
