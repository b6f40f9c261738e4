"""Count what a traced program does and holds, from its jaxpr: nothing is compiled.

A compiler fuses what it computes element by element into its consumers. So of a chain of such
operations only those results are taken to be stored that a matrix product, a convolution, a loop or
another program reads, or that are returned. A result lives until its last consumer; what an
operation updates in place takes no memory of its own (docs/hardware.md).
"""

import collections
import math
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

# Operations that read stored arrays, besides those that run programs of their own.
_READERS = frozenset({"dot_general", "conv_general_dilated", "gather", "sort", "top_k"})
# Operations whose results are stored, although what they read may be computed on the way.
_STORED = frozenset(
    {"concatenate", "cumsum", "argmax", "argmin", "random_bits", "dynamic_update_slice", "scatter"}
)
_CUTS = frozenset({"slice", "dynamic_slice"})
_IN_PLACE = frozenset({"dynamic_update_slice", "scatter", "scatter-add"})


class Cost(NamedTuple):
    """What a program takes each time that it runs, on one device."""

    products: float  # operations of matrix products, multiplications and additions
    convolutions: float  # those of convolutions
    moved: float  # bytes read and written
    held: float  # most bytes at once, its arguments apart and its results included


def calls(
    program: ClosedJaxpr, split: Mapping[tuple[int, ...], int] = MappingProxyType({})
) -> Iterator[tuple[str, Cost]]:
    """Yield name and cost of each jitted function that a traced function calls, call by call.

    Loops count as often as they run, of branches the dearest. Results that take the memory of
    donated arguments are not held besides.

    split: over how many devices arrays of a shape are split, of which each holds a part.
    """
    known: dict[int, Cost] = {}
    for eqn in program.jaxpr.eqns:
        if eqn.primitive.name not in ("jit", "pjit") or _fuses(eqn):
            continue
        called = eqn.params["jaxpr"].jaxpr
        if id(called) not in known:
            walk = _Walk(called, split)
            taken = walk.cost()
            donated = zip(called.invars, eqn.params["donated_invars"], strict=True)
            free = sum(walk.bytes_of(var) for var, given in donated if given)
            results = sum(map(walk.bytes_of, walk.new_results()))
            known[id(called)] = taken._replace(held=taken.held - min(free, results))
        yield eqn.params["name"], known[id(called)]


class _Walk:
    """One pass over a jaxpr in its order."""

    def __init__(self, jaxpr: Jaxpr, split: Mapping[tuple[int, ...], int]):
        self.jaxpr = jaxpr
        self.split = split
        self.given = {*jaxpr.invars, *jaxpr.constvars}
        self.stored: dict[Var, frozenset[Var]] = {var: frozenset([var]) for var in self.given}
        self.born: dict[Var, int] = {}
        self.last: dict[Var, int] = {}
        self.inside: dict[int, float] = {}  # bytes held within an operation
        self.products = 0.0
        self.convolutions = 0.0
        self.moved = 0.0

    def cost(self) -> Cost:
        eqns = self.jaxpr.eqns
        returned = set(_variables(self.jaxpr.outvars))
        read = {var for eqn in eqns if _reads(eqn) for var in _variables(eqn.invars)}
        for number, eqn in enumerate(eqns):
            sources = self._sources(eqn.invars)
            if not _fuses(eqn):
                self._run(number, eqn, sources)
                continue
            for var in eqn.outvars:
                shrinks = eqn.primitive.name in _CUTS and any(s in self.born for s in sources)
                if var in read or var in returned or shrinks:
                    self._store(number, [var], sources)
                else:
                    self.stored[var] = sources
        for var in self._sources(self.jaxpr.outvars):
            self.last[var] = len(eqns)
        return Cost(self.products, self.convolutions, self.moved, self._most_held())

    def bytes_of(self, var: Any) -> float:
        """Return the bytes of an array on a device; 0 for what has no items, such as a token."""
        shape = getattr(var.aval, "shape", None)
        if shape is None:
            return 0
        size = getattr(var.aval.dtype, "itemsize", 8)  # a key has no itemsize
        return math.prod(shape) * size / self.split.get(shape, 1)

    def new_results(self) -> set[Var]:
        """Return the results that do not take the memory of an argument, after `cost`."""
        return {var for var in self._sources(self.jaxpr.outvars) if var in self.born}

    def _sources(self, variables: Iterable[Any]) -> frozenset[Var]:
        """Return the stored arrays from which these are computed."""
        return frozenset().union(*(self.stored.get(v, ()) for v in _variables(variables)))

    def _store(self, number: int, results: Iterable[Var], sources: frozenset[Var]) -> None:
        self._count(number, sources)
        for var in results:
            self.stored[var] = frozenset([var])
            self.born[var] = number
            self.moved += self.bytes_of(var)

    def _count(self, number: int, sources: frozenset[Var]) -> None:
        self.moved += sum(map(self.bytes_of, sources))
        self.last |= dict.fromkeys(sources, number)

    def _run(self, number: int, eqn: Any, sources: frozenset[Var]) -> None:
        """Take in an operation that is not fused."""
        name = eqn.primitive.name
        results = list(eqn.outvars)
        programs = list(_programs(eqn))
        if name == "pallas_call":
            self.products += _kernel_products(eqn)
        elif programs:
            self._run_programs(number, eqn, programs)
        else:
            self.products += _products(eqn)
            self.convolutions += _convolutions(eqn)
        if name in _IN_PLACE:
            target = results.pop(0)
            self.stored[target] = self._sources(eqn.invars[:1])
            self._count(number, self._sources(eqn.invars[1:]))
            self.moved += sum(map(self.bytes_of, _variables(eqn.invars[1:])))
        elif programs and name != "pallas_call":
            self.last |= dict.fromkeys(sources, number)
            for var in results:
                self.stored[var] = frozenset([var])
                self.born[var] = number
        else:
            self._store(number, results, sources)

    def _run_programs(self, number: int, eqn: Any, programs: list[Jaxpr]) -> None:
        """Take in the programs of a loop, a branch or a call."""
        costs = [_Walk(program, self.split).cost() for program in programs]
        times = eqn.params.get("length", 1)
        self.products += times * max(each.products for each in costs)
        self.convolutions += times * max(each.convolutions for each in costs)
        self.moved += times * max(each.moved for each in costs)
        body = programs[0]
        kept = eqn.outvars
        sliced = 0
        if eqn.primitive.name == "scan":
            carried = eqn.params["num_consts"] + eqn.params["num_carry"]
            sliced = sum(map(self.bytes_of, body.invars[carried:]))
            kept = body.outvars
        inside = (
            max(each.held for each in costs) + sliced - sum(map(self.bytes_of, _variables(kept)))
        )
        self.inside[number] = max(inside, 0.0)

    def _most_held(self) -> float:
        change: dict[int, float] = collections.defaultdict(float)
        for var, number in self.born.items():
            change[number] += self.bytes_of(var)
            change[self.last.get(var, number) + 1] -= self.bytes_of(var)
        held = 0.0
        most = 0.0
        for number in range(len(self.jaxpr.eqns) + 1):
            held += change[number]
            most = max(most, held + self.inside.get(number, 0.0))
        return most


def _variables(values: Iterable[Any]) -> Iterator[Var]:
    return (value for value in values if not isinstance(value, Literal))


def _programs(eqn: Any) -> Iterator[Jaxpr]:
    """Yield the programs that an operation runs."""
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part


def _reads(eqn: Any) -> bool:
    """Return whether an operation reads stored arrays."""
    return not _fuses(eqn) and (eqn.primitive.name in _READERS or any(_programs(eqn)))


def _fuses(eqn: Any) -> bool:
    """Return whether an operation is computed where its result is consumed."""
    name = eqn.primitive.name
    if name in _READERS or name in _STORED or name in _IN_PLACE or name == "pallas_call":
        return False
    if name in ("scan", "while") or name.startswith("reduce_"):
        return False
    return all(_fuses(inner) for program in _programs(eqn) for inner in program.eqns)


def _products(eqn: Any) -> float:
    """Return the operations of a matrix product; 0 for anything else."""
    if eqn.primitive.name != "dot_general":
        return 0.0
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _convolutions(eqn: Any) -> float:
    """Return the operations of a convolution; 0 for anything else."""
    if eqn.primitive.name != "conv_general_dilated":
        return 0.0
    kernel = eqn.invars[1].aval.shape
    outputs = kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / outputs


def _kernel_products(eqn: Any) -> float:
    """Return the operations of an attention kernel: those of one block of its grid, times the
    blocks.
    """
    blocks = math.prod(eqn.params["grid_mapping"].grid)
    return blocks * sum(_Walk(program, {}).cost().products for program in _programs(eqn))
