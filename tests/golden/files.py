"""One golden file: its config, and which of its arrays have been used as an input or compared as an
output.
"""

import json
from functools import cached_property
from pathlib import Path

import numpy as np

WEIGHTS = "dit_weights.npz"  # MANIFEST: rollout files name no weights, they use this one


class GoldenFile:
    """Read-only view of one .npz of a golden folder."""

    def __init__(self, path: Path):
        self.path = path
        with np.load(path, allow_pickle=False) as archive:
            self._arrays = {name: archive[name] for name in archive.files}
        self._config = self._arrays.pop("config", None)
        self._used: set[str] = set()

    def __contains__(self, key: str) -> bool:
        """Whether the file holds the array `key`, or, for a key that ends with '/', any under
        it.
        """
        return bool(self.keys(key)) if key.endswith("/") else key in self._arrays

    def __getitem__(self, key: str) -> np.ndarray:
        """The array `key`, from now on counted as used."""
        self._used.add(key)
        return self._arrays[key]

    @cached_property
    def config(self) -> dict:
        """The settings under which the reference ran ({} for a file of bare weights)."""
        return {} if self._config is None else json.loads(str(self._config))

    def keys(self, prefix: str = "") -> list[str]:
        """Names that start with `prefix`, in file order."""
        return [key for key in self._arrays if key.startswith(prefix)]

    def groups(self, prefix: str = "") -> list[str]:
        """The distinct names of the path segment that follows `prefix`, in file order."""
        return list(
            dict.fromkeys(name.split("/")[0] for name in self.suffixes(prefix) if "/" in name)
        )

    def suffixes(self, prefix: str) -> list[str]:
        """What follows `prefix` in the names that start with it."""
        return [key[len(prefix) :] for key in self.keys(prefix)]

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """{name without `prefix`: array} of all arrays under it, counted as used."""
        return {name: self[prefix + name] for name in self.suffixes(prefix)}

    def unused(self) -> list[str]:
        """Arrays that nobody has read or compared."""
        return [key for key in self._arrays if key not in self._used]

    def dit_weights(self) -> dict[str, np.ndarray]:
        """The tensors of the DiT this file was made with, from the same folder."""
        with np.load(
            self.path.parent / self.config.get("weights", WEIGHTS), allow_pickle=False
        ) as archive:
            return {name: archive[name] for name in archive.files if name != "config"}
