"""Queries that are scaled on their way to an Attention (Whisper): the factor joins the node's own ``scale``.

    x -> Mul(number) or Div(number) -> [Reshape] -> [Transpose] -> Attention(scale=s)    becomes    Attention(scale=s * number)

Source: ONNX operator Attention (opset 23), whose scores are Q K^T scale. Keys are left alone: where they are cached, the cache
holds them scaled. Refused, with the node's name: a factor that is no positive constant, which the operator's square roots would
not survive, and a scaled value that something else reads too, but for its shape.
"""

import onnx_ir as ir

from txopt.exporter.algebra import scalar
from txopt.exporter.bodies import paths
from txopt.exporter.fusion.report import NOTHING, Barred, Report

_ON_THE_WAY = ("Reshape", "Transpose")


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports; queries that nothing scales are no candidates."""
    report = Report("Attention.scale", barred, paths(model))
    for attention in [node for node in model.graph.all_nodes() if node.op_type == "Attention"]:
        scaling, alone = _scaling(attention)
        if scaling is None:
            continue
        (x, factor), scale = _factor(scaling), _scale(attention)
        if not alone or scaling.outputs[0].is_graph_output():
            report.refuse(scaling, "something else reads the scaled queries too")
        elif x is None or factor <= 0:
            report.refuse(scaling, "the factor is no positive constant")
        elif scale is None:
            report.refuse(scaling, f"{attention.name} has no scale of its own, and its head size is not known")
        elif not report.bars(scaling):
            report.took(scaling, attention.outputs[0])
            attention.attributes["scale"] = ir.AttrFloat32("scale", scale * factor)
            scaling.outputs[0].replace_all_uses_with(x)
            if scaling.graph is not None:
                scaling.graph.remove(scaling, safe=True)
    return report


def _scaling(attention: ir.Node) -> tuple[ir.Node | None, bool]:
    """What multiplies the queries, and whether all between it and ``attention`` is read once."""
    value, alone = attention.inputs[0], True
    while value is not None and (node := value.producer()) is not None:
        readers = [user for user, _ in value.uses() if user.op_type != "Shape"]
        alone = alone and len(readers) == 1 and not value.is_graph_output()
        if node.op_type in ("Mul", "Div") and any(scalar(factor) is not None for factor in node.inputs):
            return node, alone
        if node.op_type not in _ON_THE_WAY:
            break
        value = node.inputs[0]
    return None, alone


def _factor(scaling: ir.Node) -> tuple[ir.Value | None, float]:
    """The value that is scaled and by what; no value where a number is divided by it."""
    left, right = scaling.inputs
    number = scalar(right)
    if scaling.op_type == "Div":
        return (left, 1 / number) if number else (None, 0.0)
    return (left, number) if number is not None else (right, scalar(left) or 0.0)


def _scale(attention: ir.Node) -> float | None:
    """The node's scale, by default one over the square root of the head size; None where that is not known."""
    if "scale" in attention.attributes:
        return attention.attributes["scale"].as_float()
    shape = attention.inputs[0].shape if attention.inputs[0] is not None else None
    size = shape[-1] if shape is not None and len(shape) == 4 else None
    return size**-0.5 if isinstance(size, int) else None
