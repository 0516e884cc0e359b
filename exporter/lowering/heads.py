"""Attention on [B,L,H*D], as its projections give it, where the graph cuts heads by Reshape and Transpose only for its sake.

    Attention(Transpose(Reshape(q, [B,L,H,D])), ..)   becomes   Attention<q_num_heads=H, kv_num_heads=G>(q, k, v)
    Split(Transpose(Reshape(x, [B,L,N*H,D])), axis=1)  becomes   Split(x, axis=-1)

ONNX Runtime's CPU kernel cuts heads itself then, and eight nodes fewer are in a graph for each block.
Source: ONNX operator Attention (opset 23 and 24), inputs of three axes. Left alone: blocks with a cache, whose K and V lie by head
in their buffers; operands and results that are cut or joined in another way. Where it is not known that a Reshape keeps batch and
length, one to [B,L,H*D] stays.
"""

from dataclasses import dataclass, replace

import onnx_ir as ir
from onnx_ir.passes import common as passes

from txopt.exporter.algebra import only_user
from txopt.exporter.graph import integers
from txopt.exporter.origins import origin
from txopt.exporter.shapes import lengths_of, order_of, rank_of

_BY_HEAD = (0, 2, 1, 3)


@dataclass(frozen=True)
class _Operand:
    """Q, K or V as ``reshape`` cuts it from [B,L,width]; or, of several that it cuts at once, output ``index`` of ``split``."""

    reshape: ir.Node
    width: int
    heads: int
    size: int
    split: ir.Node | None = None
    index: int = 0


def join_heads(model: ir.Model) -> None:
    """Changes ``model`` in place."""
    joined: dict[ir.Node, ir.Node] = {}
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Attention"]:
        if any(value is not None for value in node.inputs[4:]) or "q_num_heads" in node.attributes:
            continue
        q, k, v = (_operand(value) for value in node.inputs[:3])
        back = _joining(node.outputs[0])
        if q is None or k is None or v is None or back is None or len(node.outputs) != 1:
            continue
        for index, operand in enumerate((q, k, v)):
            node.replace_input_with(index, _whole(model.graph, operand, joined))
        node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", q.heads)
        node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", k.heads)
        node.outputs[0].shape = None
        back.replace_input_with(0, node.outputs[0])
    passes.RemoveUnusedNodesPass()(model)


def _operand(value: ir.Value | None) -> _Operand | None:
    """Where [B,H,L,D] comes from; None where heads were cut in another way."""
    node = value.producer() if value is not None else None
    if value is None or node is None or node.op_type != "Split":
        return None if node is None else _cut(node)
    whole = node.inputs[0].producer() if node.inputs[0] is not None else None
    found = None if whole is None else _cut(whole)
    sizes = lengths_of(node.inputs[1]) if len(node.inputs) > 1 else None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if found is None or sizes is None or axis != 1:
        return None
    index = value.index() or 0
    heads = sizes[index]
    return replace(found, heads=heads, split=node, index=index) if isinstance(heads, int) else None


def _cut(transpose: ir.Node) -> _Operand | None:
    """What Transpose(Reshape(x, [B,L,H,D])) cuts, whole."""
    reshape = transpose.inputs[0].producer() if transpose.inputs[0] is not None else None
    if transpose.op_type != "Transpose" or order_of(transpose) != _BY_HEAD or reshape is None:
        return None
    x, parts = reshape.inputs[0], lengths_of(reshape.inputs[1]) if reshape.op_type == "Reshape" else None
    if x is None or parts is None or len(parts) != 4:
        return None
    heads, size = (origin((reshape.outputs[0], axis)) for axis in (2, 3))
    if not isinstance(heads, int) or not isinstance(size, int) or heads < 1 or size < 1:
        return None
    return _Operand(reshape, heads * size, heads, size) if _keeps_lengths(reshape) or _places(reshape) else None


def _keeps_lengths(reshape: ir.Node) -> bool:
    x, cut = reshape.inputs[0], reshape.outputs[0]
    return x is not None and rank_of(x) == 3 and all(origin((cut, axis)) == origin((x, axis)) for axis in (0, 1))


def _places(reshape: ir.Node) -> list[ir.Value] | None:
    """The first two lengths of the shape as values; None where heads or size are left to a -1, or the shape is made otherwise."""
    shape, parts = reshape.inputs[1], lengths_of(reshape.inputs[1])
    concat = shape.producer() if shape is not None else None
    if parts is None or -1 in parts[2:] or concat is None or concat.op_type != "Concat" or len(concat.inputs) != 4:
        return None
    return [value for value in concat.inputs[:2] if value is not None]


def _joining(attended: ir.Value) -> ir.Node | None:
    """The Reshape that joins the heads of [B,H,L,D] again, behind the Transpose that is for it alone."""
    transpose = only_user(attended, "Transpose")
    if transpose is None or order_of(transpose) != _BY_HEAD:
        return None
    reshape = only_user(transpose.outputs[0], "Reshape")
    parts = lengths_of(reshape.inputs[1]) if reshape is not None else None
    # A zero in the third place would copy the number of heads.
    return reshape if parts is not None and 0 not in parts[2:] else None


def _whole(graph: ir.Graph, operand: _Operand, joined: dict[ir.Node, ir.Node]) -> ir.Value:
    """``operand`` as [B,L,heads*size]; what several of them share is made once, and then in ``joined``."""
    reshape, split = operand.reshape, operand.split
    x = reshape.inputs[0]
    assert x is not None, "_cut() asked"
    if not _keeps_lengths(reshape):
        if reshape not in joined:
            parts = [*(_places(reshape) or ()), integers(graph, [operand.width])]
            shape = ir.node("Concat", parts, attributes={"axis": 0}, name=f"{reshape.name}/joined_shape")
            new = ir.node("Reshape", [x, shape.outputs[0]], reshape.attributes, name=f"{reshape.name}/joined")
            joined[reshape] = _insert(reshape, shape, new)
            whole = new.outputs[0]
            whole.type = whole.type or x.type
            if whole.type is not None:  # without a width ONNX Runtime takes that of what Attention gives for zero
                whole.shape = ir.Shape([None, None, operand.width])
        x = joined[reshape].outputs[0]
    if split is None:
        return x
    if split not in joined:
        sizes = lengths_of(split.inputs[1]) or ()
        widths = integers(graph, [heads * operand.size for heads in sizes if isinstance(heads, int)])
        name = f"{split.name}/joined"
        new = ir.node("Split", [x, widths], attributes={"axis": 2}, num_outputs=len(split.outputs), name=name)
        joined[split] = _insert(split, new)
    return joined[split].outputs[operand.index]


def _insert(like: ir.Node, *nodes: ir.Node) -> ir.Node:
    """Puts ``nodes`` before ``like``; the last gives what it gives, joined."""
    for node in nodes:
        for index, output in enumerate(node.outputs):
            output.name = f"{node.name}:{index}"
    for before, after in zip(like.outputs, nodes[-1].outputs, strict=True):
        after.type = before.type
    assert like.graph is not None, "it was found in one"
    like.graph.insert_before(like, nodes)
    return nodes[-1]
