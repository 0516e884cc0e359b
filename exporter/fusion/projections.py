"""Projections of rows that were joined for them, as products with all axes apart, and their heads cut behind the bias.

    Gemm(Reshape(x, [-1, K]), weight) -> Reshape [B,T,H,D] -> Add(bias [H,D])   becomes   MatMul(x, weight) -> Add -> Reshape
    MatMul(Reshape(Transpose(x), [-1, K]), weight) -> Reshape [B,T,N]           becomes   Transpose -> Reshape -> MatMul

TensorFlow's tensordot and tf2onnx's einsum write a matrix product so, with the lengths computed in between; the form that comes of
it is the one that torch's exporters write, and the rule for QKV looks for. Source: ONNX operators Gemm (opset 13), whose ``beta`` of 0
is no addition, MatMul (opset 13) and Reshape (opset 14), whose zeros copy lengths. Nothing is refused: a projection of rows that
nobody joined, or whose rows are not put apart again as they were, stays as it is; so does one with a bias of its own.
"""

from dataclasses import dataclass
from itertools import dropwhile
from math import prod

import onnx_ir as ir
from onnx_ir.passes import common as passes

from txopt.exporter.algebra import only_user
from txopt.exporter.bodies import paths
from txopt.exporter.fusion.replace import replace
from txopt.exporter.fusion.report import NOTHING, Barred, Report
from txopt.exporter.graph import integers, reshaped, transpose_weights
from txopt.exporter.origins import Origins
from txopt.exporter.rearranged import behind, rearranged
from txopt.exporter.shapes import length, lengths_of, rank_of


@dataclass(frozen=True)
class _Projection:
    """``weight`` [K,N], or [N,K] where ``transposed``, on axes of ``x``: ``rows``, then those that make up K, ``columns``.

    ``sizes`` are those that N is cut into; ``bias`` has these, too. ``last`` gives all of it.
    """

    x: ir.Value
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    weight: ir.Value
    transposed: bool
    sizes: tuple[int, ...]
    bias: ir.Value | None
    last: ir.Node


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports."""
    report = Report("Projection", barred, paths(model))
    for node in [node for node in model.graph.all_nodes() if node.op_type in ("Gemm", "MatMul")]:
        found = _match(node)
        if found is not None and not report.bars(node):
            report.took(node, found.last.outputs[0])
            _rewrite(model.graph, node, found)
    transpose_weights(model)
    passes.RemoveUnusedNodesPass()(model)
    return report


def _match(product: ir.Node) -> _Projection | None:
    origins = Origins()
    weight, transposed = _weight(product)
    cut = only_user(product.outputs[0], "Reshape")
    if weight is None or weight.const_value is None or product.inputs[0] is None or cut is None:
        return None
    joined = rearranged(product.inputs[0], origins)
    if len(joined.axes) != 2 or len(joined.axes[0]) < 2 or rank_of(joined.source) != sum(map(len, joined.axes)):
        return None
    rows, columns = joined.axes
    sizes = tuple(part for part in (lengths_of(cut.inputs[1]) or ())[len(rows) :] if isinstance(part, int))
    while sizes[-1:] == (1,):
        sizes = sizes[:-1]
    if prod(sizes) != weight.const_value.shape.numpy()[0 if transposed else 1]:
        return None
    lengths = [*(origins.of((joined.source, axis)) for axis in rows), *sizes]
    apart = tuple((axis,) for axis in range(len(lengths)))
    axes = behind(cut, (tuple(range(len(rows))), tuple(range(len(rows), len(lengths)))), lengths, origins)
    last = cut
    if axes != apart and axes is not None and (squeeze := only_user(cut.outputs[0], "Squeeze")) is not None:
        axes, last = behind(squeeze, axes, lengths, origins), squeeze
    if axes != apart:
        return None
    bias, last = _bias(last, sizes)
    return _Projection(joined.source, rows, columns, weight, transposed, sizes, bias, last)


def _weight(product: ir.Node) -> tuple[ir.Value | None, bool]:
    """The constant that ``product`` multiplies by, and whether it is transposed; none where more is done than that."""
    weight = product.inputs[1]
    if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
        return None, False
    if product.op_type == "MatMul":
        return weight, False
    plain = product.attributes.get_float("alpha", 1.0) == 1 and not product.attributes.get_int("transA", 0)
    adds = len(product.inputs) > 2 and product.inputs[2] is not None and product.attributes.get_float("beta", 1.0) != 0
    return (weight, bool(product.attributes.get_int("transB", 0))) if plain and not adds else (None, False)


def _bias(cut: ir.Node, sizes: tuple[int, ...]) -> tuple[ir.Value | None, ir.Node]:
    """The constant of ``sizes``, but for ones before them, that is added to what was cut into these; and the last node."""
    added, rank = only_user(cut.outputs[0], "Add"), rank_of(cut.outputs[0]) or 0
    for value in added.inputs if added is not None and len(sizes) > 1 else ():
        tensor = None if value is None else value.const_value
        shape = (1,) * rank if tensor is None else tuple(tensor.shape.numpy())
        if added is not None and len(shape) <= rank and _without_ones(shape) == _without_ones(sizes):
            return value, added
    return None, cut


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dropwhile(lambda size: size == 1, shape))


def _rewrite(graph: ir.Graph, product: ir.Node, found: _Projection) -> None:
    nodes: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value], axes: list[int | str | None], **attributes: list[int]) -> ir.Value:
        nodes.append(ir.node(op_type, inputs, attributes=attributes, name=f"{product.name}/{op_type}_{len(nodes)}"))
        output = nodes[-1].outputs[0]
        output.shape, output.type = ir.Shape(axes), found.x.type
        return output

    x, order = found.x, [*found.rows, *found.columns]
    apart, copied = [length(x, axis) for axis in order], [0] * len(found.rows)
    rows, width = apart[: len(found.rows)], prod(found.sizes)
    if order != sorted(order):
        x = add("Transpose", [x], apart, perm=order)
    weight = found.weight
    assert weight.const_value is not None, "_weight() asked"
    if len(found.columns) > 1:
        joined = weight.const_value.shape.numpy()[1 if found.transposed else 0]
        x = add("Reshape", [x, integers(graph, [*copied, joined])], [*rows, joined])
    if found.transposed:
        weight = add("Transpose", [weight], [length(weight, 1), length(weight, 0)], perm=[1, 0])
    y = add("MatMul", [x, weight], [*rows, width])
    if found.bias is not None:
        y = add("Add", [y, reshaped(found.bias, [width])], [*rows, width])
    if len(found.sizes) > 1:
        add("Reshape", [y, integers(graph, [*copied, *found.sizes])], [*rows, *found.sizes])
    found.last.outputs[0].shape = nodes[-1].outputs[0].shape
    replace(found.last, *nodes)
