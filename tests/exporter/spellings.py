"""Attention and norms as any exporter may write them: hypothesis draws the spelling, this file writes the graph and its inputs.

A spelling says what must become of it: that it fuses, or why it must not.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass
class Graph:
    """An ONNX graph under construction: nodes and constants by the names of their values, and inputs with their arrays."""

    dtype: Any = np.float32
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)
    feeds: dict[str, Array] = field(default_factory=dict)
    axes: dict[str, list[str | int]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    fixed: bool = False  # whether lengths have numbers rather than names
    reason: str | None = None  # why it must not fuse
    kind: str = "Attention"  # what it must become

    def add(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{op_type.lower()}_{len(self.nodes)}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        name = f"block/{op_type}_{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(op_type, inputs, names, name=name, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value: Any, dtype: Any = None) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.array(value, dtype or self.dtype)
        return name

    def integers(self, *numbers: int) -> str:
        return self.constant(numbers, np.int64)

    def input(self, name: str, array: Array, axes: list[str | int] | None = None) -> str:
        self.feeds[name], self.axes[name] = array, list(array.shape) if self.fixed or axes is None else axes
        return name

    def flipped(self, op_type: str, left: str, right: str, flip: bool) -> str:
        return str(self.add(op_type, *((right, left) if flip else (left, right))))

    def model(self) -> ir.Model:
        kind, info = onnx.helper.np_dtype_to_tensor_dtype, onnx.helper.make_tensor_value_info
        used = {name for node in self.nodes for name in node.input}
        graph = onnx.helper.make_graph(
            self.nodes,
            "spelling",
            [info(name, kind(array.dtype), self.axes[name]) for name, array in self.feeds.items()],
            [onnx.helper.make_empty_tensor_value_info(name) for name in self.outputs],
            [onnx.numpy_helper.from_array(array, name) for name, array in self.constants.items() if name in used],
        )
        made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=10)
        return ir.from_proto(onnx.shape_inference.infer_shapes(made, data_prop=True))


@dataclass(frozen=True)
class Sizes:
    B: int
    H: int
    Q: int
    K: int
    D: int
    groups: int  # heads that share one of K and V


MISSES = (
    "axis",
    "per position",
    "after the mask",
    "negative",
    "capped",
    "five axes",
    "showing",
    "read",
    "computed",
    "broadcast",
)
SCALES = ("none", "scores *", "scores /", "* scores", "twice", "four axes", "q", "k", "kt", "both", "root", "length")
ADDED = ("bias", "by head", "keys", "queries", "heads alone", "plane", "line", "point")
MASKS = (*ADDED, "keep", "hide", "hide keys", "padding", "causal", "triangle")
OF_ANY_RANK = ("plane", "line", "point", "causal", "triangle")
FILLS = ("infinite", "least", "billion", "expanded")


@st.composite
def attentions(draw: st.DrawFn, *, missed: bool = False) -> Graph:
    """Self- or cross-attention of random sizes; ``missed``: with one change after which it is none."""
    heads = draw(st.sampled_from((1, 2, 4)))
    shortest = 2 if missed else 1  # a factor for each of one position is one factor
    q, k = draw(st.integers(shortest, 5)), draw(st.integers(shortest, 6))
    source = draw(st.sampled_from(("given", "by token", "projected", "packed", "packed five", "three axes")))
    k = q if source.startswith("packed") else k
    grouped = source in ("given", "projected") and draw(st.booleans())
    groups = draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0])) if grouped else 1
    sizes = Sizes(draw(st.integers(1, 3)), heads, q, k, draw(st.sampled_from((2, 4, 8))), groups)
    half, miss = draw(st.booleans()), draw(st.sampled_from(MISSES)) if missed else ""
    graph = Graph(np.float16 if half else np.float32, fixed=draw(st.booleans()) or miss == "broadcast")
    if miss == "broadcast":
        sizes, source, grouped = replace(sizes, B=1, groups=1), "given", False
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    values = _sources(graph, source, sizes, random, grouped)
    three = source == "three axes"
    scores = _scores(graph, draw, values, sizes, three)
    wide = half and draw(st.booleans())
    if wide and draw(st.booleans()):
        scores, wide = graph.add("Cast", scores, to=onnx.TensorProto.FLOAT), False
        graph.dtype, narrow = np.float32, True
    else:
        narrow = wide
    masks = draw(st.lists(st.sampled_from(MASKS), max_size=2, unique=True))
    cut = three and not missed and min(q, k) > 1 and draw(st.booleans())  # into heads for the masks, as BART did
    if cut:
        masks = [
            mask for mask in masks if mask != "heads alone"
        ]  # of three axes, which would stand for others then: refused
        scores = graph.add("Reshape", scores, graph.integers(-1, heads, q, k))
    if three and not cut:
        masks = [mask for mask in masks if mask in OF_ANY_RANK]
    if miss:
        scores = _missed(graph, miss, scores, sizes, three, random)
    for mask in masks:
        scores = _masked(graph, draw, mask, scores, sizes, random)
    if miss == "after the mask":
        scores = graph.add("Add", scores, graph.constant(random.normal(size=(sizes.Q, sizes.K))))
        scores = graph.add("Mul", scores, graph.constant(0.5))
    if cut:
        scores = graph.add("Reshape", scores, graph.integers(-1, q, k))
    if wide:
        scores = graph.add("Cast", scores, to=onnx.TensorProto.FLOAT)
    rank = 3 if three else 4
    axis = rank - 2 if miss == "axis" else draw(st.sampled_from((-1, rank - 1)))
    p = softmax = graph.add("Softmax", scores, axis=axis + (miss == "five axes" and axis > 0))
    if miss == "read":
        graph.outputs.append(graph.add("ReduceMax", p))
    if narrow:
        p = graph.add("Cast", p, to=onnx.TensorProto.FLOAT16)
    graph.dtype = np.float16 if half else np.float32
    p = graph.add(draw(st.sampled_from(("Identity", "Dropout"))), p) if draw(st.booleans()) else p
    if not missed and draw(st.booleans()):
        p = graph.add("Where", graph.add("IsNaN", softmax), graph.constant(0), p) if p == softmax else p
    graph.outputs.append(graph.add("MatMul", p, values[2]))
    graph.reason = miss or None
    return graph


def _sources(graph: Graph, source: str, sizes: Sizes, random: np.random.Generator, grouped: bool) -> list[str]:
    """Q, K and V by head [B,H,L,D], or [N,L,D] with ``three axes``."""
    b, h, d = sizes.B, sizes.H, sizes.D
    lengths, letters, kv = (sizes.Q, sizes.K, sizes.K), ("Q", "K", "K"), h // sizes.groups
    if source == "three axes":
        return [
            graph.input(name, random.normal(size=(b * h, length, d)).astype(graph.dtype), ["N", letter, d])
            for name, length, letter in zip("qkv", lengths, letters, strict=True)
        ]
    if source.startswith("packed"):
        return _packed(graph, source, sizes, random)
    found, inputs = [], dict[str, str]()
    for name, length, letter in zip("qkv", lengths, letters, strict=True):
        heads = h if name == "q" else kv
        if source == "by token":
            array = random.normal(size=(b, length, heads, d)).astype(graph.dtype)
            value = graph.add("Transpose", graph.input(name, array, ["B", letter, heads, d]), perm=[0, 2, 1, 3])
        elif source == "given":
            array = random.normal(size=(b, heads, length, d)).astype(graph.dtype)
            value = graph.input(name, array, ["B", heads, letter, d])
        else:
            x = inputs.get(letter) or graph.input(
                f"x{letter}", random.normal(size=(b, length, 6)).astype(graph.dtype), ["B", letter, 6]
            )
            inputs[letter] = x
            value = graph.add("MatMul", x, graph.constant(random.normal(size=(6, heads * d)) / 2))
            value = graph.add("Add", value, graph.constant(random.normal(size=heads * d)))
            value = graph.add("Reshape", value, graph.integers(0, 0, heads, d))
            value = graph.add("Transpose", value, perm=[0, 2, 1, 3])
        found.append(_repeated(graph, value, sizes) if grouped and name != "q" else value)
    return found


def _repeated(graph: Graph, value: str, sizes: Sizes) -> str:
    """transformers' repeat_kv."""
    value = graph.add("Unsqueeze", value, graph.integers(2))
    value = graph.add("Expand", value, graph.integers(1, 1, sizes.groups, 1, 1))
    return str(graph.add("Reshape", value, graph.integers(0, sizes.H, -1, sizes.D)))


def _packed(graph: Graph, source: str, sizes: Sizes, random: np.random.Generator) -> list[str]:
    """One projection for all three: cut by Split, or as an axis of its own that Gather takes apart."""
    h, d = sizes.H, sizes.D
    x = graph.input("x", random.normal(size=(sizes.B, sizes.Q, 6)).astype(graph.dtype), ["B", "Q", 6])
    packed = graph.add("MatMul", x, graph.constant(random.normal(size=(6, 3 * h * d)) / 2))
    if source == "packed five":
        cut = graph.add("Reshape", packed, graph.integers(0, 0, 3, h, d))
        turned = graph.add("Transpose", cut, perm=[2, 0, 3, 1, 4])
        return [graph.add("Gather", turned, graph.constant(i, np.int64), axis=0) for i in range(3)]
    parts = graph.add("Split", packed, graph.integers(h * d, h * d, h * d), outputs=3, axis=-1)
    cut = [graph.add("Reshape", part, graph.integers(0, 0, h, d)) for part in parts]
    return [graph.add("Transpose", part, perm=[0, 2, 1, 3]) for part in cut]


def _scores(graph: Graph, draw: st.DrawFn, values: list[str], sizes: Sizes, three: bool) -> str:
    q, k = values[:2]
    how, number = draw(st.sampled_from(SCALES)), draw(st.sampled_from((0.25, 0.5, 0.3)))
    perm = [0, 2, 1] if three else [0, 1, 3, 2]
    if how in ("q", "both"):
        q = graph.flipped("Mul", q, graph.constant(number), draw(st.booleans()))
    if how == "k":
        k = graph.add("Div", k, graph.constant(1 / number))
    turned = draw(st.booleans())  # keys by queries, as a query is a column to some
    kt = graph.add("Transpose", q if turned else k, perm=perm)
    if how in ("kt", "both"):
        kt = graph.flipped("Mul", kt, graph.constant([number] if how == "both" else number), draw(st.booleans()))
    scores = str(graph.add("MatMul", k if turned else q, kt))
    scores = str(graph.add("Transpose", scores, perm=perm)) if turned else scores
    if how in ("scores *", "* scores"):
        return graph.flipped("Mul", scores, graph.constant(number), how == "* scores")
    if how == "twice":
        return str(graph.add("Div", graph.add("Mul", scores, graph.constant(number)), graph.constant([2])))
    if how == "four axes":
        return str(graph.add("Mul", scores, graph.constant(np.full((1,) * (3 if three else 4), number))))
    if how == "scores /":
        return str(graph.add("Div", scores, graph.constant(1 / number)))
    if how == "root":
        return str(graph.add("Div", scores, graph.add("Sqrt", graph.constant(float(sizes.D)))))
    if how == "length":
        size = graph.add(
            "Cast",
            graph.add("Shape", values[0], start=-1),
            to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(graph.dtype)),
        )
        return str(graph.add("Div", scores, graph.add("Sqrt", size)))
    return scores


def _masked(graph: Graph, draw: st.DrawFn, mask: str, scores: str, sizes: Sizes, random: np.random.Generator) -> str:
    """``scores`` under one more mask; every query keeps its first key."""
    b, h, q, k = sizes.B, sizes.H, sizes.Q, sizes.K
    shapes = ((b, 1, q, k), (1, h, q, k), (b, 1, 1, k), (b, 1, q, 1), (h, q, k), (q, k), (k,), ())
    letters = ("B1QK", "1HQK", "B11K", "B1Q1", "HQK", "QK", "K", "")
    flip = draw(st.booleans())
    if mask in ADDED:
        i = ADDED.index(mask)
        axes: list[str | int] = [{"1": 1, "H": h}.get(letter, letter) for letter in letters[i]]
        given = graph.input(f"mask_{i}", random.normal(size=shapes[i]).astype(graph.dtype), axes)
        return graph.flipped("Add", scores, given, flip)
    if mask == "padding":  # (1 - mask) * least, as BERT does it
        kept = np.ones((b, k), graph.dtype)
        kept[:, 1:] = random.random((b, k - 1)) < 0.6
        cut = graph.add("Unsqueeze", graph.input("padding", kept, ["B", "K"]), graph.integers(1, 2))
        rest = graph.add("Sub", graph.constant(1), cut)
        least = float(ml_dtypes.finfo(graph.dtype).min) / 2  # half, so that a bias beside it stays finite
        return graph.flipped("Add", scores, graph.add("Mul", rest, graph.constant(least)), flip)
    if mask in ("causal", "triangle"):
        if mask == "causal":
            return str(graph.add("Where", graph.constant(np.tri(q, k), np.bool_), scores, _fill(graph, draw, scores)))
        low = graph.add("Expand", graph.constant(float(ml_dtypes.finfo(graph.dtype).min) / 4), graph.integers(q, k))
        return graph.flipped("Add", scores, graph.add("Trilu", low, graph.constant(1, np.int64), upper=1), flip)
    keys = mask == "hide keys"
    kept = random.random((b, 1, 1 if keys else q, k)) < 0.6
    kept[..., 0] = True
    given = graph.input(mask, kept if mask == "keep" else ~kept, ["B", 1, 1 if keys else "Q", "K"])
    fill = _fill(graph, draw, scores)
    return str(graph.add("Where", given, *((scores, fill) if mask == "keep" else (fill, scores))))


def _fill(graph: Graph, draw: st.DrawFn, scores: str) -> str:
    how = draw(st.sampled_from(FILLS if graph.dtype == np.float32 else FILLS[:2]))
    least = float(ml_dtypes.finfo(graph.dtype).min)
    number = graph.constant({"infinite": -np.inf, "billion": -1e9}.get(how, least))
    return str(graph.add("Expand", number, graph.add("Shape", scores))) if how == "expanded" else number


def _missed(graph: Graph, miss: str, scores: str, sizes: Sizes, three: bool, random: np.random.Generator) -> str:
    """The one change before the masks after which it is no attention."""
    if miss == "per position":
        return str(graph.add("Mul", scores, graph.constant(random.uniform(0.5, 1, (sizes.Q, 1)))))
    if miss == "negative":
        return str(graph.add("Mul", scores, graph.constant(-0.5)))
    if miss == "capped":
        return str(graph.add("Tanh", scores))
    if miss == "five axes":
        shape = (1,) * (2 if three else 3) + (sizes.Q, sizes.K)
        return str(graph.add("Add", scores, graph.constant(random.normal(size=shape))))
    if miss == "broadcast":
        return str(graph.add("Add", scores, graph.constant(random.normal(size=(2, 1, sizes.Q, sizes.K)))))
    if miss == "showing":
        return str(graph.add("Where", graph.constant(np.tri(sizes.Q, sizes.K), np.bool_), scores, graph.constant(-3)))
    if miss == "computed":
        factor = graph.input("factor", np.array(0.7, graph.dtype), [])
        return str(graph.add("Mul", scores, factor))
    return scores
