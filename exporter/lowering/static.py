"""Static int8 for ONNX Runtime's CPU (1.30 to 1.32): the same numbers, written so that its kernels find them.

1. Activations become uint8 with zero point 128. On x86 the engine multiplies uint8 with int8. It rewrites pairs of int8 itself, but
   not where several products share one: these it would compute in float, from weights that it dequantizes in every run.
2. Tokens look up codes and scales of a table (tables.py).

Both are exact. The graph stays standard ONNX; TensorRT gets the one before.
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
        elif node.op_type == "Gather":
            look_up(model.graph, node)


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
