"""Decomposed layer norms to LayerNormalization, by whichever exporter they were written out.

    x -> [Cast fp32] -> d = x - ReduceMean(x) -> [Cast fp32] -> Pow(2) or d * d -> ReduceMean -> Add(epsilon) -> root
      -> d / root -> [Cast] -> Mul(weight) -> [Add(bias)]

The division may be a product with Reciprocal, 1 / root or Pow(-0.5), the three factors may stand in any order, and TensorFlow's
x s + (bias - mean s) with s = weight / root is the same, also as Keras has it, x s + ((-mean) s + bias). Weights may have ones before
the axes of the mean, which are over the last ones, one or several.
Source: ONNX operator LayerNormalization (opset 17), whose ``stash_type=1`` computes statistics in fp32 whatever surrounds it.
Refused, with the node's name: another exponent, a variance by moments (E[x^2] - E[x]^2), over n - 1 (torch's ``unbiased=True``) or
otherwise scaled, other axes or axes that are dropped, an epsilon, weight or bias that is no constant, no weight at all, float64, and
results inside that something else reads.
"""

from dataclasses import dataclass

import onnx_ir as ir

from txopt.exporter.algebra import close, only_user, product, scalar
from txopt.exporter.bodies import paths
from txopt.exporter.fusion import batch_norm
from txopt.exporter.fusion.columns import size_of
from txopt.exporter.fusion.norm_path import (
    LayerNorm,
    added_bias,
    axes_of,
    before_widening,
    drops_axes,
    dtype_problem,
    flat,
    inverse,
    is_weight,
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

# Between a variance by moments and its root: epsilon, and what keeps it from falling below zero.
_BEFORE_ROOT = ("Add", "Abs", "Clip", "Max", "Relu")
# Between a scaled variance and its root: the axis that it was computed without.
_PUT_BACK = ("Reshape", "Unsqueeze", "Shape")


@dataclass(frozen=True)
class _Statistics:
    """x, its differences d from the mean, and the two nodes that compute the means."""

    x: ir.Value
    d: ir.Value
    mean: ir.Node
    variance: ir.Node

    def is_difference(self, value: ir.Value) -> bool:
        """Some exporters subtract the same mean twice."""
        node, first = value.producer(), self.d.producer()
        same = node is not None and first is not None and node.op_type == "Sub" and node.inputs == first.inputs
        return value is self.d or same


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports; a variance that nobody takes the root of is no norm and no refusal."""
    report = Report("LayerNormalization", barred, paths(model))
    taken = {str(node.name) for node in model.graph.all_nodes()}
    rules = {"ReduceMean": _match, "BatchNormalization": batch_norm.match}
    for node in [node for node in model.graph.all_nodes() if node.op_type in rules]:
        match = rules[node.op_type](node)
        if isinstance(match, str):
            report.refuse(node, match)
        elif match is not None and not report.bars(node):
            report.took(node, match.last.outputs[0])
            _rewrite(match, name_of(match.last, "LayerNormalization", taken))
    return report


def _match(variance: ir.Node) -> LayerNorm | str | None:
    """The norm, a reason of refusal, or None where this is no norm at all."""
    if (moments := _by_moments(variance)) is not None:
        return moments
    found = _statistics(variance)
    scaled_variance, factor = multiplied(variance.outputs[0])
    readers = {user.op_type for user, _ in scaled_variance.uses()}
    if found is None or not readers & {"Add", "Sqrt", "Pow", *(_PUT_BACK if factor != 1 else ())}:
        return None
    if factor != 1:
        return f"the variance is multiplied by {factor:g}{_unbiased(found, factor)}"
    axis = _axis(found)
    if isinstance(axis, str):
        return axis
    square = variance.inputs[0].producer() if variance.inputs[0] is not None else None
    if square is not None and square.op_type == "Pow" and scalar(square.inputs[1]) != 2:
        return f"the exponent is {scalar(square.inputs[1])}, not 2"
    if found.mean.inputs[0] is not found.x:
        return "the mean that is subtracted is another value's"
    if found.x.dtype == ir.DataType.DOUBLE:
        return "it computes in float64, the operator's statistics are float32"
    shifted = only_user(variance.outputs[0], "Add")
    epsilon = next((number for number in map(scalar, shifted.inputs) if number is not None), None) if shifted else None
    if shifted is None and any(user.op_type == "Add" for user, _ in variance.outputs[0].uses()):
        return f"something else reads {variance.outputs[0].name}"
    if shifted is None or epsilon is None or epsilon < 0:
        return "no constant epsilon is added to the variance inside the root"
    end = _end(shifted, found)
    if isinstance(end, str):
        return end
    x, weight, bias, last = end
    problem = shape_problem(x, axis, weight, bias) or dtype_problem(x, weight, bias)
    problem = problem or more_axes(x, weight, bias, *shifted.inputs)
    problem = problem or read_elsewhere(last, found.x, weight)
    return problem or LayerNorm(x, weight, bias, epsilon, axis, last)


def _by_moments(mean_of_squares: ir.Node) -> str | None:
    """What is wrong with a norm whose variance is E[x^2] - E[x]^2; None where this is no such variance, or no root is taken of it.

    It is another number than the operator's: in float32 it is off by a thousandth where the mean is a hundred times the deviation.
    """
    difference = only_user(mean_of_squares.outputs[0], "Sub")
    if difference is None or difference.inputs[0] is not mean_of_squares.outputs[0]:
        return None
    x, mean = (_squared(value) for value in (mean_of_squares.inputs[0], difference.inputs[1]))
    node = None if mean is None else mean.producer()
    if x is None or node is None or node.op_type != "ReduceMean" or node.inputs[0] is not x:
        return None
    last = difference
    while (
        following := next(filter(None, (only_user(last.outputs[0], each) for each in _BEFORE_ROOT)), None)
    ) is not None:
        last = following
    if not {user.op_type for user, _ in last.outputs[0].uses()} & {"Sqrt", "Pow"}:
        return None
    return (
        f"{difference.name} takes the mean's square off the mean of squares, which cancels where the mean is large; the operator "
        "averages squared differences: ((x - mean) ** 2).mean(), or x.var(unbiased=False)"
    )


def _squared(value: ir.Value | None) -> ir.Value | None:
    """What ``value`` is the square of."""
    found = product(value)
    alike = len(found.factors) == 2 and found.factors[0] is found.factors[1] and found.constant == 1
    return found.factors[0] if alike else None


def _unbiased(found: _Statistics, factor: float) -> str:
    width = size_of(found.x, -1)
    over = width is not None and width > 1 and close(factor, width / (width - 1), found.x.dtype)
    return f", as by torch's x.var() of {width}; unbiased=False is what the operator computes" if over else ""


def _statistics(variance: ir.Node) -> _Statistics | None:
    square = variance.inputs[0].producer() if variance.inputs[0] is not None else None
    if square is None or square.op_type not in ("Pow", "Mul"):
        return None
    d = square.inputs[0]
    if d is None or (square.op_type == "Mul" and square.inputs[1] is not d):
        return None
    difference = d.producer()
    if difference is not None and difference.op_type == "Cast" and difference.inputs[0] is not None:
        difference = difference.inputs[0].producer()  # only the differences are widened, not x
    if difference is None or difference.op_type != "Sub":
        return None
    x, mean = difference.inputs[0], difference.inputs[1].producer() if difference.inputs[1] is not None else None
    return (
        _Statistics(x, d, mean, variance)
        if x is not None and mean is not None and mean.op_type == "ReduceMean"
        else None
    )


def _axis(found: _Statistics) -> int | str:
    """The first of the last axes that both means are over, as a negative number, or what is wrong with them."""
    for node in filter(drops_axes, (found.mean, found.variance)):
        return f"{node.name} drops the axes of the mean"
    rank = len(found.x.shape) if found.x.shape is not None else None
    axes = [axes_of(node, rank) for node in (found.mean, found.variance)]
    if axes[0] is None or axes[0] != axes[1] or axes[0] != list(range(-len(axes[0]), 0)) or not axes[0]:
        return f"the means are over axes {axes[0]} and {axes[1]}, not both over the same last ones"
    return axes[0][0]


_End = tuple[ir.Value, ir.Value, ir.Value | None, ir.Node]


def _end(shifted: ir.Node, found: _Statistics) -> _End | str:
    """(x, weight, bias, the last node) behind Add(epsilon), or why this is no norm."""
    root, exponent = power(shifted)
    if root is None:
        return "the variance and epsilon are not used as a root alone"
    top, others = inverse(root, exponent, found.is_difference)
    if top is None:
        return "the root is not divided by alone"
    if others is None and (distributed := _distributed(top, found)) is not None:
        return distributed
    normal = scaled(top, others or (), found.is_difference)
    if isinstance(normal, str):
        return normal
    x = found.x if normal.narrow is None else before_widening(found.x, normal.narrow)
    if x is None:
        return "the result is cast to another type than x came in"
    return x, normal.weight, *added_bias(normal.last)


def _distributed(inverse: ir.Node, found: _Statistics) -> _End | str | None:
    """x s + (bias - mean s), s = inverse * weight; the mean may be negated before it is scaled, and the bias missing then.

    Where x itself is scaled and this is not what is added, what is wrong; None where x is not scaled.
    """
    scale = only_user(inverse.outputs[0], "Mul")
    weight = next(filter(is_weight, scale.inputs), None) if scale is not None else None
    if scale is None or weight is None:
        return None
    users = [user for user, _ in scale.outputs[0].uses() if user.op_type == "Mul"]
    by_x = next((user for user in users if found.x in user.inputs), None)
    if by_x is None:
        return None
    rest, bias = None, None
    for scaled_mean in [user for user in users if user is not by_x]:
        (mean,) = [value for value in scaled_mean.inputs if value is not scale.outputs[0]] or [None]
        negated = mean.producer() if mean is not None else None
        subtracted = only_user(scaled_mean.outputs[0], "Sub")
        if mean is found.mean.outputs[0] and subtracted is not None and is_weight(subtracted.inputs[0]):
            rest, bias = subtracted, subtracted.inputs[0]
        elif negated is not None and negated.op_type == "Neg" and negated.inputs[0] is found.mean.outputs[0]:
            bias, rest = added_bias(scaled_mean)
    last = only_user(by_x.outputs[0], "Add")
    if rest is None or last is None or rest.outputs[0] not in last.inputs:
        return "x is scaled, but bias - mean, scaled alike, is not what is added to it"
    return found.x, weight, bias, last


def _rewrite(norm: LayerNorm, name: str) -> None:
    attributes = {"axis": norm.axis, "epsilon": norm.epsilon, "stash_type": 1}
    weights = [norm.weight, *([norm.bias] if norm.bias is not None else [])]
    inputs = [norm.x, *(flat(weight, -norm.axis) for weight in weights)]
    replace(norm.last, ir.node("LayerNormalization", inputs, attributes=attributes, name=name))
