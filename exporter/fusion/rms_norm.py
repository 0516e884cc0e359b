"""Decomposed root-mean-square norms (T5, Llama, Gemma) to RMSNormalization, by whichever exporter they were written out.

    x -> [Cast fp32] -> Pow(2) or x * x -> ReduceMean(last axis) -> Add(epsilon) -> root -> x / root -> [Cast] -> Mul(weight)

The division may be a product with Reciprocal, 1 / root or Pow(-0.5), the three factors may stand in any order, and the weight may
be 1 + a constant. Source: ONNX operator RMSNormalization (opset 23); with casts around it, its ``stash_type=1`` says the same:
statistics in fp32. Refused, with the node's name: an exponent other than 2, squares that are summed, another axis or one that is
dropped, an epsilon outside the root (of a ReduceL2, too), an epsilon or weight that is no constant, no weight at all, float64, an
intermediate that something else reads.
"""

from dataclasses import dataclass

import onnx_ir as ir

from txopt.exporter.algebra import only_user, scalar
from txopt.exporter.bodies import paths
from txopt.exporter.fusion.norm_path import (
    Scaled,
    axes_of,
    before_widening,
    drops_axes,
    flat,
    inverse,
    more_axes,
    multiplied,
    name_of,
    power,
    read_elsewhere,
    scaled,
    shape_problem,
)
from txopt.exporter.fusion.replace import replace
from txopt.exporter.fusion.report import NOTHING, Barred, Report


@dataclass(frozen=True)
class _Norm:
    x: ir.Value
    weight: ir.Value
    epsilon: float
    last: ir.Node


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports; a chain that does not hold is left as it was."""
    report = Report("RMSNormalization", barred, paths(model))
    taken = {str(node.name) for node in model.graph.all_nodes()}
    for square in [node for node in model.graph.all_nodes() if node.op_type in ("Pow", "Mul", "ReduceL2")]:
        match = _of_length(square) if square.op_type == "ReduceL2" else _match(square) or _of_sum(square)
        if isinstance(match, str):
            report.refuse(square, match)
        elif match is not None and not report.bars(square):
            report.took(square, match.last.outputs[0])
            _rewrite(match, name_of(match.last, "RMSNormalization", taken))
    return report


def _match(square: ir.Node) -> _Norm | str | None:
    """The norm, a reason of refusal, or None where this is no norm at all."""
    x, other = square.inputs
    mean = only_user(square.outputs[0], "ReduceMean")
    if x is None or mean is None or (square.op_type == "Mul" and other is not x):
        return None
    if not {user.op_type for user, _ in mean.outputs[0].uses()} & {"Add", "Sqrt", "Pow"}:
        return None
    if square.op_type == "Pow" and scalar(other) != 2:
        return f"the exponent is {scalar(other)}, not 2"
    rank = len(x.shape) if x.shape is not None else None
    if (axes := axes_of(mean, rank)) != [-1]:
        return f"the mean is over axes {axes}, not [-1]"
    if drops_axes(mean):
        return f"{mean.name} drops the axis of the mean"
    shifted = only_user(mean.outputs[0], "Add")
    if shifted is None and any(user.op_type == "Add" for user, _ in mean.outputs[0].uses()):
        return f"something else reads {mean.outputs[0].name}"
    epsilon = next((number for number in map(scalar, shifted.inputs) if number is not None), None) if shifted else None
    if shifted is None or epsilon is None or epsilon < 0:
        return "no constant epsilon is added to the mean of squares inside the root"
    if x.dtype == ir.DataType.DOUBLE:
        return "it computes in float64, the operator's statistics are float32"
    return _end(square, shifted, x, epsilon)


def _of_sum(square: ir.Node) -> str | None:
    """What is wrong with a norm that sums squares; None where they are no norm's."""
    total = only_user(square.outputs[0], "ReduceSum")
    if total is None or (square.op_type == "Mul" and square.inputs[0] is not square.inputs[1]):
        return None
    shifted = only_user(multiplied(total.outputs[0])[0], "Add")
    if shifted is None or power(shifted)[0] is None or not any(scalar(value) is not None for value in shifted.inputs):
        return None
    return f"{total.name} sums the squares, the operator averages them"


def _of_length(length: ir.Node) -> str | None:
    """What is wrong with x / (its length + epsilon); None where that is not what divides x."""
    shifted = only_user(multiplied(length.outputs[0])[0], "Add")
    if shifted is None or not any(scalar(value) is not None for value in shifted.inputs):
        return None
    divided = [user for user, index in shifted.outputs[0].uses() if user.op_type == "Div" and index == 1]
    is_norm = any(user.inputs[0] is length.inputs[0] for user in divided)
    return "epsilon is added to the root, not inside of it" if is_norm else None


def _end(square: ir.Node, shifted: ir.Node, x: ir.Value, epsilon: float) -> _Norm | str:
    root, exponent = power(shifted)
    if root is None:
        return "the mean of squares and epsilon are not used as a root alone"
    top, others = inverse(root, exponent, lambda value: value is x)
    if top is None:
        return "the root is not divided by alone"
    found = scaled(top, others or (), lambda value: value is x)
    if isinstance(found, str):
        return found
    source = x if found.narrow is None else before_widening(x, found.narrow) or x
    problem = shape_problem(source, -1, found.weight) or more_axes(
        x, found.weight, *shifted.inputs, square.inputs[1] if square.op_type == "Pow" else None
    )
    problem = problem or _dtype_problem(source, found) or read_elsewhere(found.last, x, found.weight)
    return problem or _Norm(source, found.weight, epsilon, found.last)


def _dtype_problem(x: ir.Value, found: Scaled) -> str | None:
    if x.dtype is None or found.weight.dtype is None:
        return "its dtypes are not known"
    if found.weight.dtype != x.dtype and x.dtype != ir.DataType.FLOAT:
        return f"{found.weight.name} is {found.weight.dtype}, x is {x.dtype}"
    return None


def _rewrite(norm: _Norm, name: str) -> None:
    attributes = {"axis": -1, "epsilon": norm.epsilon, "stash_type": 1}
    weight = flat(norm.weight, 1)
    if norm.x.dtype == weight.dtype:
        replace(norm.last, ir.node("RMSNormalization", [norm.x, weight], attributes=attributes, name=name))
        return
    # The standard allows two dtypes, its own function body and ONNX Runtime do not: widen the weight, narrow the result.
    wide = ir.node("Cast", [weight], attributes={"to": norm.x.dtype}, name=f"{name}/weight")
    inner = ir.node("RMSNormalization", [norm.x, wide.outputs[0]], attributes=attributes, name=name)
    narrow = ir.node("Cast", inner.outputs, attributes={"to": weight.dtype}, name=f"{name}/result")
    replace(norm.last, wide, inner, narrow)
