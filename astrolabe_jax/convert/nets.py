"""Describe a net whose weights others publish, and open, measure and check a file of them.

A `NetSpec` is all that the library knows about such a net. The parts of a base (parts.py) and the
nets of rewards (rewards/*/weights.py) are specs, and all of them are read in the same steps:

    open      read_tensors, prepared    tensors by name, none of them read
    measure   format_of, measure        whose names these are, and the sizes that the shapes tell
    check     checked                   NetCheckpoint: every name and shape fits the net
    read      stacks                    leaves of the parameter tree, read one at a time

A format is what names the tensors have: `original` (those of the spec's table) or another writer's,
such as `diffusers`. The names of a file tell its format by the largest overlap, so that a name that
is missing or misspelt is reported in the format of the file.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from astrolabe_jax.convert import engine
from astrolabe_jax.convert.weights import read_weights
from astrolabe_jax.models import layers
from astrolabe_jax.runtime.files import INDEX, Lazy, read_index

ORIGINAL = "original"
# A run chooses these fields of a config; all others are sizes.
NUMERICS = ("dtype", "param_dtype", "remat", "attention")
_PIECE = 1 << 18  # numbers that are looked at together
# By the annotation of a size: what to expect of its value in JSON, and whether a value is that. A
# whole number is a float there, too.
_FIELD_TYPES = {
    int: (
        "a whole number, at least 1 and below 2 to the 31",
        lambda value: type(value) is int and 1 <= value < 1 << 31,
    ),
    float: (
        "a finite number",
        lambda value: type(value) in (int, float) and -math.inf < value < math.inf,
    ),
    bool: ("true or false", lambda value: type(value) is bool),
}


class Net(NamedTuple):
    """A frozen net: what `layers.merge` takes, and its config."""

    graphdef: nnx.GraphDef  # static
    params: dict  # nested, of arrays or ShapeDtypeStructs
    config: Any  # sizes and numerics


@dataclasses.dataclass(frozen=True, eq=False)
class NetSpec:
    """What a net is, and how its published files are read."""

    name: str  # as a command or a config.json names it
    module: Callable[..., nnx.Module]  # makes the net of (config, rngs=...)
    published: Any  # its config at the published sizes
    table: Callable[[Any], list[engine.Rule]]  # config -> names of tensors and leaves
    measure: Callable[[engine.Shapes], dict[str, Any]]  # sizes that the shapes of tensors tell
    # Formats by name: config -> what to put in place of the names in `table`.
    formats: Mapping[str, Callable[[Any], engine.Substitutions]] = dataclasses.field(
        default_factory=lambda: {ORIGINAL: lambda _: ()}
    )
    # Tensors as they are stored -> as the table counts them: without second names of a tensor, and
    # without what the net does not use. Refuses those of a relative.
    prepare: Callable[[Mapping[str, Any]], dict[str, Any]] = dict


class NetCheckpoint(NamedTuple):
    """A net whose tensors are known to fit, and none of which is read."""

    spec: NetSpec
    config: Any
    tensors: dict[str, Any]  # by the names in spec.table, in the dtypes of the file


def shapes(spec: NetSpec, config: Any) -> Net:
    """Return the net of these sizes with a ShapeDtypeStruct for each parameter; allocate none."""
    return _shapes(spec.module, config)


@functools.cache
def _shapes(module: Callable[..., nnx.Module], config: Any) -> Net:
    graphdef, params = layers.graphdef_of(lambda: module(config, rngs=nnx.Rngs(0)))
    return Net(graphdef, params, config)


@functools.cache
def rules(spec: NetSpec, config: Any, form: str = "") -> list[engine.Rule]:
    """Return the conversion table of a net under the names of a format, or as it is."""
    return engine.renamed(spec.table(config), spec.formats[form](config) if form else ())


def source_shapes(spec: NetSpec, config: Any, form: str = "") -> dict[str, engine.Shape]:
    """Return name and shape of every tensor that a file of this net must hold."""
    return engine.source_shapes(rules(spec, config, form), shapes(spec, config).params)


@contextlib.contextmanager
def naming_files(*paths: Path) -> Iterator[None]:
    """Put the names of files in front of the message of a ValueError that is raised inside."""
    try:
        yield
    except ValueError as error:
        raise type(error)(f"{', '.join(map(str, paths))}: {error}") from None


def read_tensors(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the tensors of several files by plain name, as `finite` does; none is read yet.

    Raises:
      ValueError: for a file that cannot be read, or that holds a tensor of another one again.
      OSError: for a file that is not there.
    """
    tensors: dict[str, Any] = {}
    for path in paths:
        content = finite(read_weights(path), path)
        if twice := sorted(set(content) & set(tensors)):
            raise ValueError(
                f"{path} holds {twice[0]}, as does another of the files; give each file once"
            )
        tensors |= content
    return tensors


def with_shards(path: Path) -> list[Path]:
    """Return the files that weights are in: `path` itself, and the shards that an index names."""
    if not path.name.endswith(INDEX):
        return [path]
    return [path, *sorted({path.parent / shard for shard in read_index(path).values()})]


def without_aliases(tensors: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return every tensor under one name.

    Args:
      tensors: by name.
      aliases: second name of a tensor -> its first.

    Raises:
      ConversionError: for a tensor that is there under both names with different values.
    """
    named = dict(tensors)
    for alias in [alias for alias in aliases if alias in tensors]:
        tensor = named.pop(alias)
        first = named.setdefault(aliases[alias], tensor)
        if first is not tensor and _digest(first) != _digest(tensor):
            raise engine.ConversionError(
                f"{alias} and {aliases[alias]} must be the same tensor, but their values differ; "
                "download the file again"
            )
    return named


def _digest(tensor: Any) -> tuple:
    content = np.ascontiguousarray(tensor)
    octets = content.reshape(-1).view(np.uint8)
    return content.shape, content.dtype, hashlib.sha256(octets.data).digest()


def finite(tensors: Mapping[str, Any], path: Path | None = None) -> dict[str, Lazy]:
    """Return tensors that raise ConversionError, with the names of their file, if it is given, and
    of the tensor, where one is read that holds NaN or an infinite number.
    """
    file = f"{path}: " if path else ""

    def check(name: str, tensor: Any) -> np.ndarray:
        content = np.asarray(tensor)
        if not is_finite(content):
            raise engine.ConversionError(
                f"{file}{name} holds numbers that are not finite (NaN or infinite), as a damaged "
                "copy or a run that diverged leaves them; take another file"
            )
        return content

    return {
        name: Lazy(tuple(tensor.shape), tensor.dtype, functools.partial(check, name, tensor))
        for name, tensor in tensors.items()
    }


def is_finite(array: np.ndarray) -> bool:
    """Return whether no number of an array is NaN or infinite, with no copy of the whole.

    Of a float that is neither, some bit of the exponent is not set.
    """
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    bits = f"u{array.dtype.itemsize}"
    exponent = np.array(np.inf, array.dtype).view(bits)
    pieces = np.nditer(
        array.view(bits),
        ["external_loop", "buffered", "zerosize_ok"],
        buffersize=_PIECE,
    )
    return all(np.bitwise_and(piece, exponent).max(initial=0) < exponent for piece in pieces)


def overlap(spec: NetSpec, form: str, tensors: Mapping[str, Any]) -> int:
    """Return how many of the names are those of a net in one of its formats."""
    return engine.overlap(rules(spec, spec.published, form), tensors)


def format_of(spec: NetSpec, tensors: Mapping[str, Any]) -> str:
    """Return the format that has most of these names."""
    return max(spec.formats, key=lambda form: overlap(spec, form, tensors))


def measure(spec: NetSpec, form: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return those sizes of a net that the shapes of its tensors tell."""
    return spec.measure(engine.Shapes(tensors, spec.formats[form](spec.published)))


def checked(spec: NetSpec, config: Any, form: str, tensors: Mapping[str, Any]) -> NetCheckpoint:
    """Return the checkpoint that prepared tensors make, under the names of the spec's table.

    Raises:
      ConversionError: listing every tensor that is missing, unused or of another shape.
    """
    stored = source_shapes(spec, config, form)
    engine.check(stored, tensors)
    plain = source_shapes(spec, config)
    return NetCheckpoint(
        spec,
        config,
        {name: tensors[theirs] for name, theirs in zip(plain, stored, strict=True)},
    )


def open_files(spec: NetSpec, paths: Sequence[Path]) -> NetCheckpoint:
    """Open the published files of a net, in any order.

    Sizes are those of the tensors; what they do not tell is as in `spec.published`.

    Raises:
      ConversionError: naming the files and every tensor at fault.
      ValueError: naming a file that is not whole.
      OSError: for a file that is not there.
    """
    tensors = read_tensors(paths)
    with naming_files(*paths):
        tensors = spec.prepare(tensors)
        form = format_of(spec, tensors)
        config = dataclasses.replace(spec.published, **measure(spec, form, tensors))
        return checked(spec, config, form, tensors)


def stacks(checkpoint: NetCheckpoint, dtype: str = "") -> dict[tuple, engine.Stack]:
    """Return the leaves of a checkpoint by their paths in the parameter tree; none is read.

    Args:
      checkpoint: what to read.
      dtype: of all leaves; by default that of the file, which then must be one for all layers.
    """
    spec, config, tensors = checkpoint
    table = rules(spec, config)
    expected = shapes(spec, config).params
    if dtype:
        expected = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), expected
        )
    else:
        expected = engine.with_dtypes(table, tensors, expected)
    return engine.stacks(table, tensors, expected)


def sizes_of(config: Any) -> dict[str, Any]:
    """Return the fields of a config that are sizes, as its config.json gives them."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in NUMERICS}


def field_faults(spec: NetSpec, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each value that is unknown, or not of its field's annotated type."""
    types = {field.name: field.type for field in dataclasses.fields(spec.published)}
    known = [name for name in types if name not in NUMERICS]
    for name, value in values.items():
        if name not in known:
            yield f"{spec.name}.{name} is unknown; expected {', '.join(known)}"
            continue
        # tuple[int, ...] has arguments, int has none
        kind, *more = get_args(types[name]) or (types[name],)
        expected, fits = _FIELD_TYPES[kind]
        if more and not (isinstance(value, list | tuple) and all(map(fits, value))):
            yield f"{spec.name}.{name} is {value!r}; expected a list, each entry {expected}"
        elif not more and not fits(value):
            yield f"{spec.name}.{name} is {value!r}; expected {expected}"


def make_config(spec: NetSpec, values: Mapping[str, Any], **numerics) -> Any:
    """Return a net's config.

    Args:
      spec: of the net.
      values: its sizes, as in a config.json.
      **numerics: other fields; those that this config does not have are left out.

    Raises:
      ValueError: for a field that is missing or makes no sense.
    """
    if faults := list(field_faults(spec, values)):
        raise ValueError("\n  ".join(["fields that do not make sense:", *faults]))
    fields = vars(spec.published)
    chosen = {name: value for name, value in numerics.items() if name in fields}
    sizes = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    try:
        return type(spec.published)(**sizes, **chosen)
    except (TypeError, ValueError) as error:  # TypeError: a field is missing
        raise ValueError(f"{spec.name}: {error}") from None
