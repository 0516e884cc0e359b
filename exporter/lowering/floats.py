"""A graph lowered to products with integers, computed in float32 again: what it says beside how it rounds.

For proof alone: the weights are given by whoever rounded them, and everything else is the lowered graph as it will be written. So a
bias that was lost on the way, or an input that was mixed up, shows as it would in any float32 graph.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from txopt.calibration.blocks import Blocks, dequantize
from txopt.exporter.lowering import rows
from txopt.exporter.lowering.blocks import weight_of


def raise_blocks(model: ir.Model, blocks: Mapping[str, Blocks]) -> None:
    """Products with integers become MatMul and Add, GatherBlockQuantized Gather; changes ``model`` in place.

    ``blocks`` [K,N] are the weights by name.
    """
    for node in [node for node in model.graph if node.op_type in ("MatMulNBits", "GatherBlockQuantized")]:
        weight = dequantize(blocks[weight_of(node)])
        if node.op_type == "MatMulNBits":
            made = [ir.node("MatMul", [node.inputs[0], _stored(model.graph, f"{node.name}/float", weight)])]
            if len(node.inputs) > 5 and node.inputs[5] is not None:
                made.append(ir.node("Add", [made[0].outputs[0], node.inputs[5]]))
        else:
            table = _stored(model.graph, f"{node.name}/float", np.ascontiguousarray(weight.T))
            made = [ir.node("Gather", [table, node.inputs[1]])]
        _replace(model.graph, node, made)
    for node in [node for node in model.graph if node.op_type == rows.PRODUCT]:
        (scaled,) = node.outputs[0].consumers()
        table = _stored(model.graph, f"{node.name}/float", dequantize(blocks[weight_of(node)]))
        made = [ir.node("MatMul", [rows.activations_of(node), table])]
        _replace(model.graph, scaled, made)
        model.graph.remove(node, safe=True)


def _replace(graph: ir.Graph, node: ir.Node, made: list[ir.Node]) -> None:
    """What the last one ``made`` gives takes the place of what ``node`` gave."""
    result, old = made[-1].outputs[0], node.outputs[0]
    result.name, result.shape, result.type = old.name, old.shape, old.type
    graph.insert_before(node, made)
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _stored(graph: ir.Graph, name: str, weight: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]") -> ir.Value:
    tensor = ir.Tensor(weight, name=name)
    value = ir.Value(name=name, shape=ir.Shape(weight.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    graph.initializers[name] = value
    return value
