"""Static int8 for ONNX Runtime's CPU (1.30 to 1.32): the same numbers, written so that its kernels find them.

1. Activations become uint8 with zero point 128. On x86 the engine multiplies uint8 with int8. It rewrites pairs of int8 itself, but
   not where several products share one: these it would compute in float, from weights that it dequantizes in every run.
2. Relu between a product and its rounding becomes Max with 0: the engine takes Relu for a part of the rounding, finds that it is not
   with a zero point of 128, and leaves the product in float.
3. Tokens look up codes and scales of a table (tables.py).

All are exact. The graph stays standard ONNX; TensorRT gets the one before.
"""

import numpy as np
import onnx_ir as ir

from txopt.calibration.quantize import constant
from txopt.exporter.lowering.tables import look_up

_MIDDLE = "static/middle"
_OFFSET = 128


def lower_static(model: ir.Model) -> None:
    """Changes ``model`` in place."""
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear" and _is_int8(node):
            _shift(model.graph, node)
        elif node.op_type == "Relu" and any(user.op_type == "QuantizeLinear" for user, _ in node.outputs[0].uses()):
            _maximum(model.graph, node)
        elif node.op_type == "Gather":
            look_up(model.graph, node)


def _maximum(graph: ir.Graph, relu: ir.Node) -> None:
    nothing = constant(graph, "static/nothing", ir.Tensor(np.array(0, np.float32)))
    new = ir.node("Max", [relu.inputs[0], nothing], name=relu.name)
    old, made = relu.outputs[0], new.outputs[0]
    made.name, made.shape, made.type = old.name, old.shape, old.type
    graph.insert_before(relu, new)
    old.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove(relu, safe=True)


def _is_int8(quantize: ir.Node) -> bool:
    zero = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    return zero is not None and zero.const_value is not None and zero.const_value.dtype == ir.DataType.INT8


def _shift(graph: ir.Graph, quantize: ir.Node) -> None:
    """One QuantizeLinear and every DequantizeLinear of its codes."""
    users = [user for user, _ in quantize.outputs[0].uses()]
    if any(user.op_type != "DequantizeLinear" for user in users) or quantize.outputs[0].is_graph_output():
        return
    old = quantize.inputs[2]
    middle = constant(graph, _MIDDLE, ir.Tensor(np.array(_OFFSET, np.uint8)))
    for node in (quantize, *users):
        node.replace_input_with(2, middle)
    quantize.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    if old is not None and not old.uses():
        graph.initializers.pop(str(old.name), None)
