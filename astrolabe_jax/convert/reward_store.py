"""A reward directory: the net of a reward, as its conversion wrote it and its scorer loads it.

config.json  the kind of reward, the sizes of its net, and the sha256 of each file that it was made
             of
weights/     the net, an Orbax store (store.py)
and the texts that the reward needs beside it, such as tokenizer.json
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from astrolabe_jax import sharding
from astrolabe_jax.convert import engine, store
from astrolabe_jax.convert.parts import Net
from astrolabe_jax.convert.weights import read_weights
from astrolabe_jax.models import layers
from astrolabe_jax.runtime.files import read_json, write_atomic

CONFIG, WEIGHTS = "config.json", "weights"
DTYPES = ("float32", "bfloat16")  # of the activations
_NUMERICS = ("dtype", "param_dtype")  # a run chooses these


class Kind(NamedTuple):
    """What the net of a kind of reward is, and how its published files are read."""

    name: str
    module: type[nnx.Module]  # made of (config, rngs)
    published: Any  # its config, whose sizes give way to those of the tensors
    # Of those that `open_checkpoint` opens: the tensors of the files -> those of `table`,
    prepare: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    # fields of the config, as the tensors of `prepare` have them,
    sizes: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda tensors: {}
    table: Callable[[Any], list[engine.Rule]] = lambda config: []


class Checkpoint(NamedTuple):
    """A net whose names and shapes are checked, and of which nothing is read."""

    config: Any
    stacks: dict[tuple, engine.Stack]  # leaves by their paths, as store.save takes them


@functools.cache
def shapes(module: type[nnx.Module], config: Any) -> Net:
    """The net of these sizes, with shapes and dtypes in place of its parameters: none is
    allocated.
    """
    return Net(*layers.graphdef_of(lambda: module(config, nnx.Rngs(0))), config)


def open_checkpoint(kind: Kind, paths: Sequence[Path], dtype: str = "") -> Checkpoint:
    """Opens the published files of a kind, in any order. dtype: of the leaves, by default the
    file's.

    Every tensor must be used, or dropped by its name in `kind.prepare`, and every leaf filled: else
    engine.ConversionError lists the culprits. Raises ValueError naming the file for one that is not
    whole, or OSError.
    """
    tensors = _tensors(paths)
    try:
        tensors = kind.prepare(tensors)
        config = dataclasses.replace(kind.published, **kind.sizes(tensors))
        rules, expected = kind.table(config), shapes(kind.module, config).params
        engine.check(engine.source_shapes(rules, expected), tensors)
        if dtype:
            expected = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), expected
            )
        else:
            expected = engine.with_dtypes(rules, tensors, expected)
        return Checkpoint(config, engine.stacks(rules, tensors, expected))
    except ValueError as error:
        raise type(error)(f"{', '.join(map(str, paths))}: {error}") from None


def _tensors(paths: Sequence[Path]) -> dict[str, Any]:
    """The tensors of all files by plain name; ValueError where two have the same one."""
    found: dict[str, Any] = {}
    for path in paths:
        tensors = read_weights(path)
        if twice := sorted(set(tensors) & set(found)):
            raise ValueError(
                f"{path} holds {twice[0]}, as does another of the files; give each file once"
            )
        found |= tensors
    return found


def write(
    to: Path,
    kind: Kind,
    checkpoint: Checkpoint,
    sources: Sequence[Path],
    texts: Mapping[str, bytes] | None = None,
    progress: Callable[[int], None] = lambda count: None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Writes a reward directory; config.json, without which it is none, comes last.

    sources: the files that the checkpoint was made of. texts: what to put beside it, by file name.
    facts: what else its scorer wants to know. Raises FileExistsError if there is one, or OSError.
    """
    check_new(to)
    digests = {}
    for path in sources:
        with open(path, "rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    to.mkdir(parents=True, exist_ok=True)
    for name, content in (texts or {}).items():
        write_atomic(to / name, content)
    store.save(to / WEIGHTS, checkpoint.stacks, progress)
    content = {"kind": kind.name, "net": _sizes(checkpoint.config), "sources": digests}
    content |= {"dtypes": sorted({str(stack.dtype) for stack in checkpoint.stacks.values()})}
    content |= {"facts": dict(facts)} if facts else {}
    write_atomic(to / CONFIG, json.dumps(content, indent=2).encode())


def check_new(to: Path) -> None:
    """FileExistsError if `to` holds a reward, or what a conversion that was stopped has left of
    one.
    """
    if (to / CONFIG).exists() or (to / WEIGHTS).exists():
        raise FileExistsError(f"{to} holds a reward already; remove it or give another --to")


def facts(directory: Path) -> dict[str, Any]:
    """What `write` was told besides; empty where that was nothing."""
    found = read_json(directory / CONFIG).get("facts", {})
    if not isinstance(found, dict):
        raise ValueError(f"{directory / CONFIG}: facts are no object; convert it again")
    return found


def identity(directory: Path) -> str:
    """A hash of what the directory was made of."""
    return hashlib.sha256((directory / CONFIG).read_bytes()).hexdigest()


def read(directory: Path, kind: Kind, mesh: Mesh, dtype: str) -> Net:
    """The net of a reward directory, its parameters in their stored dtypes on the mesh; it computes
    in `dtype`.

    Each is placed before the next is read. Raises FileNotFoundError, or ValueError naming the file
    and the field, for what is damaged or no directory of this kind.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected {' or '.join(DTYPES)}")
    config = _config(directory / CONFIG, kind, dtype)
    net, path = shapes(kind.module, config), directory / WEIGHTS
    if not store.is_store(path):
        raise FileNotFoundError(f"no whole Orbax store {path}; convert the reward again")
    try:
        leaves = engine.flatten(store.tree(store.open_leaves(path), net.params))
    except store.StoreError as error:
        raise store.StoreError(f"{path}: {error}") from None
    placed = (
        (where, sharding.shard_param(mesh, where, np.asarray(leaf)))
        for where, leaf in leaves.items()
    )
    return net._replace(params=engine.nested(placed))


def planned(directory: Path, kind: Kind, mesh: Any) -> Any:
    """The shapes of the parameters that `read` would place on a mesh, whose devices need not exist.

    Without a directory they are those of the published files.
    """
    path = directory / CONFIG
    config = _config(path, kind, DTYPES[0]) if path.exists() else kind.published
    return sharding.shard_params(mesh, shapes(kind.module, config).params)


def _config(path: Path, kind: Kind, dtype: str) -> Any:
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}; expected a directory that `python -m astrolabe_jax.convert reward "
            f"{kind.name}` has written"
        )
    content = read_json(path)
    if content.get("kind") != kind.name:
        raise ValueError(
            f"{path} is of the kind {content.get('kind')!r}; expected {kind.name!r}: give another "
            "path"
        )
    sizes = content.get("net") if isinstance(content.get("net"), dict) else {}
    known = set(_sizes(kind.published))
    if odd := sorted(known ^ set(sizes)):
        raise ValueError(
            f"{path}: fields of net that are missing or unknown: {', '.join(odd)}; convert it again"
        )
    try:
        sizes = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in sizes.items()
        }
        return dataclasses.replace(kind.published, **sizes, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; convert it again") from None


def _sizes(config: Any) -> dict[str, Any]:
    return {
        name: value for name, value in dataclasses.asdict(config).items() if name not in _NUMERICS
    }
