"""Static int8 for ONNX Runtime's CPU (1.30 to 1.32): the same numbers, written so that its kernels find them.

1. Activations become uint8 with zero point 128. On x86 the engine multiplies uint8 with int8. It rewrites pairs of int8 itself, but
   not where several products share one: these it would compute in float, from weights that it dequantizes in every run.
2. Tokens look up codes and scales of a table, and what they found is dequantized, not the whole table in every run. TensorRT does not
   take that: "Quantized constant is only allowed before DQ", says its builder.

Both are exact. The graph stays standard ONNX; TensorRT gets the one before.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.quantize import constant, remove

_MIDDLE = "static/middle"
_OFFSET = 128


def lower_static(model: ir.Model) -> None:
    """Changes ``model`` in place."""
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear" and _is_int8(node):
            _shift(model.graph, node)
        elif node.op_type == "Gather":
            _look_up(model.graph, node)


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


def _look_up(graph: ir.Graph, gather: ir.Node) -> None:
    """Gather(DequantizeLinear(codes [V,M], scales [V]), ids), rows of it, with the Gather first."""
    table, ids = gather.inputs
    dequantize = None if table is None else table.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or ids is None or len(dequantize.inputs) > 2:
        return
    codes, scales = (_constant(value) for value in dequantize.inputs)
    axes = [node.attributes["axis"].as_int() if "axis" in node.attributes else 0 for node in (gather, dequantize)]
    if codes is None or scales is None or codes.ndim != 2 or scales.ndim != 1 or axes != [0, 0]:
        return
    column = constant(graph, f"{dequantize.inputs[1].name}/column", ir.Tensor(scales[:, None]))  # type: ignore[union-attr]
    rows = ir.node("Gather", [dequantize.inputs[0], ids], name=f"{gather.name}/codes")
    steps = ir.node("Gather", [column, ids], name=f"{gather.name}/scales")
    rank = len(ids.shape) if ids.shape is not None else 2
    attributes = {"axis": rank, "block_size": codes.shape[1]}
    new = ir.node(
        "DequantizeLinear", [rows.outputs[0], steps.outputs[0]], attributes=attributes, name=f"{gather.name}/dequantize"
    )
    found, made = gather.outputs[0], new.outputs[0]
    made.name, made.shape, made.type = found.name, found.shape, found.type
    graph.insert_before(gather, [rows, steps, new])
    found.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove(gather, safe=True)
    if not dequantize.outputs[0].uses():
        remove(graph, dequantize)


def _constant(value: ir.Value | None) -> NDArray[Any] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()
