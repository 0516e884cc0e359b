"""What ONNX Runtime (1.30 to 1.32) needs that the ONNX standard does not ask for. The graphs stay standard ONNX."""

import onnx_ir as ir

from txopt.exporter.bodies import fix_names
from txopt.exporter.graph import integers
from txopt.exporter.lowering.blocks import lower_blocks
from txopt.exporter.lowering.heads import join_heads
from txopt.exporter.lowering.rows import lower_rows
from txopt.exporter.lowering.storage import store
from txopt.runtime.manifest import QUANTIZED


def lower(model: ir.Model, precision: str) -> None:
    """Changes ``model`` in place."""
    join_heads(model)
    _widen_masks(model)
    fix_names(model)


def lower_for_cpu(model: ir.Model, precision: str) -> None:
    """``lower``; then the CPU provider's own operators for products with integers, and constants in two bytes where that is enough."""
    lower(model, precision)
    if precision == "bf16":
        store(model.graph, ir.DataType.BFLOAT16)
    if precision in QUANTIZED:
        lower_blocks(model)
        lower_rows(model)
        store(model.graph, ir.DataType.FLOAT16)


def lower_for_proof(model: ir.Model, precision: str) -> None:
    """What ONNX Runtime needs to run a graph that is there for another engine, and no more: it proves such artifacts.

    bfloat16, for which its CPU provider has no kernels, is how constants are stored.
    """
    _widen_masks(model)
    fix_names(model)
    if precision == "bf16":
        store(model.graph, ir.DataType.BFLOAT16)


def _widen_masks(model: ir.Model) -> None:
    """Attention's mask may have one query row for all by the standard; ONNX Runtime wants every row there.

    Seen with F.scaled_dot_product_attention in custom modules, whose source masks are [B,1,1,T].
    """
    widened: dict[tuple[ir.Graph | None, ir.Value, ir.Value], ir.Value] = {}
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Attention" and len(node.inputs) > 3]:
        query, mask = node.inputs[0], node.inputs[3]
        if query is None or mask is None or mask.shape is None or len(mask.shape) < 2 or mask.shape[-2] != 1:
            continue
        if query.shape is not None and query.shape[-2] == 1:
            continue
        key = node.graph, query, mask
        if key not in widened:
            widened[key] = _expanded(model.graph, node, query, mask)
        node.replace_input_with(3, widened[key])


def _expanded(graph: ir.Graph, before: ir.Node, query: ir.Value, mask: ir.Value) -> ir.Value:
    one = integers(graph, [1])
    length = ir.node("Shape", [query], attributes={"start": -2, "end": -1}, name=f"{before.name}/query_length")
    shape = ir.node("Concat", [length.outputs[0], one], attributes={"axis": 0}, name=f"{before.name}/mask_shape")
    expand = ir.node("Expand", [mask, shape.outputs[0]], name=f"{before.name}/mask")
    assert before.graph is not None, "it was found in one"
    before.graph.insert_before(before, [length, shape, expand])
    return expand.outputs[0]
