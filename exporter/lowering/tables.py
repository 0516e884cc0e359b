"""Lookups in a table of codes with a scale for each row: what was found is dequantized, not the whole table in every run.

TensorRT does not take that: "Quantized constant is only allowed before DQ", says its builder. The graph stays standard ONNX, and the
numbers are the same.
"""

from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.quantize import constant, remove


def look_up(graph: ir.Graph, gather: ir.Node) -> None:
    """Gather(DequantizeLinear(codes [V,M], scales [V]), ids), rows of it, with the Gather first.

    Zero points [V] may be there, all of them 0.
    """
    table, ids = gather.inputs
    dequantize = None if table is None else table.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or ids is None:
        return
    codes, scales, *zeros = (_constant(value) for value in dequantize.inputs)
    axes = [node.attributes["axis"].as_int() if "axis" in node.attributes else 0 for node in (gather, dequantize)]
    if codes is None or scales is None or codes.ndim != 2 or scales.ndim != 1 or axes != [0, 0]:
        return
    if any(each is None or each.any() for each in zeros):
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
