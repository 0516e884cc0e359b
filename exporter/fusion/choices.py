"""Choices brought to one form, ``Where``, which the rule for attention looks for.

    Add(Mul(Cast(c), x), Mul(Cast(Not(c)), y))                       becomes   Where(c, x, y)
    Where(And(m, Expand(true, Shape(x))), x, y)                      becomes   Where(m, x, y), also within several And

tf2onnx multiplies where TensorFlow chooses (SelectV2), unless a number is known to be infinite: then zero times it is no number. The
two say the same of all others; of these, Where says what TensorFlow does. Keras starts its masks from ``tf.ones_like`` of the
scores. Source: ONNX operators Where (opset 16) and And (opset 7), both of which broadcast. Nothing is refused: a sum of products is
rarely a choice.
"""

import onnx_ir as ir
from onnx_ir.passes import common as passes

from txopt.exporter.bodies import paths
from txopt.exporter.fusion.attention_path import fill_of
from txopt.exporter.fusion.replace import replace
from txopt.exporter.fusion.report import NOTHING, Barred, Report
from txopt.exporter.shapes import lengths_of, rank_of


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports."""
    report = Report("Where", barred, paths(model))
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Add"]:
        chosen = _choice(node)
        if chosen is not None and not report.bars(node):
            report.took(node, node.outputs[0])
            replace(node, ir.node("Where", chosen, name=f"{node.name}/Where"))
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Where"]:
        found = _beside_all(node)
        if found is not None and not report.bars(node):
            reader, index, mask = found
            report.took(node, node.outputs[0])
            reader.replace_input_with(index, mask)
    passes.RemoveUnusedNodesPass()(model)
    return report


def _choice(add: ir.Node) -> list[ir.Value] | None:
    """(condition, where it holds, where not) of a sum of both, each times whether it is chosen."""
    left, right = (_times_condition(value) for value in add.inputs)
    if left is None or right is None:
        return None
    (first, one), (second, other) = left, right
    if _negated(second) is first:
        return [first, one, other]
    return [second, other, one] if _negated(first) is second else None


def _times_condition(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """(condition, x) of x times the condition as a number."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Mul":
        return None
    for factor, x in (node.inputs, reversed(node.inputs)):
        cast = None if factor is None else factor.producer()
        condition = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
        if condition is not None and x is not None and condition.dtype == ir.DataType.BOOL:
            return condition, x
    return None


def _negated(value: ir.Value) -> ir.Value | None:
    node = value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Not" else None


def _beside_all(where: ir.Node) -> tuple[ir.Node, int, ir.Value] | None:
    """(who reads it, at which input, mask) of the And of a mask with what holds everywhere, in the shape of what is chosen from.

    Of an And that something else reads too, what it is made of is not looked into.
    """
    waiting = [(where, 0)]
    while waiting:
        reader, index = waiting.pop()
        value = reader.inputs[index]
        conjunction = None if value is None else value.producer()
        if value is None or conjunction is None or conjunction.op_type != "And":
            continue
        for whole, mask in (conjunction.inputs, reversed(conjunction.inputs)):
            if mask is not None and any(_holds_everywhere(whole, chosen) for chosen in where.inputs[1:]):
                return reader, index, mask
        if len(value.uses()) == 1 and not value.is_graph_output():
            waiting += [(conjunction, 0), (conjunction, 1)]
    return None


def _holds_everywhere(condition: ir.Value | None, like: ir.Value | None) -> bool:
    """Whether ``condition`` is true everywhere, in the shape of ``like``."""
    node = None if condition is None else condition.producer()
    rank = None if like is None else rank_of(like)
    if node is None or node.op_type not in ("Expand", "ConstantOfShape") or like is None or rank is None:
        return False
    return fill_of(condition) == 1 and lengths_of(node.inputs[-1]) == tuple((like, axis) for axis in range(rank))
