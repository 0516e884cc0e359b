"""The factors of a rotation, cosines or sines, as RotaryEmbedding takes them: one for each pair of columns, [B,Q,R/2].

Written out they stand twice, once for each column of a pair, over an axis of one for the heads. That both are the same is read from
how they were made: two of one value joined, one repeated, or a constant table; whatever acts on each number alone keeps it so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from txopt.exporter.fusion.columns import size_of, width_of
from txopt.exporter.graph import integers
from txopt.exporter.origins import origin
from txopt.exporter.shapes import lengths_of, rank_of

_BY_NUMBER = "Add Cast Cos Div Exp Identity Mul Neg Pow Reciprocal Sin Sqrt Sub"
_ELEMENTWISE = frozenset(_BY_NUMBER.split())
_HEADS_FIRST, _HEADS_LAST = 1, 2  # the heads' axis of [B,H,Q,D] and of [B,Q,H,D]


def heads_axis(*factors: ir.Value) -> int | None:
    """Which axis of a value with four the heads are on, as factors tell that are the same for all of them; None: they tell neither."""
    for axis in (_HEADS_FIRST, _HEADS_LAST):
        if all(_is_one(factor, axis) for factor in factors):
            return axis
    return None


def _is_one(factor: ir.Value, axis: int) -> bool:
    """Whether it has no axis there, counted as if it had four, or one of length 1."""
    rank = rank_of(factor)
    return rank is not None and rank <= 4 and (axis < 4 - rank or size_of(factor, axis - 4) == 1)


def stands_twice(factor: ir.Value, width: int, interleaved: bool) -> bool:
    """Whether ``factor`` is known to be the same for both columns of each of the ``width`` / 2 pairs."""
    known: dict[ir.Value, bool] = {}

    def ask(value: ir.Value | None) -> bool:
        if value is None:
            return False
        if value not in known:
            known[value] = False  # while it is asked for
            known[value] = size_of(value, -1) == 1 or rank_of(value) == 0 or _twice(value, width, interleaved, ask)
        return known[value]

    return ask(factor)


def _twice(value: ir.Value, width: int, interleaved: bool, ask: Callable[[ir.Value | None], bool]) -> bool:
    if value.const_value is not None:
        return _constant_twice(value.const_value, width, interleaved)
    node, rank = value.producer(), rank_of(value)
    if node is None or rank is None or not node.inputs:
        return False
    x = node.inputs[0]
    if node.op_type in _ELEMENTWISE:
        return all(map(ask, node.inputs))
    if node.op_type == "Concat" and node.attributes["axis"].as_int() % rank == rank - 1:
        return not interleaved and len(node.inputs) == 2 and x is node.inputs[1]
    if node.op_type == "Concat":
        return all(map(ask, node.inputs))
    if node.op_type == "Tile":
        return not interleaved and _repeats(node, -1) == 2 and x is not None and width_of(x) == width // 2
    if node.op_type == "Reshape" and x is not None and _is_doubled(x, -1 if interleaved else -2):
        return width_of(value) in (width, None)
    if node.op_type in ("Gather", "GatherND"):
        return _keeps_rows(node) and ask(x)
    return _keeps_columns(node, value, rank) and ask(x)


def _constant_twice(tensor: ir.TensorProtocol, width: int, interleaved: bool) -> bool:
    table = tensor.numpy()
    if table.ndim == 0 or table.shape[-1] != width:
        return table.ndim == 0
    first, second = (
        (table[..., ::2], table[..., 1::2]) if interleaved else (table[..., : width // 2], table[..., width // 2 :])
    )
    return bool(np.array_equal(first, second))


def _is_doubled(value: ir.Value, axis: int) -> bool:
    """Whether ``axis``, counted from the end, holds one thing twice: joined with itself, expanded or tiled there."""
    node, rank = value.producer(), rank_of(value)
    if node is None or rank is None or not node.inputs or node.inputs[0] is None or size_of(node.inputs[0], axis) != 1:
        return False
    if node.op_type == "Concat":
        along = node.attributes["axis"].as_int() % rank - rank
        return along == axis and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
    return node.op_type in ("Expand", "Tile") and _repeats(node, axis) == 2


def _repeats(node: ir.Node, axis: int) -> int | None:
    """How often or how long an Expand or Tile makes an axis, counted from the end."""
    numbers = lengths_of(node.inputs[1])
    found = numbers[axis] if numbers and len(numbers) >= -axis else None
    return found if isinstance(found, int) else None


def _keeps_rows(node: ir.Node) -> bool:
    """Whether a lookup takes whole rows, and does not pick columns."""
    table, indices = node.inputs[0], node.inputs[1]
    rank = None if table is None else rank_of(table)
    if node.op_type == "Gather":
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        return rank is not None and rank > 1 and axis % rank != rank - 1
    batched = "batch_dims" in node.attributes and node.attributes["batch_dims"].as_int() > 0
    picked = None if indices is None else size_of(indices, -1)
    return rank is not None and picked is not None and picked < rank and not batched


def _keeps_columns(node: ir.Node, value: ir.Value, rank: int) -> bool:
    """Whether a node moves or picks along other axes than the last only."""
    x = node.inputs[0]
    before = None if x is None else rank_of(x)
    if x is None or before is None:
        return False
    if node.op_type == "Expand":
        return True  # an axis longer than one keeps its length
    if node.op_type == "Unsqueeze":
        axes = lengths_of(node.inputs[1])
        return axes is not None and not {rank - 1, -1} & {axis for axis in axes if isinstance(axis, int)}
    if node.op_type == "Transpose" and "perm" in node.attributes:
        return list(node.attributes["perm"].as_ints())[-1] == rank - 1
    if node.op_type == "Slice":
        axes = lengths_of(node.inputs[3]) if len(node.inputs) > 3 else None
        return axes is not None and not {rank - 1, -1} & {axis for axis in axes if isinstance(axis, int)}
    if node.op_type in ("Squeeze", "Reshape"):
        width = width_of(x)
        return (width is not None and width == width_of(value)) or _same_end(node, x, before)
    return False


def _same_end(node: ir.Node, x: ir.Value, rank: int) -> bool:
    sizes = lengths_of(node.inputs[1]) if node.op_type == "Reshape" else None
    last = origin((x, rank - 1))
    return sizes is not None and isinstance(sizes[-1], tuple) and isinstance(last, tuple) and origin(sizes[-1]) == last


@dataclass(frozen=True)
class Layout:
    """How a value [B,H,Q,D] or [B,Q,H,D] is rotated; ``doubled`` is how long the factors' last axis is where they stand twice."""

    heads_axis: int
    interleaved: bool
    doubled: int | None


class Tables:
    """Makes factors ready, each once for all that read it."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value, Layout], ir.Value] = {}

    def of(self, factor: ir.Value, layout: Layout) -> ir.Value:
        """One for each pair, [B,Q,R/2] or [1,Q,R/2]."""
        key = (factor, layout)
        if key not in self._made:
            self._made[key] = self._made_of(factor, layout)
        return self._made[key]

    def _made_of(self, factor: ir.Value, layout: Layout) -> ir.Value:
        rank, value, nodes = rank_of(factor) or 0, factor, list[ir.Node]()
        place, name = layout.heads_axis - (4 - rank), f"{factor.name}/rotary_{len(self._made)}"
        if layout.doubled is not None:
            cut = (0, layout.doubled, -1, 2) if layout.interleaved else (0, layout.doubled // 2, -1, 1)
            numbers = [integers(self._graph, [number]) for number in cut]
            nodes.append(ir.node("Slice", [value, *numbers], name=f"{name}/one_of_two"))
        if place >= 0:
            axes, rank = integers(self._graph, [place]), rank - 1
            nodes.append(ir.node("Squeeze", [nodes[-1].outputs[0] if nodes else value, axes], name=f"{name}/no_heads"))
        if rank < 3:
            axes = integers(self._graph, list(range(3 - rank)))
            nodes.append(ir.node("Unsqueeze", [nodes[-1].outputs[0] if nodes else value, axes], name=f"{name}/axes"))
        for node in nodes:
            node.outputs[0].name, node.outputs[0].type = f"{node.name}:0", factor.type
        self._insert(factor, nodes)
        return nodes[-1].outputs[0] if nodes else value

    def _insert(self, factor: ir.Value, nodes: list[ir.Node]) -> None:
        """Right behind the factor, before whoever reads it first."""
        producer, graph = factor.producer(), factor.graph or self._graph  # what is made outside of a loop stays there
        if producer is not None:
            graph.insert_after(producer, nodes)
        elif nodes:
            graph.insert_before(graph[0], nodes)
