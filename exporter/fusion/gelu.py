"""Written-out GELUs to the operator, exact and by tanh.

    exact  x/2 (1 + erf(x / sqrt 2))
    tanh   x/2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))

Source: ONNX operator Gelu (opset 20). Factors may stand in any order, powers as Pow or as products. Beyond fewer nodes it saves
precision: a graph in bfloat16 rounds the constants above, the operator does not. Refused, with the node's name: other constants and
results inside that something else reads.
"""

import math

import onnx_ir as ir

from txopt.exporter.algebra import Product, close, only_user, product, scalar
from txopt.exporter.bodies import paths
from txopt.exporter.fusion.replace import replace
from txopt.exporter.fusion.report import NOTHING, Barred, Report


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports; an Erf or Tanh with no 1 added is no GELU and no refusal."""
    report = Report("Gelu", barred, paths(model))
    for node in [node for node in model.graph.all_nodes() if node.op_type in _INSIDE]:
        added = only_user(node.outputs[0], "Add")
        if added is None or 1.0 not in map(scalar, added.inputs):
            continue
        match = _match(node, added)
        if isinstance(match, str):
            report.refuse(node, match)
            continue
        if report.bars(node):
            continue
        x, last = match
        report.took(node, last.outputs[0])
        gelu = ir.node("Gelu", [x], attributes={"approximate": _INSIDE[node.op_type]}, name=f"{node.name}/Gelu")
        replace(last, gelu)
    return report


_INSIDE = {"Erf": "none", "Tanh": "tanh"}


def _match(node: ir.Node, added: ir.Node) -> tuple[ir.Value, ir.Node] | str:
    """(x, the last node), or why this is no GELU."""
    x = _argument(node)
    if x is None:
        return f"what {node.op_type} is taken of is not what GELU takes it of"
    last = added
    while (above := only_user(last.outputs[0], "Mul") or only_user(last.outputs[0], "Div")) is not None:
        last = above
        found = product(last.outputs[0])
        if _count(found, x) == 1 and close(found.constant, 0.5, x.dtype):
            return (x, last) if len(found.factors) == 2 else "something else is multiplied in between"
    return "its product is not x/2 times the sum with 1"


def _argument(node: ir.Node) -> ir.Value | None:
    """The x of an Erf's or Tanh's argument."""
    inside = product(node.inputs[0])
    if node.op_type == "Erf":
        (x,) = inside.factors if len(inside.factors) == 1 else (None,)
        return x if x is not None and close(inside.constant, math.sqrt(0.5), x.dtype) else None
    if len(inside.factors) != 1 or not close(inside.constant, math.sqrt(2 / math.pi), inside.factors[0].dtype):
        return None
    total = inside.factors[0].producer()
    if total is None or total.op_type != "Add" or len(inside.factors[0].uses()) != 1:
        return None
    for x, cubed in (tuple(total.inputs), tuple(reversed(total.inputs))):
        power = product(cubed)
        if x is not None and power.factors == (x,) * 3 and close(power.constant, 0.044715, x.dtype):
            return x
    return None


def _count(found: Product, x: ir.Value) -> int:
    return sum(factor is x for factor in found.factors)
