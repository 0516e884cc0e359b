"""Reductions brought to one form, which the rules for norms and softmaxes look for: reduced axes kept, sums over a length as means.

    ReduceMean<keepdims=0>(x) -> Reshape, Unsqueeze or Expand to x's shape with a 1 at the axis   becomes   ReduceMean(x)
    ReduceSum(x, axes) / n, n the known length of these axes                                       becomes   ReduceMean(x, axes)
    GlobalAveragePool(x) of three axes                                                             becomes   ReduceMean(x, -1)
    axes counted from the front, where two reductions are of one value                             become    counted from the end

torch's new exporter writes ``x.var()`` and ``x.sum() / n`` so, and tf2onnx makes a pool of every mean over the last of three axes.
Reshaping keeps the order of elements; where there are as many at the end as there were, nothing in between repeated any. Source: ONNX
operators ReduceMean, ReduceSum and ReduceMax (opset 18), GlobalAveragePool (opset 1). The pools of images, of four axes, stay.
Nothing is refused: a reduction that does not have this form stays as it is, and those who look for one say what it lacks.
"""

import math
from dataclasses import dataclass

import onnx_ir as ir

from txopt.exporter.algebra import close
from txopt.exporter.bodies import paths, share_equal_nodes
from txopt.exporter.fusion.norm_path import axes_of, drops_axes
from txopt.exporter.fusion.replace import replace
from txopt.exporter.fusion.report import NOTHING, Barred, Report
from txopt.exporter.graph import integers
from txopt.exporter.shapes import length, number_of, rank_of

_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax")
_RESHAPING = ("Reshape", "Unsqueeze", "Expand")


@dataclass(frozen=True)
class _Reduction:
    """``last`` gives what ``op_type`` over ``axes`` would."""

    op_type: str
    axes: list[int]
    keepdims: bool
    last: ir.Node


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports."""
    report = Report("Reduction", barred, paths(model))
    for pool in [node for node in model.graph.all_nodes() if node.op_type == "GlobalAveragePool"]:
        x = pool.inputs[0]
        if x is not None and rank_of(x) == 3 and not report.bars(pool):
            report.took(pool, pool.outputs[0])
            replace(pool, ir.node("ReduceMean", [x, integers(model.graph, [-1])], name=f"{pool.name}/ReduceMean"))
    for graph, node in _reductions(model):
        found = _match(node)
        if found is not None and not report.bars(node):
            report.took(node, found.last.outputs[0])
            inputs = [node.inputs[0], integers(graph, found.axes)]
            attributes = {} if found.keepdims else {"keepdims": 0}
            new = ir.node(found.op_type, inputs, attributes=attributes, name=f"{node.name}/{found.op_type}")
            replace(found.last, new)
    for graph, node in _reductions(model):
        axes = _axes(node)
        if axes is not None and _has_a_like(node):
            node.replace_input_with(1, integers(graph, axes))
            node.attributes.pop("noop_with_empty_axes", None)  # there are axes
            if not drops_axes(node):
                node.attributes.pop("keepdims", None)  # the default
    share_equal_nodes(model)  # means of one value over -1 and over 2 are one now
    return report


def _reductions(model: ir.Model) -> list[tuple[ir.Graph, ir.Node]]:
    """Every reduction and the graph or body that it is in."""
    return [
        (graph, node) for graph in paths(model) for node in graph if node.op_type in _REDUCTIONS and not node.domain
    ]


def _has_a_like(node: ir.Node) -> bool:
    """Whether another reduction of the same kind is of the same value, and may be the same one."""
    x = node.inputs[0]
    return x is not None and sum(user.op_type == node.op_type for user, _ in x.uses()) > 1


def _axes(node: ir.Node) -> list[int] | None:
    """The axes from the end, ascending; None where they or the rank are not known, or there are none."""
    rank = None if node.inputs[0] is None else rank_of(node.inputs[0])
    axes = None if rank is None else axes_of(node, rank)
    return axes if axes and len(set(axes)) == len(axes) and min(axes) < 0 else None


def _match(node: ir.Node) -> _Reduction | None:
    """The reduction that ``node`` and what follows it are; None where nothing follows that one reduction would do as well."""
    x, axes, value = node.inputs[0], _axes(node), node.outputs[0]
    rank = None if x is None else rank_of(x)
    if x is None or axes is None or rank is None:
        return None
    lengths = [length(x, axis) for axis in range(rank)]
    kept = [1 if axis - rank in axes else lengths[axis] for axis in range(rank)]
    dropped = [lengths[axis] for axis in range(rank) if axis - rank not in axes]
    found, averaged = None, False
    while (reader := _only_reader(value)) is not None and None not in kept:
        if node.op_type == "ReduceSum" and not averaged and _averages(reader, value, [lengths[axis] for axis in axes]):
            averaged = True
        elif reader.op_type not in _RESHAPING or reader.inputs[0] is not value:
            break
        value = reader.outputs[0]
        shape = [length(value, axis) for axis in range(rank_of(value) or 0)]
        if shape == kept or (averaged and shape == dropped):
            found = _Reduction("ReduceMean" if averaged else node.op_type, axes, shape == kept, reader)
    return found


def _only_reader(value: ir.Value) -> ir.Node | None:
    """What reads ``value``, but for its shape."""
    readers = [user for user, _ in value.uses() if user.op_type != "Shape"]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _averages(reader: ir.Node, value: ir.Value, lengths: list[int | str | None]) -> bool:
    """Whether ``reader`` divides ``value``, a sum over axes of these ``lengths``, by how many were summed."""
    if reader.op_type not in ("Mul", "Div") or not all(isinstance(one, int) and one for one in lengths):
        return False
    number = number_of(reader.inputs[1 if reader.inputs[0] is value else 0])
    if not number or (reader.op_type == "Div" and reader.inputs[0] is not value):
        return False
    factor = 1 / number if reader.op_type == "Div" else number
    return close(factor * math.prod(one for one in lengths if isinstance(one, int)), 1, value.dtype)
