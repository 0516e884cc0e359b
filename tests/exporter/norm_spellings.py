"""Layer norms and root-mean-square norms as any exporter may write them: hypothesis draws the spelling."""

import numpy as np
import onnx
from hypothesis import strategies as st

from tests.exporter.spellings import Graph

MISSES = (
    "axis",
    "epsilon outside",
    "epsilon of several",
    "epsilon from outside",
    "read",
    "cubed",
    "no root",
    "dropped",
)
INVERSES = ("x / root", "reciprocal", "1 / root", "power")
ORDERS = ("weight last", "weight first", "weight on the inverse")
EPSILONS = (1e-5, 1e-6, 1e-2)


@st.composite
def norms(draw: st.DrawFn, *, missed: bool = False) -> Graph:
    """A norm of the last axis, in float32 or in float16 around it; ``missed``: with one change after which it is none.

    The operator it must become is ``graph.kind``.
    """
    layer = draw(st.booleans())
    half, width = draw(st.booleans()), draw(st.sampled_from((3, 4, 8)))
    miss = draw(st.sampled_from(MISSES)) if missed else ""
    shape = (2, *(draw(st.integers(1, 4)) for _ in range(draw(st.integers(1, 2)))), width)
    shape = (width,) * len(shape) if miss == "dropped" else shape  # so that it runs at all
    graph = Graph(np.float16 if half else np.float32, fixed=draw(st.booleans()))
    graph.kind = "LayerNormalization" if layer else "RMSNormalization"
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    array = (random.normal(size=shape) * 3 + 1).astype(graph.dtype)
    x = graph.input("x", array, ["B", *("L" if i == 0 else n for i, n in enumerate(shape[1:-1])), width])
    graph.dtype = np.float32
    wide = graph.add("Cast", x, to=onnx.TensorProto.FLOAT) if half else x
    axis = graph.integers(0 if miss == "axis" else draw(st.sampled_from((-1, len(shape) - 1))))
    mean = graph.add("ReduceMean", wide, axis) if layer else ""
    d = graph.add("Sub", wide, mean) if layer else wide
    flips = draw(st.lists(st.booleans(), min_size=4, max_size=4))
    inverse = _inverse(graph, draw, miss, d, axis, flips[0])
    ones = (1,) * draw(st.integers(0, len(shape) - 1))  # TensorFlow's weights have the axes of x
    weight = graph.constant(random.uniform(0.5, 2, (*ones, width)))
    if draw(st.booleans()):  # Gemma
        weight = graph.flipped("Add", weight, graph.constant(1), flips[1])
    apart = layer and inverse[0] != "x / root" and draw(st.booleans())
    narrowing = (half and ("at the end" if apart else draw(st.sampled_from(("inside", "at the end"))))) or ""
    bias = layer and draw(st.booleans())
    graph.dtype = np.float16 if narrowing == "inside" else np.float32
    added = graph.constant(random.normal(size=(*ones, width))) if bias else ""
    graph.dtype = np.float32
    if apart:
        y = _apart(graph, draw, (wide, mean), graph.flipped("Mul", inverse[1], weight, flips[2]), added, flips)
    else:
        y = _multiplied(graph, draw, d, inverse, weight, narrowing, flips[2])
        y = graph.flipped("Add", y, added, flips[3]) if bias else y
    graph.outputs.append(graph.add("Cast", y, to=onnx.TensorProto.FLOAT16) if narrowing == "at the end" else y)
    graph.reason = miss or None
    return graph


def _inverse(graph: Graph, draw: st.DrawFn, miss: str, d: str, axis: str, flip: bool) -> tuple[str, str]:
    """(how to use it, the root or one over it)."""
    exponent = graph.constant(3 if miss == "cubed" else 2)
    square = graph.add("Mul", d, d) if miss != "cubed" and draw(st.booleans()) else graph.add("Pow", d, exponent)
    mean = graph.add("ReduceMean", square, axis, **({"keepdims": 0} if miss == "dropped" else {}))
    if miss == "read":
        graph.outputs.append(graph.add("Neg", mean))
    epsilon = graph.constant(draw(st.sampled_from(EPSILONS)))
    if miss == "epsilon of several":
        epsilon = graph.constant(np.linspace(0.1, 1, graph.feeds["x"].shape[-1]))
    if miss == "epsilon from outside":
        epsilon = graph.input("epsilon", np.array(0.1, np.float32), [])
    if miss == "epsilon outside":
        return "x / root", graph.flipped("Add", graph.add("Sqrt", mean), epsilon, flip)
    shifted = graph.flipped("Add", mean, epsilon, flip)
    how = draw(st.sampled_from(INVERSES))
    if miss == "no root":
        return how, shifted
    if how == "power":
        return how, str(graph.add("Pow", shifted, graph.constant(-0.5)))
    root = graph.add("Sqrt", shifted)
    if how == "reciprocal":
        root = graph.add("Reciprocal", root)
    return how, str(graph.add("Div", graph.constant(1), root) if how == "1 / root" else root)


def _apart(graph: Graph, draw: st.DrawFn, sides: tuple[str, str], scale: str, bias: str, flips: list[bool]) -> str:
    """x and its mean scaled apart: as TensorFlow subtracts the one, or as Keras adds its opposite, without a bias, too."""
    x, mean = sides
    scaled = graph.flipped("Mul", x, scale, flips[0])
    if bias and draw(st.booleans()):
        rest = graph.add("Sub", bias, graph.flipped("Mul", mean, scale, flips[1]))
    else:
        rest = graph.flipped("Mul", graph.add("Neg", mean), scale, flips[1])
        rest = graph.flipped("Add", rest, bias, flips[2]) if bias else rest
    return graph.flipped("Add", scaled, rest, flips[3])


def _multiplied(
    graph: Graph, draw: st.DrawFn, d: str, inverse: tuple[str, str], weight: str, narrowing: str, flip: bool
) -> str:
    """d, the inverse and the weight, in any order; the weight in float16 where the result is narrowed before."""
    how, root = inverse
    if narrowing == "inside":
        normal = graph.add("Div", d, root) if how == "x / root" else graph.flipped("Mul", d, root, flip)
        normal = graph.add("Cast", normal, to=onnx.TensorProto.FLOAT16)
        return graph.flipped("Mul", normal, graph.add("Cast", weight, to=onnx.TensorProto.FLOAT16), flip)
    order = draw(st.sampled_from(ORDERS[:2] if how == "x / root" else ORDERS))
    if order == "weight first":
        d, weight = graph.flipped("Mul", d, weight, flip), ""
    if order == "weight on the inverse":
        root, weight = graph.flipped("Mul", root, weight, flip), ""
    normal = graph.add("Div", d, root) if how == "x / root" else graph.flipped("Mul", d, root, flip)
    return graph.flipped("Mul", normal, weight, flip) if weight else str(normal)
