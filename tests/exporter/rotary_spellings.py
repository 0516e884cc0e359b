"""Rotary position embeddings as any exporter may write them: hypothesis draws the spelling."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from tests.exporter.spellings import Graph

MISSES = ("other way", "joined otherwise", "by head", "columns apart", "read", "another value", "float64")
TURNED = ("other way", "columns apart", "another value")  # what only x cos + turned sin can be
JOINED = ("joined otherwise", "read")  # and only what is multiplied out
FACTORS = ("plane", "by token", "looked up", "angles")
_END = 2**63 - 1


@dataclass(frozen=True)
class Layout:
    rows: int
    tokens: int
    width: int  # of what is rotated
    heads_axis: int
    interleaved: bool
    turned: bool  # whether factors stand for each column, not for each pair


@st.composite
def rotations(draw: st.DrawFn, *, missed: bool = False) -> Graph:
    """A rotation of [B,H,Q,D] or [B,Q,H,D], in float32 or float16; ``missed``: with one change after which it is none."""
    miss = draw(st.sampled_from(MISSES)) if missed else ""
    width = draw(st.sampled_from((4, 6) if missed else (2, 4, 6)))
    rest = draw(st.sampled_from((0, 0, 2, 3)))
    heads_axis = draw(st.sampled_from((1, 2)))
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    dtype = np.float64 if miss == "float64" else draw(st.sampled_from((np.float32, np.float16)))
    graph = Graph(dtype, fixed=draw(st.booleans()))
    graph.kind = "RotaryEmbedding"
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    shape = (rows, 2, tokens, width + rest) if heads_axis == 1 else (rows, tokens, 2, width + rest)
    axes: list[str | int] = ["B", 2, "Q", width + rest] if heads_axis == 1 else ["B", "Q", 2, width + rest]
    whole = graph.input("x", random.normal(size=shape).astype(dtype), axes)
    x = graph.add("Slice", whole, *map(graph.integers, (0, width, 3))) if rest else whole
    turned = miss in TURNED or (miss not in JOINED and draw(st.booleans()))
    layout = Layout(rows, tokens, width, heads_axis, draw(st.booleans()), turned)
    factors = [_factor(graph, draw, miss, random, layout) for _ in range(2)]
    parts = _apart(graph, draw, x, layout)
    flips = draw(st.lists(st.booleans(), min_size=4, max_size=4))
    y = (_added if turned else _joined)(graph, miss, x, parts, factors, layout, flips)
    if rest:
        y = graph.add("Concat", y, graph.add("Slice", whole, *map(graph.integers, (width, _END, 3))), axis=-1)
    graph.outputs.append(y)
    graph.reason = miss or None
    return graph


def _apart(graph: Graph, draw: st.DrawFn, x: str, layout: Layout) -> tuple[str, str]:
    """x1 and x2, which one spelling or another cuts from x."""
    half, axis = layout.width // 2, graph.integers(-1)
    if not layout.interleaved:
        if draw(st.booleans()):
            first, second = graph.add("Split", x, outputs=2, axis=-1, num_outputs=2)
            return first, second
        cuts = ((0, half), (half, _END))
        first, second = (graph.add("Slice", x, graph.integers(a), graph.integers(b), axis) for a, b in cuts)
        return first, second
    how = draw(st.sampled_from(("strides", "pairs", "picked")))
    if how == "strides":
        two, end = graph.integers(2), graph.integers(_END)
        first, second = (graph.add("Slice", x, graph.integers(start), end, axis, two) for start in (0, 1))
        return first, second
    pairs = graph.add("Reshape", x, graph.integers(0, 0, 0, half, 2))
    if how == "picked":
        first, second = (graph.add("Gather", pairs, graph.constant(i, np.int64), axis=-1) for i in (0, 1))
        return first, second
    first, second = (
        graph.add("Squeeze", one, axis) for one in graph.add("Split", pairs, outputs=2, axis=4, num_outputs=2)
    )
    return first, second


def _put(graph: Graph, parts: tuple[str, str], width: int, interleaved: bool) -> str:
    if not interleaved:
        return str(graph.add("Concat", *parts, axis=-1))
    pairs = [graph.add("Unsqueeze", part, graph.integers(-1)) for part in parts]
    return str(graph.add("Reshape", graph.add("Concat", *pairs, axis=-1), graph.integers(0, 0, 0, width)))


def _added(
    graph: Graph, miss: str, x: str, parts: tuple[str, str], factors: list[str], layout: Layout, flips: list[bool]
) -> str:
    """x cos + turned sin."""
    left, right = parts
    signed = (right, graph.add("Neg", left)) if miss == "other way" else (graph.add("Neg", right), left)
    turned = _put(graph, signed, layout.width, layout.interleaved)
    straight = graph.add("Exp", x) if miss == "another value" else x
    one, two = graph.flipped("Mul", straight, factors[0], flips[0]), graph.flipped("Mul", turned, factors[1], flips[1])
    return graph.flipped("Add", one, two, flips[2])


def _joined(
    graph: Graph, miss: str, x: str, parts: tuple[str, str], factors: list[str], layout: Layout, flips: list[bool]
) -> str:
    """x1 cos - x2 sin, x2 cos + x1 sin."""
    (left, right), (cos, sin) = parts, factors
    one, two = graph.flipped("Mul", left, cos, flips[0]), graph.flipped("Mul", right, sin, flips[1])
    three, four = graph.flipped("Mul", right, cos, flips[2]), graph.flipped("Mul", left, sin, flips[3])
    first, second = graph.add("Sub", one, two), graph.flipped("Add", three, four, flips[0])
    if miss == "read":
        graph.outputs.append(graph.add("Neg", one))
    return _put(graph, (first, second), layout.width, layout.interleaved is not (miss == "joined otherwise"))


def _factor(graph: Graph, draw: st.DrawFn, miss: str, random: np.random.Generator, layout: Layout) -> str:
    """Numbers for each token and each column, or each pair of columns, of x."""
    half, tokens, name = layout.width // 2, layout.tokens, f"f{len(graph.feeds)}"
    width = layout.width if layout.turned else half
    if miss == "by head":
        shape = (1, 2, tokens, width) if layout.heads_axis == 1 else (1, tokens, 2, width)
        return graph.input(name, random.normal(size=shape).astype(graph.dtype))
    if miss == "columns apart":
        array = random.normal(size=(tokens, width)).astype(graph.dtype)
        if draw(st.booleans()):
            return _with_heads(graph, graph.input(name, array, ["Q", width]), 2, layout)
        ids = graph.input(name, random.integers(0, tokens, (layout.rows, tokens)), ["B", "Q"])
        return _with_heads(graph, graph.add("Gather", graph.constant(array), ids), 3, layout)
    kind = draw(st.sampled_from(FACTORS))
    row = random.normal(size=(9, half)).astype(graph.dtype)
    early = layout.turned and kind in ("looked up", "angles") and draw(st.booleans())
    if early:  # the constant stands twice already
        row = row.repeat(2, -1) if layout.interleaved else np.concatenate([row, row], -1)
    if kind == "plane":
        numbers = graph.input(name, row[:tokens], ["Q", half])
    elif kind == "by token":
        numbers = graph.input(name, np.stack([row[:tokens]] * layout.rows), ["B", "Q", half])
    elif kind == "looked up":
        ids = graph.input(name, random.integers(0, 9, (layout.rows, tokens)), ["B", "Q"])
        numbers = graph.add("Gather", graph.constant(row), ids)
    else:
        places = graph.input(name, random.normal(size=(layout.rows, tokens, 1)).astype(graph.dtype), ["B", "Q", 1])
        numbers = graph.add("Cos", graph.add("Mul", places, graph.constant(row[0])))
    rank = 2 if kind == "plane" else 3
    if layout.turned and not early:
        numbers = _doubled(graph, draw, numbers, rank, layout)
    return _with_heads(graph, numbers, rank, layout)


def _doubled(graph: Graph, draw: st.DrawFn, numbers: str, rank: int, layout: Layout) -> str:
    how = draw(st.sampled_from(("joined", "repeated")))
    if not layout.interleaved:
        if how == "joined":
            return str(graph.add("Concat", numbers, numbers, axis=-1))
        return str(graph.add("Tile", numbers, graph.integers(*[1] * (rank - 1), 2)))
    pairs = graph.add("Unsqueeze", numbers, graph.integers(-1))
    if how == "joined":
        pairs = graph.add("Concat", pairs, pairs, axis=-1)
    else:
        pairs = graph.add("Expand", pairs, graph.integers(*[1] * rank, 2))
    return str(graph.add("Reshape", pairs, graph.integers(*[0] * (rank - 1), layout.width)))


def _with_heads(graph: Graph, numbers: str, rank: int, layout: Layout) -> str:
    """With an axis of one for the heads, unless a rank of two says the same."""
    if rank == 2 and layout.heads_axis == 1:
        return numbers
    return str(graph.add("Unsqueeze", numbers, graph.integers(layout.heads_axis - 4)))
