"""Shape arithmetic brought to one form: a length is read where it first appears, so that equal lengths are one value.

    Shape(Mul(MatMul(x, weight), scale)) -> Gather(1)   becomes   Shape<start=1,end=2>(x)

torch's old exporter asks every intermediate for its shape: Q, K and V are then cut by three shapes that nothing shows to be one, and
scores are read by more than their Softmax. A length is followed through operators that keep it: elementwise ones, norms, products of
matrices, Transpose, Reshape by known lengths, Split, Concat and Slice along other axes, lookups.

Source: the shape inference of each operator, ONNX opset 24. Where two operands may broadcast, a length is followed only if both have
the same, or one is known not to have it. Nothing is refused: a length that cannot be followed stays where it is read.
"""

from collections.abc import Sequence
from math import prod

import onnx_ir as ir
from onnx_ir.passes import common as passes

from txopt.exporter.fusion.report import NOTHING, Barred, Report
from txopt.exporter.fusion.shapes import Length, length, lengths_of, rank_of
from txopt.exporter.graph import integers

_SAME_SHAPE = (
    "Abs Cast Clip Cos Dropout Elu Erf Exp Gelu HardSwish Identity IsNaN LayerNormalization LeakyRelu Log LogSoftmax Neg Not "
    "Reciprocal Relu RMSNormalization RotaryEmbedding Round Sigmoid Sin Softmax Softplus Sqrt Tanh"
)
_ELEMENTWISE = "Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mul Or Pow Sub Where"
_KEEP, _BROADCAST = frozenset(_SAME_SHAPE.split()), frozenset(_ELEMENTWISE.split())
_READ = ("Shape", "Gather", "Slice", "Squeeze", "Unsqueeze")


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports how many reads were moved.

    No place of its own is named: nothing is computed otherwise, and what reads the lengths is proved where it is fused.
    """
    report = Report("Length", barred)
    made: dict[object, ir.Value] = {}
    origins = _Origins()
    for node in [node for node in model.graph if node.op_type in _READ]:
        output = node.outputs[0]
        found = lengths_of(output) if output not in made.values() else None
        if not found or output.is_graph_output() or not output.uses():
            continue
        first = _run([origins.of(one) for one in found])
        if first is None or _is_canonical(node, first, len(found)) or report.bars(node):
            continue
        new = _read(model.graph, first, len(found), made)
        if rank_of(output) == 0:
            new = _as_scalar(model.graph, new, made)
        output.replace_all_uses_with(new)
        report.fused += 1
    passes.RemoveUnusedNodesPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    return report


def origin(found: Length) -> Length:
    """Where a length first appears: the earliest value that has it, with the axis, or its number."""
    return _Origins().of(found)


class _Origins:
    """Remembers what it found: along residual connections every length is asked for twice."""

    def __init__(self) -> None:
        self._known: dict[tuple[ir.Value, int], Length] = {}

    def of(self, found: Length) -> Length:
        way: list[tuple[ir.Value, int]] = []
        while isinstance(found, tuple) and found not in self._known:
            way.append(found)
            value, axis = found
            number, rank = length(value, axis), rank_of(value)
            before = None if rank is None else self._before(value, axis % rank, rank)
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
        """The length that all operands have which are not known to be stretched along the axis."""
        found: set[Length] = set()
        for operand in node.inputs:
            own = None if operand is None else rank_of(operand)
            if operand is None or own is None:
                return None
            place = axis - (rank - own)
            if place >= 0 and length(operand, place) != 1:
                found.add(self.of((operand, place)))
        return found.pop() if len(found) == 1 else None

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
        part = parts[axis]
        if not isinstance(part, int) or part > 0:
            return part
        if part == 0:
            return None if "allowzero" in node.attributes and node.attributes["allowzero"].as_int() else (x, axis)
        # -1: the length that is left, where all others stay what they were, or where the numbers among them say it
        others = [place for place in range(len(parts)) if place != axis]
        stays = rank_of(x) == len(parts) and all(self.of(parts[place]) == self.of((x, place)) for place in others)
        return (x, axis) if stays else self._left_of_numbers(parts, x)

    def _left_of_numbers(self, parts: Sequence[Length], x: ir.Value) -> int | None:
        """What -1 comes to in ``parts`` of ``x`` where both begin with the same lengths, and all that follow are numbers."""
        own: list[Length] = [self.of((x, place)) for place in range(rank_of(x) or 0)]
        cut = [part if isinstance(part, int) else self.of(part) for part in parts]
        same = next((place for place, pair in enumerate(zip(own, cut, strict=False)) if pair[0] != pair[1]), len(own))
        numbers, rest = ([part for part in side[same:] if isinstance(part, int)] for side in (own, cut))
        if len(numbers) != len(own) - same or len(rest) != len(cut) - same or 0 in rest or not numbers:
            return None
        length, others = prod(numbers), -prod(rest)
        return length // others if others > 0 and length % others == 0 else None


def _run(found: Sequence[Length]) -> Length | None:
    """The first of lengths that are neighbours in one value, or the only one; None where they are scattered."""
    first = found[0]
    if isinstance(first, ir.Value) or (isinstance(first, int) and len(found) > 1):
        return None
    if isinstance(first, int) or len(found) == 1:
        return first
    value, axis = first
    return first if list(found) == [(value, axis + i) for i in range(len(found))] else None


def _is_canonical(node: ir.Node, first: Length, count: int) -> bool:
    if node.op_type != "Shape" or not isinstance(first, tuple):
        return False
    return lengths_of(node.outputs[0]) == tuple((first[0], first[1] + i) for i in range(count))


def _read(graph: ir.Graph, first: Length, count: int, made: dict[object, ir.Value]) -> ir.Value:
    """One axis: the lengths from ``first`` on."""
    if not isinstance(first, tuple):
        assert isinstance(first, int), "_run() gives no computed number"
        return integers(graph, [first])
    key = (*first, count)
    if key not in made:
        value, axis = first
        start = axis % (rank_of(value) or 1)
        attributes = {"start": start, "end": start + count}
        name = f"{value.name}/length_{start}" if count == 1 else f"{value.name}/lengths_{start}_to_{start + count - 1}"
        made[key] = _insert(graph, value, ir.node("Shape", [value], attributes=attributes, name=name))
        made[key].shape = ir.Shape([count])
    return made[key]


def _as_scalar(graph: ir.Graph, value: ir.Value, made: dict[object, ir.Value]) -> ir.Value:
    if value not in made:
        inputs = [value, integers(graph, [0])]
        made[value] = _insert(graph, value, ir.node("Squeeze", inputs, name=f"{value.name}/scalar"))
        made[value].shape = ir.Shape([])
    return made[value]


def _insert(graph: ir.Graph, value: ir.Value, node: ir.Node) -> ir.Value:
    """Right behind ``value``: whatever reads a length of something made of it comes later."""
    producer = value.producer()
    if producer is not None:
        graph.insert_after(producer, node)
    elif len(graph):
        graph.insert_before(graph[0], node)
    output = node.outputs[0]
    output.name, output.type = f"{node.name}:0", ir.TensorType(ir.DataType.INT64)
    return output
