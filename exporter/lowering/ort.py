"""What ONNX Runtime (1.30 to 1.32) needs that the ONNX standard does not ask for. The graphs stay standard ONNX."""

import numpy as np
import onnx_ir as ir


def lower(model: ir.Model) -> None:
    """Changes ``model`` in place."""
    _widen_masks(model)


def _widen_masks(model: ir.Model) -> None:
    """Attention's mask may have one query row for all by the standard; ONNX Runtime wants every row there.

    Seen with F.scaled_dot_product_attention in custom modules, whose source masks are [B,1,1,T].
    """
    widened: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
    for node in [node for node in model.graph if node.op_type == "Attention" and len(node.inputs) > 3]:
        query, mask = node.inputs[0], node.inputs[3]
        if query is None or mask is None or mask.shape is None or len(mask.shape) < 2 or mask.shape[-2] != 1:
            continue
        if query.shape is not None and query.shape[-2] == 1:
            continue
        if (query, mask) not in widened:
            widened[query, mask] = _expanded(model.graph, node, query, mask)
        node.replace_input_with(3, widened[query, mask])


def _expanded(graph: ir.Graph, before: ir.Node, query: ir.Value, mask: ir.Value) -> ir.Value:
    one = _constant(graph, "lowering/one", [1])
    length = ir.node("Shape", [query], attributes={"start": 2, "end": 3}, name=f"{before.name}/query_length")
    shape = ir.node("Concat", [length.outputs[0], one], attributes={"axis": 0}, name=f"{before.name}/mask_shape")
    expand = ir.node("Expand", [mask, shape.outputs[0]], name=f"{before.name}/mask")
    graph.insert_before(before, [length, shape, expand])
    return expand.outputs[0]


def _constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        graph.initializers[name] = ir.Value(
            name=name, shape=ir.Shape([len(numbers)]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor
        )
    return graph.initializers[name]
