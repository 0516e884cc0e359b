"""Shape arithmetic brought to one form: a length is read where it first appears, so that equal lengths are one value.

    Shape(Mul(MatMul(x, weight), scale)) -> Gather(1)   becomes   Shape<start=1,end=2>(x)

    Cast<int64>(Concat(Gather(Cast<int32>(Shape(x)), 0), 8))   becomes   Concat(Shape<start=0,end=1>(x), 8)

torch's old exporter asks every intermediate for its shape: Q, K and V are then cut by three shapes that nothing shows to be one, and
scores are read by more than their Softmax. TensorFlow computes shapes in int32. origins.py follows lengths back. Nothing is refused:
a length that cannot be followed stays where it is read, and so does one that would be read inside of a written-out attention, where
a mask of unknown lengths hides those of Q: attention may not be read inside, and what comes out of it has the same length. The shape
of what was given a whole shape by a Reshape is that shape, also where it holds products and quotients of lengths.
"""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common as passes

from txopt.exporter.bodies import paths, share_equal_nodes
from txopt.exporter.fusion.attention_path import after, before
from txopt.exporter.fusion.report import NOTHING, Barred, Report
from txopt.exporter.graph import integers
from txopt.exporter.origins import Origins
from txopt.exporter.shapes import Length, lengths_of, rank_of

_READ = ("Shape", "Gather", "Slice", "Squeeze", "Unsqueeze")


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports how many reads were moved.

    No place of its own is named: nothing is computed otherwise, and what reads the lengths is proved where it is fused.
    """
    report = Report("Length", barred, paths(model))
    made: dict[object, ir.Value] = {}
    origins, inside = Origins(), _inside_attention(model)
    for cast in [node for node in model.graph.all_nodes() if node.op_type == "Cast"]:
        whole = _in_one_type(model.graph, cast, origins, inside, made)
        if whole is not None and not report.bars(cast):
            cast.outputs[0].replace_all_uses_with(whole)
            report.fused += 1
    for node in [node for node in model.graph.all_nodes() if node.op_type in _READ]:
        output = node.outputs[0]
        read = output not in made.values() and output.dtype in (None, ir.DataType.INT64)  # which is what a Shape gives
        found = lengths_of(output) if read else None
        if not found or output.is_graph_output() or not output.uses():
            continue
        if (given := _given(node)) is not None and not report.bars(node):
            output.replace_all_uses_with(given)
            report.fused += 1
            continue
        first = _run([origins.of(one) for one in found])
        hidden = isinstance(first, tuple) and first[0] in inside
        if first is None or hidden or _is_canonical(node, first, len(found)) or report.bars(node):
            continue
        new = _read(model.graph, first, len(found), made)
        if rank_of(output) == 0:
            new = _as_scalar(model.graph, new, made)
        output.replace_all_uses_with(new)
        report.fused += 1
    passes.RemoveUnusedNodesPass()(model)
    share_equal_nodes(model)
    return report


def _inside_attention(model: ir.Model) -> set[ir.Value]:
    """Scores and probabilities, masked or not: all between the product of Q and K and that with V."""
    softmaxes = [node for node in model.graph.all_nodes() if node.op_type == "Softmax"]
    paths = [(node, before(node), after(node)) for node in softmaxes]
    nodes = {
        each
        for softmax, above, below in paths
        if above and below
        for each in (softmax, *(step.node for step in (*above, *below[:-1])))
    }
    return {node.outputs[0] for node in nodes}


def _in_one_type(
    graph: ir.Graph, cast: ir.Node, origins: Origins, inside: set[ir.Value], made: dict[object, ir.Value]
) -> ir.Value | None:
    """The shape that ``cast`` gives, put together of lengths in int64; None where it does not come from int32, or of other things."""
    shape, output = cast.inputs[0], cast.outputs[0]
    joined = shape is not None and shape.dtype == ir.DataType.INT32 and output.dtype == ir.DataType.INT64
    found = lengths_of(output) if joined and output.uses() and not output.is_graph_output() else None
    parts = tuple(origins.of(one) for one in found or ())
    if len(parts) < 2 or cast.graph is None:
        return None
    if any(isinstance(one, ir.Value) or (isinstance(one, tuple) and one[0] in inside) for one in parts):
        return None
    if (key := (cast.graph, parts)) not in made:
        inputs = [_read(graph, one, 1, made) for one in parts]
        concat = ir.node("Concat", inputs, attributes={"axis": 0}, name=f"{cast.name}/Concat")
        cast.graph.insert_before(cast, concat)
        made[key] = concat.outputs[0]
        made[key].type, made[key].shape = output.type, ir.Shape([len(parts)])
        made[key].name = f"{concat.name}:0"
    return made[key]


def _run(found: Sequence[Length]) -> Length | None:
    """The first of lengths that are neighbours in one value, or the only one; None where they are scattered."""
    first = found[0]
    if isinstance(first, ir.Value) or (isinstance(first, int) and len(found) > 1):
        return None
    if isinstance(first, int) or len(found) == 1:
        return first
    value, axis = first
    return first if list(found) == [(value, axis + i) for i in range(len(found))] else None


def _given(shape: ir.Node) -> ir.Value | None:
    """The shape that a Reshape gave to what ``shape`` asks, if it says every length and leaves none."""
    whole = shape.op_type == "Shape" and not shape.attributes and shape.inputs[0] is not None
    reshape = shape.inputs[0].producer() if whole and shape.inputs[0] is not None else None
    given = reshape.inputs[1] if reshape is not None and reshape.op_type == "Reshape" else None
    parts = lengths_of(given)
    return given if parts is not None and all(map(_counts, parts)) else None


def _counts(part: Length | None) -> bool:
    """Whether a part of a shape counts something, and is neither what is left nor what is copied: -1 and 0."""
    if not isinstance(part, ir.Value):
        return isinstance(part, tuple) or (part is not None and part > 0)
    if (found := lengths_of(part)) is not None:
        return all(map(_counts, found))
    node = part.producer()
    if node is None or node.op_type not in (*_READ, "Mul", "Div"):
        return False
    return all(map(_counts, node.inputs if node.op_type in ("Mul", "Div") else node.inputs[:1]))


def _is_canonical(node: ir.Node, first: Length, count: int) -> bool:
    if node.op_type != "Shape" or not isinstance(first, tuple):
        return False
    return lengths_of(node.outputs[0]) == tuple((first[0], first[1] + i) for i in range(count))


def _read(graph: ir.Graph, first: Length, count: int, made: dict[object, ir.Value]) -> ir.Value:
    """One axis: the lengths from ``first`` on."""
    if not isinstance(first, tuple):
        assert isinstance(first, int), "_run() gives no computed number"
        return integers(graph, [first])
    key = (*first, count)
    if key not in made:
        value, axis = first
        start = axis if axis >= 0 else axis % (rank_of(value) or 1)
        attributes = {"start": start, "end": start + count}
        name = f"{value.name}/length_{start}" if count == 1 else f"{value.name}/lengths_{start}_to_{start + count - 1}"
        made[key] = _insert(graph, value, ir.node("Shape", [value], attributes=attributes, name=name))
        made[key].shape = ir.Shape([count])
    return made[key]


def _as_scalar(graph: ir.Graph, value: ir.Value, made: dict[object, ir.Value]) -> ir.Value:
    if value not in made:
        inputs = [value, integers(graph, [0])]
        made[value] = _insert(graph, value, ir.node("Squeeze", inputs, name=f"{value.name}/scalar"))
        made[value].shape = ir.Shape([])
    return made[value]


def _insert(graph: ir.Graph, value: ir.Value, node: ir.Node) -> ir.Value:
    """Right behind ``value``: whatever reads a length of something made of it comes later."""
    producer, owner = value.producer(), value.graph or graph  # which may be around the body that reads the length
    if producer is not None:
        owner.insert_after(producer, node)
    elif len(owner):
        owner.insert_before(owner[0], node)
    output = node.outputs[0]
    output.name, output.type = f"{node.name}:0", ir.TensorType(ir.DataType.INT64)
    return output
