"""torch.einsum of two tensors with one contracted axis, in a graph of PyTorch operators, as the matmul that it is.

    einsum("b q h d, b k h d -> b h q k", x, y)   becomes   matmul(permute(x, [0,2,1,3]), transpose(permute(y, [0,2,1,3]), -2, -1))

Left as it is: more or fewer than two tensors, an ellipsis, several contracted axes or none, an axis that only one side has
besides the one that it contributes (as of keys that all heads share).
"""

from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten


def as_matmul(graph: fx.Graph) -> int:
    """Rewrites ``graph``; gives the number of einsums that became matmuls."""
    found = 0
    for node in [node for node in graph.nodes if node.target is _aten.einsum.default]:
        equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
        left, _, out = equation.partition("->")
        terms = left.split(",")
        if len(terms) != 2 or "." in equation or not isinstance(operands, (list, tuple)):
            continue
        axes = _axes(terms[0], terms[1], out)
        if axes is None:
            continue
        batch, row, column, inner = axes
        with graph.inserting_before(node):
            a = _permuted(graph, operands[0], terms[0], f"{batch}{row}{inner}")
            if terms[1][-1] == inner:  # keys: as what writes a matmul has them
                b = _permuted(graph, operands[1], terms[1], f"{batch}{column}{inner}")
                b = made(graph, _aten.transpose.int, b, -2, -1)
            else:
                b = _permuted(graph, operands[1], terms[1], f"{batch}{inner}{column}")
            product = made(graph, _aten.matmul.default, a, b)
            result = _permuted(graph, product, f"{batch}{row}{column}", out)
        for new in {a, b, product, result} - set(operands):
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


def _axes(a: str, b: str, out: str) -> tuple[str, str, str, str] | None:
    """(batch axes in the order of ``out``, the axis of ``a`` alone, of ``b`` alone, the contracted one)."""
    if any(len(set(term)) != len(term) for term in (a, b, out)):
        return None
    batch = "".join(axis for axis in out if axis in a and axis in b)
    row, column = (
        "".join(axis for axis in out if axis in one and axis not in other) for one, other in ((a, b), (b, a))
    )
    inner = "".join(axis for axis in a if axis in b and axis not in out)
    complete = set(a) == set(batch + row + inner) and set(b) == set(batch + column + inner)
    return (batch, row, column, inner) if complete and len(row) == len(column) == len(inner) == 1 else None


def _permuted(graph: fx.Graph, node: fx.Node, term: str, wanted: str) -> fx.Node:
    return node if term == wanted else made(graph, _aten.permute.default, node, [term.index(axis) for axis in wanted])
