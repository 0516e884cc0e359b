"""Written-out GELUs: every spelling that fuses, what must not and why, and that the numbers stay."""

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.exporter.plain_engine import run
from txopt.exporter.fusion.gelu import fuse
from txopt.exporter.graph import count

X = np.linspace(-4, 4, 24, dtype=np.float32).reshape(3, 8)

CONSTANTS = {
    "one": 1.0,
    "two": 2.0,
    "three": 3.0,
    "half": 0.5,
    "other_half": 0.51,
    "cubic": 0.044715,
    "root_two": math.sqrt(2),
    "inverse_root_two": math.sqrt(0.5),
    "scale": math.sqrt(2 / math.pi),
    "other_scale": 0.8,
}

# nodes, line by line, from x to y; "t" is always the Erf or Tanh
SPELLINGS: dict[str, tuple[str, str]] = {
    "erf, halved first": ("none", "a = Div(x, root_two) t = Erf(a) s = Add(t, one) h = Mul(x, half) y = Mul(h, s)"),
    "erf, halved last": (
        "none",
        "a = Mul(inverse_root_two, x) t = Erf(a) s = Add(one, t) p = Mul(x, s) y = Mul(half, p)",
    ),
    "erf, sum halved": ("none", "a = Div(x, root_two) t = Erf(a) s = Add(t, one) h = Mul(s, half) y = Mul(x, h)"),
    "erf, divided by two": ("none", "a = Div(x, root_two) t = Erf(a) s = Add(t, one) p = Mul(x, s) y = Div(p, two)"),
    "tanh, as transformers writes it": (
        "tanh",
        "h = Mul(x, half) c = Pow(x, three) d = Mul(c, cubic) u = Add(x, d) v = Mul(u, scale) t = Tanh(v) s = Add(t, one) "
        "y = Mul(h, s)",
    ),
    "tanh, the cube as products": (
        "tanh",
        "q = Mul(x, x) c = Mul(q, x) d = Mul(cubic, c) u = Add(d, x) v = Mul(scale, u) t = Tanh(v) s = Add(one, t) "
        "p = Mul(s, x) y = Mul(p, half)",
    ),
    "tanh, the constant inside the cube": (
        "tanh",
        "q = Mul(cubic, x) r = Mul(q, x) c = Mul(r, x) u = Add(x, c) v = Mul(u, scale) t = Tanh(v) s = Add(t, one) "
        "h = Mul(half, s) y = Mul(x, h)",
    ),
}

ERF = "a = Div(x, root_two) t = Erf(a) s = Add(t, one) "
TANH = "c = Pow(x, three) d = Mul(c, cubic) u = Add(x, d) v = Mul(u, scale) t = Tanh(v) s = Add(t, one) "

# nodes that are almost a GELU, and the reason that must be given
NEAR_MISSES: dict[str, tuple[str, str]] = {
    "another half": (ERF + "h = Mul(x, other_half) y = Mul(h, s)", "not x/2 times the sum"),
    "another scale": (TANH.replace("scale", "other_scale") + "h = Mul(x, half) y = Mul(h, s)", "Tanh is taken of"),
    "a square for the cube": (TANH.replace("three", "two") + "h = Mul(x, half) y = Mul(h, s)", "Tanh is taken of"),
    "erf of x itself": ("t = Erf(x) s = Add(t, one) h = Mul(x, half) y = Mul(h, s)", "Erf is taken of"),
    "another value halved": (ERF + "n = Neg(x) h = Mul(n, half) y = Mul(h, s)", "not x/2 times the sum"),
    "the sum read elsewhere": (ERF + "h = Mul(x, half) g = Mul(h, s) y = Add(g, s)", "not x/2 times the sum"),
    "a gate inside": (ERF + "n = Neg(x) g = Mul(n, s) h = Mul(x, half) y = Mul(h, g)", "something else is multiplied"),
}


def model(nodes: str, dtype: str = "float") -> ir.Model:
    kinds = {"float": np.float32, "float16": np.float16}
    text = f'<ir_version: 10, opset_import: ["" : 24]> gelu ({dtype}[B,8] x) => ({dtype}[B,8] y) {{ {nodes} }}'
    proto = onnx.parser.parse_model(text)
    for index, node in enumerate(proto.graph.node):
        node.name = f"act/{node.op_type}_{index}"
    used = {name for node in proto.graph.node for name in node.input}
    for name in sorted(used & CONSTANTS.keys()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(CONSTANTS[name], kinds[dtype]), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_gelu_fuses_and_says_the_same(name: str) -> None:
    approximate, nodes = SPELLINGS[name]
    before = run(model(nodes), {"x": X})[0]
    graph = model(nodes)
    report = fuse(graph)
    assert (report.fused, report.refused) == (1, [])
    assert count(graph) == {"Gelu": 1}
    (node,) = graph.graph
    assert node.attributes["approximate"].as_string() == approximate
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    np.testing.assert_allclose(run(graph, {"x": X})[0], before, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", SPELLINGS)
def test_constants_that_float16_rounded_are_known(name: str) -> None:
    graph = model(SPELLINGS[name][1], "float16")
    assert fuse(graph).fused == 1
    before = run(model(SPELLINGS[name][1], "float16"), {"x": X.astype(np.float16)})[0]
    np.testing.assert_allclose(run(graph, {"x": X.astype(np.float16)})[0], before, rtol=0, atol=8e-3)


def test_a_gate_outside_stays() -> None:
    graph = model(ERF + "h = Mul(x, half) g = Mul(h, s) n = Neg(x) y = Mul(g, n)")
    assert fuse(graph).fused == 1
    assert count(graph) == {"Gelu": 1, "Mul": 1, "Neg": 1}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone_and_says_why(name: str) -> None:
    nodes, reason = NEAR_MISSES[name]
    graph = model(nodes)
    untouched = ir.to_proto(graph).SerializeToString(deterministic=True)
    report = fuse(graph)
    assert report.fused == 0
    assert len(report.refused) == 1
    assert report.refused[0].startswith(("act/Erf", "act/Tanh"))
    assert reason in report.refused[0]
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == untouched


def test_a_tanh_without_a_one_is_no_gelu_and_no_refusal() -> None:
    report = fuse(model("t = Tanh(x) y = Mul(t, x)"))
    assert (report.fused, report.refused) == (0, [])
