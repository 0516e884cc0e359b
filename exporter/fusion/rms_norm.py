"""Decomposed root-mean-square norms (T5) to RMSNormalization.

    x -> [Cast fp32] -> Pow(2) -> ReduceMean(last axis) -> Add(epsilon) -> Sqrt -> Reciprocal -> Mul(x) -> [Cast] -> Mul(weight)

Source: ONNX operator RMSNormalization (opset 23); with casts around it, its ``stash_type=1`` says the same: statistics in fp32.
Refused, with the node's name: an exponent other than 2, another axis, an epsilon or weight that is no constant, an intermediate
that something else reads.
"""

from collections.abc import Iterator

import onnx_ir as ir

from txopt.exporter.fusion.report import Report


def fuse(model: ir.Model) -> Report:
    """Rewrites ``model`` and reports; a chain that does not hold is left as it was."""
    report = Report("RMSNormalization")
    for power in [node for node in model.graph if node.op_type == "Pow"]:
        match = _match(power)
        if isinstance(match, str):
            report.refused.append(f"{power.name}: {match}")
        elif match is not None:
            _rewrite(model.graph, *match)
            report.fused += 1
    return report


def _match(power: ir.Node) -> tuple[ir.Value, ir.Value, float, ir.Node, list[ir.Node]] | str | None:
    """(input, weight, epsilon, last node, all nodes), a reason of refusal, or None where this is no norm at all."""
    mean = _only_user(power, "ReduceMean")
    if mean is None:
        return None
    if _scalar(power.inputs[1]) != 2:
        return f"the exponent is {_scalar(power.inputs[1])}, not 2"
    axes = _ints(mean.inputs[1]) if len(mean.inputs) > 1 else None
    if axes != [-1]:
        return f"the mean is over axes {axes}, not [-1]"
    add = _only_user(mean, "Add")
    root = add and _only_user(add, "Sqrt")
    inverse = root and _only_user(root, "Reciprocal")
    scaled = inverse and _only_user(inverse, "Mul")
    if add is None or root is None or inverse is None or scaled is None:
        return "the mean of squares is not used as Add(epsilon), Sqrt, Reciprocal, Mul alone"
    epsilon = next((value for value in map(_scalar, add.inputs) if value is not None), None)
    if epsilon is None:
        return "epsilon is not a constant"
    chain = [power, mean, add, root, inverse, scaled]
    x = power.inputs[0]
    if x not in scaled.inputs:
        return "the value that is squared is not the one that is scaled"
    if x is not None and (widened := x.producer()) is not None and widened.op_type == "Cast":
        chain.insert(0, widened)
        x = widened.inputs[0]
    last = scaled
    if (narrowed := _only_user(last, "Cast")) is not None:
        chain.append(narrowed)
        last = narrowed
    weighted = _only_user(last, "Mul")
    weight = (
        next((value for value in weighted.inputs if value is not None and value.const_value is not None), None)
        if weighted
        else None
    )
    if weighted is None or weight is None or weight.shape is None or len(weight.shape) != 1:
        return "no weight vector is multiplied at the end"
    return x, weight, float(epsilon), weighted, [*chain, weighted]  # type: ignore[return-value]


def _rewrite(
    graph: ir.Graph, x: ir.Value, weight: ir.Value, epsilon: float, last: ir.Node, chain: list[ir.Node]
) -> None:
    attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    scope = last.name.rpartition("/")[0] if last.name else ""
    name = f"{scope}/RMSNormalization".lstrip("/")
    if x.dtype == weight.dtype:
        norm = ir.node("RMSNormalization", [x, weight], attributes=attributes, name=name)
        nodes = [norm]
    else:  # the standard allows it, its own function body and ONNX Runtime do not: widen the weight, narrow the result
        wide = ir.node("Cast", [weight], attributes={"to": x.dtype}, name=f"{name}/weight")
        norm = ir.node("RMSNormalization", [x, wide.outputs[0]], attributes=attributes, name=name)
        nodes = [
            wide,
            norm,
            ir.node("Cast", norm.outputs, attributes={"to": last.outputs[0].dtype}, name=f"{name}/result"),
        ]
    old, new = last.outputs[0], nodes[-1].outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    graph.insert_after(last, nodes)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    for node in reversed(chain):
        if not any(output.uses() for output in node.outputs):  # a widening Cast may feed others
            graph.remove(node, safe=True)


def _only_user(node: ir.Node, op_type: str) -> ir.Node | None:
    users = list(_users(node))
    return (
        users[0] if len(users) == 1 and users[0].op_type == op_type and not node.outputs[0].is_graph_output() else None
    )


def _users(node: ir.Node) -> Iterator[ir.Node]:
    yield from (user for user, _ in node.outputs[0].uses())


def _scalar(value: ir.Value | None) -> float | None:
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(()))


def _ints(value: ir.Value | None) -> list[int] | None:
    return (
        None if value is None or value.const_value is None else [int(x) for x in value.const_value.numpy().reshape(-1)]
    )
