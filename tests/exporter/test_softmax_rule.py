"""A softmax written out by exponentials: what fuses, what must not and why, and that the numbers stay."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.exporter.plain_engine import run
from txopt.exporter.fusion import softmax
from txopt.exporter.fusion.proof import prove
from txopt.exporter.graph import count

X = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32) * 5
CONSTANTS = {
    "last": np.array([-1]),
    "middle": np.array([1]),
    "both": np.array([1, 2]),
    "one": np.array(1, np.float32),
    "two": np.array(2, np.float32),
    "sink": np.linspace(1, 2, 3, dtype=np.float32).reshape(3, 1),
    "keep": np.array([1, 1, 0, 1, 1, 1, 1, 1], np.float32),
    "values": np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8),
}

E = "m = ReduceMax(x, last) d = Sub(x, m) e = Exp(d) "
SUM = E + "s = ReduceSum(e, last) "

SPELLINGS: dict[str, tuple[int, str, str]] = {
    "the largest subtracted": (-1, "x", SUM + "y = Div(e, s)"),
    "along another axis": (-2, "x", (SUM + "y = Div(e, s)").replace("last", "middle")),
    "the largest of several axes": (-1, "x", (SUM + "y = Div(e, s)").replace("(x, last)", "(x, both)")),
    "nothing subtracted": (-1, "x", "e = Exp(x) s = ReduceSum(e, last) y = Div(e, s)"),
    "something else subtracted": (-1, "d", (SUM + "y = Div(e, s)").replace("ReduceMax", "ReduceMean")),
    "another value's largest": (-1, "d", "n = Neg(x) " + (SUM + "y = Div(e, s)").replace("(x, last)", "(n, last)")),
    "the largest along another axis": (-1, "d", (SUM + "y = Div(e, s)").replace("(x, last)", "(x, middle)")),
    "by the reciprocal": (-1, "x", SUM + "r = Reciprocal(s) y = Mul(e, r)"),
    "by the reciprocal, from the left": (-1, "x", SUM + "r = Reciprocal(s) y = Mul(r, e)"),
    "one over the sum": (-1, "x", SUM + "r = Div(one, s) y = Mul(e, r)"),
}

NEAR_MISSES: dict[str, tuple[str, str]] = {
    "one added to the sum": (SUM + "t = Add(s, one) y = Div(e, t)", "head/Add_4 adds to the sum of exponentials (a sink"),
    "a sink added to the sum": (SUM + "t = Add(sink, s) y = Div(e, t)", "adds to the sum of exponentials"),
    "a floor under the sum": (SUM + "t = Max(s, one) y = Div(e, t)", "head/Max_4 changes the sum of exponentials"),
    "masked after the exponential": (
        E + "k = Mul(e, keep) s = ReduceSum(k, last) y = Div(k, s)",
        "head/Mul_3 changes the exponentials before they are summed",
    ),
    "masked in the sum alone": (
        E + "k = Mul(e, keep) s = ReduceSum(k, last) y = Div(e, s)",
        "head/Mul_3 changes the exponentials before they are summed",
    ),
    "another value divided": (SUM + "y = Div(x, s)", "head/Div_4 divides something else than the exponentials"),
    "the product with values divided": (
        SUM + "o = MatMul(e, values) y = Div(o, s)",
        "head/Div_5 divides something else than the exponentials",
    ),
    "two axes": (SUM.replace("(e, last)", "(e, both)") + "y = Div(e, s)", "the sum is over axes [-2, -1], expected one"),
    "exponentials read elsewhere": (SUM + "p = Div(e, s) y = Add(p, e)", "something else reads e"),
    "the sum read elsewhere": (SUM + "p = Div(e, s) y = Add(p, s)", "something else reads s"),
    "a factor": (SUM + "r = Div(two, s) y = Mul(e, r)", "head/Div_4 divides something else than the exponentials"),
}  # fmt: skip

OTHERS = {
    "a sum of exponentials": E + "s = ReduceSum(e, last) y = Mul(x, s)",
    "a logarithm of one": "e = Exp(x) s = ReduceSum(e, last) l = Log(s) y = Sub(x, l)",
    "a weighted mean": "s = ReduceSum(x, last) y = Div(x, s)",
}


def model(nodes: str) -> ir.Model:
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 24]> head (float[B,3,8] x) => (float[B,3,8] y) {{ {nodes} }}'
    )
    for index, node in enumerate(proto.graph.node):
        node.name = f"head/{node.op_type}_{index}"
    used = {name for node in proto.graph.node for name in node.input}
    for name in sorted(used & CONSTANTS.keys()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(CONSTANTS[name], name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_softmax_by_hand_fuses_and_says_the_same(name: str) -> None:
    axis, source, nodes = SPELLINGS[name]
    before, graph = run(model(nodes), {"x": X})[0], model(nodes)
    report = prove(softmax.fuse, graph, [{"x": X}])
    assert (report.operator, report.fused, report.refused) == ("Softmax", 1, [])
    assert report.proof is not None
    assert report.proof.held == 1
    (node,) = (node for node in graph.graph if node.op_type == "Softmax")
    assert node.attributes["axis"].as_int() == axis
    assert node.inputs[0] is not None
    assert node.inputs[0].name == source
    assert not {"Exp", "ReduceSum", "Div", "Reciprocal"} & count(graph).keys()
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    np.testing.assert_allclose(run(graph, {"x": X})[0], before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone_and_says_why(name: str) -> None:
    nodes, reason = NEAR_MISSES[name]
    graph = model(nodes)
    untouched = ir.to_proto(graph).SerializeToString(deterministic=True)
    report = softmax.fuse(graph)
    assert report.fused == 0
    (refusal,) = report.refused
    assert refusal.startswith("head/ReduceSum")
    assert reason in refusal
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == untouched


@pytest.mark.parametrize("name", OTHERS)
def test_something_else_is_no_candidate(name: str) -> None:
    report = softmax.fuse(model(OTHERS[name]))
    assert (report.fused, report.refused) == (0, [])
