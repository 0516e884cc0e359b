"""The Q, K and V projections of one self-attention as one MatMul over weights laid side by side.

    x -> MatMul(weight) -> [Add(bias)] -> Reshape(.., heads, size) -> Transpose(0,2,1,3) -> [TensorScatter] -> Attention

for Q, K and V becomes MatMul, [Add], Reshape, Transpose once and a Split by heads; a missing bias counts as zeros. A decode step
reads every weight once either way, but runs a third of the nodes. Refused, with the node's name: weights that something else reads
too, which would then be stored twice, and Q, K and V that are cut into heads differently or by a shape that is not known.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from txopt.exporter.bodies import paths, share_equal_nodes
from txopt.exporter.fusion.report import NOTHING, Barred, Report
from txopt.exporter.graph import integers
from txopt.exporter.origins import origin

_BY_HEAD = (0, 2, 1, 3)


@dataclass(frozen=True)
class _Projection:
    """One of Q, K, V: its constants, and its nodes from the last to the first."""

    weight: ir.Value
    bias: ir.Value | None
    nodes: tuple[ir.Node, ...]

    @property
    def matmul(self) -> ir.Node:
        return self.nodes[-1]

    @property
    def input(self) -> ir.Value | None:
        return self.matmul.inputs[0]

    @property
    def reshape(self) -> ir.Node:
        return self.nodes[1]


Pack = tuple[_Projection, ...]


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports; projections that do not share their input are no candidates."""
    report = Report("QKV", barred, paths(model))
    packs = _packs(model)
    refusals = {
        node: reason for node, pack in packs.items() if (reason := report.barred_for(node) or _uncuttable(pack))
    }
    possible = [pack for node, pack in packs.items() if node not in refusals]
    refusals |= {
        node: reason for node, pack in packs.items() if pack in possible and (reason := _shared(pack, possible))
    }
    for node in [node for node in packs if node in refusals]:
        report.refuse(node, refusals[node])
    packed: dict[tuple[ir.Value | None, ...], ir.Value] = {}
    for node in [node for node in packs if node not in refusals]:
        report.took(node, *(projection.nodes[0].outputs[0] for projection in packs[node]))
        _rewrite(model.graph, node, packs[node], packed)
    passes.RemoveUnusedNodesPass()(model)
    share_equal_nodes(model)  # one shape for all layers
    return report


def _packs(model: ir.Model) -> dict[ir.Node, Pack]:
    """By Attention; where several share Q, K and V, by the first."""
    found = {node: pack for node in model.graph.all_nodes() if node.op_type == "Attention" and (pack := _pack(node))}
    first = {tuple(projection.matmul for projection in pack): node for node, pack in reversed(found.items())}
    return {node: found[node] for node in found if node in first.values()}


def _pack(attention: ir.Node) -> Pack | None:
    """Q, K and V of one Attention where all three are projections of one value."""
    found = []
    for value in attention.inputs[:3]:
        node = value.producer() if value is not None else None
        if node is not None and node.op_type == "TensorScatter":
            node = node.inputs[1].producer() if node.inputs[1] is not None else None
        projection = _projection(node)
        if projection is None:
            return None
        found.append(projection)
    inputs, matmuls = ({p.input for p in found}, {p.matmul for p in found})
    graphs = {
        node.graph for projection in found for node in projection.nodes
    }  # what is around a loop must not get into it
    return tuple(found) if len(inputs) == 1 and len(matmuls) == 3 and len(graphs) == 1 else None


def _projection(transpose: ir.Node | None) -> _Projection | None:
    reshape = _behind(transpose, "Transpose", 0)
    below = _behind(reshape, "Reshape", 0)
    if transpose is None or reshape is None or below is None:
        return None
    permutation = transpose.attributes.get("perm")
    if permutation is None or tuple(permutation.as_ints()) != _BY_HEAD:
        return None
    nodes: tuple[ir.Node, ...] = (transpose, reshape, below)
    bias = None
    if below.op_type == "Add":
        biases = [value for value in below.inputs if _is_weight(value, rank=1)]
        others = [value for value in below.inputs if value not in biases]
        matmul = others[0].producer() if len(biases) == 1 and others[0] is not None else None
        if matmul is None:
            return None
        nodes, bias = (*nodes, matmul), biases[0]
    weight = nodes[-1].inputs[1] if nodes[-1].op_type == "MatMul" else None
    if weight is None or not _is_weight(weight, rank=2):
        return None
    if bias is not None and _width(bias) != _width(weight):
        return None
    alone = all(len(node.outputs[0].uses()) == 1 for node in nodes[1:])
    return (
        _Projection(weight, bias, nodes)
        if alone and not any(node.outputs[0].is_graph_output() for node in nodes)
        else None
    )


def _behind(node: ir.Node | None, op_type: str, index: int) -> ir.Node | None:
    """What produces an input of ``node``, if ``node`` is an ``op_type``."""
    value = node.inputs[index] if node is not None and node.op_type == op_type else None
    return None if value is None else value.producer()


def _is_weight(value: ir.Value | None, rank: int) -> bool:
    return (
        value is not None
        and value.is_initializer()
        and not value.is_graph_input()
        and value.const_value is not None
        and len(value.const_value.shape) == rank
    )


def _uncuttable(pack: Pack) -> str | None:
    one_shape = len({projection.reshape.inputs[1] for projection in pack}) == 1
    if not one_shape and len({_rows_tokens_size(projection) for projection in pack}) != 1:
        return "Q, K and V are cut into heads by different shapes"
    sizes, head_sizes = _sizes(pack[0].reshape), {_head_size(projection) for projection in pack}
    if sizes is None:
        return "the shape that cuts into heads is not put together of lengths that are known one by one"
    if None in head_sizes:
        return "the shape that cuts into heads does not say their size"
    if len(head_sizes) != 1:
        return "the heads of Q, K and V are of different sizes"
    counts = {_width(projection.weight) / size for projection in pack for size in head_sizes if size}
    if one_shape and isinstance(sizes[-2], int) and sizes[-2] > 0 and counts != {sizes[-2]}:
        return "the shape that cuts into heads says another number of them than the weights"
    return None


def _head_size(projection: _Projection) -> int | None:
    """As the shape says, or what -1 comes to for a known number of heads."""
    sizes = _sizes(projection.reshape)
    if sizes is None or not isinstance(sizes[-1], int):
        return None
    if sizes[-1] != -1:
        return sizes[-1] if sizes[-1] > 0 else None
    width, heads = _width(projection.weight), sizes[-2]
    return width // heads if isinstance(heads, int) and heads > 0 and width % heads == 0 else None


def _rows_tokens_size(projection: _Projection) -> object:
    """What must be equal for Q, K and V, of which each may have its own number of heads; no two are equal where it is not known."""
    cut = projection.reshape.outputs[0]
    return origin((cut, 0)), origin((cut, 1)), _head_size(projection)


def _shared(pack: Pack, packs: Sequence[Pack]) -> str | None:
    """Layers may share all three weights; anything else that reads one of them would need a second copy."""
    weights = _weights(pack)
    users = {projection.matmul for other in packs if _weights(other) == weights for projection in other}
    for weight in weights:
        if weight.is_graph_output() or any(user not in users for user, _ in weight.uses()):
            return f"{weight.name} is read elsewhere too"
    others = {projection.matmul for other in packs if other is not pack for projection in other}
    if any(projection.matmul in others for projection in pack):
        return "another Attention takes some of Q, K and V, but not all"
    return None


def _weights(pack: Pack) -> tuple[ir.Value, ...]:
    return tuple(projection.weight for projection in pack)


def _sizes(reshape: ir.Node) -> list[ir.Value | int] | None:
    """Rows, tokens, heads and head size as the shape has them, numbers where they are constant; rows and tokens may be one value.

    None where it is made otherwise.
    """
    shape = reshape.inputs[1]
    concat = shape.producer() if shape is not None else None
    joined = concat is not None and concat.op_type == "Concat"
    sizes: list[ir.Value | int] = []
    for part in concat.inputs if concat is not None and joined else [shape]:
        if part is None or (part.const_value is None and not joined):
            return None
        sizes += [part] if part.const_value is None else map(int, part.const_value.numpy().reshape(-1))
    both = len(sizes) == 3 and [isinstance(size, int) for size in sizes] == [
        False,
        True,
        True,
    ]  # of four, as the cut has
    return sizes if both or len(sizes) == 4 else None


def _rewrite(
    graph: ir.Graph, attention: ir.Node, pack: Pack, packed: dict[tuple[ir.Value | None, ...], ir.Value]
) -> None:
    name = f"{attention.name}/QKV"  # one folder may hold several attentions
    widths = [_width(projection.weight) for projection in pack]
    weight = _side_by_side(graph, _weights(pack), widths, packed)
    matmul = ir.node("MatMul", [pack[0].input, weight], name=name)
    nodes = [matmul]
    if any(projection.bias is not None for projection in pack):
        bias = _side_by_side(graph, [projection.bias for projection in pack], widths, packed)
        nodes.append(ir.node("Add", [matmul.outputs[0], bias], name=f"{name}_bias"))
    sizes, head_size = _sizes(pack[0].reshape), _head_size(pack[0])
    assert sizes is not None, "_uncuttable() asked"
    assert head_size is not None
    heads = [width // head_size for width in widths]
    sizes[-2:] = [sum(heads), head_size]
    shape = ir.node("Concat", [_as_value(graph, size) for size in sizes], attributes={"axis": 0}, name=f"{name}_shape")
    cut = ir.node("Reshape", [nodes[-1].outputs[0], shape.outputs[0]], pack[0].reshape.attributes, name=f"{name}_heads")
    by_head = ir.node("Transpose", cut.outputs, attributes={"perm": list(_BY_HEAD)}, name=f"{name}_by_head")
    split_inputs = [by_head.outputs[0], integers(graph, heads)]
    split = ir.node("Split", split_inputs, attributes={"axis": 1}, num_outputs=3, name=f"{name}_split")
    if pack[0].input is not None and pack[0].input.shape is not None:
        for node in nodes:
            node.outputs[0].shape = ir.Shape([*pack[0].input.shape[:-1], sum(widths)])
            node.outputs[0].type = weight.type
    # Before the first cut into heads: everything that these nodes read is there, and whoever reads them comes later.
    scope = pack[0].reshape.graph
    assert scope is not None, "_pack() found it in one"
    first = next(node for node in scope if any(node is projection.reshape for projection in pack))
    scope.insert_before(first, [*nodes, shape, cut, by_head, split])
    for projection, output in zip(pack, split.outputs, strict=True):
        old = projection.nodes[0].outputs[0]
        output.name, output.shape, output.type = old.name, old.shape, old.type
        old.replace_all_uses_with(output)
        for node in projection.nodes:
            scope.remove(node, safe=True)


def _as_value(graph: ir.Graph, size: ir.Value | int) -> ir.Value:
    return integers(graph, [size]) if isinstance(size, int) else size


def _side_by_side(
    graph: ir.Graph,
    values: Sequence[ir.Value | None],
    widths: Sequence[int],
    packed: dict[tuple[ir.Value | None, ...], ir.Value],
) -> ir.Value:
    """One weight of all ``values``, joined along their last axis, lazily; None is a bias of zeros.

    Layers that share their weights share this one too.
    """
    key = tuple(values)
    if key in packed:
        return packed[key]
    tensors = [
        None if value is None else _tensor(value) for value in values
    ]  # as they are now: a lowering may swap them
    like = next(tensor for tensor in tensors if tensor is not None)
    dtype, rows = like.dtype, like.shape.numpy()[:-1]

    def join() -> ir.TensorProtocol:
        zeros = (np.zeros((*rows, width), dtype.numpy()) for width in widths)
        parts = [zero if tensor is None else tensor.numpy() for tensor, zero in zip(tensors, zeros, strict=True)]
        return ir.Tensor(np.concatenate(parts, axis=-1), dtype=dtype, name=name)

    name = "|".join("zeros" if value is None else str(value.name) for value in values)
    shape = ir.Shape([*rows, sum(widths)])
    lazy = ir.LazyTensor(join, dtype=dtype, shape=shape, name=name, cache=False)
    packed[key] = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=lazy)
    graph.initializers[name] = packed[key]
    return packed[key]


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _width(value: ir.Value) -> int:
    return _tensor(value).shape.numpy()[-1]
