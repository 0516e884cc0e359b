"""The weights of a graph that can be quantized, and who reads them: linear layers, token tables, and heads tied to a table.

Owns which initializers count. Positions, biases, norms, convolutions and small matrices stay as they are: they weigh little, and
nothing reads them as a product. Knows neither how codes are found nor what becomes of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

LEAST_SIZE = 4096  # numbers in a weight; below that, scales and a node of its own cost what is gained


class Role(Enum):
    """How a node reads a weight."""

    LINEAR = "the second operand [K,N] of a MatMul"
    HEAD = "a table [V,M], transposed, the second operand of a MatMul"
    TABLE = "a table [V,M] that tokens pick rows of"


@dataclass(frozen=True, kw_only=True)
class Read:
    """One use of a weight: the node that computes with it, and, for products, the value [..,K] that it is multiplied with."""

    weight: ir.Value
    node: ir.Node
    role: Role

    @property
    def name(self) -> str:
        return str(self.weight.name)

    @property
    def size(self) -> int:
        """K, how many numbers of its input one output sums over; of a table, the width of its rows."""
        assert self.weight.const_value is not None, "reads() gives no others"
        rows, columns = self.weight.const_value.shape.numpy()
        return int(rows if self.role is Role.LINEAR else columns)

    @property
    def numbers(self) -> int:
        """How many the weight holds."""
        assert self.weight.const_value is not None, "reads() gives no others"
        return self.weight.const_value.size

    def matrix(self) -> NDArray[np.float32]:
        """The weight as its product takes it, [K,N]; of a table, transposed."""
        assert self.weight.const_value is not None, "reads() gives no others"
        numbers: NDArray[np.float32] = self.weight.const_value.numpy()
        return numbers if self.role is Role.LINEAR else numbers.T

    @property
    def activations(self) -> ir.Value | None:
        return None if self.role is Role.TABLE else self.node.inputs[0]


def reads(graph: ir.Graph) -> list[Read]:
    """Every read of every weight that can be quantized, in the order of the nodes.

    A weight that something else reads too, or that is read both as [K,N] and as a table, is left out whole.
    """
    found: list[Read] = []
    for weight in graph.initializers.values():
        if not _is_large_matrix(weight):
            continue
        mine = list(_reads(weight))
        if mine and None not in mine and len({read.role is Role.LINEAR for read in mine if read}) == 1:
            found += [read for read in mine if read]
    order = {node: index for index, node in enumerate(graph)}
    return sorted(found, key=lambda read: order[read.node])


def roles(graph: ir.Graph) -> dict[str, Role]:
    """How each weight that can be quantized is read, by name; of a table with a head, as that or as a table."""
    return {read.name: read.role for read in reads(graph)}


def _is_large_matrix(weight: ir.Value) -> bool:
    tensor = weight.const_value
    if tensor is None or weight.is_graph_output():
        return False
    return tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == 2 and tensor.size >= LEAST_SIZE


def _reads(weight: ir.Value) -> Iterator[Read | None]:
    """The uses of ``weight``; None for one that needs its numbers themselves."""
    for node, index in weight.uses():
        if node.graph is not weight.graph:
            yield None  # in the body of a branch or loop
        elif node.op_type == "MatMul" and index == 1:
            yield Read(weight=weight, node=node, role=Role.LINEAR)
        elif node.op_type == "Gather" and index == 0 and _picks_tokens(node):
            yield Read(weight=weight, node=node, role=Role.TABLE)
        elif node.op_type == "Transpose" and _turns(node):
            for user, place in node.outputs[0].uses():
                is_head = user.op_type == "MatMul" and place == 1
                yield Read(weight=weight, node=user, role=Role.HEAD) if is_head else None
        else:
            yield None


def _turns(transpose: ir.Node) -> bool:
    """Whether rows become columns, for nobody but nodes of the graph."""
    permutation = transpose.attributes["perm"].as_ints() if "perm" in transpose.attributes else [1, 0]
    return list(permutation) == [1, 0] and not transpose.outputs[0].is_graph_output()


def _picks_tokens(gather: ir.Node) -> bool:
    """Whether rows are picked by the caller's tokens; a table of positions is picked by a length."""
    axis = gather.attributes["axis"].as_int() if "axis" in gather.attributes else 0
    indices = gather.inputs[1]
    return axis == 0 and indices is not None and indices.is_graph_input()
