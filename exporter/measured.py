"""What the values of a foreign graph depend on, and its lengths said plainly.

An exporter reads a length off whatever tensor is at hand, and adds, cuts and joins what it has read: a Shape of a hidden state
ties a node to the whole network before it, although all it wants is the batch. Here every such number is measured at several sizes,
and becomes what it is: a constant, or a multiple of the inputs' own axes. Knows no model, and of a graph only its inputs' axes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from itertools import combinations
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from txopt.exporter.graph import FOLD_LIMIT, integers
from txopt.exporter.probe import Probe
from txopt.runtime.errors import SourceError

Array = NDArray[Any]

_MOST_NUMBERS = 16  # a shape has fewer
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, None)


class Kind(Enum):
    """What a value depends on."""

    CONSTANT = "nothing that is given"
    LENGTH = "lengths alone"
    SOURCE = "the source"
    TOKENS = "the tokens"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How to run a graph for its lengths.

    Args:
        roles: what each input is, SOURCE or TOKENS.
        sizes: two lengths to measure at, for each that varies, by letter.
        homes: for SOURCE and TOKENS, the axis that a node of that kind reads each letter from; two kinds may read the same
            length from different inputs (B beams of one source are rows to the tokens, and one source to the source).
        shapes: the inputs' axes, letters or numbers.
    """

    roles: Mapping[str, Kind]
    sizes: Mapping[str, tuple[int, int]]
    homes: Mapping[Kind, Mapping[str, tuple[str, int]]]
    shapes: Mapping[str, Sequence[str | int]]

    def feeds(self, graph: ir.Graph, sizes: Mapping[str, int]) -> dict[str, Array]:
        """Inputs of these sizes: ones where they are integers, so that masks let everything through, else zeros."""
        made = {}
        for value in graph.inputs:
            name, dtype = str(value.name), value.dtype or ir.DataType.FLOAT
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in self.shapes[name]]
            made[name] = np.full(shape, int(dtype.is_integer()), dtype.numpy())
        return made


Monomial = tuple[int, tuple[str, ...]]  # a number times the lengths of some axes


def kinds(graph: ir.Graph, roles: Mapping[str, Kind]) -> dict[ir.Value, Kind]:
    """What every value depends on; of its inputs' lengths alone counts as LENGTH, whatever the inputs are."""
    found: dict[ir.Value, Kind] = dict.fromkeys(graph.initializers.values(), Kind.CONSTANT)
    found |= {value: roles[str(value.name)] for value in graph.inputs}
    for node in graph:
        before = {found[value] for value in node.inputs if value is not None}
        if node.op_type in ("Shape", "Size"):
            kind = Kind.LENGTH if before - {Kind.CONSTANT} else Kind.CONSTANT
        else:
            kind = max(before, key=list(Kind).index, default=Kind.CONSTANT)
        found |= dict.fromkeys(node.outputs, kind)
    return found


def simplify(model: ir.Model, reading: Reading) -> None:
    """Changes ``model`` in place: every small number that depends on lengths alone is read off the inputs, or is a constant.

    Raises:
        SourceError: a number is neither, so that it cannot be known how the graph behaves at other lengths.
    """
    graph = model.graph
    found = kinds(graph, reading.roles)
    candidates = [value for value, kind in found.items() if kind is Kind.LENGTH and _may_be_numbers(value, found)]
    if not candidates:
        return
    reshapes = [node for node in graph if node.op_type == "Reshape" and _kind(found, node.inputs[1]) is Kind.LENGTH]
    points = _points(reading.sizes)
    with Probe(graph, [*candidates, *(node.outputs[0] for node in reshapes)]) as probe:
        answers = [probe.run(reading.feeds(graph, sizes)) for sizes in points]
    writer = _Writer(graph, reading)
    for node in reshapes:
        shapes = [np.array(answer[str(node.outputs[0].name)].shape) for answer in answers]
        if (numbers := _monomials(shapes, points)) is not None:
            node.replace_input_with(1, writer.numbers(_with_a_rest(numbers), 1, found[node.outputs[0]]))
    for value in candidates:
        measured = [answer[str(value.name)] for answer in answers]
        if measured[0].size <= FOLD_LIMIT and all(_same(measured[0], other) for other in measured):
            value.replace_all_uses_with(writer.constant(measured[0]), replace_graph_outputs=False)
        elif _is_list(measured):
            _replace(value, _monomials(measured, points), measured[0].ndim, found, writer)
    passes.RemoveUnusedNodesPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)


def _kind(found: Mapping[ir.Value, Kind], value: ir.Value | None) -> Kind:
    return Kind.CONSTANT if value is None else found[value]


def _may_be_numbers(value: ir.Value, found: Mapping[ir.Value, Kind]) -> bool:
    """Integers of at most one axis, and whatever else other kinds of nodes read."""
    if value.dtype in _INTEGERS and (value.shape is None or len(value.shape) < 2):
        return True
    return any(found[user.outputs[0]] is not Kind.LENGTH for user, _ in value.uses())


def _points(sizes: Mapping[str, tuple[int, int]]) -> list[dict[str, int]]:
    """Sizes to measure at: all small, each larger alone, all larger."""
    small, large = ({name: pair[index] for name, pair in sizes.items()} for index in (0, 1))
    return [small, *({**small, name: large[name]} for name in sizes), large]


def _same(left: Array, right: Array) -> bool:
    return left.shape == right.shape and np.array_equal(left, right, equal_nan=left.dtype.kind == "f")


def _is_list(measured: Sequence[Array]) -> bool:
    first = measured[0]
    one_shape = len({array.shape for array in measured}) == 1
    return one_shape and first.dtype.kind == "i" and first.ndim < 2 and first.size <= _MOST_NUMBERS


def _monomials(measured: Sequence[Array], points: Sequence[Mapping[str, int]]) -> tuple[Monomial, ...] | None:
    """Each number as a constant times axes; None where one is no such product."""
    columns = zip(*(array.reshape(-1).tolist() for array in measured), strict=True)
    found = [_monomial(column, points) for column in columns]
    return None if None in found else tuple(one for one in found if one is not None)


def _monomial(numbers: Sequence[int], points: Sequence[Mapping[str, int]]) -> Monomial | None:
    names = list(points[0])
    for count in range(len(names) + 1):
        for axes in combinations(names, count):
            products = [prod(sizes[name] for name in axes) for sizes in points]
            factor = numbers[0] // products[0]
            if all(factor * product == number for product, number in zip(products, numbers, strict=True)):
                return factor, axes
    return None


def _replace(
    value: ir.Value,
    numbers: tuple[Monomial, ...] | None,
    rank: int,
    found: Mapping[ir.Value, Kind],
    writer: "_Writer",
) -> None:
    for user, index in list(value.uses()):
        kind = found[user.outputs[0]]
        if numbers is not None:
            user.replace_input_with(index, writer.numbers(numbers, rank, kind))
        elif kind is not Kind.LENGTH:
            raise SourceError(
                f"node {user.name} ({user.op_type}) takes the length {value.name}, which is no multiple of the inputs' lengths"
            )


def _with_a_rest(numbers: tuple[Monomial, ...]) -> tuple[Monomial, ...]:
    """A Reshape's shape with -1 for its last length that varies: whatever the exporter wrote, Q, K and V are cut by one shape."""
    varying = [place for place, (_, axes) in enumerate(numbers) if axes]
    if not varying:
        return numbers
    return (*numbers[: varying[-1]], (-1, ()), *numbers[varying[-1] + 1 :])


class _Writer:
    """Makes the plain lengths, each once, before everything else in the graph."""

    def __init__(self, graph: ir.Graph, reading: Reading) -> None:
        self._graph, self._reading, self._first = graph, reading, next(iter(graph))
        self._made: dict[object, ir.Value] = {}
        self._inputs = {str(value.name): value for value in graph.inputs}

    def constant(self, array: Array) -> ir.Value:
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._made:
            name = f"lengths/constant_{len(self._made)}"
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.initializers[name] = self._made[key] = value
        return self._made[key]

    def numbers(self, numbers: tuple[Monomial, ...], rank: int, kind: Kind) -> ir.Value:
        """int64 [len(numbers)], or a scalar where ``rank`` is 0."""
        home = self._reading.homes.get(kind, self._reading.homes[Kind.TOKENS])
        key = (tuple((factor, tuple(home[name] for name in axes)) for factor, axes in numbers), rank)
        if key not in self._made:
            parts = [self._monomial(factor, axes, home) for factor, axes in numbers]
            joined = parts[0] if len(parts) == 1 else self._add("Concat", parts, axis=0)
            self._made[key] = joined if rank else self._add("Squeeze", [joined])
        return self._made[key]

    def _monomial(self, factor: int, axes: tuple[str, ...], home: Mapping[str, tuple[str, int]]) -> ir.Value:
        found = [self._axis(*home[name]) for name in axes]
        if factor != 1 or not found:
            found.insert(0, integers(self._graph, [factor]))
        return reduce(lambda left, right: self._add("Mul", [left, right]), found)

    def _axis(self, name: str, index: int) -> ir.Value:
        key = (name, index)
        if key not in self._made:
            self._made[key] = self._add("Shape", [self._inputs[name]], start=index, end=index + 1)
        return self._made[key]

    def _add(self, op_type: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
        name = f"lengths/{op_type}_{len(self._made)}_{self._graph.num_nodes()}"
        node = ir.node(op_type, inputs, attributes=attributes, name=name)
        self._graph.insert_before(self._first, node)
        output = node.outputs[0]
        output.name, output.type = f"{name}:0", ir.TensorType(ir.DataType.INT64)
        output.shape = ir.Shape([] if op_type == "Squeeze" else [None] if op_type == "Concat" else [1])
        if op_type == "Concat":
            output.shape = ir.Shape([len(inputs)])
        return output
