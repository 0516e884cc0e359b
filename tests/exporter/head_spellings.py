"""Logarithms of a softmax as any exporter may write them: hypothesis draws the spelling."""

import numpy as np
from hypothesis import strategies as st

from tests.exporter.spellings import Graph

MISSES = ("added", "read", "masked", "two axes")


@st.composite
def logarithms(draw: st.DrawFn, *, missed: bool = False) -> Graph:
    """The logarithm of a softmax along any axis; ``missed``: with one change after which it is none, or another one."""
    miss = draw(st.sampled_from(MISSES)) if missed else ""
    shape = tuple(draw(st.lists(st.integers(2, 5), min_size=2, max_size=4)))
    graph = Graph(draw(st.sampled_from((np.float32, np.float16))), fixed=draw(st.booleans()))
    graph.kind = "LogSoftmax"
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    array = (random.normal(size=shape) * 2).astype(graph.dtype)
    x = graph.input("x", array, ["B", *shape[1:]])
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    how = "softmax" if miss in ("added", "masked") else draw(st.sampled_from(("softmax", "log-sum-exp", "sum")))
    how = "log-sum-exp" if miss == "two axes" else how
    if miss == "masked":
        x = graph.add("Add", x, graph.constant(np.where(np.arange(shape[-1]) == 0, -1e4, 0)))
    if how == "softmax":
        total = graph.add("Softmax", x, axis=axis)
        inner = graph.flipped("Add", total, graph.constant(1e-3), draw(st.booleans())) if miss == "added" else total
        y = graph.add("Log", inner)
    else:
        axes = graph.integers(0, 1) if miss == "two axes" else graph.integers(axis)
        total = graph.add("ReduceLogSumExp", x, axes) if how == "log-sum-exp" else ""
        total = total or graph.add("Log", graph.add("ReduceSum", graph.add("Exp", x), axes))
        y = graph.add("Sub", x, total)
    if miss == "read":
        graph.outputs.append(graph.add("Neg", total))
    graph.outputs.append(y)
    graph.reason = miss or None
    return graph
