"""A graph lowered to products with integers, computed in float32 again: what it says beside how it rounds.

For proof alone: the weights are given by whoever rounded them, and everything else is the lowered graph as it will be written. So a
bias that was lost on the way, or an input that was mixed up, shows as it would in any float32 graph.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from txopt.calibration.blocks import Blocks, dequantize
from txopt.exporter.lowering.blocks import weight_of


def raise_blocks(model: ir.Model, blocks: Mapping[str, Blocks]) -> None:
    """MatMulNBits becomes MatMul and Add, GatherBlockQuantized Gather; changes ``model`` in place. ``blocks`` [K,N] by weight."""
    for node in [node for node in model.graph if node.op_type in ("MatMulNBits", "GatherBlockQuantized")]:
        weight = dequantize(blocks[weight_of(node)])
        if node.op_type == "MatMulNBits":
            made = [ir.node("MatMul", [node.inputs[0], _stored(model.graph, f"{node.name}/float", weight)])]
            if len(node.inputs) > 5 and node.inputs[5] is not None:
                made.append(ir.node("Add", [made[0].outputs[0], node.inputs[5]]))
        else:
            table = _stored(model.graph, f"{node.name}/float", np.ascontiguousarray(weight.T))
            made = [ir.node("Gather", [table, node.inputs[1]])]
        result = made[-1].outputs[0]
        result.name, result.shape, result.type = node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type
        model.graph.insert_before(node, made)
        node.outputs[0].replace_all_uses_with(result, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def _stored(graph: ir.Graph, name: str, weight: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]") -> ir.Value:
    tensor = ir.Tensor(weight, name=name)
    value = ir.Value(name=name, shape=ir.Shape(weight.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
    graph.initializers[name] = value
    return value
