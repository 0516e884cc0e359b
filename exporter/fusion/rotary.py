"""Written-out rotary position embeddings to the operator, in halves (Llama, GPT-NeoX) and in neighbours (GPT-J, RoFormer).

    x1, x2 = halves, or columns 0, 2, .. and 1, 3, ..;   y = x1 cos - x2 sin joined with x2 cos + x1 sin as x was taken apart

either multiplied out like this, or as ``x cos + turned sin`` where ``turned`` is (-x2, x1) put back in x's order and the factors
stand once for each column; over all columns or over the first ones of each head. The factors may come from anywhere: the operator
takes them for each token, [B,Q,R/2], so they are made once and serve all layers. Source: ONNX operator RotaryEmbedding (opset 23).
Refused, with the node's name: columns taken apart or joined in another way, a rotation the other way round, factors that are not
known to be the same for both columns of a pair or for all heads, other than four axes, float64, results inside that something
else reads.
"""

from dataclasses import dataclass, replace

import onnx_ir as ir

from txopt.exporter.algebra import scalar
from txopt.exporter.bodies import paths
from txopt.exporter.fusion import replace as rewriting
from txopt.exporter.fusion.columns import Columns, cut_from, size_of, width_of
from txopt.exporter.fusion.report import NOTHING, Barred, Report
from txopt.exporter.fusion.rotary_tables import Layout, Tables, heads_axis, stands_twice
from txopt.exporter.graph import integers
from txopt.exporter.origins import origin
from txopt.exporter.shapes import length, rank_of

_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class _Rotation:
    """``x`` [B,H,Q,D] or [B,Q,H,D], of which ``width`` columns are rotated; ``last`` gives the result."""

    x: ir.Value
    width: int
    cos: ir.Value
    sin: ir.Value
    interleaved: bool
    doubled: bool
    last: ir.Node
    heads_axis: int = 1


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports; two parts that are joined without being rotated are no candidates."""
    report, tables = Report("RotaryEmbedding", barred, paths(model)), Tables(model.graph)
    for node in [node for node in model.graph.all_nodes() if node.op_type == "Concat" and len(node.inputs) == 2]:
        if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            continue
        found = _turned(node) or _multiplied_out(node)
        match = _checked(found) if isinstance(found, _Rotation) else found
        if isinstance(match, str):
            report.refuse(node, match)
        elif match is not None and not report.bars(node):
            report.took(node, match.last.outputs[0])
            _rewrite(model.graph, node, match, tables)
    return report


def _turned(concat: ir.Node) -> _Rotation | str | None:
    """x cos + turned sin, where ``concat`` joins -x2 and x1."""
    parts, stacked = _parts(concat)
    if [part.op_type == "Neg" for part in parts if part is not None].count(True) != 1:
        return None
    turned = _reader(concat, "Reshape") if stacked else concat
    times = None if turned is None else _reader(turned, "Mul")
    if turned is None or times is None:
        users = {user.op_type for user, _ in (turned or concat).outputs[0].uses()}
        return "something else reads what is turned too" if "Mul" in users else None
    times, sin = _past_ones(times), _other(times, turned.outputs[0])
    total = _reader(times, "Add")
    if total is None or sin is None:
        return "what is turned is not added to anything"
    straight = _other(total, times.outputs[0])
    while straight is not None and (plain := _times_one(straight)) is not None:
        straight = plain
    scaled = None if straight is None else straight.producer()
    if straight is None or scaled is None or scaled.op_type != "Mul":
        return "what is turned is not added to a product"
    if (read := _read_elsewhere(scaled)) is not None:
        return read
    for x, cos in (tuple(scaled.inputs), tuple(reversed(scaled.inputs))):
        width = None if x is None or cos is None else width_of(x) or width_of(cos) or width_of(sin)
        columns = None if x is None or width is None else Columns(x, width).of(turned.outputs[0])
        if x is not None and cos is not None and width is not None and columns is not None:
            interleaved = _order(columns, width)
            if interleaved is None:
                return "it turns columns neither by halves nor by neighbours"
            return _Rotation(x, width, cos, sin, interleaved, True, total)
    return "what is turned is not what is added to it"


def _order(columns: tuple[int, ...], width: int) -> bool | None:
    """Whether the turned columns are neighbours (True) or halves (False), or None."""
    half, pairs = width // 2, range(1, width + 1, 2)
    if width % 2 == 0 and columns == (*range(-half - 1, -width - 1, -1), *range(1, half + 1)):
        return False
    if width % 2 == 0 and columns == tuple(column for first in pairs for column in (-first - 1, first)):
        return True
    return None


def _multiplied_out(concat: ir.Node) -> _Rotation | str | None:
    """x1 cos - x2 sin and x2 cos + x1 sin, which ``concat`` joins."""
    parts, stacked = _parts(concat)
    last = _reader(concat, "Reshape") if stacked else concat
    by_kind = {part.op_type: part for part in parts if part is not None}
    if last is None or by_kind.keys() != {"Sub", "Add"}:
        return None
    inside = [value.producer() for kind in ("Sub", "Add") for value in by_kind[kind].inputs if value is not None]
    products = [factors for factors in map(_factors, inside) if factors is not None]
    if len(products) != 4:
        return None
    one, other, *added = products
    sums = set(map(frozenset, added))
    for x1, cos in (one, one[::-1]):
        for x2, sin in (other, other[::-1]):
            found = _apart(x1, x2, cos) if sums == {frozenset((x1, sin)), frozenset((x2, cos))} else None
            if found is None:
                continue
            x, width, interleaved = found
            if interleaved is None:
                return "it takes columns apart neither by halves nor by neighbours"
            if interleaved is not stacked or parts[0] is not by_kind["Sub"]:
                return "it joins the columns otherwise than it takes them apart"
            read = _read_elsewhere(*by_kind.values(), *inside)
            return read or _Rotation(x, width, cos, sin, interleaved, False, last)
    return None


def _apart(x1: ir.Value, x2: ir.Value, cos: ir.Value) -> tuple[ir.Value, int, bool | None] | None:
    """(what both are cut from, its width, whether they are neighbours in it); None where they are not cut from one value."""
    shared = cut_from(x2)
    for x in (value for value in cut_from(x1) if value in shared and rank_of(value) == rank_of(x1)):
        width = width_of(x) or 2 * (width_of(cos) or 0)
        columns = [Columns(x, width).of(part) for part in (x1, x2)]
        if width and None not in columns:
            by_halves = [tuple(range(1, width // 2 + 1)), tuple(range(width // 2 + 1, width + 1))]
            by_pairs = [tuple(range(1, width + 1, 2)), tuple(range(2, width + 1, 2))]
            return x, width, False if columns == by_halves else True if columns == by_pairs else None
    return None


def _parts(concat: ir.Node) -> tuple[list[ir.Node | None], bool]:
    """What a Concat along the last axis joins, and whether it joins it as pairs, which a Reshape then makes one axis."""
    rank, axis = rank_of(concat.outputs[0]), concat.attributes["axis"].as_int()
    if rank is None or axis % rank != rank - 1:
        return [], False
    parts = [None if value is None else value.producer() for value in concat.inputs]
    if all(part is not None and part.op_type == "Unsqueeze" for part in parts):
        inner = [part.inputs[0] for part in parts if part is not None]
        if all(size_of(value, -1) == 1 for value in concat.inputs if value is not None):
            return [None if value is None else value.producer() for value in inner], True
    return parts, False


def _reader(node: ir.Node, op_type: str) -> ir.Node | None:
    """The one node that reads what ``node`` gives, but for its shape, if it is an ``op_type``."""
    value = node.outputs[0]
    readers = [user for user, _ in value.uses() if user.op_type != "Shape"]
    alone = len(readers) == 1 and readers[0].graph is node.graph and not value.is_graph_output()
    return readers[0] if alone and readers[0].op_type == op_type else None


def _read_elsewhere(*nodes: ir.Node | None) -> str | None:
    """What speaks against taking ``nodes`` out, of which each should be read once."""
    values = (node.outputs[0] for node in nodes if node is not None)
    for value in values:
        if len(value.uses()) != 1 or value.is_graph_output():
            return f"something else reads {value.name}"
        if any(user.graph is not value.graph for user, _ in value.uses()):
            return f"{value.name} is read inside a branch or loop"
    return None


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    return next((operand for operand in node.inputs if operand is not value), None)


def _factors(node: ir.Node | None) -> tuple[ir.Value, ir.Value] | None:
    """The two factors of a product."""
    left, right = node.inputs if node is not None and node.op_type == "Mul" else (None, None)
    return None if left is None or right is None else (left, right)


def _past_ones(node: ir.Node) -> ir.Node:
    """``node`` or, where its result is multiplied by 1 (x-transformers without xPos), the last of these."""
    while (above := _reader(node, "Mul")) is not None and _times_one(above.outputs[0]) is not None:
        node = above
    return node


def _times_one(value: ir.Value) -> ir.Value | None:
    """What ``value`` is 1 times."""
    node = value.producer()
    if node is None or node.op_type != "Mul" or 1.0 not in map(scalar, node.inputs):
        return None
    return next((factor for factor in node.inputs if scalar(factor) != 1.0), None)


def _checked(found: _Rotation) -> _Rotation | str:
    """The rotation with all that is known of it, or what speaks against it."""
    if rank_of(found.x) != 4:
        return f"{found.x.name} has {rank_of(found.x)} axes, expected batch, heads, tokens and columns"
    if found.x.dtype not in _DTYPES:
        return "it computes in float64, which the operator does not know"
    axis = heads_axis(found.cos, found.sin)
    if axis is None:
        return "its factors are not known to be the same for all heads"
    for factor in (found.cos, found.sin):
        if width_of(factor) not in (None, found.width if found.doubled else found.width // 2):
            return f"{factor.name} has no factor for each column"
        if found.doubled and not stands_twice(factor, found.width, found.interleaved):
            return f"{factor.name} is not known to be the same for both columns of a pair"
    whole = replace(_with_rest(found), heads_axis=axis)
    if axis == 2 and (size_of(whole.x, 2) is None or width_of(whole.x) is None):
        return f"the number of heads of {whole.x.name} is not known"
    return whole


def _with_rest(found: _Rotation) -> _Rotation:
    """The same with the columns behind those that are rotated, where they pass by and are joined to the result."""
    join, cut = _reader(found.last, "Concat"), found.x.producer()
    whole = cut.inputs[0] if cut is not None and cut.op_type in ("Slice", "Split") else None
    width = None if whole is None else width_of(whole)
    if join is None or whole is None or width is None or len(join.inputs) != 2 or rank_of(whole) != 4:
        return found
    first, second = join.inputs
    if first is not found.last.outputs[0] or second is None or join.attributes["axis"].as_int() % 4 != 3:
        return found
    columns = Columns(whole, width)
    rotated, rest = columns.of(found.x), columns.of(second)
    whole_row = rotated is not None and rest is not None and (*rotated, *rest) == tuple(range(1, width + 1))
    return replace(found, x=whole, last=join) if whole_row else found


def _rewrite(graph: ir.Graph, node: ir.Node, found: _Rotation, tables: Tables) -> None:
    name, x = f"{node.name}/RotaryEmbedding", found.x
    layout = Layout(found.heads_axis, found.interleaved, found.width if found.doubled else None)
    nodes: list[ir.Node] = []
    factors = []
    for factor, part in ((found.cos, "cos"), (found.sin, "sin")):
        table = tables.of(factor, layout)
        stretched = _stretch(graph, found, factor, table, f"{name}/{part}")
        factors.append(stretched[-1].outputs[0] if stretched else table)
        nodes += stretched
    attributes = {"interleaved": int(found.interleaved)}
    if width_of(x) not in (None, found.width):
        attributes["rotary_embedding_dim"] = found.width
    if found.heads_axis == 1:
        nodes.append(ir.node("RotaryEmbedding", [x, *factors], attributes=attributes, name=name))
    else:
        heads, size = size_of(x, 2), width_of(x)
        assert heads is not None, "_checked() asked"
        assert size is not None
        flat = _uncut(x, heads * size)
        if flat is None:
            nodes.append(ir.node("Reshape", [x, integers(graph, [0, 0, heads * size])], name=f"{name}/flat"))
            flat = nodes[-1].outputs[0]
        attributes["num_heads"] = heads
        rotated = ir.node("RotaryEmbedding", [flat, *factors], attributes=attributes, name=name)
        by_head = ir.node("Reshape", [rotated.outputs[0], integers(graph, [0, 0, heads, size])], name=f"{name}/heads")
        nodes += [rotated, by_head]
    rewriting.replace(found.last, *nodes)


def _uncut(x: ir.Value, width: int) -> ir.Value | None:
    """What x [B,Q,H,D] is cut into heads from, [B,Q,width]."""
    cut = x.producer()
    flat = cut.inputs[0] if cut is not None and cut.op_type == "Reshape" else None
    if flat is None or rank_of(flat) != 3 or width_of(flat) != width:
        return None
    return flat if all(_equal(x, axis, flat, axis) for axis in (0, 1)) else None


def _stretch(graph: ir.Graph, found: _Rotation, factor: ir.Value, table: ir.Value, name: str) -> list[ir.Node]:
    """What gives ``table`` [B,Q,R/2] x's rows and tokens where it is not known to have them: ONNX Runtime wants both."""
    nodes, parts = list[ir.Node](), list[ir.Value]()
    for axis, letter in ((0, "rows"), (3 - found.heads_axis, "tokens")):
        if _equal(found.x, axis, factor, axis - (4 - (rank_of(factor) or 0))):
            parts.append(integers(graph, [1]))
            continue
        attributes = {"start": axis, "end": axis + 1}
        nodes.append(ir.node("Shape", [found.x], attributes=attributes, name=f"{name}_{letter}"))
        parts.append(nodes[-1].outputs[0])
    if nodes:
        parts.append(integers(graph, [1]))
        nodes.append(ir.node("Concat", parts, attributes={"axis": 0}, name=f"{name}_shape"))
        nodes.append(ir.node("Expand", [table, nodes[-1].outputs[0]], name=name))
    return nodes


def _equal(x: ir.Value, axis: int, factor: ir.Value, place: int) -> bool:
    if place < 0:
        return size_of(x, axis) == 1
    name = length(x, axis)
    return (name is not None and name == length(factor, place)) or origin((x, axis)) == origin((factor, place))
