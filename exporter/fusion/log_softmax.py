"""Logarithms of a softmax, however they are spelled, to LogSoftmax.

    Log(Softmax(x))      x - ReduceLogSumExp(x)      x - Log(ReduceSum(Exp(x)))

Beyond fewer nodes it keeps what they lose: the logarithm of a probability too small for its dtype is a number, not minus infinity.
Source: ONNX operator LogSoftmax (opset 13). Refused, with the node's name: a number added before the logarithm, several axes or none
that are constant, an axis that is dropped, results inside that something else reads, and masks by a finite number, which the
nodes turn into minus infinity and the operator would show.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from txopt.exporter.algebra import only_user, scalar
from txopt.exporter.bodies import paths
from txopt.exporter.fusion.norm_path import axes_of, drops_axes, read_elsewhere
from txopt.exporter.fusion.replace import replace
from txopt.exporter.fusion.report import NOTHING, Barred, Report
from txopt.exporter.shapes import rank_of

_HIDDEN = -80.0  # e to this is a probability that float32 can still divide by a sum


@dataclass(frozen=True)
class _Logarithm:
    x: ir.Value
    axis: int
    last: ir.Node


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports; a logarithm or sum of something else is no candidate."""
    report = Report("LogSoftmax", barred, paths(model))
    for node in [node for node in model.graph.all_nodes() if node.op_type in _RULES]:
        match = _RULES[node.op_type](node)
        if isinstance(match, str):
            report.refuse(node, match)
        elif match is not None and not report.bars(node):
            report.took(node, match.last.outputs[0])
            attributes = {"axis": match.axis}
            replace(
                match.last,
                ir.node("LogSoftmax", [match.x], attributes=attributes, name=f"{node.name}/LogSoftmax"),
            )
    return report


def _of_softmax(node: ir.Node) -> _Logarithm | str | None:
    """Log(Softmax(x))"""
    log = only_user(node.outputs[0], "Log")
    shifted = only_user(node.outputs[0], "Add")
    if shifted is not None and only_user(shifted.outputs[0], "Log") and any(map(_is_number, shifted.inputs)):
        return "a number is added before the logarithm"
    if log is None:
        readers = [user.op_type for user, _ in node.outputs[0].uses()]
        return f"something else reads {node.outputs[0].name}" if "Log" in readers else None
    x, axis = node.inputs[0], node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    if x is None:
        return None
    return _masked(x) or _Logarithm(x, axis, log)


def _of_log_sum_exp(node: ir.Node) -> _Logarithm | str | None:
    """x - ReduceLogSumExp(x)"""
    return _subtracted(node, node, node.inputs[0])


def _of_sum(node: ir.Node) -> _Logarithm | str | None:
    """x - Log(ReduceSum(Exp(x)))"""
    log = only_user(node.outputs[0], "Log")
    exponential = None if node.inputs[0] is None else node.inputs[0].producer()
    if log is None or exponential is None or exponential.op_type != "Exp":
        return None
    return _subtracted(node, log, exponential.inputs[0])


def _subtracted(total: ir.Node, last: ir.Node, x: ir.Value | None) -> _Logarithm | str | None:
    logarithm = last.outputs[0]
    differences = [
        user for user, _ in logarithm.uses() if user.op_type == "Sub" and list(user.inputs) == [x, logarithm]
    ]
    if x is None or not differences:
        return None
    difference = differences[0]
    if len(logarithm.uses()) > 1 or logarithm.is_graph_output():
        return f"something else reads {logarithm.name}"
    axes = axes_of(total, rank_of(x))
    if axes is None or len(axes) != 1:
        return f"the sum is over axes {axes}, expected one"
    if drops_axes(total):
        return f"{total.name} drops the axis of the sum"
    return read_elsewhere(difference, x) or _Logarithm(x, axes[0], difference)


def _masked(x: ir.Value) -> str | None:
    """What speaks against a logarithm of what was masked by finite numbers."""
    node = x.producer()
    if node is None or node.op_type not in ("Where", "Add"):
        return None
    for value in node.inputs:
        tensor = None if value is None else value.const_value
        if tensor is None or tensor.dtype == ir.DataType.BOOL:
            continue
        least = tensor.numpy().astype(np.float64)
        if np.any(np.isfinite(least) & (least < _HIDDEN)):
            return f"{node.name} masks by a finite number, which is minus infinity here and the operator would show"
    return None


def _is_number(value: ir.Value | None) -> bool:
    return scalar(value) is not None


_RULES = {"Softmax": _of_softmax, "ReduceLogSumExp": _of_log_sum_exp, "ReduceSum": _of_sum}
