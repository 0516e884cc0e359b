"""The Q, K and V projections of one self-attention as one MatMul over weights laid side by side.

    x -> MatMul(weight) -> [Add(bias)] -> Reshape(.., heads, size) -> Transpose(0,2,1,3) -> [TensorScatter] -> Attention

for Q, K and V becomes MatMul, [Add], Reshape, Transpose once and a Split by heads; a missing bias counts as zeros. A decode step
reads every weight once either way, but runs a third of the nodes. Refused, with the node's name: weights that something else reads
too, which would then be stored twice, and shapes in which the number of heads cannot be left open.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from txopt.exporter.fusion.report import Report
from txopt.exporter.graph import integers

_BY_HEAD = (0, 2, 1, 3)


@dataclass(frozen=True)
class _Projection:
    """One of Q, K, V: its constants, and its nodes from the last to the first."""

    weight: ir.Value
    bias: ir.Value | None
    nodes: tuple[ir.Node, ...]

    @property
    def input(self) -> ir.Value | None:
        return self.nodes[-1].inputs[0]

    @property
    def reshape(self) -> ir.Node:
        return self.nodes[1]


Pack = tuple[_Projection, ...]


def fuse(model: ir.Model) -> Report:
    """Rewrites ``model`` and reports; projections that do not share their input are no candidates."""
    report = Report("QKV")
    packs = {node: pack for node in model.graph if node.op_type == "Attention" and (pack := _pack(node))}
    refusals = {node: reason for node, pack in packs.items() if (reason := _uncuttable(pack))}
    possible = [pack for node, pack in packs.items() if node not in refusals]
    refusals |= {
        node: reason for node, pack in packs.items() if pack in possible and (reason := _shared(pack, possible))
    }
    report.refused = [f"{node.name}: {refusals[node]}" for node in packs if node in refusals]
    packed: dict[tuple[str, ...], ir.Value] = {}
    for node in [node for node in packs if node not in refusals]:
        _rewrite(model.graph, node, packs[node], packed)
        report.fused += 1
    passes.RemoveUnusedNodesPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)  # the shapes with open heads
    return report


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
    return tuple(found) if len({projection.input for projection in found}) == 1 else None


def _projection(transpose: ir.Node | None) -> _Projection | None:
    reshape = _behind(transpose, "Transpose", 0)
    below = _behind(reshape, "Reshape", 0)
    if transpose is None or reshape is None or below is None:
        return None
    if tuple(transpose.attributes["perm"].as_ints()) != _BY_HEAD:
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
    if bias is not None and _width(_tensor(bias)) != _width(_tensor(weight)):
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
        and value.const_value is not None
        and len(value.const_value.shape) == rank
    )


def _uncuttable(pack: Pack) -> str | None:
    if len({projection.reshape.inputs[1] for projection in pack}) != 1:
        return "Q, K and V are cut into heads by different shapes"
    if _cut(pack) is None:
        return "the number of heads cannot be left open in the shape that cuts them"
    return None


def _shared(pack: Pack, packs: Sequence[Pack]) -> str | None:
    """Layers may share all three weights; anything else that reads one of them would need a second copy."""
    weights = _weights(pack)
    users = {projection.nodes[-1] for other in packs if _weights(other) == weights for projection in other}
    for weight in weights:
        if any(user not in users for user, _ in weight.uses()):
            return f"{weight.name} is read elsewhere too"
    return None


def _weights(pack: Pack) -> tuple[ir.Value, ...]:
    return tuple(projection.weight for projection in pack)


def _cut(pack: Pack) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """(rows, tokens, head size) of the shape [rows, tokens, heads, size] that cuts into heads; None where it is made otherwise."""
    shape = pack[0].reshape.inputs[1]
    concat = shape.producer() if shape is not None else None
    if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 4:
        return None
    rows, tokens, _, size = concat.inputs
    if rows is None or tokens is None or size is None or _number(size) < 1:
        return None
    return (rows, tokens, size) if {_maker(rows), _maker(tokens)} == {"Shape"} else None


def _maker(value: ir.Value) -> str | None:
    node = value.producer()
    return None if node is None else node.op_type


def _number(value: ir.Value) -> int:
    """The number that ``value`` is known to be, -1 where it is not."""
    if value.const_value is None or value.const_value.size != 1:
        return -1
    return int(value.const_value.numpy().reshape(()))


def _rewrite(graph: ir.Graph, attention: ir.Node, pack: Pack, packed: dict[tuple[str, ...], ir.Value]) -> None:
    cut = _cut(pack)
    assert cut is not None, "_uncuttable() asked"
    rows, tokens, size = cut
    name = f"{(attention.name or '').rpartition('/')[0]}/QKV".lstrip("/")
    weights = [_tensor(projection.weight) for projection in pack]
    matmul = ir.node("MatMul", [pack[0].input, _side_by_side(graph, weights, packed)], name=name)
    nodes = [matmul]
    if any(projection.bias is not None for projection in pack):
        biases = [_bias(projection) for projection in pack]
        nodes.append(ir.node("Add", [matmul.outputs[0], _side_by_side(graph, biases, packed)], name=f"{name}_bias"))
    shape = ir.node("Concat", [rows, tokens, integers(graph, [-1]), size], attributes={"axis": 0}, name=f"{name}_shape")
    heads = [_width(weight) // _number(size) for weight in weights]
    reshape = ir.node(
        "Reshape", [nodes[-1].outputs[0], shape.outputs[0]], attributes={"allowzero": 1}, name=f"{name}_heads"
    )
    by_head = ir.node("Transpose", reshape.outputs, attributes={"perm": list(_BY_HEAD)}, name=f"{name}_by_head")
    split_inputs = [by_head.outputs[0], integers(graph, heads)]
    split = ir.node("Split", split_inputs, attributes={"axis": 1}, num_outputs=3, name=f"{name}_split")
    # Before the first cut into heads: everything that these nodes read is there, and whoever reads them comes later.
    first = next(node for node in graph if any(node is projection.reshape for projection in pack))
    graph.insert_before(first, [*nodes, shape, reshape, by_head, split])
    for projection, output in zip(pack, split.outputs, strict=True):
        old = projection.nodes[0].outputs[0]
        output.name, output.shape, output.type = old.name, old.shape, old.type
        old.replace_all_uses_with(output)
        for node in projection.nodes:
            graph.remove(node, safe=True)


def _side_by_side(
    graph: ir.Graph, tensors: Sequence[ir.TensorProtocol], packed: dict[tuple[str, ...], ir.Value]
) -> ir.Value:
    """One weight of all ``tensors``, joined along their last axis, lazily; layers that share their weights share this one too."""
    names = tuple(str(tensor.name) for tensor in tensors)
    if names in packed:
        return packed[names]
    name = "|".join(names)
    lazy = ir.LazyTensor(
        lambda: ir.Tensor(np.concatenate([tensor.numpy() for tensor in tensors], axis=-1), name=name),
        dtype=tensors[0].dtype,
        shape=ir.Shape([*tensors[0].shape.numpy()[:-1], sum(map(_width, tensors))]),
        name=name,
        cache=False,
    )
    packed[names] = ir.Value(name=name, shape=lazy.shape, type=ir.TensorType(lazy.dtype), const_value=lazy)
    graph.initializers[name] = packed[names]
    return packed[names]


def _bias(projection: _Projection) -> ir.TensorProtocol:
    if projection.bias is not None:
        return _tensor(projection.bias)
    weight = _tensor(projection.weight)
    zeros = np.zeros(_width(weight), weight.dtype.numpy())
    return ir.Tensor(zeros, dtype=weight.dtype, name=f"{weight.name}.no_bias")


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _width(tensor: ir.TensorProtocol) -> int:
    return tensor.shape.numpy()[-1]
