"""Logarithms of a softmax, and rankings of one: what fuses, what must not and why, and that the numbers stay."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.exporter.plain_engine import run
from txopt.exporter.fusion import log_softmax, ranking
from txopt.exporter.fusion.proof import prove
from txopt.exporter.graph import count

X = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32) * 5
CONSTANTS = {
    "last": np.array([-1]),
    "middle": np.array([1]),
    "both": np.array([1, 2]),
    "three": np.array([3]),
    "small": np.array(1e-6, np.float32),
    "least": np.array(-1e9, np.float32),
    "infinite": np.array(-np.inf, np.float32),
    "zero": np.array(0, np.float32),
}

SPELLINGS: dict[str, tuple[int, str]] = {
    "of a softmax": (-1, "p = Softmax<axis=-1>(x) y = Log(p)"),
    "of a softmax without an axis": (-1, "p = Softmax(x) y = Log(p)"),
    "of a softmax along another axis": (1, "p = Softmax<axis=1>(x) y = Log(p)"),
    "of a softmax masked by minus infinity": (
        -1,
        "m = Less(x, zero) s = Where(m, infinite, x) p = Softmax<axis=-1>(s) y = Log(p)",
    ),
    "less log-sum-exp": (-1, "l = ReduceLogSumExp(x, last) y = Sub(x, l)"),
    "less log-sum-exp along another axis": (-2, "l = ReduceLogSumExp(x, middle) y = Sub(x, l)"),
    "less log of sum of exp": (-1, "e = Exp(x) s = ReduceSum(e, last) l = Log(s) y = Sub(x, l)"),
}

NEAR_MISSES: dict[str, tuple[str, str]] = {
    "a number added": ("p = Softmax<axis=-1>(x) q = Add(p, small) y = Log(q)", "a number is added before"),
    "probabilities read": ("p = Softmax<axis=-1>(x) l = Log(p) y = Mul(p, l)", "something else reads p"),
    "masked by a number": (
        "m = Less(x, zero) s = Where(m, least, x) p = Softmax<axis=-1>(s) y = Log(p)",
        "masks by a finite number",
    ),
    "two axes": ("l = ReduceLogSumExp(x, both) y = Sub(x, l)", "over axes [-2, -1]"),
    "exponentials read": ("e = Exp(x) s = ReduceSum(e, last) l = Log(s) d = Sub(x, l) y = Add(d, e)", "reads e"),
}

OTHERS = {
    "a log of a sum": "s = ReduceSum(x, last) l = Log(s) y = Sub(x, l)",
    "the sum alone": "l = ReduceLogSumExp(x, last) y = Sub(l, x)",
    "a softmax alone": "y = Softmax<axis=-1>(x)",
}


def model(nodes: str, outputs: str = "float[B,Q,8] y", dtype: str = "float") -> ir.Model:
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 24]> head ({dtype}[B,Q,8] x) => ({outputs}) {{ {nodes} }}'
    )
    for index, node in enumerate(proto.graph.node):
        node.name = f"head/{node.op_type}_{index}"
    used = {name for node in proto.graph.node for name in node.input}
    for name in sorted(used & CONSTANTS.keys()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(CONSTANTS[name], name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_logarithm_of_a_softmax_fuses_and_says_the_same(name: str) -> None:
    axis, nodes = SPELLINGS[name]
    before, graph = run(model(nodes), {"x": X})[0], model(nodes)
    report = prove(log_softmax.fuse, graph, [{"x": X}])
    assert (report.fused, report.refused) == (1, [])
    assert report.proof is not None
    assert report.proof.held == 1
    (node,) = (node for node in graph.graph if node.op_type == "LogSoftmax")
    assert node.attributes["axis"].as_int() == axis
    assert not {"Log", "Sub", "Softmax", "ReduceSum"} & count(graph).keys()
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    np.testing.assert_allclose(run(graph, {"x": X})[0], before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone_and_says_why(name: str) -> None:
    nodes, reason = NEAR_MISSES[name]
    graph = model(nodes)
    untouched = ir.to_proto(graph).SerializeToString(deterministic=True)
    report = log_softmax.fuse(graph)
    assert report.fused == 0
    (refusal,) = report.refused
    assert refusal.startswith("head/")
    assert reason in refusal
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == untouched


@pytest.mark.parametrize("name", OTHERS)
def test_something_else_is_no_candidate(name: str) -> None:
    report = log_softmax.fuse(model(OTHERS[name], "float y" if name == "the sum alone" else "float[B,Q,8] y"))
    assert (report.fused, report.refused) == (0, [])


INDICES = "int64[B,Q,N] y"
RANKINGS: dict[str, tuple[str, str]] = {
    "the best": ("p = Softmax<axis=-1>(x) y = ArgMax<axis=2,keepdims=1>(p)", INDICES),
    "the best by logarithm": ("p = LogSoftmax<axis=1>(x) y = ArgMax<axis=1,keepdims=1>(p)", INDICES),
    "the best three": ("p = Softmax<axis=-1>(x) v, y = TopK(p, three)", INDICES),
}
NO_RANKINGS: dict[str, tuple[str, str, str]] = {
    "another axis": ("p = Softmax<axis=-1>(x) y = ArgMax<axis=1,keepdims=1>(p)", "float", "it ranks along axis 1"),
    "the smallest": ("p = Softmax<axis=-1>(x) v, y = TopK<largest=0>(p, three)", "float", "the smallest"),
    "float16": ("p = Softmax<axis=-1>(x) y = ArgMax<axis=2,keepdims=1>(p)", "float16", "in this dtype"),
}


@pytest.mark.parametrize("name", RANKINGS)
def test_a_ranking_needs_no_probabilities(name: str) -> None:
    nodes, outputs = RANKINGS[name]
    before, graph = run(model(nodes, outputs), {"x": X})[0], model(nodes, outputs)
    report = prove(ranking.fuse, graph, [{"x": X}])
    assert (report.fused, report.refused) == (1, [])
    assert report.proof is not None
    assert report.proof.held == 1
    assert len(graph.graph) == 1
    np.testing.assert_array_equal(run(graph, {"x": X})[0], before)


@pytest.mark.parametrize("name", NO_RANKINGS)
def test_a_ranking_that_could_differ_is_left_alone_and_says_why(name: str) -> None:
    nodes, dtype, reason = NO_RANKINGS[name]
    graph = model(nodes, INDICES, dtype)
    report = ranking.fuse(graph)
    assert report.fused == 0
    (refusal,) = report.refused
    assert refusal.startswith("head/")
    assert reason in refusal
    assert len(graph.graph) == 2


def test_probabilities_that_are_read_stay() -> None:
    for nodes, outputs in (
        ("p = Softmax<axis=-1>(x) y = ArgMax<axis=2>(p)", "int64[B,Q,1] y, float[B,Q,8] p"),
        ("p = Softmax<axis=-1>(x) v, y = TopK(p, three)", f"{INDICES}, float[B,Q,3] v"),
    ):
        report = ranking.fuse(model(nodes, outputs))
        assert (report.fused, report.refused) == (0, [])
