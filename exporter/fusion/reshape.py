"""Shape arithmetic that says one thing twice: equal ``Shape`` nodes become one, a ``Reshape`` of a ``Reshape`` only the second, and
none is left where a value has that shape already.

Two ``Shape`` nodes are equal where the axes they read have equal names, which the trace gives to equal lengths only. Refused, with
the node's name: a second ``Reshape`` whose zeros copy lengths of the first (``allowzero`` 0 and a shape that may hold zeros; one put
together of other values' lengths holds none).
"""

import onnx_ir as ir
from onnx_ir.passes import common as passes

from txopt.exporter.bodies import paths, share_equal_nodes
from txopt.exporter.fusion.report import NOTHING, Barred, Report
from txopt.exporter.origins import origin
from txopt.exporter.shapes import is_open, lengths_of, rank_of


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports the reshapes it saved."""
    report = Report("Reshape", barred, paths(model))
    for graph in report.paths:
        _share_shapes(graph)
    share_equal_nodes(model)  # the Concats over shapes that are one now
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Reshape"]:
        inner = node.inputs[0].producer() if node.inputs[0] is not None else None
        if inner is None or inner.op_type != "Reshape":
            continue
        if _may_copy_lengths(node):
            report.refuse(node, f"its shape may copy lengths of {inner.name}")
            continue
        if not report.bars(node):
            report.took(node, node.outputs[0])
            node.replace_input_with(0, inner.inputs[0])
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Reshape"]:
        x, y = node.inputs[0], node.outputs[0]
        if x is not None and y.uses() and not y.is_graph_output() and _keeps_shape(node) and not report.bars(node):
            report.took(node, *(user.outputs[0] for user, _ in y.uses()))
            y.replace_all_uses_with(x)
    passes.RemoveUnusedNodesPass()(model)
    return report


def _keeps_shape(node: ir.Node) -> bool:
    """Whether every length asked for is the one that is there; -1 is, where all others are."""
    x, parts = node.inputs[0], lengths_of(node.inputs[1])
    if x is None or parts is None or rank_of(x) != len(parts):
        return False
    copies = "allowzero" not in node.attributes or node.attributes["allowzero"].as_int() == 0
    asked = [(axis, part) for axis, part in enumerate(parts) if not is_open(part) and not (part == 0 and copies)]
    return sum(map(is_open, parts)) < 2 and all(origin(part) == origin((x, axis)) for axis, part in asked)


def _share_shapes(graph: ir.Graph) -> None:
    first: dict[tuple[str, ...], ir.Value] = {}
    for node in [node for node in graph if node.op_type == "Shape"]:
        axes = _axes(node)
        if axes is None:
            continue
        kept = first.setdefault(axes, node.outputs[0])
        if kept is not node.outputs[0] and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(kept)
            graph.remove(node, safe=True)


def _axes(node: ir.Node) -> tuple[str, ...] | None:
    """The names and numbers of the axes that a ``Shape`` node reads; None where one is unknown."""
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    start, end = (node.attributes[key].as_int() if key in node.attributes else None for key in ("start", "end"))
    dims = list(value.shape)[start:end]
    if any(isinstance(dim, ir.SymbolicDim) and dim.value is None for dim in dims):
        return None
    return tuple(str(dim if isinstance(dim, int) else dim.value) for dim in dims)


def _may_copy_lengths(node: ir.Node) -> bool:
    if "allowzero" in node.attributes and node.attributes["allowzero"].as_int() == 1:
        return False
    lengths = lengths_of(node.inputs[1])
    return lengths is None or any(isinstance(one, ir.Value) or one == 0 for one in lengths)
