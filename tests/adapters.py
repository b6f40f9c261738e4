"""Adapters <-> tensors under the names of PEFT, as files of adapters hold them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from astrolabe_jax.convert import engine, lora
from astrolabe_jax.models.wan.config import WAN_1_3B
from astrolabe_jax.runtime.files import Lazy


def from_peft(tensors: Mapping[str, Any], expected: dict) -> dict:
    """Return the adapter tree `expected`, in its dtypes, filled from a PEFT state dict."""
    return engine.load(lora.PEFT, tensors, expected)


def to_peft(adapter: dict) -> dict[str, np.ndarray]:
    """Return the PEFT state dict of an adapter: the exact inverse of `from_peft`."""
    return {name: np.asarray(half) for name, half in engine.tensors(lora.PEFT, adapter).items()}


def merge_adapter(params: dict, adapter: dict, scale: float = 1.0) -> dict:
    """Return the parameters with an adapter added to them, as `sample --lora` does."""
    halves = {
        name.removeprefix(lora.PEFT_PREFIX): Lazy(half.shape, half.dtype, lambda half=half: half)
        for name, half in to_peft(adapter).items()
    }
    changes = {
        name.replace("lora_A.", ""): [lora.product(a, halves[name.replace("_A.", "_B.")], scale)]
        for name, a in halves.items()
        if "lora_A" in name
    }
    # No rule but that of the patches, which are the same everywhere, depends on the sizes.
    change = lora.leaf_changer(changes, WAN_1_3B)
    leaves = engine.flatten(params).items()
    return engine.nested(
        (path, change("transformer", path, np.array(leaf))) for path, leaf in leaves
    )
