"""Table-driven, strict and exactly invertible conversion between a flat checkpoint and a parameter
tree.

A table is a list of `Rule(source, target, transform)`. `source` is a tensor name of the checkpoint;
`target` is the dotted path of a leaf ('blocks.self_attn.q.kernel'; list indices are plain numbers).
A source that holds `{i}` stands for one tensor per layer: the layers are stacked on a leading axis
of the target leaf. The names of another writer are the same table with other sources: `renamed`.

`load` and `save` take the shapes they need from the tree that the model expects, so a table says
nothing about sizes. One error lists every tensor at fault. Tensors may be arrays or files.Lazy;
`stacks` and `tensors` read none of them. The trees are those of docs/checkpoints.md, JAX trees.
"""

import collections
import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from astrolabe_jax.runtime.files import Lazy, listed

Shape = tuple[int, ...]
# Regular expressions and their replacements, applied one after the other.
Substitutions = Sequence[tuple[str, str]]


class ConversionError(ValueError):
    """The checkpoint and the model do not fit; the message lists tensors and leaves at fault."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """Permutes the source axes by `axes`, then reshapes to the target leaf.

    `unfold` returns the permuted shape for a target shape, which makes the step invertible by shape
    alone.
    """

    axes: tuple[int, ...] | None = None
    unfold: Callable[[Shape], Shape] = lambda shape: shape

    def forward(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        """Return the target leaf of `shape` (without the layer axis) for a source tensor."""
        permuted = tensor.transpose(self.axes) if self.axes else tensor
        return permuted.reshape(shape)

    def inverse(self, leaf: np.ndarray) -> np.ndarray:
        """Return the source tensor, C-contiguous, for a target leaf (without the layer axis)."""
        permuted = leaf.reshape(self.unfold(leaf.shape))
        source = permuted.transpose(np.argsort(self.axes)) if self.axes else permuted
        return np.ascontiguousarray(source)

    def source_shape(self, shape: Shape) -> Shape:
        """Return the source tensor's shape for a target leaf of `shape` (without the layer
        axis).
        """
        permuted = self.unfold(shape)
        return tuple(permuted[axis] for axis in np.argsort(self.axes)) if self.axes else permuted


IDENTITY = Transform()
LINEAR = Transform(axes=(1, 0))  # [out, in] -> [in, out]
CONV2D = Transform(axes=(2, 3, 1, 0))  # [out, in, h, w] -> [h, w, in, out]
CONV3D = Transform(axes=(2, 3, 4, 1, 0))  # [out, in, t, h, w] -> [t, h, w, in, out]
GAMMA2D = Transform(unfold=lambda shape: (*shape, 1, 1))  # [C, 1, 1] -> [C]
GAMMA3D = Transform(unfold=lambda shape: (*shape, 1, 1, 1))  # [C, 1, 1, 1] -> [C]


def patch_kernel(patch: Shape) -> Transform:
    """Return the transform of a convolution whose stride is its kernel to a linear map.

    It takes [D, C, t, h, w] to [C*t*h*w, D], the channel slowest; `patch` is (t, h, w).
    """
    return Transform(
        axes=(1, 2, 3, 4, 0),
        unfold=lambda shape: (shape[0] // math.prod(patch), *patch, shape[1]),
    )


class Rule(NamedTuple):
    """One line of a table; see the module docstring."""

    source: str  # name of a tensor, or of one per layer
    target: str  # path of a leaf
    transform: Transform = IDENTITY


@dataclasses.dataclass(frozen=True)
class Stack:
    """A leaf that is not read yet: np.asarray reads it layer by layer, stack[i] reads one layer."""

    shape: Shape
    dtype: np.dtype
    stacked: bool
    pieces: tuple[Lazy, ...]  # its layers, or the leaf itself

    @property
    def size(self) -> int:
        """Return the number of elements; the writer of Orbax asks for it."""
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

    names: list[str]  # of the tensors, by layer
    shape: Shape  # of each tensor
    path: tuple  # of the leaf
    leaf: Any
    stacked: bool
    transform: Transform


def renamed(table: Sequence[Rule], substitutions: Substitutions) -> list[Rule]:
    """Return the table of a writer that has other names for the same tensors."""
    return [rule._replace(source=substituted(rule.source, substitutions)) for rule in table]


def substituted(name: str, substitutions: Substitutions) -> str:
    """Return `name` with all substitutions made."""
    for pattern, replacement in substitutions:
        name = re.sub(pattern, replacement, name)
    return name


def load(
    table: Sequence[Rule],
    tensors: Mapping[str, Any],
    expected: dict,
    place: Callable[[tuple, np.ndarray], Any] = lambda path, leaf: leaf,
) -> dict:
    """Return the parameter tree `expected`, filled from the tensors of a checkpoint.

    Args:
      table: the rules of this model and format.
      tensors: by name.
      expected: the tree; its leaves have the shape and dtype that the model wants.
      place: may put each leaf, given its path, on its devices before the next is read.

    Raises:
      ConversionError: tensors are unused, missing or misshapen, or leaves are not filled.
    """
    leaves = stacks(table, tensors, expected)
    return nested((path, place(path, np.asarray(leaf))) for path, leaf in leaves.items())


def nested(flat: Iterable[tuple[tuple, Any]]) -> dict:
    """Return the nested dict of pairs (key path, leaf), the inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat))


def flatten(tree: dict) -> dict[tuple, Any]:
    """Return {key path: leaf} of a nested dict, in its order."""
    return traverse_util.flatten_dict(tree)


def stacks(table: Sequence[Rule], tensors: Mapping[str, Any], expected: dict) -> dict[tuple, Stack]:
    """Return the leaves of `load` by their paths; none is read yet."""
    steps = list(_resolve(table, expected))
    check({name: step.shape for step in steps for name in step.names}, tensors)
    return {step.path: _stack(step, tensors) for step in steps}


def with_dtypes(table: Sequence[Rule], tensors: Mapping[str, Any], expected: dict) -> dict:
    """Return the tree `expected` with each leaf in the dtype of its tensors.

    Its leaves have shape and dtype alone. Raises ConversionError where layers differ in dtype.
    """
    steps = list(_resolve(table, expected))
    dtypes = {
        step.path: list(dict.fromkeys(np.dtype(tensors[name].dtype) for name in step.names))
        for step in steps
    }
    _refuse(
        [
            f"dtypes of {step.names[0]} and its other layers: "
            f"{', '.join(sorted(map(str, dtypes[step.path])))}; give one --dtype"
            for step in steps
            if len(dtypes[step.path]) > 1
        ]
    )
    return nested(
        (step.path, Stack(tuple(step.leaf.shape), dtypes[step.path][0], step.stacked, ()))
        for step in steps
    )


def _stack(step: _Step, tensors: Mapping[str, Any]) -> Stack:
    shape = tuple(step.leaf.shape)
    dtype = np.dtype(step.leaf.dtype)
    piece_shape = shape[1:] if step.stacked else shape
    forward = step.transform.forward

    def piece(name: str) -> Lazy:
        return Lazy(
            piece_shape,
            dtype,
            lambda: forward(np.asarray(tensors[name]), piece_shape).astype(dtype, copy=False),
        )

    return Stack(shape, dtype, step.stacked, tuple(map(piece, step.names)))


def save(table: Sequence[Rule], params: dict) -> dict[str, np.ndarray]:
    """Return tensors by checkpoint name, in the dtype of the leaves: the exact inverse of
    `load`.
    """
    return {name: np.asarray(tensor) for name, tensor in tensors(table, params).items()}


def tensors(table: Sequence[Rule], params: dict) -> dict[str, Lazy]:
    """Return the tensors of `save`; none is read yet.

    A leaf of `params` must have shape and dtype. It is read by leaf[i], its layers, or np.asarray.
    """

    def tensor(step: _Step, layer: int) -> Lazy:
        return Lazy(
            step.shape,
            np.dtype(step.leaf.dtype),
            lambda: step.transform.inverse(
                np.asarray(step.leaf[layer] if step.stacked else step.leaf)
            ),
        )

    return {
        name: tensor(step, i)
        for step in _resolve(table, params)
        for i, name in enumerate(step.names)
    }


def source_shapes(table: Sequence[Rule], expected: dict) -> dict[str, Shape]:
    """Return name and shape of every tensor that a checkpoint of this model must hold."""
    return {name: step.shape for step in _resolve(table, expected) for name in step.names}


def overlap(table: Sequence[Rule], names: Iterable[str]) -> int:
    """Return how many of the names are sources of the table, of any layer."""
    known = re.compile("|".join(_pattern(rule.source) for rule in table))
    return sum(known.fullmatch(name) is not None for name in names)


def _pattern(source: str) -> str:
    """Return the regular expression of a source's names, of any layer."""
    return re.escape(source).replace(r"\{i\}", r"\d+")


def _resolve(table: Sequence[Rule], expected: dict) -> Iterator[_Step]:
    """Yield every rule with its leaf; refuse a table and a tree that do not cover each other."""
    flat = {".".join(map(str, path)): (path, leaf) for path, leaf in flatten(expected).items()}
    targets = collections.Counter(rule.target for rule in table)
    _refuse(
        [
            *(f"leaf no rule of the table fills: {name}" for name in flat if name not in targets),
            *(
                f"rule for a leaf the model does not have: {name}"
                for name in targets.elements()
                if name not in flat
            ),
            *(f"leaf filled twice: {name}" for name in sorted(targets) if targets[name] > 1),
        ]
    )
    for source, target, transform in table:
        path, leaf = flat[target]
        stacked = "{i}" in source
        names = [source.format(i=i) for i in range(leaf.shape[0])] if stacked else [source]
        shape = transform.source_shape(tuple(leaf.shape[1:] if stacked else leaf.shape))
        yield _Step(names, shape, path, leaf, stacked, transform)


def check(shapes: Mapping[str, Shape], tensors: Mapping[str, Any]) -> None:
    """Raise ConversionError unless the tensors are exactly those of `shapes`, each of its shape."""
    _refuse(mismatches(shapes, tensors))


def mismatches(shapes: Mapping[str, Shape], tensors: Mapping[str, Any]) -> list[str]:
    """Return what `check` refuses, a line for each tensor."""
    return [
        *(
            f"missing tensor: {name} {list(shape)}"
            for name, shape in shapes.items()
            if name not in tensors
        ),
        *(
            f"unused tensor: {name} {list(tensor.shape)}"
            for name, tensor in tensors.items()
            if name not in shapes
        ),
        *(
            f"changed shape: {name} is {list(tensors[name].shape)}, the model expects {list(shape)}"
            for name, shape in shapes.items()
            if name in tensors and tuple(tensors[name].shape) != shape
        ),
    ]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The shapes of a checkpoint's tensors, from which the sizes of its model are read.

    Tensors are asked for by the sources of a table; `substitutions` take these to the checkpoint's
    own names.
    """

    tensors: Mapping[str, Any]  # by the checkpoint's names
    substitutions: Substitutions

    def of(self, source: str) -> list[Shape]:
        """Return the shapes of a source's tensors, of all layers if it has `{i}`.

        Tensors that are missing are left out.
        """
        names = re.compile(_pattern(substituted(source, self.substitutions)))
        return [
            tuple(tensor.shape) for name, tensor in self.tensors.items() if names.fullmatch(name)
        ]

    def vote(self, *witnesses: tuple[str, int]) -> int | None:
        """Return the size that most witnesses give, so that one wrong tensor is outvoted.

        A witness is an axis of a source. None comes back if all are missing.
        """
        return _most(
            [
                shape[axis]
                for source, axis in witnesses
                for shape in self.of(source)
                if axis < len(shape)
            ]
        )

    def layers(self, table: Sequence[Rule]) -> int | None:
        """Return the number of layers that most stacked sources have; None if there is no such
        source.
        """
        return _most([len(self.of(rule.source)) for rule in table if "{i}" in rule.source])

    def sizes(self, witnesses: Mapping[str, Sequence[tuple[str, int]]]) -> dict[str, int]:
        """Return `vote` for every field; those whose witnesses are all missing are left out."""
        sizes = {field: self.vote(*axes) for field, axes in witnesses.items()}
        return {field: size for field, size in sizes.items() if size is not None}


def _most(numbers: Sequence[int]) -> int | None:
    """Return the most frequent number, or None of no numbers."""
    return statistics.mode(numbers) if numbers else None


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        head = "mismatches; check that the checkpoint belongs to this model and config:"
        raise ConversionError(listed(f"{len(faults)} {head}", faults))
