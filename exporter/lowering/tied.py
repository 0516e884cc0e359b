"""Tables of 8 bits for TensorRT, which a lookup and a head share: stored as the head multiplies with them, so that an engine has one.

TensorRT-RTX 1.7 turns the codes of 8 bits that Transpose(DequantizeLinear(codes [V,M])) multiplies with while it builds an engine,
and keeps them twice where a Gather reads them too. Codes of 4 bits it keeps once, as they are; turned by hand they would be there
twice. So a table of 8 bits that has a head becomes a weight [M,V], and tokens pick its columns:

    Gather(DequantizeLinear(codes [V,M]), ids [..]) [..,M]    Transpose(Gather(DequantizeLinear(codes [M,V]), ids [..], axis 1) [M,..])

Exact; the graph stays standard ONNX. tests/exporter/test_blocks_tensorrt.py measures both, and fails when an engine is otherwise.
"""

import hashlib
from collections.abc import Collection

import onnx_ir as ir

from txopt.calibration.packing import for_dequantize_linear
from txopt.calibration.quantize import blocks_of, constant, is_table, is_weight, remove

_BITS = 8


def turn_tables(models: Collection[ir.Model]) -> None:
    """Changes ``models`` in place: tables of 8 bits that have a head in any of them, in all, for their codes are stored once."""
    tables = [
        (model.graph, node)
        for model in models
        for node in model.graph
        if is_weight(node) and is_table(node) and blocks_of(node).scheme.bits == _BITS
    ]
    tied = {_digest(node) for _, node in tables if any(user.op_type == "Transpose" for user in _users(node))}
    for graph, node in tables:
        if _digest(node) in tied:
            _turn(graph, node)


def _turn(graph: ir.Graph, node: ir.Node) -> None:
    packed, name = for_dequantize_linear(blocks_of(node)), str(node.outputs[0].name).removesuffix("/rounded")
    inputs = [
        constant(graph, f"{name}/{part}", tensor)
        for part, tensor in zip(
            ("turned", "steps"), packed.inputs, strict=True
        )  # without zero points: TensorRT takes none
    ]
    turned = ir.node("DequantizeLinear", inputs, attributes=packed.attributes, name=f"{name}/turned/dequantize")
    weight = turned.outputs[0]
    weight.name, weight.type = f"{name}/turned/rounded", node.outputs[0].type
    weight.shape = ir.Shape(packed.codes.shape.numpy())
    graph.insert_before(node, turned)
    for user in _users(node):
        if user.op_type == "Gather":
            _look_up(graph, user, weight)
        else:
            user.outputs[0].replace_all_uses_with(weight)
            graph.remove(user, safe=True)
    remove(graph, node)


def _look_up(graph: ir.Graph, gather: ir.Node, weight: ir.Value) -> None:
    """Columns of ``weight`` [M,V] in the place of rows of the table."""
    ids = gather.inputs[1]
    assert ids is not None, "a Gather has indices"
    assert ids.shape is not None, "tokens are an input of the graph"
    columns = ir.node("Gather", [weight, ids], attributes={"axis": 1}, name=f"{gather.name}/columns")
    last = [*range(1, len(ids.shape) + 1), 0]
    rows = ir.node("Transpose", [columns.outputs[0]], attributes={"perm": last}, name=f"{gather.name}/rows")
    found, made = gather.outputs[0], rows.outputs[0]
    made.name, made.shape, made.type = found.name, found.shape, found.type
    graph.insert_before(gather, [columns, rows])
    found.replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove(gather, safe=True)


def _users(node: ir.Node) -> list[ir.Node]:
    """Who reads what ``node`` gives: Gathers and Transposes."""
    return [user for user, _ in node.outputs[0].uses()]


def _digest(node: ir.Node) -> bytes:
    codes = node.inputs[0]
    assert codes is not None, "is_weight() asked"
    assert codes.const_value is not None, "is_weight() asked"
    return hashlib.sha256(codes.const_value.tobytes()).digest()
