"""Table-driven, strict and exactly invertible conversion between a flat checkpoint and a parameter
tree.

A table is a list of `Rule(source, target, transform)`. `source` is a tensor name of the checkpoint;
`target` is the dotted path of a leaf ('blocks.self_attn.q.kernel'; list indices are plain numbers).
A source that holds `{i}` stands for one tensor per layer: the layers are stacked on a leading axis
of the target leaf. The names of another writer are the same table with other sources: `renamed`.

`load` and `save` read the shapes they need from the tree the model expects, so a table says nothing
about sizes, and one call reports every culprit at once. Tensors may be arrays or files.Lazy;
`stacks` and `tensors` read none of them.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from astrolabe_jax.runtime.files import Lazy

Shape = tuple[int, ...]
# regular expressions and what to put in their place, one after the other
Substitutions = Sequence[tuple[str, str]]


class ConversionError(ValueError):
    """The checkpoint and the model do not fit; the message lists every tensor and leaf at fault."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """Permute the source axes by `axes`, then reshape to the target leaf.

    `unfold` gives the permuted shape back from the target shape, which makes the step invertible by
    shape alone.
    """

    axes: tuple[int, ...] | None = None
    unfold: Callable[[Shape], Shape] = lambda shape: shape

    def forward(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        """Source tensor -> target leaf of `shape` (without the layer axis)."""
        return tensor.transpose(self.axes).reshape(shape) if self.axes else tensor.reshape(shape)

    def inverse(self, leaf: np.ndarray) -> np.ndarray:
        """Target leaf (without the layer axis) -> source tensor, C-contiguous."""
        permuted = leaf.reshape(self.unfold(leaf.shape))
        return np.ascontiguousarray(
            permuted.transpose(np.argsort(self.axes)) if self.axes else permuted
        )

    def source_shape(self, shape: Shape) -> Shape:
        """Shape of the source tensor for a target leaf of `shape` (without the layer axis)."""
        permuted = self.unfold(shape)
        return tuple(permuted[j] for j in np.argsort(self.axes)) if self.axes else permuted


IDENTITY = Transform()
LINEAR = Transform(axes=(1, 0))  # [out, in] -> [in, out]
CONV2D = Transform(axes=(2, 3, 1, 0))  # [out, in, h, w] -> [h, w, in, out]
CONV3D = Transform(axes=(2, 3, 4, 1, 0))  # [out, in, t, h, w] -> [t, h, w, in, out]
GAMMA2D = Transform(unfold=lambda shape: (*shape, 1, 1))  # [C, 1, 1] -> [C]
GAMMA3D = Transform(unfold=lambda shape: (*shape, 1, 1, 1))  # [C, 1, 1, 1] -> [C]


def patch_kernel(patch: Shape) -> Transform:
    """[D, C, t, h, w] -> [C*t*h*w, D], channel slowest: a convolution whose stride is its kernel,
    as a linear map.
    """
    volume = int(np.prod(patch))
    return Transform(
        axes=(1, 2, 3, 4, 0), unfold=lambda shape: (shape[0] // volume, *patch, shape[1])
    )


class Rule(NamedTuple):
    """One line of a table; see the module docstring."""

    source: str
    target: str
    transform: Transform = IDENTITY


@dataclasses.dataclass(frozen=True)
class Stack:
    """A leaf that is not read yet: np.asarray reads it, layer by layer, stack[i] one layer."""

    shape: Shape
    dtype: np.dtype
    stacked: bool
    pieces: tuple[Lazy, ...]  # its layers, or itself

    @property
    def size(self) -> int:
        """Elements; the writer of Orbax asks for it."""
        return math.prod(self.shape)

    def __getitem__(self, i: int) -> np.ndarray:
        return np.asarray(self.pieces[i])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        if not self.stacked:
            return np.asarray(self.pieces[0], dtype)
        stack = np.empty(self.shape, dtype or self.dtype)
        for i, piece in enumerate(self.pieces):
            stack[i] = np.asarray(piece)
        return stack


class _Step(NamedTuple):
    """A rule resolved against the expected tree: which tensors, of which shape, make which leaf."""

    names: list[str]
    shape: Shape
    path: tuple
    leaf: Any
    stacked: bool
    transform: Transform


def renamed(table: Sequence[Rule], substitutions: Substitutions) -> list[Rule]:
    """The table of a writer that has other names for the same tensors."""
    return [rule._replace(source=substituted(rule.source, substitutions)) for rule in table]


def substituted(name: str, substitutions: Substitutions) -> str:
    """`name` with all substitutions made."""
    for pattern, replacement in substitutions:
        name = re.sub(pattern, replacement, name)
    return name


def load(
    table: Sequence[Rule],
    tensors: Mapping[str, Any],
    expected: dict,
    place: Callable[[tuple, np.ndarray], Any] = lambda path, leaf: leaf,
) -> dict:
    """Build the parameter tree `expected` (leaves with shape and dtype) from the tensors of a
    checkpoint.

    Leaves take the dtype of `expected`. `place` may put each on its devices before the next is
    read. Raises ConversionError on unused, missing or misshapen tensors and on unfilled leaves.
    """
    return nested((path, place(path, leaf)) for path, leaf in leaves(table, tensors, expected))


def nested(flat: Iterable[tuple[tuple, Any]]) -> dict:
    """The inverse of `flatten`."""
    tree: dict = {}
    for path, leaf in flat:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def leaves(
    table: Sequence[Rule], tensors: Mapping[str, Any], expected: dict
) -> Iterator[tuple[tuple, np.ndarray]]:
    """Like `load`, as a stream of (path, leaf): one leaf is in memory at a time."""
    for path, stack in stacks(table, tensors, expected).items():
        yield path, np.asarray(stack)


def stacks(table: Sequence[Rule], tensors: Mapping[str, Any], expected: dict) -> dict[tuple, Stack]:
    """Like `load`, with nothing read: the leaves by their paths."""
    steps = _resolve(table, expected)
    check({name: step.shape for step in steps for name in step.names}, tensors)
    return {step.path: _stack(step, tensors) for step in steps}


def with_dtypes(table: Sequence[Rule], tensors: Mapping[str, Any], expected: dict) -> dict:
    """The tree `expected` with each leaf in the dtype of its tensors; ConversionError where layers
    differ in it.
    """
    found, faults = {}, []
    for step in _resolve(table, expected):
        dtypes = {str(tensors[name].dtype) for name in step.names}
        if len(dtypes) > 1:
            faults.append(
                f"dtypes of {step.names[0]} and its other layers: {', '.join(sorted(dtypes))}; "
                "give one --dtype"
            )
        found[step.path] = Stack(
            tuple(step.leaf.shape), np.dtype(tensors[step.names[0]].dtype), step.stacked, ()
        )
    _refuse(faults)
    return nested(found.items())


def _stack(step: _Step, tensors: Mapping[str, Any]) -> Stack:
    shape, dtype = tuple(step.leaf.shape), np.dtype(step.leaf.dtype)
    part = shape[1:] if step.stacked else shape

    def piece(name: str) -> Lazy:
        return Lazy(
            part,
            dtype,
            lambda: step.transform.forward(np.asarray(tensors[name]), part).astype(
                dtype, copy=False
            ),
        )

    return Stack(shape, dtype, step.stacked, tuple(map(piece, step.names)))


def save(table: Sequence[Rule], params: dict) -> dict[str, np.ndarray]:
    """The exact inverse of `load`: tensors by checkpoint name, byte for byte, in the dtype of the
    leaves.
    """
    return {name: np.asarray(tensor) for name, tensor in tensors(table, params).items()}


def tensors(table: Sequence[Rule], params: dict) -> dict[str, Lazy]:
    """Like `save`, with nothing read: a leaf needs shape and dtype, and leaf[i] for its layers or
    np.asarray.
    """

    def tensor(step: _Step, i: int) -> Lazy:
        return Lazy(
            step.shape,
            np.dtype(step.leaf.dtype),
            lambda: step.transform.inverse(np.asarray(step.leaf[i] if step.stacked else step.leaf)),
        )

    steps = _resolve(table, params)
    return {name: tensor(step, i) for step in steps for i, name in enumerate(step.names)}


def source_shapes(table: Sequence[Rule], expected: dict) -> dict[str, Shape]:
    """Name and shape of every tensor that a checkpoint of this model must hold."""
    return {name: step.shape for step in _resolve(table, expected) for name in step.names}


def overlap(table: Sequence[Rule], names: Iterable[str]) -> int:
    """How many of the names are sources of the table, of any layer."""
    stacked = [
        re.escape(rule.source).replace(r"\{i\}", r"\d+") for rule in table if "{i}" in rule.source
    ]
    plain, layer = {rule.source for rule in table}, re.compile("|".join(stacked) or r"(?!)")
    return sum(name in plain or layer.fullmatch(name) is not None for name in names)


def flatten(tree: dict, prefix: tuple = ()) -> dict[tuple, Any]:
    """Nested dict -> {key path: leaf}, in the order of the tree."""
    flat = {}
    for key, node in tree.items():
        flat.update(
            flatten(node, (*prefix, key)) if isinstance(node, dict) else {(*prefix, key): node}
        )
    return flat


def _resolve(table: Sequence[Rule], expected: dict) -> list[_Step]:
    """Match every rule with its leaf, and refuse a table and a tree that do not cover each
    other.
    """
    flat = {".".join(map(str, path)): (path, leaf) for path, leaf in flatten(expected).items()}
    targets = [rule.target for rule in table]
    faults = [
        f"leaf no rule of the table fills: {name}" for name in flat if name not in set(targets)
    ]
    faults += [
        f"rule for a leaf the model does not have: {name}" for name in targets if name not in flat
    ]
    faults += [
        f"leaf filled twice: {name}"
        for name in sorted({name for name in targets if targets.count(name) > 1})
    ]
    _refuse(faults)
    steps = []
    for source, target, transform in table:
        path, leaf = flat[target]
        stacked = "{i}" in source
        names = [source.format(i=i) for i in range(leaf.shape[0])] if stacked else [source]
        shape = transform.source_shape(tuple(leaf.shape[1:] if stacked else leaf.shape))
        steps.append(_Step(names, shape, path, leaf, stacked, transform))
    return steps


def check(wanted: Mapping[str, Shape], tensors: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks a tensor, holds one nobody reads, or holds one of another
    shape.
    """
    _refuse(mismatches(wanted, tensors))


def mismatches(wanted: Mapping[str, Shape], tensors: Mapping[str, Any]) -> list[str]:
    """What `check` refuses, one line for each tensor."""
    faults = [
        f"missing tensor: {name} {list(shape)}"
        for name, shape in wanted.items()
        if name not in tensors
    ]
    faults += [
        f"unused tensor: {name} {list(tensors[name].shape)}"
        for name in tensors
        if name not in wanted
    ]
    faults += [
        f"changed shape: {name} is {list(tensors[name].shape)}, the model expects {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    return faults


class Shapes:
    """Shapes of a checkpoint's tensors, asked for by the sources of a table: what the sizes of its
    model are.
    """

    def __init__(self, tensors: Mapping[str, Any], substitutions: Substitutions):
        self._tensors, self._substitutions = tensors, substitutions

    def of(self, source: str) -> list[Shape]:
        """The shapes of a source's tensors, of all layers if it has `{i}`; those that are missing
        are left out.
        """
        name = substituted(source, self._substitutions)
        if "{i}" not in name:
            return [tuple(self._tensors[name].shape)] if name in self._tensors else []
        layer = re.compile(r"\d+".join(map(re.escape, name.split("{i}"))))
        return [
            tuple(tensor.shape) for other, tensor in self._tensors.items() if layer.fullmatch(other)
        ]

    def vote(self, *witnesses: tuple[str, int]) -> int | None:
        """The size that most say it is: axes of sources; None if all are missing. One wrong tensor
        is outvoted.
        """
        found = [
            shape[axis]
            for source, axis in witnesses
            for shape in self.of(source)
            if axis < len(shape)
        ]
        return _most(found)

    def layers(self, table: Sequence[Rule]) -> int | None:
        """The number of layers that most of the stacked sources have."""
        return _most([len(self.of(rule.source)) for rule in table if "{i}" in rule.source])

    def sizes(self, witnesses: Mapping[str, Sequence[tuple[str, int]]]) -> dict[str, int]:
        """`vote` for every field; those without a witness are left out."""
        voted = {field: self.vote(*voters) for field, voters in witnesses.items()}
        return {field: size for field, size in voted.items() if size is not None}


def _most(numbers: Sequence[int]) -> int | None:
    return collections.Counter(numbers).most_common(1)[0][0] if numbers else None


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        head = (
            f"{len(faults)} mismatches; check that the checkpoint belongs to this model and config:"
        )
        raise ConversionError("\n  ".join([head, *faults]))
