"""Clamps of what overflowed, brought to one Clip to the dtype's largest finite number.

    bound = Where(any(IsInf(x)), largest - 1000, largest);  Min(Max(x, -bound), bound)   becomes   Clip(x, -largest, largest)

So transformers' T5 keeps float16 finite, after every layer, in eleven nodes, one of which looks at all rows. The two say the same
of every x without infinities. Of one with some, Clip puts them at the largest number rather than 1000 below, and leaves all other
numbers, and so the other rows of a batch, alone. Source: T5Block.forward in transformers; ONNX operator Clip (opset 13). Nothing is
refused: other bounds are other clamps.
"""

import numpy as np
import onnx_ir as ir

from txopt.calibration.quantize import constant
from txopt.exporter.algebra import scalar
from txopt.exporter.bodies import paths
from txopt.exporter.fusion.replace import replace
from txopt.exporter.fusion.report import NOTHING, Barred, Report

_MOVES = ("Cast", "Neg")
_SAYS_ANY = (
    "Cast",
    "Identity",
    "ReduceMax",
    "ReduceSum",
    "Reshape",
)  # behind IsInf: false where all it was asked of is
_WIDER = (ir.DataType.FLOAT, ir.DataType.DOUBLE)  # what float16 and float32 may be cast to without becoming infinite


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports."""
    report = Report("Clip", barred, paths(model))
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Min" and len(node.inputs) == 2]:
        found = _clamped(node)
        if found is None or report.bars(node):
            continue
        report.took(node, node.outputs[0])
        x, largest = found
        bounds = [_bound(model.graph, "least", -largest, x), _bound(model.graph, "largest", largest, x)]
        replace(node, ir.node("Clip", [x, *bounds], name=f"{node.name}/Clip"))
    return report


def _clamped(low: ir.Node) -> tuple[ir.Value, float] | None:
    """(x, the largest number of its dtype) of the outer node of such a clamp."""
    for inner, upper in (low.inputs, reversed(low.inputs)):
        high = None if inner is None else inner.producer()
        if high is None or high.op_type != "Max" or len(high.inputs) != 2 or len(inner.uses()) != 1:  # type: ignore[union-attr]
            continue
        for x, lower in (high.inputs, reversed(high.inputs)):
            largest = None if x is None else _largest(x)
            if x is not None and largest is not None and _bounds(x, upper, lower, largest):
                return x, largest
    return None


def _largest(x: ir.Value) -> float | None:
    return None if x.dtype not in (ir.DataType.FLOAT16, ir.DataType.FLOAT) else float(np.finfo(x.dtype.numpy()).max)


def _bounds(x: ir.Value, upper: ir.Value | None, lower: ir.Value | None, largest: float) -> bool:
    """Whether these are the bound and its negative: ``largest``, or less where any of ``x`` is infinite."""
    above, below = _chosen(upper), _chosen(lower)
    if above is None or below is None or above[0] is not below[0] or (above[1], below[1]) != (1, -1):
        return False
    overflowed, less, most = above[0].inputs
    lowered, whole = scalar(less), scalar(most)
    return lowered is not None and whole == largest and 0 < lowered < largest and _asks(overflowed, x)


def _chosen(value: ir.Value | None) -> tuple[ir.Node, int] | None:
    """(the Where that a bound is of, its sign)."""
    sign = 1
    while (node := None if value is None else value.producer()) is not None:
        if node.op_type == "Where":
            return node, sign
        if node.op_type not in _MOVES:
            return None
        sign, value = -sign if node.op_type == "Neg" else sign, node.inputs[0]
    return None


def _asks(overflowed: ir.Value | None, x: ir.Value) -> bool:
    """Whether a condition is false wherever none of ``x`` is infinite, and asks for both signs."""
    node = None if overflowed is None else overflowed.producer()
    while node is not None and node.op_type in _SAYS_ANY:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or node.op_type != "IsInf":
        return False
    asked = node.inputs[0]
    if asked is not None and asked is not x and (cast := asked.producer()) is not None and cast.op_type == "Cast":
        asked = cast.inputs[0] if cast.attributes.get_int("to", 0) in _WIDER else None
    both = all(node.attributes.get_int(name, 1) for name in ("detect_negative", "detect_positive"))
    return asked is x and both


def _bound(graph: ir.Graph, name: str, number: float, x: ir.Value) -> ir.Value:
    assert x.dtype is not None, "one that _largest knows"
    return constant(graph, f"{name}/{x.dtype.name.lower()}", ir.Tensor(np.array(number, x.dtype.numpy())))
