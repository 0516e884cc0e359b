"""Decomposed layer norms to LayerNormalization, by whichever exporter they were written out.

    x -> [Cast fp32] -> d = x - ReduceMean(x) -> [Cast fp32] -> Pow(2) or d * d -> ReduceMean -> Add(epsilon) -> root
      -> d / root -> [Cast] -> Mul(weight) -> [Add(bias)]

The division may be a product with Reciprocal, 1 / root or Pow(-0.5), the three factors may stand in any order, and TensorFlow's
x s + (bias - mean s) with s = weight / root is the same. Means are over the last axes, one or several.
Source: ONNX operator LayerNormalization (opset 17), whose ``stash_type=1`` computes statistics in fp32 whatever surrounds it.
Refused, with the node's name: another exponent, other axes or axes that are dropped, an epsilon, weight or bias that is no
constant, no weight at all, float64, and results inside that something else reads.
"""

from dataclasses import dataclass

import onnx_ir as ir

from txopt.exporter.fusion.algebra import only_user, product, scalar
from txopt.exporter.fusion.replace import replace
from txopt.exporter.fusion.report import NOTHING, Barred, Report


@dataclass(frozen=True)
class _Norm:
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    epsilon: float
    axis: int
    last: ir.Node


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
    report = Report("LayerNormalization", barred)
    for variance in [node for node in model.graph if node.op_type == "ReduceMean"]:
        match = _match(variance)
        if isinstance(match, str):
            report.refused.append(f"{variance.name}: {match}")
        elif match is not None and not report.bars(variance):
            report.took(variance, match.last.outputs[0])
            _rewrite(model.graph, match)
    return report


def _match(variance: ir.Node) -> _Norm | str | None:
    """The norm, a reason of refusal, or None where this is no norm at all."""
    found = _statistics(variance)
    if found is None or not {user.op_type for user, _ in variance.outputs[0].uses()} & {"Add", "Sqrt", "Pow"}:
        return None
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
    if shifted is None or epsilon is None or epsilon < 0:
        return "no constant epsilon is added to the variance inside the root"
    end = _end(shifted, found)
    if isinstance(end, str):
        return end
    x, weight, bias, last = end
    problem = _shape_problem(x, axis, weight, bias) or _read_elsewhere(variance.graph, last, found.x)
    return problem or _Norm(x, weight, bias, epsilon, axis, last)


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
    for node in (found.mean, found.variance):
        if "keepdims" in node.attributes and not node.attributes["keepdims"].as_int():
            return f"{node.name} drops the axes of the mean"
    rank = len(found.x.shape) if found.x.shape is not None else None
    axes = [_axes(node, rank) for node in (found.mean, found.variance)]
    if axes[0] is None or axes[0] != axes[1] or axes[0] != list(range(-len(axes[0]), 0)) or not axes[0]:
        return f"the means are over axes {axes[0]} and {axes[1]}, not both over the same last ones"
    return axes[0][0]


def _axes(node: ir.Node, rank: int | None) -> list[int] | None:
    value = node.inputs[1] if len(node.inputs) > 1 else None
    if value is None or value.const_value is None:
        return None
    axes = [int(axis) for axis in value.const_value.numpy().reshape(-1)]
    return sorted(axis - rank if axis >= 0 and rank is not None else axis for axis in axes)


_End = tuple[ir.Value, ir.Value, ir.Value | None, ir.Node]


def _end(shifted: ir.Node, found: _Statistics) -> _End | str:
    """(x, weight, bias, the last node) behind Add(epsilon), or why this is no norm."""
    root, exponent = _power(shifted)
    if root is None:
        return "the variance and epsilon are not used as a root alone"
    top, others = _inverse(root, exponent)
    if top is None:
        return "the root is not divided by alone"
    narrow: ir.Node | None = None
    if others is None:
        if (distributed := _distributed(top, found)) is not None:
            return distributed
        others, top = (), top
    factors = list(others)
    while len(factors) < 2:
        cast = only_user(top.outputs[0], "Cast") if narrow is None else None
        times = only_user(top.outputs[0], "Mul")
        if cast is not None and factors:
            top = narrow = cast
            continue
        if times is None:
            break
        (other,) = [value for value in times.inputs if value is not top.outputs[0]] or [None]
        inner = product(other)
        if inner.constant != 1:
            return "something else is multiplied in between"
        factors, top = [*factors, *inner.factors], times
    weights = [value for value in factors if _is_weight(value)]
    differences = [value for value in factors if found.is_difference(value)]
    if factors and not differences:
        return "the value that is squared is not the one that is divided"
    if len(factors) != 2 or len(weights) != 1:
        return "no constant weight is multiplied at the end"
    x = found.x if narrow is None else _before_widening(found.x, narrow)
    if x is None:
        return "the result is cast to another type than x came in"
    return x, weights[0], *_bias(top)


def _power(shifted: ir.Node) -> tuple[ir.Node | None, float]:
    """The root of a sum, and its exponent."""
    if (root := only_user(shifted.outputs[0], "Sqrt")) is not None:
        return root, 0.5
    root = only_user(shifted.outputs[0], "Pow")
    exponent = scalar(root.inputs[1]) if root is not None and root.inputs[0] is shifted.outputs[0] else None
    return (root, exponent) if exponent is not None and abs(exponent) == 0.5 else (None, 0.0)


def _inverse(root: ir.Node, exponent: float) -> tuple[ir.Node | None, tuple[ir.Value, ...] | None]:
    """The node that divides and what it divides; nothing where it only gives one over the root."""
    if exponent < 0:
        return root, None
    if (reciprocal := only_user(root.outputs[0], "Reciprocal")) is not None:
        return reciprocal, None
    division = only_user(root.outputs[0], "Div")
    if division is None or division.inputs[1] is not root.outputs[0]:
        return None, None
    divided = product(division.inputs[0])
    if divided.constant != 1:
        return None, None
    return division, divided.factors or None


def _distributed(inverse: ir.Node, found: _Statistics) -> _End | None:
    """x s + (bias - mean s), s = inverse * weight."""
    scale = only_user(inverse.outputs[0], "Mul")
    weight = next(filter(_is_weight, scale.inputs), None) if scale is not None else None
    if scale is None or weight is None:
        return None
    users = [user for user, _ in scale.outputs[0].uses() if user.op_type == "Mul"]
    by_x = next((user for user in users if found.x in user.inputs), None)
    by_mean = next((user for user in users if found.mean.outputs[0] in user.inputs), None)
    rest = only_user(by_mean.outputs[0], "Sub") if by_mean is not None else None
    last = only_user(by_x.outputs[0], "Add") if by_x is not None else None
    if rest is None or last is None or rest.outputs[0] not in last.inputs:
        return None
    return (found.x, weight, rest.inputs[0], last) if _is_weight(rest.inputs[0]) else None


def _bias(weighted: ir.Node) -> tuple[ir.Value | None, ir.Node]:
    """The bias that is added to ``weighted``, and the last node."""
    added = only_user(weighted.outputs[0], "Add")
    bias = next(filter(_is_weight, added.inputs), None) if added is not None else None
    return (bias, added) if added is not None and bias is not None else (None, weighted)


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and len(value.const_value.shape) > 0


def _before_widening(x: ir.Value, narrow: ir.Node) -> ir.Value | None:
    """x itself or what was widened to it, whichever is of the type that the result is narrowed to."""
    cast = x.producer()
    source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    narrowed = narrow.attributes["to"].as_int()
    return next((v for v in (x, source) if v is not None and v.dtype is not None and v.dtype == narrowed), None)


def _shape_problem(x: ir.Value, axis: int, *weights: ir.Value | None) -> str | None:
    lengths = list(x.shape)[axis:] if x.shape is not None else [None] * -axis
    for value in weights:
        tensor = value.const_value if value is not None else None
        if tensor is None:
            continue
        found = list(tensor.shape.numpy())
        if len(found) != -axis or any(isinstance(n, int) and n != m for n, m in zip(lengths, found, strict=True)):
            return f"{tensor.name} has shape {found}, not that of the axes of the mean"
        if x.dtype is not None and tensor.dtype != x.dtype:
            return f"{tensor.name} is {tensor.dtype.name}, x is {x.dtype.name}"
    return None


def _read_elsewhere(graph: ir.Graph | ir.Function | None, last: ir.Node, x: ir.Value) -> str | None:
    """What speaks against taking out all between ``x`` and ``last``: another reader, for whom it would be computed twice."""
    inside, waiting = {last}, [last]
    while waiting:
        for value in waiting.pop().inputs:
            node = value.producer() if value is not None and value is not x and value.const_value is None else None
            if node is not None and node not in inside:
                inside.add(node)
                waiting.append(node)
    if any(node.graph is not graph for node in inside):
        return "a part of it is inside a branch or loop"
    for value in (output for node in inside if node is not last for output in node.outputs):
        if value.is_graph_output() or any(user not in inside for user, _ in value.uses()):
            return f"something else reads {value.name}"
    return None


def _rewrite(graph: ir.Graph, norm: _Norm) -> None:
    scope = norm.last.name.rpartition("/")[0] if norm.last.name else ""
    attributes = {"axis": norm.axis, "epsilon": norm.epsilon, "stash_type": 1}
    inputs = [norm.x, norm.weight, *([norm.bias] if norm.bias is not None else [])]
    name = f"{scope}/LayerNormalization" if scope else "LayerNormalization"
    replace(graph, norm.last, ir.node("LayerNormalization", inputs, attributes=attributes, name=name))
