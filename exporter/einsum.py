"""torch.einsum of two tensors with one contracted axis, in a graph of PyTorch operators, as the matmul that it is.

    einsum("b q h d, b k h d -> b h q k", x, y)   becomes   matmul(permute(x, [0,2,1,3]), transpose(permute(y, [0,2,1,3]), -2, -1))

Left as it is: more or fewer than two tensors, an ellipsis, several contracted axes or none, an axis that only one side has
besides the one that it contributes (as of keys that all heads share).
"""

from typing import Any

import torch
from torch import fx

from txopt.exporter.matrix_product import matrix_product

_aten = torch.ops.aten


def as_matmul(graph: fx.Graph) -> int:
    """Rewrites ``graph``; gives the number of einsums that became matmuls."""
    found = 0
    for node in [node for node in graph.nodes if node.target is _aten.einsum.default]:
        product, operands = matrix_product(str(node.args[0])), node.args[1]
        if product is None or not isinstance(operands, (list, tuple)) or len(operands) != 2:
            continue
        left, right, out, batch, row, column, inner = product
        with graph.inserting_before(node):
            a = _permuted(graph, operands[0], left, batch + row + inner)
            if right[-1] == inner:  # keys: as what writes a matmul has them
                b = _permuted(graph, operands[1], right, batch + column + inner)
                b = made(graph, _aten.transpose.int, b, -2, -1)
            else:
                b = _permuted(graph, operands[1], right, batch + inner + column)
            matmul = made(graph, _aten.matmul.default, a, b)
            result = _permuted(graph, matmul, batch + row + column, out)
        for new in {a, b, matmul, result} - set(operands):
            new.meta = {**node.meta, "val": new.meta["val"]}
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        found += 1
    return found


def made(graph: fx.Graph, operator: Any, *arguments: Any) -> fx.Node:
    """A new node with the shape of its result, as far as the arguments have theirs."""
    node = graph.call_function(operator, arguments)
    node.meta = {"val": operator(*fx.map_arg(arguments, lambda each: each.meta["val"]))}
    return node


def _permuted(graph: fx.Graph, node: fx.Node, term: str, wanted: str) -> fx.Node:
    return node if term == wanted else made(graph, _aten.permute.default, node, [term.index(axis) for axis in wanted])
