"""Reward directories: the net of a reward, as its conversion wrote it and its scorer loads it.

config.json  the kind of reward, the sizes of its net, and the sha256 of each file that it was made
             of
weights/     the net, an Orbax store (convert/store.py)
and the texts that the reward needs beside it, such as tokenizer.json
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from astrolabe_jax import sharding
from astrolabe_jax.convert import engine, nets, store
from astrolabe_jax.convert.nets import Net, NetSpec
from astrolabe_jax.runtime.files import read_json, write_atomic

CONFIG = "config.json"
WEIGHTS = "weights"
DTYPES = ("float32", "bfloat16")  # of the activations


class PublishedFiles(NamedTuple):
    """The files of a reward model that a user has, and how its leaves are to be stored."""

    weights: tuple[Path, ...]
    tokenizer: Path | None = None  # tokenizer.json, or the folder that holds it
    # the official package, or the module of it that holds the template
    template: Path | None = None
    dtype: str = ""  # of the leaves; by default the file's
    quantised: bool = False  # kernels as int8

    def require(self, kind: str, option: str, description: str) -> Path:
        """Return the path of an option; ValueError says what it is, where it is not given."""
        path = getattr(self, option)
        if path is None:
            raise ValueError(f"{kind} needs --{option}: {description}")
        return path

    def refuse(self, kind: str, *options: str) -> None:
        """Raise ValueError if one of the options is given: this kind of reward takes none."""
        if needless := [f"--{option}" for option in options if getattr(self, option)]:
            raise ValueError(f"{kind} takes no {', '.join(needless)}")


class RewardContents(NamedTuple):
    """What a conversion makes of published files: all that a reward directory holds."""

    spec: NetSpec
    config: Any  # of the net
    stacks: Mapping[tuple, engine.Stack]  # leaves by their paths; none is read yet
    sources: tuple[Path, ...]  # the files it is made of
    texts: Mapping[str, bytes] = {}  # by file name, to stand beside the net
    facts: Mapping[str, Any] = {}  # what else the scorer wants to know


def contents_of(spec: NetSpec, published: PublishedFiles) -> RewardContents:
    """Return the contents for a net that `nets.open_files` opens, without texts and facts."""
    checkpoint = nets.open_files(spec, published.weights)
    with nets.naming_files(*published.weights):
        stacks = nets.stacks(checkpoint, published.dtype)
    return RewardContents(
        spec,
        checkpoint.config,
        stacks,
        tuple(file for path in published.weights for file in nets.with_shards(path)),
    )


def write(
    to: Path, contents: RewardContents, progress: Callable[[int], None] = lambda count: None
) -> None:
    """Write a reward directory; config.json, without which it is none, comes last.

    Args:
      to: the directory.
      contents: what it holds.
      progress: called with the bytes of each piece that is written.

    Raises:
      FileExistsError: if there is one already, or the remains of a stopped conversion.
      OSError: if a file cannot be read or written.
    """
    if (to / CONFIG).exists() or (to / WEIGHTS).exists():
        raise FileExistsError(f"{to} holds a reward already; remove it or give another --to")
    digests = {}
    for path in contents.sources:
        with open(path, "rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    to.mkdir(parents=True, exist_ok=True)
    for name, text in contents.texts.items():
        write_atomic(to / name, text)
    store.save(to / WEIGHTS, contents.stacks, progress)
    facts = {"facts": dict(contents.facts)} if contents.facts else {}
    described = {
        "kind": contents.spec.name,
        "net": nets.sizes_of(contents.config),
        "sources": digests,
        "dtypes": sorted({str(stack.dtype) for stack in contents.stacks.values()}),
        **facts,
    }
    write_atomic(to / CONFIG, json.dumps(described, indent=2).encode())


def facts(directory: Path) -> dict[str, Any]:
    """Return the facts that `write` was given."""
    content = read_json(directory / CONFIG).get("facts", {})
    if not isinstance(content, dict):
        raise ValueError(f"{directory / CONFIG}: facts are no object; convert it again")
    return content


def identity(directory: Path) -> str:
    """Return a hash of what the directory was made of."""
    return hashlib.sha256((directory / CONFIG).read_bytes()).hexdigest()


def read(directory: Path, spec: NetSpec, mesh: Mesh, dtype: str) -> Net:
    """Return the net of a reward directory, which computes in `dtype`.

    Its parameters have their stored dtypes, and are on the mesh: each is placed before the next is
    read.

    Raises:
      FileNotFoundError: if there is no whole directory.
      ValueError: naming the file and the field, for what is damaged or of another kind.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected {' or '.join(DTYPES)}")
    net = nets.shapes(spec, _read_config(directory / CONFIG, spec, dtype))
    path = directory / WEIGHTS
    _require_store(path)
    with nets.naming_files(path):
        leaves = store.tree(store.open_leaves(path), net.params)
    return net._replace(params=sharding.shard_params(mesh, leaves))


def check(directory: Path, spec: NetSpec) -> None:
    """Raise, as `read` does, for what is no whole directory of this net; no weights are read."""
    _read_config(directory / CONFIG, spec, DTYPES[0])
    _require_store(directory / WEIGHTS)


def _require_store(path: Path) -> None:
    if not store.is_store(path):
        raise FileNotFoundError(f"no whole Orbax store {path}; convert the reward again")


def planned(directory: Path, spec: NetSpec, mesh: Any, dtype: str = DTYPES[0]) -> Net:
    """Return the net that `read` would, with shapes in place of its parameters.

    The devices of the mesh need not exist. Without a directory, sizes are those of the published
    files.
    """
    path = directory / CONFIG
    there = path.exists()
    config = (
        _read_config(path, spec, dtype)
        if there
        else nets.make_config(
            spec,
            nets.sizes_of(spec.published),
            dtype=dtype,
            param_dtype=spec.published.param_dtype,
        )
    )
    net = nets.shapes(spec, config)
    return net._replace(params=sharding.shard_params(mesh, net.params))


def _read_config(path: Path, spec: NetSpec, dtype: str) -> Any:
    """Return the config of a directory's net, with the numerics of a run."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}; expected a directory that `python -m astrolabe_jax.convert reward "
            f"{spec.name}` has written"
        )
    content = read_json(path)
    if content.get("kind") != spec.name:
        raise ValueError(
            f"{path} is of the kind {content.get('kind')!r}; expected {spec.name!r}: give another "
            "path"
        )
    sizes = content["net"] if isinstance(content.get("net"), dict) else {}
    if odd := sorted(set(nets.sizes_of(spec.published)) ^ set(sizes)):
        raise ValueError(
            f"{path}: fields of net that are missing or unknown: {', '.join(odd)}; convert it again"
        )
    try:
        return nets.make_config(spec, sizes, dtype=dtype, param_dtype=spec.published.param_dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; convert it again") from None
