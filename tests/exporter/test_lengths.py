"""Lengths read where they first appear: through which operators they are followed, through which not, and that they stay equal."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.exporter.plain_engine import run
from txopt.exporter.fusion import attention
from txopt.exporter.fusion.lengths import fuse
from txopt.exporter.graph import count

CONSTANTS = {
    "weight": np.ones((6, 8), np.float32),
    "table": np.ones((50, 6), np.float32),
    "row": np.ones(6, np.float32),
    "number": np.array(2, np.float32),
    "zero": np.array(0, np.int64),
    "one": np.array(1, np.int64),
    "two": np.array(2, np.int64),
    "last": np.array(-1, np.int64),
    "zeros": np.array([0], np.int64),
    "ones": np.array([1], np.int64),
    "twos": np.array([2], np.int64),
    "threes": np.array([3], np.int64),
    "left": np.array([-1], np.int64),
    "pair": np.array([2, 3], np.int32),
    "six": np.array([6], np.int32),
    "first": np.array([0, 1], np.int64),
    "heads": np.array([2], np.int64),
    "size": np.array([3], np.int64),
    "copied": np.array([0, 0, 2, 3], np.int64),
}

# nodes that make v of x [B,T,6], the index of a length of v, and whose length that is; None: nobody else's
FOLLOWED: dict[str, tuple[str, str, tuple[str, int] | int]] = {
    "activation": ("v = Relu(x)", "one", ("x", 1)),
    "several of them": ("a = Relu(x) b = Tanh(a) v = Cast<to=10>(b)", "zero", ("x", 0)),
    "norm": ("v = LayerNormalization(x, row)", "one", ("x", 1)),
    "number added": ("v = Add(number, x)", "one", ("x", 1)),
    "bias added": ("v = Add(x, row)", "one", ("x", 1)),
    "an axis that nobody stretches": ("a = Unsqueeze(x, ones) b = Unsqueeze(x, ones) v = Add(a, b)", "one", 1),
    "residual": ("a = Relu(x) v = Add(a, x)", "one", ("x", 1)),
    "projection, tokens": ("v = MatMul(x, weight)", "one", ("x", 1)),
    "projection, width": ("v = MatMul(x, weight)", "two", 8),
    "products, queries": ("t = Transpose<perm=[0,2,1]>(x) v = MatMul(x, t)", "one", ("x", 1)),
    "products, keys": ("t = Transpose<perm=[0,2,1]>(x) v = MatMul(x, t)", "last", ("x", 1)),
    "transpose": ("v = Transpose<perm=[1,0,2]>(x)", "zero", ("x", 1)),
    "transpose without order": ("v = Transpose(x)", "last", ("x", 0)),
    "lookup, tokens": ("i = Cast<to=7>(x) v = Gather(table, i)", "one", ("x", 1)),
    "reshape that copies": ("v = Reshape(x, copied)", "one", ("x", 1)),
    "reshape by a number": ("v = Reshape(x, copied)", "two", 2),
    "reshape by lengths": (
        "s = Shape(x) b = Gather(s, zero) t = Gather(s, one) c = Unsqueeze(b, zeros) d = Unsqueeze(t, zeros) "
        "h = Concat<axis=0>(d, c, heads, size) v = Reshape(x, h)",
        "zero",
        ("x", 1),
    ),
    "reshape that leaves what is left": (
        "b = Shape<end=1>(x) h = Concat<axis=0>(b, left, twos, threes) a = Reshape(x, h) c = Concat<axis=0>(b, left, twos, threes) "
        "v = Reshape(a, c)",
        "two",
        2,
    ),
    "one axis more": ("v = Unsqueeze(x, ones)", "zero", ("x", 0)),
    "behind one axis more": ("v = Unsqueeze(x, ones)", "two", ("x", 1)),
    "the axis that is more": ("v = Unsqueeze(x, ones)", "one", 1),
    "one axis less": ("a = Unsqueeze(x, ones) v = Squeeze(a, ones)", "one", ("x", 1)),
    "reshape that leaves a product of what is left": (
        "s = Shape(x) n = Gather(s, first) p = ReduceProd(n) h = Concat<axis=0>(p, left) a = Reshape(x, h) "
        "c = Concat<axis=0>(n, left) v = Reshape(a, c)",
        "two",
        6,
    ),
    "slice along another axis": ("v = Slice(x, zeros, ones, twos)", "one", ("x", 1)),
    "concat along another axis": ("v = Concat<axis=2>(x, x)", "one", ("x", 1)),
    "split along another axis": ("u, v = Split<axis=2,num_outputs=2>(x)", "one", ("x", 1)),
}

# a mask whose lengths nothing says, as far as shape inference sees it
MASKED = (
    "t = Shape<start=1,end=2>(x) e = Concat<axis=0>(t, t) m = Expand(number, e) k = Transpose<perm=[0,2,1]>(x) q = MatMul(x, k) "
    "s = Add(q, m) p = Softmax(s) "
)

NOT_FOLLOWED: dict[str, tuple[str, str]] = {
    "two operands of unknown lengths": ("k = Cast<to=7>(x) a = NonZero(k) b = NonZero(x) v = Add(a, b)", "one"),
    "slice along the axis": ("v = Slice(x, zeros, ones, ones)", "one"),
    "concat along the axis": ("v = Concat<axis=1>(x, x)", "one"),
    "what is left of others": ("h = Concat<axis=0>(left, heads, size) v = Reshape(x, h)", "zero"),
    "an operator that is not known": ("v = NonZero(x)", "one"),
}


def model(nodes: str, index: str) -> ir.Model:
    text = (
        '<ir_version: 10, opset_import: ["" : 24]> g (float[B,T,6] x) => (int64[] y) '
        f"{{ {nodes} all = Shape(v) y_ = Gather(all, {index}) y = Mul(y_, one) }}"
    )
    proto = onnx.parser.parse_model(text)
    used = {name for node in proto.graph.node for name in node.input}
    for name, value in CONSTANTS.items():
        if name in used:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    for position, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{position}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def give_away(graph: ir.Model, name: str) -> None:
    graph.graph.outputs.append(next(node.outputs[0] for node in graph.graph if node.outputs[0].name == name))


def feeds() -> dict[str, np.ndarray]:
    return {"x": np.zeros((3, 5, 6), np.float32)}


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_length_is_read_where_it_first_appears(name: str) -> None:
    nodes, index, origin = FOLLOWED[name]
    graph = model(nodes, index)
    before = run(graph, feeds())[0]
    fuse(graph)
    source = graph.graph[-1].inputs[0]
    assert source is not None
    if isinstance(origin, int):
        node = source.producer()
        value = source if node is None else node.inputs[0]
        assert value is not None
        assert value.const_value is not None
        assert value.const_value.numpy().reshape(-1).tolist() == [origin]
    else:
        squeeze = source.producer()
        assert squeeze is not None
        assert squeeze.op_type == "Squeeze"
        shape = squeeze.inputs[0].producer() if squeeze.inputs[0] is not None else None
        assert shape is not None
        assert shape.op_type == "Shape"
        assert (shape.inputs[0].name if shape.inputs[0] else None, shape.attributes["start"].as_int()) == origin
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    np.testing.assert_array_equal(run(graph, feeds())[0], before)


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_a_length_that_changes_on_the_way_is_read_where_it_is(name: str) -> None:
    graph = model(*NOT_FOLLOWED[name])
    before = run(graph, feeds())[0]
    fuse(graph)
    (shape,) = (node for node in graph.graph if node.op_type == "Shape")
    assert shape.inputs[0] is not None
    assert shape.inputs[0].name == "v"
    np.testing.assert_array_equal(run(graph, feeds())[0], before)


def test_a_length_that_leads_into_attention_is_read_behind_it() -> None:
    """Where the mask may have widened the scores: attention that is read inside could not be fused."""
    graph = model(f"{MASKED} v = MatMul(p, x)", "one")
    before = run(graph, feeds())[0]
    fuse(graph)
    (shape,) = (node for node in graph.graph if node.op_type == "Shape" and node.outputs[0].name != "t")
    assert shape.inputs[0] is not None
    assert shape.inputs[0].name == "v"
    assert attention.fuse(graph).fused == 1
    np.testing.assert_array_equal(run(graph, feeds())[0], before)


def test_scores_that_no_attention_has_may_be_read() -> None:
    graph = model(f"{MASKED} v = Relu(p)", "one")
    fuse(graph)
    assert "s" in [
        node.inputs[0].name for node in graph.graph if node.op_type == "Shape" and node.inputs[0] is not None
    ]


def test_equal_lengths_of_different_values_become_one() -> None:
    graph = model("a = Relu(x) b = Tanh(a) s = Shape(a) t = Gather(s, one) r = Range(zero, t, one) v = Relu(b)", "one")
    give_away(graph, "r")
    assert count(graph)["Shape"] == 2
    fuse(graph)
    assert count(graph)["Shape"] == 1


NARROW = "s = Shape(a) c = Cast<to=6>(s) b = Gather(c, zeros) t = Gather(c, ones) "


def test_a_shape_that_was_computed_in_int32_is_put_together_in_int64() -> None:
    """As TensorFlow computes it."""
    graph = model(f"a = Relu(x) {NARROW} n = Concat<axis=0>(b, t, pair) w = Cast<to=7>(n) v = Reshape(a, w)", "two")
    give_away(graph, "v")
    before = run(graph, feeds())[1]
    fuse(graph)
    operators = count(graph)
    assert "Cast" not in operators
    assert (operators["Shape"], operators["Concat"]) == (2, 1)
    assert {node.inputs[0].name for node in graph.graph if node.op_type == "Shape" and node.inputs[0]} == {"x"}
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    np.testing.assert_array_equal(run(graph, feeds())[1], before)


def test_what_is_no_length_is_left_in_int32() -> None:
    """Its numbers could be put together in int64, but not in the type that others read them in."""
    nodes = f"a = Relu(x) {NARROW} p = Mul(b, t) n = Concat<axis=0>(p, pair) w = Cast<to=7>(n) v = Reshape(a, w)"
    graph = model(nodes.replace("pair", "six"), "one")
    give_away(graph, "v")
    before = run(graph, feeds())[1]
    fuse(graph)
    assert count(graph)["Cast"] == 2
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    np.testing.assert_array_equal(run(graph, feeds())[1], before)


def test_a_deep_model_takes_no_longer() -> None:
    """Every residual connection has two ways to the same length: together they are more than anyone can walk."""
    nodes = (
        "r0 = Relu(x) "
        + " ".join(f"a{i} = Relu(r{i}) r{i + 1} = Add(a{i}, r{i})" for i in range(100))
        + " v = Relu(r100)"
    )
    graph = model(nodes, "one")
    fuse(graph)
    assert [node.inputs[0].name for node in graph.graph if node.op_type == "Shape" and node.inputs[0]] == ["x"]


def test_lengths_that_the_graph_gives_away_keep_their_names() -> None:
    graph = model("a = Relu(x) s = Shape(a) v = Tanh(a)", "one")
    give_away(graph, "s")
    fuse(graph)
    assert [value.name for value in graph.graph.outputs] == ["y", "s"]
    np.testing.assert_array_equal(run(graph, feeds())[1], [3, 5, 6])


def test_a_length_and_several_from_there_on_have_names_of_their_own() -> None:
    graph = model("a = Relu(x) s = Shape<end=1>(a) t = Shape<end=2>(a) m = Add(s, t) v = Tanh(a)", "zero")
    give_away(graph, "m")
    fuse(graph)
    names = [node.name for node in graph.graph if node.op_type == "Shape"]
    assert len(set(names)) == len(names) == 2
    np.testing.assert_array_equal(run(graph, feeds())[1], [6, 8])


def test_what_is_left_is_known_where_the_other_lengths_are_numbers_or_stay() -> None:
    """As torch's old exporter cuts into heads: rows and tokens of the value itself, a number of heads, and -1."""
    cut = "r = Shape<end=1>(a) t = Shape<start=1,end=2>(a) h = Concat<axis=0>(r, t, heads, left) "
    graph = model(f"a = Relu(x) {cut} v = Reshape(a, h)", "last")
    fuse(graph)
    assert all(
        node.inputs[0] is not None and node.inputs[0].name == "x" for node in graph.graph if node.op_type == "Shape"
    )
    assert run(graph, feeds())[0] == 3


# nodes that make v of x, and what asks for its shape: a shape that was given to a Reshape, and ones that say less than the answer
GIVEN = {
    "lengths, products and quotients": "p = Mul(b, t) h = Concat<axis=0>(p, twos, threes) v = Reshape(x, h)",
    "a quotient": "p = Mul(b, t) m = Mul(p, twos) n = Div(m, twos) h = Concat<axis=0>(n, twos, threes) v = Reshape(x, h)",
}
NOT_GIVEN = {
    "what is left": "p = Mul(b, t) h = Concat<axis=0>(p, left, threes) v = Reshape(x, h)",
    "what is copied": "p = Mul(b, t) h = Concat<axis=0>(p, zeros, threes) v = Reshape(x, h)",
    "a difference": "p = Sub(b, t) h = Concat<axis=0>(p, twos, threes) v = Reshape(x, h)",
}


@pytest.mark.parametrize("name", [*GIVEN, *NOT_GIVEN])
def test_the_shape_of_what_was_given_one_is_that(name: str) -> None:
    nodes = GIVEN[name] if name in GIVEN else NOT_GIVEN[name]
    graph = model(f"b = Shape<end=1>(x) t = Shape<start=1,end=2>(x) {nodes} w = Shape(v) z = Mul(w, ones)", "one")
    reader = next(node for node in graph.graph if node.outputs[0].name == "z")
    graph.graph.outputs.append(reader.outputs[0])
    fuse(graph)
    (source,) = (value.producer() for value in reader.inputs if value is not None and value.producer() is not None)
    assert source is not None
    assert source.op_type == ("Concat" if name in GIVEN else "Shape")
