"""Where a length first appears in a graph, so that two lengths can be seen to be one.

A length that has the name of an input's axis is that input's, of the first that has it; who reads a file sees to it that equal
names are equal lengths. Without a name it is followed through operators that keep it: elementwise ones, norms, products of
matrices, Transpose, Squeeze, Unsqueeze, Reshape by known lengths, Split, Concat and Slice along other axes, lookups. Source: the
shape inference of each operator, ONNX opset 24. Where two operands may broadcast, a length is followed only if both have the same, or
one is known not to have it.
"""

from math import prod

import onnx_ir as ir

from txopt.exporter.shapes import Length, is_open, length, lengths_of, multiplied_lengths, rank_of

_SAME_SHAPE = (
    "Abs Cast Clip Cos Dropout Elu Erf Exp Gelu HardSwish Identity IsNaN LayerNormalization LeakyRelu Log LogSoftmax Neg Not "
    "Reciprocal Relu RMSNormalization RotaryEmbedding Round Sigmoid Sin Softmax Softplus Sqrt Tanh"
)
_ELEMENTWISE = "Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mul Or Pow Sub Where"
_ONE_NUMBER = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_KEEP, _BROADCAST = frozenset(_SAME_SHAPE.split()), frozenset(_ELEMENTWISE.split())


def origin(found: Length) -> Length:
    """Where a length first appears: the earliest value that has it, with the axis, or its number."""
    return Origins().of(found)


class Origins:
    """Remembers what it found: along residual connections every length is asked for twice."""

    def __init__(self) -> None:
        self._known: dict[tuple[ir.Value, int], Length] = {}

    def of(self, found: Length) -> Length:
        way: list[tuple[ir.Value, int]] = []
        while isinstance(found, tuple) and found not in self._known:
            way.append(found)
            value, axis = found
            number, rank = length(value, axis), rank_of(value)
            before = None if rank is None else _namesake(value, axis) or self._before(value, axis % rank, rank)
            if isinstance(number, int):
                found = number
            elif before is None:
                break
            else:
                found = before
        last = self._known.get(found, found) if isinstance(found, tuple) else found
        self._known.update(dict.fromkeys(way, last))
        return last

    def _before(self, value: ir.Value, axis: int, rank: int) -> Length | None:
        """The same length of what ``value`` is made of; None where this is not known."""
        node = value.producer()
        x = node.inputs[0] if node is not None and node.inputs else None
        if node is None or x is None or (value is not node.outputs[0] and node.op_type != "Split"):
            return None
        if node.op_type in _KEEP:
            return x, axis
        if node.op_type in _BROADCAST:
            return self._of_operands(node, axis, rank)
        if node.op_type == "MatMul":
            return self._of_matrices(node, axis, rank)
        if node.op_type == "Transpose":
            order = node.attributes["perm"].as_ints() if "perm" in node.attributes else list(range(rank))[::-1]
            return x, order[axis]
        if node.op_type == "Reshape":
            return self._of_reshape(node, axis)
        if node.op_type in ("Squeeze", "Unsqueeze"):
            return _beside_ones(node, x, axis, rank)
        if node.op_type == "Attention" and rank == 4:
            source = node.inputs[2] if axis == 3 else x
            return None if source is None else (source, axis)
        if node.op_type in ("Concat", "Split"):
            along = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
            return None if along % rank == axis else (x, axis)
        if node.op_type == "Slice":
            axes = node.inputs[3] if len(node.inputs) > 3 else None
            cut = None if axes is None or axes.const_value is None else axes.const_value.numpy().reshape(-1) % rank
            return None if cut is None or axis in cut else (x, axis)
        if node.op_type == "Gather" and x.const_value is not None:  # a lookup in a table: ids, then the row
            along = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
            ids = node.inputs[1]
            return (ids, axis) if along == 0 and ids is not None and axis < (rank_of(ids) or 0) else None
        return None

    def _of_operands(self, node: ir.Node, axis: int, rank: int) -> Length | None:
        """The length that all operands have which are not known to be stretched along the axis; 1, where all of them are 1."""
        found: set[Length] = set()
        for operand in node.inputs:
            own = None if operand is None else rank_of(operand)
            if operand is None or own is None:
                return None
            place = axis - (rank - own)
            if place >= 0 and length(operand, place) != 1:
                found.add(self.of((operand, place)))
        return found.pop() if len(found) == 1 else None if found else 1

    def _of_matrices(self, node: ir.Node, axis: int, rank: int) -> Length | None:
        left, right = node.inputs
        ranks = [None if side is None else rank_of(side) for side in (left, right)]
        if left is None or right is None or ranks[0] is None or ranks[1] is None or min(ranks[0], ranks[1]) < 2:
            return None
        if axis >= rank - 2:
            return (left, ranks[0] - 2) if axis == rank - 2 else (right, ranks[1] - 1)
        return self._of_operands(node, axis, rank)

    def _of_reshape(self, node: ir.Node, axis: int) -> Length | None:
        parts, x = lengths_of(node.inputs[1]), node.inputs[0]
        if x is None or parts is None or axis >= len(parts):
            return None
        rank, part = rank_of(x), parts[axis]
        if part == 0 and "allowzero" in node.attributes and node.attributes["allowzero"].as_int():
            return None
        if part == 0:
            return x, axis
        if not is_open(part) or rank is None:
            return part
        others = [(x, place) if other == 0 else other for place, other in enumerate(parts) if place != axis]
        lengths = [factor for place in range(rank) for factor in self.factors(self.of((x, place)))]
        return _left(lengths, [factor for other in others for factor in self.factors(self.of(other))])

    def factors(self, found: Length) -> list[Length]:
        """``found`` as a product, as far as it was computed as one."""
        node = found.producer() if isinstance(found, ir.Value) else None
        while node is not None and node.op_type in _ONE_NUMBER and node.inputs[0] is not None:
            node = node.inputs[0].producer()
        if node is not None and (several := multiplied_lengths(node)) is not None:
            return [factor for one in several for factor in self.factors(self.of(one))]
        sides = [lengths_of(side) for side in node.inputs] if node is not None and node.op_type == "Mul" else []
        if not sides or any(side is None or len(side) != 1 for side in sides):
            return [found]
        return [factor for side in sides for one in side or () for factor in self.factors(self.of(one))]


def _beside_ones(node: ir.Node, x: ir.Value, axis: int, rank: int) -> Length | None:
    """The length before a Squeeze or an Unsqueeze, which gives ``rank`` axes; those that it adds are 1."""
    axes, before = lengths_of(node.inputs[1]) if len(node.inputs) > 1 else None, rank_of(x)
    if axes is None or before is None or not all(isinstance(one, int) for one in axes):
        return None
    changed = {int(one) % max(before, rank) for one in axes if isinstance(one, int)}
    if node.op_type == "Squeeze":
        return x, [place for place in range(before) if place not in changed][axis]
    return 1 if axis in changed else (x, axis - sum(one < axis for one in changed))


def _left(lengths: list[Length], taken: list[Length]) -> Length | None:
    """What -1 comes to where ``lengths`` are reshaped and all others are ``taken``: one length, or a number."""
    named = [one for one in lengths if not isinstance(one, int)]
    for one in taken:
        if one in named:
            named.remove(one)
        elif not isinstance(one, int):
            return None
    numbers, divisor = (prod(one for one in side if isinstance(one, int)) for side in (lengths, taken))
    if not named and divisor and numbers % divisor == 0:
        return numbers // divisor
    return named[0] if len(named) == 1 and numbers == divisor else None


def _namesake(value: ir.Value, axis: int) -> tuple[ir.Value, int] | None:
    """The first axis of an input that has the name of this one; None where it has none, or is that axis itself."""
    name, graph = length(value, axis), value.graph
    if not isinstance(name, str) or graph is None:
        return None
    for other in graph.inputs:
        for place in range(len(other.shape or ())):
            if length(other, place) == name:
                return None if other is value and place == axis % len(other.shape or ()) else (other, place)
    return None
