"""Reductions in one form: axes that were dropped and put back, sums over a length, axes by their number; and what stays as it is."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.exporter.plain_engine import run
from txopt.exporter.fusion import reductions
from txopt.exporter.fusion.norm_path import drops_axes
from txopt.exporter.fusion.proof import prove
from txopt.exporter.graph import count

X = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32) * 5
CONSTANTS = {
    "last": np.array([-1]),
    "third": np.array([2]),
    "second": np.array([1]),
    "both": np.array([1, 2]),
    "kept": np.array([0, 3, 1]),
    "wrongly": np.array([-1, 1, 8]),
    "wider": np.array([0, 3, 8]),
    "eight": np.array(8, np.float32),
    "eighth": np.array(0.125, np.float32),
    "seven": np.array(7, np.float32),
    "of_both": np.array(24, np.float32),
}
SPREAD = " y = Sub(x, m)"

SPELLINGS: dict[str, tuple[str, str]] = {
    "unsqueezed": ("ReduceMean", "d = ReduceMean<keepdims=0>(x, last) m = Unsqueeze(d, last)" + SPREAD),
    "unsqueezed elsewhere": ("ReduceMax", "d = ReduceMax<keepdims=0>(x, second) m = Unsqueeze(d, second)" + SPREAD),
    "reshaped": ("ReduceSum", "d = ReduceSum<keepdims=0>(x, third) m = Reshape(d, kept)" + SPREAD),
    "reshaped and expanded to its own shape": (
        "ReduceMean",
        "d = ReduceMean<keepdims=0>(x, third) u = Unsqueeze(d, last) b = Shape<end=2>(x) o = Constant<value_ints=[1]>() "
        "c = Concat<axis=0>(b, o) m = Expand(u, c)" + SPREAD,
    ),
    "a sum divided by the length": ("ReduceMean", "s = ReduceSum(x, third) m = Div(s, eight)" + SPREAD),
    "a sum by one over the length": ("ReduceMean", "s = ReduceSum(x, last) m = Mul(eighth, s)" + SPREAD),
    "a sum over two axes": ("ReduceMean", "s = ReduceSum(x, both) m = Div(s, of_both)" + SPREAD),
    "a sum that was unsqueezed": (
        "ReduceMean",
        "s = ReduceSum<keepdims=0>(x, last) u = Unsqueeze(s, last) m = Div(u, eight)" + SPREAD,
    ),
    "a pool": ("ReduceMean", "m = GlobalAveragePool(x)" + SPREAD),
    "a sum without its axis": (
        "ReduceMean",
        "s = ReduceSum<keepdims=0>(x, last) d = Div(s, eight) m = Reshape(d, kept)" + SPREAD,
    ),
}

OTHERS: dict[str, str] = {
    "divided by less": "s = ReduceSum(x, last) m = Div(s, seven)" + SPREAD,
    "the length divided": "s = ReduceSum(x, last) m = Div(eight, s)" + SPREAD,
    "read before it is put back": "d = ReduceMean<keepdims=0>(x, last) n = Neg(d) a = Add(d, n) m = Unsqueeze(a, last)"
    + SPREAD,
    "repeated": "m = ReduceMean(x, last) u = Expand(m, wider) y = Sub(x, u)",
    "put elsewhere": "d = ReduceMean<keepdims=0>(x, second) m = Reshape(d, wrongly)" + SPREAD,
    "a pool of an image": "u = Unsqueeze(x, last) p = GlobalAveragePool(u) m = Squeeze(p, last)" + SPREAD,
    "as it should be": "m = ReduceMean(x, last)" + SPREAD,
}


def model(nodes: str) -> ir.Model:
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 24]> norm (float[B,3,8] x) => (float[B,3,8] y) {{ {nodes} }}'
    )
    for index, node in enumerate(proto.graph.node):
        node.name = f"norm/{node.op_type}_{index}"
    used = {name for node in proto.graph.node for name in node.input}
    for name in sorted(used & CONSTANTS.keys()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(CONSTANTS[name], name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_reduction_takes_one_form_and_says_the_same(name: str) -> None:
    operator, nodes = SPELLINGS[name]
    before, graph = run(model(nodes), {"x": X})[0], model(nodes)
    report = prove(reductions.fuse, graph, [{"x": X}])
    assert report.fused > 0
    assert report.refused == []
    assert report.proof is not None
    assert report.proof.held == report.fused
    assert count(graph) == {operator: 1, "Sub": 1}
    (node,) = (node for node in graph.graph if node.op_type == operator)
    assert not drops_axes(node)
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    np.testing.assert_allclose(run(graph, {"x": X})[0], before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_none_stays(name: str) -> None:
    graph = model(OTHERS[name])
    before = count(graph)
    report = reductions.fuse(graph)
    assert (report.fused, report.refused) == (0, [])
    assert count(graph) == before


def test_means_over_one_axis_are_one() -> None:
    graph = model(
        "a = ReduceMean<keepdims=1>(x, last) b = ReduceMean<noop_with_empty_axes=0>(x, third) d = Sub(x, a) e = Sub(x, b) "
        "y = Mul(d, e)"
    )
    assert reductions.fuse(graph).fused == 0
    assert count(graph) == {"ReduceMean": 1, "Sub": 1, "Mul": 1}
