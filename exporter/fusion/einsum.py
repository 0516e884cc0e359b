"""An ``Einsum`` that is a matrix product as MatMul, with a Transpose where its letters stand in another order.

    bqhd,bkhd->bhqk       becomes   MatMul(Transpose<0,2,1,3>(a), Transpose<0,2,3,1>(b))
    bhgqd,bhkd->bhgqk     becomes   MatMul(a, Transpose<0,1,4,3,2>(Unsqueeze<4>(b)))
    bqd,dk->bqk           becomes   MatMul(a, b)

Source: ONNX operators Einsum (opset 12) and MatMul (opset 13). Two operands, one letter that is summed over, one that only the first
has and one that only the second has; every other letter is in both and in the result. Where only the first has more than one, as of
groups of heads, the last of them in the scores is the row, and the second gets axes of length 1 for the others. Refused, with the
node's name: everything else (sums over several letters, a diagonal, an ellipsis, lengths of 1 that are summed over), which MatMul
cannot say.
"""

import onnx_ir as ir
from onnx_ir.passes import common as passes

from txopt.exporter.bodies import paths
from txopt.exporter.fusion.attention_path import changes_nothing
from txopt.exporter.fusion.replace import replace
from txopt.exporter.fusion.report import NOTHING, Barred, Report
from txopt.exporter.graph import integers
from txopt.exporter.matrix_product import matrix_product

_Orders = tuple[list[int], list[int], list[int]]


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports."""
    report = Report("Einsum", barred, paths(model))
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Einsum"]:
        equation = node.attributes["equation"].as_string().replace(" ", "")
        wide, extra = _stretched(equation, by_left=_are_probabilities(node.inputs[0]))
        orders = _orders(wide)
        if orders is None:
            report.refuse(node, f"{equation} is no product of matrices")
        elif _broadcasts(node, orders):
            report.refuse(node, f"{equation} broadcasts an axis of length 1")
        elif not report.bars(node):
            report.took(node, node.outputs[0])
            _rewrite(model.graph, node, orders, extra)
    passes.RemoveUnusedNodesPass()(model)
    return report


def _stretched(equation: str, *, by_left: bool) -> tuple[str, int]:
    """``equation`` with the letters of groups in its second operand too, behind its own, and how many these are.

    Rows are the last of the first operand's own letters in the result, or ``by_left`` in the operand.
    """
    operands, arrow, result = equation.partition("->")
    left, comma, right = operands.partition(",")
    alone = [
        letter
        for letter in (left if by_left else result)
        if letter in left and letter in result and letter not in right
    ]
    if not arrow or not comma or len(alone) < 2 or not (left + right + result).isalpha():
        return equation, 0
    return f"{left},{right}{''.join(alone[:-1])}->{result}", len(alone) - 1


def _are_probabilities(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    while node is not None and changes_nothing(node):
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node is not None and node.op_type == "Softmax"


def _orders(equation: str) -> _Orders | None:
    """How the axes of both operands and then of the product must be permuted; None where this is no product of matrices."""
    found = matrix_product(equation)
    if found is None:
        return None
    batch, row, column, summed = found[3:]
    return (
        [found.left.index(letter) for letter in batch + row + summed],
        [found.right.index(letter) for letter in batch + summed + column],
        [(batch + row + column).index(letter) for letter in found.result],
    )


def _broadcasts(node: ir.Node, orders: _Orders) -> bool:
    """Einsum stretches a length of 1 that is summed over; MatMul does not."""
    left, right = node.inputs
    if left is None or right is None or left.shape is None or right.shape is None:
        return False
    sizes = left.shape[orders[0][-1]], right.shape[orders[1][-2]]  # a letter of the second's own: behind it are groups
    return sizes[0] != sizes[1] and 1 in sizes


def _rewrite(graph: ir.Graph, node: ir.Node, orders: _Orders, extra: int) -> None:
    left, right, result = orders
    nodes: list[ir.Node] = []
    first, second = node.inputs
    if extra and len(right) == extra + 2:
        right = right[-2:]  # a matrix for all: MatMul has it so
    elif extra and second is not None:
        second = _unsqueezed(graph, second, [len(right) - extra + index for index in range(extra)], nodes)
    operands = [_permuted(value, order, nodes) for value, order in ((first, left), (second, right))]
    nodes.append(ir.node("MatMul", operands))
    _permuted(nodes[-1].outputs[0], result, nodes)
    for index, new in enumerate(nodes):
        new.name = f"{node.name}/{new.op_type}_{index}"
    replace(node, *nodes)


def _unsqueezed(graph: ir.Graph, value: ir.Value, axes: list[int], nodes: list[ir.Node]) -> ir.Value:
    """``value`` with axes of length 1 behind its own."""
    nodes.append(ir.node("Unsqueeze", [value, integers(graph, axes)]))
    output = nodes[-1].outputs[0]
    output.type = value.type
    output.shape = None if value.shape is None else ir.Shape([*value.shape, *([1] * len(axes))])
    return output


def _permuted(value: ir.Value | None, order: list[int], nodes: list[ir.Node]) -> ir.Value | None:
    if value is None or order == sorted(order):
        return value
    nodes.append(ir.node("Transpose", [value], attributes={"perm": order}))
    output = nodes[-1].outputs[0]
    output.type, output.shape = value.type, None if value.shape is None else ir.Shape([value.shape[i] for i in order])
    return output
