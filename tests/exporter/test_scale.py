"""Scaled queries: the factor joins Attention's own scale, or stays with a reason."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.exporter.plain_engine import run
from txopt.exporter.fusion.scale import fuse
from txopt.exporter.graph import count

CONSTANTS = {"number": 0.4, "minus": -0.4, "zero": 0.0}
GENERATOR = np.random.default_rng(0)
FEEDS = {name: GENERATOR.normal(size=(2, 3, 5, 4)).astype(np.float32) for name in ("x", "k", "v")}

ATTENTION = "y = Attention<scale = 0.25>(q, k, v)"

# nodes that lead to Attention, and the scale that it must have afterwards
SPELLINGS: dict[str, tuple[str, float]] = {
    "multiplied": (f"q = Mul(x, number) {ATTENTION}", 0.1),
    "the number first": (f"q = Mul(number, x) {ATTENTION}", 0.1),
    "divided": (f"q = Div(x, number) {ATTENTION}", 0.625),
    "without a scale of its own": ("q = Mul(x, number) y = Attention(q, k, v)", 0.2),
    "cut and turned on the way": (
        f"t = Transpose<perm = [0, 2, 1, 3]>(x) s = Mul(t, number) q = Transpose<perm = [0, 2, 1, 3]>(s) {ATTENTION}",
        0.1,
    ),
}

NEAR_MISSES: dict[str, tuple[str, list[str]]] = {
    "a negative factor": (f"q = Mul(x, minus) {ATTENTION}", ["scale_0: the factor is no positive constant"]),
    "no factor at all": (f"q = Mul(x, zero) {ATTENTION}", ["scale_0: the factor is no positive constant"]),
    "a number divided by the queries": (
        f"q = Div(number, x) {ATTENTION}",
        ["scale_0: the factor is no positive constant"],
    ),
    "read elsewhere": (
        "q = Mul(x, number) a = Attention<scale = 0.25>(q, k, v) y = Add(a, q)",
        ["scale_0: something else reads the scaled queries too"],
    ),
    "two values multiplied": (f"q = Mul(x, k) {ATTENTION}", []),
    "keys scaled": ("q = Mul(k, number) y = Attention<scale = 0.25>(x, q, v)", []),
    "added in between": (f"s = Mul(x, number) q = Add(s, k) {ATTENTION}", []),
}


def model(nodes: str) -> ir.Model:
    inputs = ", ".join(f"float[2,3,5,4] {name}" for name in FEEDS)
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 24]> g ({inputs}) => (float[2,3,5,4] y) {{ {nodes} }}'
    )
    for index, node in enumerate(proto.graph.node):
        node.name = f"scale_{index}"
    used = {name for node in proto.graph.node for name in node.input}
    for name in sorted(used & CONSTANTS.keys()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(CONSTANTS[name], np.float32), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_factor_joins_the_scale(name: str) -> None:
    nodes, scale = SPELLINGS[name]
    before, graph = run(model(nodes), FEEDS)[0], model(nodes)
    report = fuse(graph)
    assert (report.fused, report.refused) == (1, [])
    assert not {"Mul", "Div"} & count(graph).keys()
    (attention,) = (node for node in graph.graph if node.op_type == "Attention")
    assert attention.attributes["scale"].as_float() == pytest.approx(scale)
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    np.testing.assert_allclose(run(graph, FEEDS)[0], before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone(name: str) -> None:
    nodes, reasons = NEAR_MISSES[name]
    graph = model(nodes)
    untouched = ir.to_proto(graph).SerializeToString(deterministic=True)
    report = fuse(graph)
    assert (report.fused, report.refused) == (0, reasons)
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == untouched
