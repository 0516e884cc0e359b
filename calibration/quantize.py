"""Weights of a graph as blocks of integers: the neutral form, standard ONNX, that every lowering starts from.

MatMul(x, W) becomes MatMul(x, DequantizeLinear(codes, scales, zeros?)), with blocks along K; a table [V,M], read by tokens or by a
tied head, is dequantized along M once for all its readers. Owns the edit of the graph. Which weights and in what scheme is the
caller's choice; how codes are found is weights.py's business.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from txopt.calibration import packing
from txopt.calibration.blocks import Blocks, dequantize
from txopt.calibration.linears import Role, reads
from txopt.calibration.packing import Packed, for_dequantize_linear, for_dequantized_table, from_dequantize_linear


def put(graph: ir.Graph, quantized: Mapping[str, Blocks]) -> None:
    """Gives the readers of each weight of ``quantized`` its dequantized blocks instead.

    Args:
        graph: changed in place; the float weights are gone from it afterwards.
        quantized: by the weight's name. Blocks [K,N] of a linear weight are as it is, those of a table [V,M] of its transpose [M,V].
    """
    for read in reads(graph):
        if read.name not in quantized or read.name not in graph.initializers:
            continue  # not asked for, or done with its first reader
        weight, blocks = read.weight, quantized[read.name]
        packed = for_dequantize_linear(blocks) if read.role is Role.LINEAR else for_dequantized_table(blocks)
        node = _dequantize(graph, weight, packed)
        weight.replace_all_uses_with(node.outputs[0])
        del graph.initializers[read.name]


def found(graph: ir.Graph) -> dict[ir.Node, Blocks]:
    """The blocks of every weight that ``put`` left in ``graph``, by the node that dequantizes it."""
    return {node: blocks_of(node) for node in graph if is_weight(node)}


def is_weight(node: ir.Node) -> bool:
    """Whether ``node`` dequantizes blocks of a weight, or whole columns of it."""
    constants = [None if value is None else value.const_value for value in node.inputs]
    if node.op_type != "DequantizeLinear" or constants[0] is None or len(constants[0].shape) != 2:
        return False
    return constants[1] is not None and len(constants[1].shape) > 0


def is_table(node: ir.Node) -> bool:
    """Whether what a DequantizeLinear of ``put`` gives is a table [V,M]."""
    return packing.is_table(node.attributes["axis"].as_int(), _block_size(node))


def blocks_of(node: ir.Node) -> Blocks:
    """The blocks that a DequantizeLinear of ``put`` dequantizes: of a table, its transpose's."""
    codes, scales, *rest = (None if value is None else value.const_value for value in node.inputs)
    assert codes is not None, "is_weight"
    assert scales is not None, "is_weight"
    zeros = rest[0] if rest else None
    axis = node.attributes["axis"].as_int()
    return from_dequantize_linear(codes, scales, zeros, axis=axis, block_size=_block_size(node))


def unfold(graph: ir.Graph) -> None:
    """Puts the rounded weights into ``graph`` as floats again: what its integers stand for, computed in float32 by every engine.

    Weights are computed one by one as they are written, never all at once.
    """
    for node in [node for node in graph if is_weight(node)]:
        value, blocks = node.outputs[0], blocks_of(node)
        weight = _Floats(blocks, str(value.name), table=is_table(node)).value()
        graph.initializers[str(weight.name)] = weight
        value.replace_all_uses_with(weight)
        remove(graph, node)


def constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """``tensor`` as the initializer ``name`` of ``graph``, made once."""
    if name not in graph.initializers:
        tensor.name = name
        shape = ir.Shape(tensor.shape.numpy())
        graph.initializers[name] = ir.Value(
            name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    return graph.initializers[name]


def remove(graph: ir.Graph, node: ir.Node) -> None:
    """Takes ``node``, whose outputs nobody reads, out of ``graph``, and the constants that it alone read."""
    inputs = list(node.inputs)
    graph.remove(node, safe=True)
    for value in inputs:
        if value is not None and not value.uses():
            graph.initializers.pop(str(value.name), None)


@dataclass(frozen=True)
class _Floats:
    """The weight [K,N], or the table [N,K], that ``blocks`` stand for, computed whenever it is asked for."""

    blocks: Blocks
    name: str
    table: bool

    def value(self) -> ir.Value:
        shape = self.blocks.codes.shape[::-1] if self.table else self.blocks.codes.shape
        lazy = ir.LazyTensor(self._tensor, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=self.name, cache=False)
        return ir.Value(name=self.name, shape=lazy.shape, type=ir.TensorType(lazy.dtype), const_value=lazy)

    def _tensor(self) -> "ir.Tensor[Any]":
        weight = dequantize(self.blocks)
        return ir.Tensor(np.ascontiguousarray(weight.T) if self.table else weight, name=self.name)


def _block_size(node: ir.Node) -> int | None:
    """Rows in a block of a DequantizeLinear of ``put``; None: whole columns."""
    return node.attributes["block_size"].as_int() if "block_size" in node.attributes else None


def _dequantize(graph: ir.Graph, weight: ir.Value, packed: Packed) -> ir.Node:
    """The node that gives ``weight``'s rounded numbers, before everything else in ``graph``."""
    inputs = []
    for part, tensor in zip(("codes", "scales", "zeros"), packed.inputs, strict=False):
        name = f"{weight.name}/{part}"
        inputs.append(constant(graph, name, tensor))
    node = ir.node("DequantizeLinear", inputs, attributes=packed.attributes, name=f"{weight.name}/dequantize")
    node.outputs[0].name = f"{weight.name}/rounded"
    node.outputs[0].shape, node.outputs[0].type = weight.shape, ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(next(iter(graph)), node)
    return node
