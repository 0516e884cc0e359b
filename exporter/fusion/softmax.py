"""Softmaxes written out by exponentials to Softmax, before attention is looked for around them.

    x -> [Sub(ReduceMax(x))] -> e = Exp -> s = ReduceSum(e) -> e / s, or e Reciprocal(s), or e (1 / s)

What is subtracted cancels; where it is the largest of x itself, over axes with that of the sum among them, it goes with the rest.
Beyond fewer nodes the operator keeps what exponentials without it lose: large numbers, which overflow.
Source: ONNX operator Softmax (opset 13). Refused, with the node's name: something added to the sum (a sink, for which neither
Softmax nor Attention has an input), exponentials that are changed before they are summed, another value divided by the sum,
several axes or none that are constant, an axis that is dropped, results inside that something else reads.
A sum of exponentials that nothing is divided by is no candidate.
"""

from dataclasses import dataclass

import onnx_ir as ir

from txopt.exporter.algebra import scalar
from txopt.exporter.bodies import paths
from txopt.exporter.fusion.norm_path import axes_of, drops_axes, read_elsewhere
from txopt.exporter.fusion.replace import replace
from txopt.exporter.fusion.report import NOTHING, Barred, Report
from txopt.exporter.shapes import rank_of

_IN_BETWEEN = ("Mul", "Where", "Add", "Sub")  # what changes exponentials before they are summed
_ON_SUMS = ("Add", "Max", "Clip", "Where", "Mul")


@dataclass(frozen=True)
class _Softmax:
    x: ir.Value
    axis: int
    last: ir.Node


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports."""
    report = Report("Softmax", barred, paths(model))
    for total in [node for node in model.graph.all_nodes() if node.op_type == "ReduceSum"]:
        match = _match(total)
        if isinstance(match, str):
            report.refuse(total, match)
        elif match is not None and not report.bars(total):
            report.took(total, match.last.outputs[0])
            name = f"{total.name}/Softmax"
            replace(match.last, ir.node("Softmax", [match.x], attributes={"axis": match.axis}, name=name))
    return report


def _match(total: ir.Node) -> _Softmax | str | None:
    """The softmax, a reason of refusal, or None where nothing is divided by a sum of exponentials."""
    summed, s = total.inputs[0], total.outputs[0]
    exponential, changed = _exponential(summed)
    division, inside = _division(s)
    if summed is None or exponential is None or division is None:
        return None
    if changed is not None:
        return f"{changed.name} changes the exponentials before they are summed"
    if inside is not None:
        what = "adds to" if inside.op_type == "Add" else "changes"
        sink = " (a sink), for which Softmax has no input" if inside.op_type == "Add" else ""
        return f"{inside.name} {what} the sum of exponentials{sink}"
    last = _quotient(division, s, summed)
    if last is None:
        return f"{division.name} divides something else than the exponentials"
    y = exponential.inputs[0]
    rank = None if y is None else rank_of(y)
    if y is None or (axes := axes_of(total, rank)) is None or len(axes) != 1:
        return f"the sum is over axes {axes_of(total, rank)}, expected one"
    if drops_axes(total):
        return f"{total.name} drops the axis of the sum"
    x = _unshifted(y, axes[0], rank)
    return read_elsewhere(last, x) or _Softmax(x, axes[0], last)


def _exponential(summed: ir.Value | None) -> tuple[ir.Node | None, ir.Node | None]:
    """(the Exp whose results are summed, what changes them before)."""
    node = None if summed is None else summed.producer()
    if node is not None and node.op_type in _IN_BETWEEN:
        inner = [value.producer() for value in node.inputs if value is not None]
        return next((one for one in inner if one is not None and one.op_type == "Exp"), None), node
    return (node, None) if node is not None and node.op_type == "Exp" else (None, None)


def _division(s: ir.Value) -> tuple[ir.Node | None, ir.Node | None]:
    """(what divides by the sum, what changes the sum before)."""
    for user, index in s.uses():
        if user.op_type == "Reciprocal" or (user.op_type == "Div" and index == 1):
            return user, None
    for user, _ in s.uses():
        if user.op_type in _ON_SUMS:
            division, _ = _division(user.outputs[0]) if user.op_type != "Mul" else (None, None)
            if division is not None:
                return division, user
    return None, None


def _quotient(division: ir.Node, s: ir.Value, e: ir.Value) -> ir.Node | None:
    """The node that gives e / s, None where something else is divided."""
    if division.op_type == "Div" and division.inputs[0] is e:
        return division
    if division.op_type == "Div" and scalar(division.inputs[0]) != 1:
        return None
    products = [user for user, _ in division.outputs[0].uses() if user.op_type == "Mul" and e in user.inputs]
    return products[0] if len(products) == 1 else None


def _unshifted(y: ir.Value, axis: int, rank: int | None) -> ir.Value:
    """x where ``y`` is x less its largest along ``axis``, and maybe along others; else ``y``, of which the softmax is the same."""
    node = y.producer()
    if node is None or node.op_type != "Sub" or node.inputs[0] is None or node.inputs[1] is None:
        return y
    largest = node.inputs[1].producer()
    if largest is None or largest.op_type != "ReduceMax" or largest.inputs[0] is not node.inputs[0]:
        return y
    axes = axes_of(largest, rank)
    return node.inputs[0] if axes is not None and axis in axes and not drops_axes(largest) else y
