"""Products that arrive as Gemm (GPT-2's linear layers, layers over rows of two axes), written as all others: MatMul and Add.

Gemm(x, W, b) = MatMul(x, W) + b. Exporters flatten x [..,K] to rows before it and cut what comes out into places again; both
Reshapes go where the lengths on either side are the same, so that the product is one over places, as padding is told by places. A
weight [N,K] (transB) stays as it is, behind a Transpose, like the table of a head. Gemms with factors other than 1, of a transposed x
or of a computed weight are left alone.
"""

import onnx_ir as ir


def split(graph: ir.Graph) -> None:
    """Changes ``graph`` in place: the same numbers, but for the order of float sums."""
    for node in list(graph):
        if node.op_type == "Gemm" and _is_plain(node):
            _split(graph, node)


def _is_plain(gemm: ir.Node) -> bool:
    factors = [gemm.attributes[name].as_float() for name in ("alpha", "beta") if name in gemm.attributes]
    weight = gemm.inputs[1]
    known = weight is not None and weight.const_value is not None
    return known and all(factor == 1 for factor in factors) and not _is_set(gemm, "transA")


def _split(graph: ir.Graph, gemm: ir.Node) -> None:
    x, weight, bias = [*gemm.inputs, None][:3]
    assert x is not None, "the operator has one"
    assert weight is not None, "_is_plain() looked"
    y = gemm.outputs[0]
    places, ends = _around(x, y, bias)
    nodes = [ir.node("Transpose", [weight], attributes={"perm": [1, 0]})] if _is_set(gemm, "transB") else []
    nodes.append(ir.node("MatMul", [places, nodes[0].outputs[0] if nodes else weight], name=gemm.name))
    if bias is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias], name=f"{gemm.name}/bias"))
    graph.insert_before(gemm, nodes)
    made = nodes[-1].outputs[0]
    made.shape, made.type, made.name = ends[0].shape, ends[0].type, ends[0].name
    for end in ends:
        end.replace_all_uses_with(made, replace_graph_outputs=True)
    cuts = [end.producer() for end in ends if end is not y]
    graph.remove([node for node in (*cuts, gemm) if node is not None], safe=True)
    flatten = x.producer()
    if places is not x and flatten is not None and not x.uses():
        graph.remove(flatten, safe=True)


def _around(x: ir.Value, y: ir.Value, bias: ir.Value | None) -> tuple[ir.Value, list[ir.Value]]:
    """What flattened rows were before, and what becomes of the result of all of them; ``x`` and ``y`` where that is not known."""
    flatten, users = x.producer(), list(y.uses())
    cuts = [user.outputs[0] for user, index in users if user.op_type == "Reshape" and index == 0]
    if flatten is None or flatten.op_type != "Reshape" or not cuts or len(cuts) < len(users):
        return x, [y]
    before = flatten.inputs[0]
    assert before is not None, "a Reshape has an input"
    *places, size = _sizes(before) or (None,)
    same = _sizes(x)[-1:] == (size,) and all(_sizes(cut) == (*places, *_sizes(y)[-1:]) for cut in cuts)
    by_output = bias is None or len(_sizes(bias)) == 1
    outside = any(value.is_graph_output() for value in (y, *cuts))
    return (before, cuts) if same and by_output and not outside and None not in (*places, size) else (x, [y])


def _sizes(value: ir.Value) -> tuple[int | str | None, ...]:
    """Lengths and names of the axes; empty where the file does not say."""
    return tuple(size if isinstance(size, int) else size.value for size in value.shape or ())


def _is_set(gemm: ir.Node, flag: str) -> bool:
    return flag in gemm.attributes and bool(gemm.attributes[flag].as_int())
