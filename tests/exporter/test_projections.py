"""Projections of joined rows: what takes the form that torch writes, what stays as it is, and that the numbers stay."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import common as passes

from tests.exporter.plain_engine import run
from txopt.exporter.fusion.projections import fuse
from txopt.exporter.graph import count

random = np.random.default_rng(0)
CONSTANTS = {
    "rows": np.array([-1, 6], np.int64),
    "rows_of_heads": np.array([-1, 8], np.int64),
    "threes": np.array([3], np.int64),
    "heads": np.array([2, 4], np.int64),
    "ones": np.array([1], np.int64),
    "first": np.array([0, 1], np.int64),
    "turned": np.array([1, 0], np.int64),
    "middle": np.array([2, 3], np.int64),
    "ends": np.array([3, 4], np.int64),
    "last": np.array([-1], np.int64),
    "eight": np.array([8], np.int64),
    "copied": np.array([0, -1, 2, 4], np.int64),
    "weight": random.normal(size=(6, 8)).astype(np.float32),
    "rows_of_weight": random.normal(size=(8, 6)).astype(np.float32),
    "square": random.normal(size=(8, 8)).astype(np.float32),
    "bias": random.normal(size=8).astype(np.float32),
    "by_head": random.normal(size=(2, 4)).astype(np.float32),
    "by_head_of_four": random.normal(size=(1, 1, 2, 4)).astype(np.float32),
    "by_column": random.normal(size=4).astype(np.float32),
}
SIZES = "s = Shape(x) n = Gather(s, first) "
GEMM = "p = Gemm<alpha = 1.0, beta = 0.0, transA = 0, transB = 1>(r, rows_of_weight) "
PARTS = "c = Concat<axis=0>(n, heads, ones) h = Reshape(p, c) q = Squeeze(h, last) "
# As tf2onnx writes einsum("btk,khd->bthd") and ("bhtd,hdk->btk"), and TensorFlow a tensordot.
CUT = f"u = Unsqueeze(x, middle) r = Reshape(u, rows) {SIZES}{GEMM}{PARTS}"
JOINED = (
    "u = Unsqueeze(context, ones) t = Transpose<perm=[0,3,1,2,4]>(u) s = Shape(t) n = Gather(s, first) d = Gather(s, ends) "
    "w = ReduceProd<keepdims=1>(d) g = Concat<axis=0>(last, w) r = Reshape(t, g) "
    "p = Gemm<beta = 0.0>(r, square) c = Concat<axis=0>(n, eight, ones) h = Reshape(p, c) y = Squeeze(h, threes)"
)
DENSE = f"{SIZES}c = Concat<axis=0>(n, eight) r = Reshape(x, rows) p = MatMul(r, weight) y = Reshape(p, c)"

TAKEN: dict[str, tuple[str, dict[str, int]]] = {
    "into heads": (CUT + "y = Identity(q)", {"Identity": 1, "MatMul": 1, "Reshape": 1}),
    "into heads, with a bias": (CUT + "y = Add(q, by_head)", {"Add": 1, "MatMul": 1, "Reshape": 1}),
    "into heads, with a bias of more axes": (
        CUT + "y = Add(by_head_of_four, q)",
        {"Add": 1, "MatMul": 1, "Reshape": 1},
    ),
    "into heads, by a bias that is no projection's": (
        CUT + "y = Add(q, by_column)",
        {"Add": 1, "MatMul": 1, "Reshape": 1},
    ),
    "from heads": (JOINED, {"MatMul": 1, "Reshape": 1, "Transpose": 1}),
    "of one size": (DENSE, {"MatMul": 1}),
    "of one size, by Gemm": (DENSE.replace("MatMul(r", "Gemm(r"), {"MatMul": 1}),
}

OTHERS: dict[str, str] = {
    "rows put apart otherwise": DENSE.replace("c = Concat<axis=0>(n,", "m = Gather(s, turned) c = Concat<axis=0>(m,"),
    "a number of rows that is not known": DENSE.replace("Reshape(p, c)", "Reshape(p, copied)"),
    "rows that stay joined": "r = Reshape(x, rows) y = MatMul(r, weight)",
    "rows that nobody joined": "p = MatMul(x, weight) y = Identity(p)",
    "joined rows that are read, too": DENSE.replace("y =", "z =") + " m = ReduceMax<keepdims=0>(p) y = Add(z, m)",
    "a factor": DENSE.replace("MatMul(r", "Gemm<alpha = 0.5>(r"),
    "a bias of its own": DENSE.replace("MatMul(r, weight)", "Gemm(r, weight, bias)"),
    "two computed values": DENSE.replace("MatMul(r, weight)", "MatMul(r, k)").replace(
        "s = Shape", "k = Neg(weight_) s = Shape"
    ),
}


def model(nodes: str) -> ir.Model:
    words = set(nodes.replace("(", " ").replace(")", " ").replace(",", " ").split())
    kinds = {"x": "float[B,T,6]", "context": "float[B,2,T,4]", "weight_": "float[6,8]"}
    header = ", ".join(f"{kind} {name}" for name, kind in kinds.items() if name in words)
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 24]> g ({header}) => (float y) {{ {nodes} }}'
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    for node in proto.graph.node:
        node.name = node.output[0]
    for name in sorted(words & CONSTANTS.keys()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(CONSTANTS[name], name))
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    passes.RemoveUnusedNodesPass()(graph)
    return graph


def feeds(graph: ir.Model) -> dict[str, np.ndarray]:
    shapes = {"x": (3, 5, 6), "context": (3, 2, 5, 4), "weight_": (6, 8)}
    source = np.random.default_rng(1)
    return {str(v.name): source.normal(size=shapes[str(v.name)]).astype(np.float32) for v in graph.graph.inputs}


@pytest.mark.parametrize("name", TAKEN)
def test_a_projection_takes_one_form_and_says_the_same(name: str) -> None:
    nodes, left = TAKEN[name]
    before, graph = run(model(nodes), feeds(model(nodes)))[0], model(nodes)
    report = fuse(graph)
    assert (report.operator, report.fused, report.refused) == ("Projection", 1, [])
    assert count(graph) == left
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    np.testing.assert_allclose(run(graph, feeds(graph))[0], before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_none_stays(name: str) -> None:
    graph = model(OTHERS[name])
    before, untouched = run(graph, feeds(graph))[0], count(graph)
    report = fuse(graph)
    assert (report.fused, report.refused) == (0, [])
    assert count(graph) == untouched
    np.testing.assert_array_equal(run(graph, feeds(graph))[0], before)


def test_a_weight_is_stored_transposed_once() -> None:
    graph = model(CUT + "y = Add(q, by_head)")
    fuse(graph)
    assert {name for name in graph.graph.initializers if "weight" in name} == {"rows_of_weight.T"}
