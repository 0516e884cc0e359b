"""ArgMax and TopK of probabilities that nothing else reads: taken of the scores, whose order is the same.

    Softmax -> ArgMax      LogSoftmax -> TopK, of which only the indices are read

A softmax over a whole vocabulary costs more than the search. Source: ONNX operators ArgMax (opset 13) and TopK (opset 24); both
softmaxes rise with every score. Refused, with the node's name: another axis, the smallest of a softmax, where probabilities too
small for their dtype are equal, and float16, which rounds probabilities of different scores to one.
"""

import onnx_ir as ir

from txopt.exporter.bodies import paths
from txopt.exporter.fusion.report import NOTHING, Barred, Report
from txopt.exporter.shapes import rank_of

_EXACT = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports; probabilities that something else reads must be computed anyway and are no candidates."""
    report = Report("Ranking", barred, paths(model))
    for node in [node for node in model.graph.all_nodes() if node.op_type in ("ArgMax", "TopK")]:
        softmax = node.inputs[0].producer() if node.inputs[0] is not None else None
        if softmax is None or softmax.op_type not in ("Softmax", "LogSoftmax") or not _alone(node, softmax):
            continue
        problem, ranks = _problem(node, softmax), node.outputs[-1]
        if problem is not None:
            report.refuse(node, problem)
        elif not report.bars(node):
            report.took(node, ranks)
            node.replace_input_with(0, softmax.inputs[0])
            if softmax.graph is not None:  # which may be around the body that ranks
                softmax.graph.remove(softmax, safe=True)
    return report


def _alone(node: ir.Node, softmax: ir.Node) -> bool:
    """Whether only the ranking reads the probabilities, and nothing reads those it gives."""
    probabilities = softmax.outputs[0]
    if len(probabilities.uses()) != 1 or probabilities.is_graph_output():
        return False
    return all(not value.uses() and not value.is_graph_output() for value in node.outputs[:-1])


def _problem(node: ir.Node, softmax: ir.Node) -> str | None:
    x = softmax.inputs[0]
    rank = None if x is None else rank_of(x)
    default = 0 if node.op_type == "ArgMax" else -1
    axes = [_attribute(node, "axis", default), _attribute(softmax, "axis", -1)]
    if rank is None or axes[0] % rank != axes[1] % rank:
        return f"it ranks along axis {axes[0]}, {softmax.name} is along axis {axes[1]}"
    if node.op_type == "TopK" and not _attribute(node, "largest", 1):
        return "it asks for the smallest, of which several may be zero"
    if x is None or x.dtype not in _EXACT:
        return "different scores may have one probability in this dtype"
    return None


def _attribute(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default
