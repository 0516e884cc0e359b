"""Products of matrices in one form, which the rule for attention looks for: batches as axes of their own, queries before keys.

    MatMul(Reshape(a), Reshape(b)) -> Reshape          becomes   MatMul(Transpose(a), Transpose(b))
    MatMul(a, b) -> Transpose of the last two axes     becomes   MatMul(Transpose(b), Transpose(a))

tf2onnx writes an einsum as a product of matrices of three axes, with all batches and heads in the first: between its Unsqueeze,
Transpose, Reshape and Squeeze stand the lengths, computed in the graph. Keras writes keys times queries and turns them. Source: ONNX
operators MatMul (opset 13), whose batches broadcast, and Reshape, which keeps the order of elements; (A B)^T = B^T A^T.

Joined batches may broadcast only where one of them is 1 as a whole, and then each of its axes is 1: apart, they broadcast alike.
Refused, with the node's name: joined batches of which several pairs do not show to be equal, a product that is not cut as its
operands were joined, or that something else reads as it is. Scores that are cut for a mask and joined again before their Softmax
are left for the rule for attention, which knows them, and so are those that are turned and softmaxed along the keys.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

import onnx_ir as ir
from onnx_ir.passes import common as passes

from txopt.exporter.bodies import paths
from txopt.exporter.fusion.attention_path import before
from txopt.exporter.fusion.replace import replace as put
from txopt.exporter.fusion.report import NOTHING, Barred, Report
from txopt.exporter.origins import Origins
from txopt.exporter.rearranged import Axes, behind, rearranged
from txopt.exporter.shapes import length, rank_of


@dataclass(frozen=True)
class _Side:
    """One operand of a product: axes of ``source`` that are batches, and the two of the matrix in their order.

    ``groups`` says how many of them each batch axis of the operand is made of; ``lengths`` are those of all, as far as they are known.
    """

    source: ir.Value
    batches: tuple[int, ...]
    matrix: tuple[int, int]
    groups: tuple[int, ...]
    lengths: tuple[int | str | None, ...]

    @property
    def joined(self) -> bool:
        return set(self.groups) != {1}

    @property
    def order(self) -> tuple[int, ...]:
        return (*self.batches, *self.matrix)

    @property
    def transposed(self) -> "_Side":
        return replace(self, matrix=self.matrix[::-1], lengths=(*self.lengths[:-2], *self.lengths[:-3:-1]))


@dataclass(frozen=True)
class _Product:
    """``left`` times ``right``, given by ``last``; where ``turned``, its transposed is."""

    left: _Side
    right: _Side
    last: ir.Node
    turned: bool


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports."""
    report = Report("MatMul", barred, paths(model))
    others = _of_attention(model)
    for node in [node for node in model.graph.all_nodes() if node.op_type == "MatMul" and node not in others]:
        found = _match(node)
        if isinstance(found, str):
            report.refuse(node, found)
        elif found is not None and not report.bars(node):
            report.took(node, found.last.outputs[0])
            _rewrite(node, found)
    passes.RemoveUnusedNodesPass()(model)
    return report


def _of_attention(model: ir.Model) -> set[ir.Node]:
    """Products that are reshaped twice before they are softmaxed, or turned and then softmaxed over their rows."""
    found = set()
    for softmax in [node for node in model.graph.all_nodes() if node.op_type == "Softmax"]:
        way = before(softmax)
        operators = [step.node.op_type for step in way]
        if operators.count("Reshape") > 1 or ("Transpose" in operators and _is_over_rows(softmax)):
            found.add(way[0].node)
    return found


def _is_over_rows(softmax: ir.Node) -> bool:
    rank = None if softmax.inputs[0] is None else rank_of(softmax.inputs[0])
    axis = softmax.attributes["axis"].as_int() if "axis" in softmax.attributes else -1
    return rank is not None and rank > 2 and axis % rank == rank - 2


def _match(product: ir.Node) -> _Product | str | None:
    """What ``product`` and its rearrangements are, a reason of refusal, or None where it is neither joined nor turned."""
    origins = Origins()  # of its own: what was remembered of nodes that are gone is wrong
    left, right = (None if value is None else _side(value, origins) for value in product.inputs)
    if left is None or right is None or left.groups != right.groups:
        return None
    last, turned = _end(product, left, right, origins)
    if last is None:
        cut = left.joined and any(user.op_type == "Reshape" for user, _ in product.outputs[0].uses())
        return "its result is not cut as its operands were joined, or something else reads it as it is" if cut else None
    if not left.joined and not turned:
        return None
    pairs = [
        (origins.of((left.source, one)), origins.of((right.source, other)))
        for one, other in zip(left.batches, right.batches, strict=True)
    ]
    unequal = [pair for pair in pairs if pair[0] != pair[1]]
    if left.joined and (len(unequal) > 1 or any(isinstance(one, int) for pair in unequal for one in pair)):
        return "the batches that were joined do not show to be the same on both sides"
    return _Product(left, right, last, turned)


def _side(value: ir.Value, origins: Origins) -> _Side | None:
    """``value`` as an operand; None where an axis of its matrix is made of several, or a part of what it is made of is gone.

    Axes of length 1 that went into the matrix count as batches: they may be anywhere.
    """
    found = rearranged(value, origins)
    if len(found.axes) < 3 or rank_of(found.source) != sum(map(len, found.axes)):
        return None
    *batches, rows, columns = found.axes
    lengths = {axis: _length(found.source, axis, origins) for group in found.axes for axis in group}
    ones = tuple(axis for group in (rows, columns) if len(group) > 1 for axis in group if lengths[axis] == 1)
    rows, columns = (tuple(axis for axis in group if axis not in ones) for group in (rows, columns))
    if len(rows) != 1 or len(columns) != 1:
        return None
    batches[-1] += ones
    order = tuple(axis for group in batches for axis in group)
    known = tuple(lengths[axis] for axis in (*order, *rows, *columns))
    return _Side(found.source, order, (*rows, *columns), tuple(map(len, batches)), known)


def _length(value: ir.Value, axis: int, origins: Origins) -> int | str | None:
    """The number of a length, also where only its origin says it, or its name."""
    number = origins.of((value, axis))
    return number if isinstance(number, int) else length(value, axis)


def _end(product: ir.Node, left: _Side, right: _Side, origins: Origins) -> tuple[ir.Node | None, bool]:
    """The last node behind ``product`` that gives all its axes one by one, batches first, and whether its matrix is turned then."""
    count = len(left.batches)
    straight: Axes = tuple((axis,) for axis in range(count + 2))
    turned: Axes = (*straight[:-2], straight[-1], straight[-2])
    ends = list(accumulate(left.groups))
    joined = (tuple(range(end - size, end)) for size, end in zip(left.groups, ends, strict=True))
    axes: Axes | None = (*joined, *straight[-2:])
    sources = [(left.source, axis) for axis in (*left.batches, left.matrix[0])] + [(right.source, right.matrix[1])]
    lengths = [origins.of(one) for one in sources]
    end: tuple[ir.Node | None, bool] = (None, False)
    node = product
    while axes is not None and (reader := _only_reader(node)) is not None:
        axes, node = behind(reader, axes, lengths, origins), reader
        if axes in (straight, turned):
            end = node, axes == turned
    return end


def _only_reader(node: ir.Node) -> ir.Node | None:
    """What alone reads the result of ``node``, in the same graph."""
    value = node.outputs[0]
    readers = [user for user, _ in value.uses()]
    return readers[0] if len(readers) == 1 and readers[0].graph is node.graph and not value.is_graph_output() else None


def _rewrite(product: ir.Node, found: _Product) -> None:
    left, right = (found.right.transposed, found.left.transposed) if found.turned else (found.left, found.right)
    result = found.last.outputs[0]
    result.shape = result.shape or ir.Shape([None] * len(left.order))  # of which whatever follows has the names
    put(found.last, *_multiplied(product, left, right))


def _multiplied(product: ir.Node, left: _Side, right: _Side) -> list[ir.Node]:
    """The nodes that multiply both sides, their axes in order; the last is the product."""
    nodes: list[ir.Node] = []
    operands = []
    for side in (left, right):
        operands.append(side.source)
        if list(side.order) != sorted(side.order):
            nodes.append(ir.node("Transpose", [side.source], attributes={"perm": side.order}))
            operands[-1] = nodes[-1].outputs[0]
            operands[-1].type = side.source.type
            operands[-1].shape = ir.Shape(side.lengths)
    nodes.append(ir.node("MatMul", operands))
    for index, node in enumerate(nodes):
        node.name = f"{product.name}/{node.op_type}_{index}"
    return nodes
