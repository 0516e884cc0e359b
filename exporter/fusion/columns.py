"""Which columns of one value another holds: the last axis cut, split, negated, paired up and joined again.

Every operator on the way is done to the columns' numbers instead of the columns, so how a rearrangement was written does not matter.
It knows no rule; a length that only the graph's shape arithmetic says is computed along.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.exporter.algebra import scalar
from txopt.exporter.origins import origin
from txopt.exporter.shapes import Length, lengths_of, number_of, rank_of

Numbers = NDArray[np.int64]

_CUTS = ("Slice", "Split", "Squeeze", "Gather", "Reshape")


def width_of(value: ir.Value) -> int | None:
    """The length of the last axis, also where only what it is cut from says it."""
    known, node = size_of(value, -1), value.producer()
    if known is not None or node is None or node.op_type not in ("Slice", "Split") or node.inputs[0] is None:
        return known
    whole = width_of(node.inputs[0])
    columns = None if whole is None else Columns(node.inputs[0], whole).of(value)
    return None if columns is None else len(columns)


def size_of(value: ir.Value, axis: int) -> int | None:
    """The length of an axis as a number, None where it has none or it is not known."""
    rank = rank_of(value)
    if rank is None or not -rank <= axis < rank:
        return None
    found = origin((value, axis % rank))
    number = number_of(found) if isinstance(found, ir.Value) else found
    return None if number is None or isinstance(number, tuple) else int(number)


def cut_from(value: ir.Value) -> list[ir.Value]:
    """``value``, what it is cut from, and so on."""
    chain = [value]
    while (node := chain[-1].producer()) is not None and node.op_type in _CUTS and node.inputs[0] is not None:
        chain.append(node.inputs[0])
    return chain


class Columns:
    """The columns of ``root``, whose last axis is ``width`` long, by their numbers from 1 on; negated ones are negative."""

    def __init__(self, root: ir.Value, width: int) -> None:
        rank = rank_of(root)
        self._leading = None if rank is None else rank - 1
        self._known: dict[ir.Value, Numbers | None] = {root: np.arange(1, width + 1)}

    def of(self, value: ir.Value) -> tuple[int, ...] | None:
        """The columns that ``value`` has along its last axis; None where it is made of anything else."""
        found = self._numbers(value)
        return None if found is None or found.ndim != 1 else tuple(found.tolist())

    def _numbers(self, value: ir.Value | None) -> Numbers | None:
        """[width], or [rows, columns] where the last axis was cut in two."""
        if value is None or self._leading is None:
            return None
        if value not in self._known:
            self._known[value] = None  # while it is asked for
            self._known[value] = self._computed(value)
        return self._known[value]

    def _computed(self, value: ir.Value) -> Numbers | None:
        node = value.producer()
        if node is None or not node.inputs:
            return None
        if node.op_type == "Concat":
            return self._joined(node)
        x = self._numbers(node.inputs[0])
        rule = _RULES.get(node.op_type)
        if x is None or rule is None:
            return None
        try:
            result: Numbers | None = rule(self, node, x, value)
        except (IndexError, ValueError):  # no such columns, or they cannot be put so
            return None
        return result if result is not None and 1 <= result.ndim <= 2 else None

    def _joined(self, node: ir.Node) -> Numbers | None:
        parts = [self._numbers(part) for part in node.inputs]
        known = [part for part in parts if part is not None]
        if len(known) != len(parts) or len({part.ndim for part in known}) != 1:
            return None
        axis = self._axis(node.attributes["axis"].as_int(), known[0].ndim)
        return None if axis is None else np.concatenate(known, axis)

    def _axis(self, axis: int, ndim: int) -> int | None:
        """An axis of a value as one of its ``ndim`` axes of columns, None where it is one of the others."""
        assert self._leading is not None
        place = axis - self._leading if axis >= 0 else axis + ndim
        return place if 0 <= place < ndim else None

    def _axes(self, value: ir.Value | None, ndim: int) -> list[int] | None:
        numbers = lengths_of(value)
        places = [self._axis(one, ndim) if isinstance(one, int) else None for one in numbers or ()]
        return [place for place in places if place is not None] if places and None not in places else None

    def _negated(self, node: ir.Node, x: Numbers, value: ir.Value) -> Numbers:
        return -x

    def _sliced(self, node: ir.Node, x: Numbers, value: ir.Value) -> Numbers | None:
        places = self._axes(node.inputs[3], x.ndim) if len(node.inputs) > 3 else None
        start, end = (self._number(bound) for bound in node.inputs[1:3])
        step = self._number(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else 1
        if places is None or len(places) != 1 or start is None or end is None or step is None or step < 1:
            return None
        return np.moveaxis(np.moveaxis(x, places[0], 0)[start:end:step], 0, places[0])

    def _split(self, node: ir.Node, x: Numbers, value: ir.Value) -> Numbers | None:
        axis = self._axis(node.attributes["axis"].as_int() if "axis" in node.attributes else 0, x.ndim)
        if axis is None:
            return None
        sizes = lengths_of(node.inputs[1]) if len(node.inputs) > 1 else None
        chunk = -(-x.shape[axis] // len(node.outputs))
        known = [chunk] * len(node.outputs) if sizes is None else [size for size in sizes if isinstance(size, int)]
        if len(known) != len(node.outputs):
            return None
        ends = [sum(known[: i + 1]) for i in range(len(known))]
        return np.split(x, ends, axis)[list(node.outputs).index(value)]

    def _squeezed(self, node: ir.Node, x: Numbers, value: ir.Value) -> Numbers | None:
        places = self._axes(node.inputs[1], x.ndim) if len(node.inputs) > 1 else None
        return None if places is None else np.squeeze(x, tuple(places))

    def _unsqueezed(self, node: ir.Node, x: Numbers, value: ir.Value) -> Numbers | None:
        places = self._axes(node.inputs[1], x.ndim + 1)
        return None if places is None else np.expand_dims(x, tuple(places))

    def _picked(self, node: ir.Node, x: Numbers, value: ir.Value) -> Numbers | None:
        axis = self._axis(node.attributes["axis"].as_int() if "axis" in node.attributes else 0, x.ndim)
        index = None if node.inputs[1] is None else node.inputs[1].const_value
        return None if axis is None or index is None else np.take(x, index.numpy(), axis)

    def _cut(self, node: ir.Node, x: Numbers, value: ir.Value) -> Numbers | None:
        """A Reshape of the columns alone."""
        assert self._leading is not None
        sizes, source = lengths_of(node.inputs[1]), node.inputs[0]
        if sizes is None or source is None or len(sizes) <= self._leading:
            return None
        leading, rest = sizes[: self._leading], sizes[self._leading :]
        if any(_unlike(size, source, axis) for axis, size in enumerate(leading)):
            return None
        if len(rest) == 1:
            return x.reshape(-1)
        numbers = [size if isinstance(size, int) else self._number(_value(size)) or -1 for size in rest]
        return x.reshape(numbers) if numbers.count(-1) < 2 else None

    def _number(self, value: ir.Value | None) -> int | None:
        """What a bound or length comes to, also where it is read from the shape of a value that holds columns."""
        if value is None:
            return None
        constant = scalar(value)
        if constant is not None:
            return int(constant)
        node, found = value.producer(), lengths_of(value)
        if found is not None and len(found) == 1 and isinstance(found[0], tuple):
            return self._length(*found[0])
        if node is None or node.op_type not in _ARITHMETIC:
            return None
        operands = [self._number(operand) for operand in node.inputs[: _ARITHMETIC[node.op_type]]]
        if None in operands:
            return None
        first, last = operands[0] or 0, operands[-1] or 0
        results = {"Add": first + last, "Sub": first - last, "Mul": first * last, "Neg": -first}
        if node.op_type == "Div":
            return first // last if last > 0 else None
        return results.get(node.op_type, first)

    def _length(self, value: ir.Value, axis: int) -> int | None:
        numbers = self._numbers(value)
        place = None if numbers is None else self._axis(axis, numbers.ndim)
        return size_of(value, axis) if numbers is None or place is None else numbers.shape[place]


def _value(size: Length) -> ir.Value | None:
    return size if isinstance(size, ir.Value) else None


def _unlike(size: Length, source: ir.Value, axis: int) -> bool:
    """Whether a Reshape's length is known to be another one than ``source`` has there."""
    if size == 0:
        return False
    number, own = (origin(size) if isinstance(size, tuple) else size), size_of(source, axis)
    return isinstance(number, int) and number > 0 and own is not None and own != number


_ARITHMETIC = {"Cast": 1, "Identity": 1, "Squeeze": 1, "Unsqueeze": 1, "Reshape": 1, "Neg": 1} | dict.fromkeys(
    ("Add", "Sub", "Mul", "Div"), 2
)

_RULES: dict[str, Any] = {
    "Neg": Columns._negated,
    "Slice": Columns._sliced,
    "Split": Columns._split,
    "Squeeze": Columns._squeezed,
    "Unsqueeze": Columns._unsqueezed,
    "Gather": Columns._picked,
    "Reshape": Columns._cut,
}
