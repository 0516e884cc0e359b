"""What ONNX Runtime (1.30 to 1.32) needs that the ONNX standard does not ask for. The graphs stay standard ONNX."""

import numpy as np
import onnx_ir as ir


def lower(model: ir.Model) -> None:
    """Changes ``model`` in place."""
    _widen_masks(model)


def lower_for_cpu(model: ir.Model) -> None:
    """``lower``, and float32 arithmetic on bfloat16 weights: the CPU provider has no bfloat16 kernels."""
    lower(model)
    _widen_bfloat16(model)


def _widen_bfloat16(model: ir.Model) -> None:
    """Weights stay bfloat16 in the file and are widened when they are loaded; everything computed from them is float32."""
    graph = model.graph
    narrow, wide = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    for value in [value for value in graph.initializers.values() if value.dtype == narrow]:
        uses = list(value.uses())
        cast = ir.node("Cast", [value], attributes={"to": wide}, name=f"{value.name}/widened")
        cast.outputs[0].type = ir.TensorType(wide)
        graph.insert_before(next(iter(graph)), cast)
        for user, index in uses:
            user.replace_input_with(index, cast.outputs[0])
    for node in graph:
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.as_int() == narrow:
            node.attributes["to"] = ir.AttrInt64("to", wide)
        constant = node.attributes.get("value")
        if node.op_type == "Constant" and constant is not None and constant.as_tensor().dtype == narrow:
            numbers = constant.as_tensor().numpy().astype(np.float32)
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(numbers))
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.dtype == narrow:
            value.type = ir.TensorType(wide)


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
