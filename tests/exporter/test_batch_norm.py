"""Layer norms that are written as a batch norm by statistics of each token: what fuses, what must not and why, and the numbers."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import common as passes

from tests.exporter.plain_engine import run
from txopt.exporter.fusion.layer_norm import fuse
from txopt.exporter.graph import count

X = np.random.default_rng(0).normal(size=(2, 3, 8)) * 3 + 1
EPSILON = 0.01
CONSTANTS = {
    "joined": np.array([1, -1, 8, 1], np.int64),
    "planes": np.array([1, -1, 24, 1], np.int64),
    "of_batches": np.array([-1, 3, 8, 1], np.int64),
    "apart": np.array([0, 2, 3], np.int64),
    "along": np.array([0, 1, 3], np.int64),
    "last": np.array([-1], np.int64),
    "otherwise": np.array([-1, 2, 8], np.int64),
    "eight": np.array(8, np.float32),
    "seven": np.array(7, np.float32),
    "twenty_four": np.array(24, np.float32),
    "one": np.array(1, np.float32),
    "two": np.array(2, np.float32),
    "zero": np.array(0, np.float32),
    "weight": np.linspace(0.5, 2, 8, dtype=np.float32),
    "bias": np.linspace(-1, 1, 8, dtype=np.float32),
    "weight_of_planes": np.linspace(0.5, 2, 24, dtype=np.float32).reshape(3, 8),
    "means": np.array([0.5, 1, 2], np.float32),
}
GIVEN = "r = Reshape(x, joined) "
MOMENTS = (
    "s = Shape(r) n = Gather(s, apart) p = ReduceProd<keepdims=0>(n) c = Cast<to=1>(p) m = ReduceMean(r, apart) d = Sub(r, m) "
    "q = ReduceSumSquare<keepdims=0>(d, apart) v = Div(q, c) k = Squeeze(m, apart) "
)
TOKENS = "sx = Shape(x) t = Shape<end=2>(x) w = ReduceProd(t) o = Expand(one, w) z = Expand(zero, w) "
NORM = f"b = BatchNormalization<epsilon = {EPSILON}>(r, o, z, k, v) "
END = "y_ = Reshape(b, sx) g = Mul(y_, weight) y = Add(g, bias)"
KERAS = GIVEN + MOMENTS + TOKENS + NORM + END

SPELLINGS: dict[str, str] = {
    "as Keras 2 writes it": KERAS,
    "its count a number": KERAS.replace("Div(q, c)", "Div(q, eight)"),
    "its moments with and without axes": KERAS.replace("<keepdims=0>(d", "(d").replace(
        "v = Div(q, c)", "u = Div(q, c) v = Squeeze(u, apart)"
    ),
    "sides exchanged": KERAS.replace("Mul(y_, weight)", "Mul(weight, y_)").replace("Add(g, bias)", "Add(bias, g)"),
}

NEAR_MISSES: dict[str, tuple[str, str]] = {
    "another count": (KERAS.replace("Div(q, c)", "Div(q, seven)"), "not that of the differences from its mean"),
    "squares of x": (
        KERAS.replace("SumSquare<keepdims=0>(d", "SumSquare<keepdims=0>(r"),
        "not that of the differences",
    ),
    "a scale of its own": (KERAS.replace("Expand(one", "Expand(two"), "are not ones and zeros"),
    "a bias of its own": (KERAS.replace("Expand(zero", "Expand(one"), "are not ones and zeros"),
    "another shape at the end": (KERAS.replace("(b, sx)", "(b, otherwise)"), "not brought back to the shape"),
    "no weight": (KERAS.replace("g = Mul(y_, weight)", "g = Neg(y_)"), "no constant weight vector"),
    "a weight of more axes": (
        KERAS.replace("y_, weight", "y_, weight_of_planes").replace("y = Add(g, bias)", "y = Neg(g)"),
        "weight_of_planes has shape [3, 8]",
    ),
    "its mean read elsewhere": (
        KERAS.replace("y =", "a =") + " h = ReduceMax(k) y = Add(a, h)",
        "something else reads",
    ),
}

OTHERS: dict[str, str] = {
    "of constants": "r = Unsqueeze(x, last) b = BatchNormalization(r, means, means, means, means) y = Squeeze(b, last)",
    "by the moments of a batch": "r = Reshape(x, of_batches) " + MOMENTS + "sx = Shape(x) "
    "b = BatchNormalization(r, means, means, k, v) y = Reshape(b, sx)",
}


def model(nodes: str) -> ir.Model:
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 24]> g (float[B,3,8] x) => (float[B,3,8] y) {{ {nodes} }}'
    )
    for index, node in enumerate(proto.graph.node):
        node.name = f"block/{node.op_type}_{index}"
    used = {name for node in proto.graph.node for name in node.input}
    for name in sorted(used & CONSTANTS.keys()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(CONSTANTS[name], name))
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    passes.RemoveUnusedNodesPass()(graph)
    return graph


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_norm_fuses_and_says_the_same(name: str) -> None:
    x, graph = X.astype(np.float32), model(SPELLINGS[name])
    before = run(graph, {"x": x})[0]
    report = fuse(graph)
    assert (report.fused, report.refused) == (1, [])
    operators = count(graph)
    assert operators.pop("LayerNormalization") == 1
    assert "BatchNormalization" not in operators
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    after = run(graph, {"x": x})[0]
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-6)
    difference = X - X.mean(-1, keepdims=True)
    normal = difference / np.sqrt((difference**2).mean(-1, keepdims=True) + EPSILON)
    np.testing.assert_allclose(after, normal * CONSTANTS["weight"] + CONSTANTS["bias"], rtol=0, atol=2e-6)


def test_a_norm_over_several_axes_fuses() -> None:
    nodes = KERAS.replace("joined", "planes").replace("end=2", "end=1").replace("Div(q, c)", "Div(q, twenty_four)")
    nodes = nodes.replace("Mul(y_, weight)", "Mul(y_, weight_of_planes)").replace("y = Add(g, bias)", "y = Neg(g)")
    x, graph = X.astype(np.float32), model(nodes)
    before = run(graph, {"x": x})[0]
    assert fuse(graph).fused == 1
    (node,) = (node for node in graph.graph if node.op_type == "LayerNormalization")
    assert node.attributes["axis"].as_int() == -2
    np.testing.assert_allclose(run(graph, {"x": x})[0], before, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone_and_says_why(name: str) -> None:
    nodes, reason = NEAR_MISSES[name]
    graph = model(nodes)
    untouched = ir.to_proto(graph).SerializeToString(deterministic=True)
    report = fuse(graph)
    assert report.fused == 0
    (refusal,) = report.refused
    assert refusal.startswith("block/BatchNormalization")
    assert reason in refusal
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == untouched


@pytest.mark.parametrize("name", OTHERS)
def test_a_batch_norm_is_no_refusal(name: str) -> None:
    graph = model(OTHERS[name])
    assert np.isfinite(run(graph, {"x": X.astype(np.float32)})[0]).all()
    report = fuse(graph)
    assert (report.fused, report.refused) == (0, [])
