"""Adapters <-> tensors under the names of PEFT, as files of adapters hold them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from astrolabe_jax.convert import engine, lora


def from_peft(tensors: Mapping[str, Any], expected: dict) -> dict:
    """Return the adapter tree `expected`, in its dtypes, filled from a PEFT state dict."""
    return engine.load(lora.PEFT, tensors, expected)


def to_peft(adapter: dict) -> dict[str, np.ndarray]:
    """Return the PEFT state dict of an adapter: the exact inverse of `from_peft`."""
    return {name: np.asarray(half) for name, half in engine.tensors(lora.PEFT, adapter).items()}
