"""Decomposed root-mean-square norms (T5) to RMSNormalization.

    x -> [Cast fp32] -> Pow(2) -> ReduceMean(last axis) -> Add(epsilon) -> Sqrt -> Reciprocal -> Mul(x) -> [Cast] -> Mul(weight)

where TorchScript writes Div(1, root) for the Reciprocal.
Source: ONNX operator RMSNormalization (opset 23); with casts around it, its ``stash_type=1`` says the same: statistics in fp32.
Refused, with the node's name: an exponent other than 2, another axis, an epsilon or weight that is no constant, an intermediate
that something else reads.
"""

from dataclasses import dataclass

import onnx_ir as ir

from txopt.exporter.fusion.algebra import only_user, scalar
from txopt.exporter.fusion.replace import replace
from txopt.exporter.fusion.report import Report


@dataclass(frozen=True)
class _Norm:
    x: ir.Value
    weight: ir.Value
    epsilon: float
    last: ir.Node


def fuse(model: ir.Model) -> Report:
    """Rewrites ``model`` and reports; a chain that does not hold is left as it was."""
    report = Report("RMSNormalization")
    for power in [node for node in model.graph if node.op_type == "Pow"]:
        match = _match(power)
        if isinstance(match, str):
            report.refused.append(f"{power.name}: {match}")
        elif match is not None:
            _rewrite(model.graph, match)
            report.fused += 1
    return report


def _match(power: ir.Node) -> _Norm | str | None:
    """The norm, a reason of refusal, or None where this is no norm at all."""
    x = power.inputs[0]
    mean = only_user(power.outputs[0], "ReduceMean")
    if x is None or mean is None:
        return None
    if scalar(power.inputs[1]) != 2:
        return f"the exponent is {scalar(power.inputs[1])}, not 2"
    axes = _ints(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if axes != [-1]:
        return f"the mean is over axes {axes}, not [-1]"
    add = only_user(mean.outputs[0], "Add")
    root = add and only_user(add.outputs[0], "Sqrt")
    inverse = root and _inverse(root.outputs[0])
    last = inverse and only_user(inverse.outputs[0], "Mul")
    if add is None or last is None:
        return "the mean of squares is not used as Add(epsilon), Sqrt, Reciprocal, Mul alone"
    epsilon = next((value for value in map(scalar, add.inputs) if value is not None), None)
    if epsilon is None:
        return "epsilon is not a constant"
    if x not in last.inputs:
        return "the value that is squared is not the one that is scaled"
    last = only_user(last.outputs[0], "Cast") or last
    weighted = only_user(last.outputs[0], "Mul")
    weight = next((value for value in weighted.inputs if _is_vector(value)), None) if weighted is not None else None
    if weighted is None or weight is None:
        return "no weight vector is multiplied at the end"
    return _Norm(_before_widening(x), weight, epsilon, weighted)


def _inverse(root: ir.Value) -> ir.Node | None:
    """The one node that reads ``root``, if it gives 1 / root."""
    reciprocal, division = only_user(root, "Reciprocal"), only_user(root, "Div")
    return division if division is not None and scalar(division.inputs[0]) == 1 else reciprocal


def _before_widening(x: ir.Value) -> ir.Value:
    cast = x.producer()
    if cast is None or cast.op_type != "Cast" or cast.inputs[0] is None:
        return x
    return cast.inputs[0] if cast.attributes["to"].as_int() == ir.DataType.FLOAT else x


def _is_vector(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and len(value.const_value.shape) == 1


def _rewrite(graph: ir.Graph, norm: _Norm) -> None:
    attributes = {"axis": -1, "epsilon": norm.epsilon, "stash_type": 1}
    scope = norm.last.name.rpartition("/")[0] if norm.last.name else ""
    name = f"{scope}/RMSNormalization".lstrip("/")
    if norm.x.dtype == norm.weight.dtype:
        replace(graph, norm.last, ir.node("RMSNormalization", [norm.x, norm.weight], attributes=attributes, name=name))
        return
    # The standard allows two dtypes, its own function body and ONNX Runtime do not: widen the weight, narrow the result.
    wide = ir.node("Cast", [norm.weight], attributes={"to": norm.x.dtype}, name=f"{name}/weight")
    inner = ir.node("RMSNormalization", [norm.x, wide.outputs[0]], attributes=attributes, name=name)
    narrow = ir.node("Cast", inner.outputs, attributes={"to": norm.last.outputs[0].dtype}, name=f"{name}/result")
    replace(graph, norm.last, wide, inner, narrow)


def _ints(value: ir.Value | None) -> list[int] | None:
    return (
        None if value is None or value.const_value is None else [int(x) for x in value.const_value.numpy().reshape(-1)]
    )
