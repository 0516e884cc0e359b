"""What the conversion of opset 12 to 13 makes of a softmax, undone: before, it ran over all axes from ``axis`` on, flattened.

Of the last axis alone that was always the softmax of today, but the converter writes Flatten, Softmax, Reshape all the same, and
attention would not be known behind it.
"""

import onnx_ir as ir


def restore_softmaxes(graph: ir.Graph) -> None:
    """Reshape(Softmax(Flatten(x, last axis)), Shape(x)) becomes Softmax(x) over the last axis; changes ``graph`` in place."""
    for node in [node for node in graph.all_nodes() if node.op_type == "Softmax"]:
        flat, back = _made_by(node.inputs[0], "Flatten"), _only_reader(node.outputs[0], "Reshape")
        if node.graph is None or flat is None or back is None or back.graph is not node.graph:
            continue
        value, shape = flat.inputs[0], _made_by(back.inputs[1], "Shape")
        if value is None or value.shape is None or shape is None or shape.inputs[0] is not value or shape.attributes:
            continue
        rank = len(value.shape)
        axis = flat.attributes["axis"].as_int() if "axis" in flat.attributes else 1
        over = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        if axis % rank != rank - 1 or over not in (-1, 1):
            continue
        whole = ir.node("Softmax", [value], attributes={"axis": -1}, name=node.name)
        made, result = whole.outputs[0], back.outputs[0]
        made.name, made.shape, made.type = result.name, value.shape, result.type
        node.graph.insert_before(node, whole)
        result.replace_all_uses_with(made, replace_graph_outputs=True)
        node.graph.remove([back, node], safe=True)


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == operator else None


def _only_reader(value: ir.Value, operator: str) -> ir.Node | None:
    users = [user for user, _ in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type == operator and not value.is_graph_output() else None
