"""Table-driven, strict and exactly invertible conversion between a flat checkpoint and a parameter tree.

A table is a list of `Rule(source, target, transform)`. `source` is a tensor name of the checkpoint; `target` is the
dotted path of a leaf ('blocks.self_attn.q.kernel'; list indices are plain numbers). A source that holds `{i}` stands
for one tensor per layer: the layers are stacked on a leading axis of the target leaf.

`load` and `save` read the shapes they need from the tree the model expects, so a table says nothing about sizes, and
one call reports every culprit at once.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]


class ConversionError(ValueError):
    """The checkpoint and the model do not fit; the message lists every tensor and leaf at fault."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """Permute the source axes by `axes`, then reshape to the target leaf.

    `unfold` gives the permuted shape back from the target shape, which makes the step invertible by shape alone.
    """

    axes: tuple[int, ...] | None = None
    unfold: Callable[[Shape], Shape] = lambda shape: shape

    def forward(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        """Source tensor -> target leaf of `shape` (without the layer axis)."""
        return tensor.transpose(self.axes).reshape(shape) if self.axes else tensor.reshape(shape)

    def inverse(self, leaf: np.ndarray) -> np.ndarray:
        """Target leaf (without the layer axis) -> source tensor, C-contiguous."""
        permuted = leaf.reshape(self.unfold(leaf.shape))
        return np.ascontiguousarray(permuted.transpose(np.argsort(self.axes)) if self.axes else permuted)

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
    """[D, C, t, h, w] -> [C*t*h*w, D], channel slowest: a convolution whose stride is its kernel, as a linear map."""
    volume = int(np.prod(patch))
    return Transform(axes=(1, 2, 3, 4, 0), unfold=lambda shape: (shape[0] // volume, *patch, shape[1]))


class Rule(NamedTuple):
    """One line of a table; see the module docstring."""

    source: str
    target: str
    transform: Transform = IDENTITY


class _Step(NamedTuple):
    """A rule resolved against the expected tree: which tensors, of which shape, make which leaf."""

    names: list[str]
    shape: Shape
    path: tuple
    leaf: Any
    stacked: bool
    transform: Transform


def load(table: Sequence[Rule], tensors: Mapping[str, np.ndarray], expected: dict) -> dict:
    """Build the parameter tree `expected` (leaves with shape and dtype) from the tensors of a checkpoint.

    Leaves take the dtype of `expected`. Raises ConversionError on unused, missing or misshapen tensors and on unfilled
    leaves.
    """
    tree: dict = {}
    for path, leaf in leaves(table, tensors, expected):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def leaves(
    table: Sequence[Rule], tensors: Mapping[str, np.ndarray], expected: dict
) -> Iterator[tuple[tuple, np.ndarray]]:
    """Like `load`, as a stream of (path, leaf): a caller may place each leaf on its devices before the next is read."""
    steps = _resolve(table, expected)
    _check_tensors(steps, tensors)
    for step in steps:
        shape = step.leaf.shape
        if not step.stacked:
            tensor = np.asarray(tensors[step.names[0]])
            yield step.path, step.transform.forward(tensor, shape).astype(step.leaf.dtype)
            continue
        stack = np.empty(shape, step.leaf.dtype)
        for i, name in enumerate(step.names):
            stack[i] = step.transform.forward(np.asarray(tensors[name]), shape[1:])
        yield step.path, stack


def save(table: Sequence[Rule], params: dict) -> dict[str, np.ndarray]:
    """The exact inverse of `load`: tensors by checkpoint name, byte for byte, in the dtype of the leaves."""
    tensors = {}
    for step in _resolve(table, params):
        leaf = np.asarray(step.leaf)
        for name, part in zip(step.names, leaf if step.stacked else [leaf], strict=True):
            tensors[name] = step.transform.inverse(part)
    return tensors


def source_shapes(table: Sequence[Rule], expected: dict) -> dict[str, Shape]:
    """Name and shape of every tensor that a checkpoint of this model must hold."""
    return {name: step.shape for step in _resolve(table, expected) for name in step.names}


def flatten(tree: dict, prefix: tuple = ()) -> dict[tuple, Any]:
    """Nested dict -> {key path: leaf}, in the order of the tree."""
    flat = {}
    for key, node in tree.items():
        flat.update(flatten(node, (*prefix, key)) if isinstance(node, dict) else {(*prefix, key): node})
    return flat


def _resolve(table: Sequence[Rule], expected: dict) -> list[_Step]:
    """Match every rule with its leaf, and refuse a table and a tree that do not cover each other."""
    flat = {".".join(map(str, path)): (path, leaf) for path, leaf in flatten(expected).items()}
    targets = [rule.target for rule in table]
    faults = [f"leaf no rule of the table fills: {name}" for name in flat if name not in set(targets)]
    faults += [f"rule for a leaf the model does not have: {name}" for name in targets if name not in flat]
    faults += [f"leaf filled twice: {name}" for name in sorted({name for name in targets if targets.count(name) > 1})]
    _refuse(faults)
    steps = []
    for source, target, transform in table:
        path, leaf = flat[target]
        stacked = "{i}" in source
        names = [source.format(i=i) for i in range(leaf.shape[0])] if stacked else [source]
        shape = transform.source_shape(tuple(leaf.shape[1:] if stacked else leaf.shape))
        steps.append(_Step(names, shape, path, leaf, stacked, transform))
    return steps


def _check_tensors(steps: Sequence[_Step], tensors: Mapping[str, np.ndarray]) -> None:
    """Refuse a checkpoint that lacks a tensor, holds one nobody reads, or holds one of another shape."""
    wanted = {name: step.shape for step in steps for name in step.names}
    faults = [f"missing tensor: {name} {list(shape)}" for name, shape in wanted.items() if name not in tensors]
    faults += [f"unused tensor: {name} {list(tensors[name].shape)}" for name in tensors if name not in wanted]
    faults += [
        f"changed shape: {name} is {list(tensors[name].shape)}, the model expects {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    _refuse(faults)


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        head = f"{len(faults)} mismatches; check that the checkpoint belongs to this model and config:"
        raise ConversionError("\n  ".join([head, *faults]))
