"""An ``Einsum`` that is a matrix product as MatMul, with a Transpose where its letters stand in another order.

    bqhd,bkhd->bhqk   becomes   MatMul(Transpose<0,2,1,3>(a), Transpose<0,2,3,1>(b))

Source: ONNX operators Einsum (opset 12) and MatMul (opset 13). Two operands, one letter that is summed over, one that only the first
has and one that only the second has; every other letter is in both and in the result. Refused, with the node's name: everything else
(sums over several letters, a diagonal, an ellipsis, letters that broadcast), which MatMul alone cannot say.
"""

import onnx_ir as ir
from onnx_ir.passes import common as passes

from txopt.exporter.bodies import paths
from txopt.exporter.fusion.replace import replace
from txopt.exporter.fusion.report import NOTHING, Barred, Report
from txopt.exporter.matrix_product import matrix_product

_Orders = tuple[list[int], list[int], list[int]]


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports."""
    report = Report("Einsum", barred, paths(model))
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Einsum"]:
        equation = node.attributes["equation"].as_string().replace(" ", "")
        orders = _orders(equation)
        if orders is None:
            report.refuse(node, f"{equation} is no product of matrices")
        elif _broadcasts(node, orders):
            report.refuse(node, f"{equation} broadcasts an axis of length 1")
        elif not report.bars(node):
            report.took(node, node.outputs[0])
            _rewrite(node, orders)
    passes.RemoveUnusedNodesPass()(model)
    return report


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
    sizes = left.shape[orders[0][-1]], right.shape[orders[1][-2]]
    return sizes[0] != sizes[1] and 1 in sizes


def _rewrite(node: ir.Node, orders: _Orders) -> None:
    left, right, result = orders
    nodes: list[ir.Node] = []
    operands = [_permuted(value, order, nodes) for value, order in zip(node.inputs, (left, right), strict=True)]
    nodes.append(ir.node("MatMul", operands))
    _permuted(nodes[-1].outputs[0], result, nodes)
    for index, new in enumerate(nodes):
        new.name = f"{node.name}/{new.op_type}_{index}"
    replace(node, *nodes)


def _permuted(value: ir.Value | None, order: list[int], nodes: list[ir.Node]) -> ir.Value | None:
    if value is None or order == sorted(order):
        return value
    nodes.append(ir.node("Transpose", [value], attributes={"perm": order}))
    output = nodes[-1].outputs[0]
    output.type, output.shape = value.type, None if value.shape is None else ir.Shape([value.shape[i] for i in order])
    return output
