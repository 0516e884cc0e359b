"""Decomposed layer norms: every spelling that fuses, what must not and why, and that the numbers stay."""

import math
import re
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.version_converter import convert_version
from onnx_ir.passes import common as passes

from tests.exporter.plain_engine import run
from txopt.exporter.fusion.layer_norm import fuse
from txopt.exporter.graph import count

X = np.random.default_rng(0).normal(size=(2, 3, 8)) * 3 + 1
EPSILON = 0.01

CONSTANTS = {
    "one": np.array(1.0),
    "two": np.array(2.0),
    "three": np.array(3.0),
    "two64": np.array(2.0),
    "epsilon64": np.array(EPSILON),
    "half": np.array(0.5),
    "seven": np.array(7.0),
    "eight": np.array(8.0),
    "minus_half": np.array(-0.5),
    "epsilon": np.array(EPSILON),
    "negative": np.array(-EPSILON),
    "weight": np.linspace(0.5, 2, 8),
    "bias": np.linspace(-1, 1, 8),
    "weight_of_three": np.linspace(0.5, 2, 8).reshape(1, 1, 8),
    "bias_of_three": np.linspace(-1, 1, 8).reshape(1, 1, 8),
    "of_four": np.linspace(0.5, 2, 8).reshape(1, 1, 1, 8),
    "short": np.array([2.0]),
    "plane": np.linspace(0.5, 2, 24).reshape(3, 8),
}
AXES = {"last": [-1], "third": [2], "second": [1], "both": [1, 2], "outer": [0, 2]}

MEANS = "m = ReduceMean(x, last) d = Sub(x, m) "
MOMENTS = MEANS + "q = Pow(x, two) p = ReduceMean(q, last) o = Pow(m, two) v = Sub(p, o) "
VARIANCE = MEANS + "q = Pow(d, two) v = ReduceMean(q, last) e = Add(v, epsilon) "
ROOT = VARIANCE + "r = Sqrt(e) "
END = "z = Mul(n, weight) y = Add(z, bias)"

KERAS = "o = Neg(m) i = Reciprocal(r) s = Mul(i, weight) a = Mul(x, s) b = Mul(o, s) c = Add(b, bias) y = Add(a, c)"

# nodes from x to y
SPELLINGS: dict[str, str] = {
    "as torch writes it": ROOT + "n = Div(d, r) " + END,
    "sides exchanged": VARIANCE.replace("(v, epsilon)", "(epsilon, v)")
    + "r = Sqrt(e) n = Div(d, r) z = Mul(weight, n) y = Add(bias, z)",
    "squared by itself": ROOT.replace("Pow(d, two)", "Mul(d, d)") + "n = Div(d, r) " + END,
    "by the reciprocal": ROOT + "i = Reciprocal(r) n = Mul(d, i) " + END,
    "one over the root": ROOT + "i = Div(one, r) n = Mul(i, d) " + END,
    "a power of one half": VARIANCE + "r = Pow(e, half) n = Div(d, r) " + END,
    "a power of minus one half": VARIANCE + "i = Pow(e, minus_half) n = Mul(d, i) " + END,
    "the weight on the inverse": ROOT + "i = Reciprocal(r) s = Mul(i, weight) z = Mul(d, s) y = Add(z, bias)",
    "the weight on the differences": ROOT + "w = Mul(weight, d) z = Div(w, r) y = Add(z, bias)",
    "both on the inverse at once": ROOT + "i = Reciprocal(r) w = Mul(weight, d) z = Mul(w, i) y = Add(z, bias)",
    "subtracted twice": ROOT + "f = Sub(x, m) n = Div(f, r) " + END,
    "as TensorFlow writes it": ROOT
    + "i = Reciprocal(r) s = Mul(i, weight) a = Mul(x, s) b = Mul(m, s) c = Sub(bias, b) y = Add(a, c)",
    "as Keras writes it": ROOT + KERAS,
    "as Keras writes it, in any order": ROOT
    + "o = Neg(m) i = Reciprocal(r) s = Mul(weight, i) a = Mul(s, x) b = Mul(s, o) c = Add(bias, b) y = Add(c, a)",
    "weights with ones before them": ROOT + KERAS.replace("weight", "weight_of_three").replace("bias", "bias_of_three"),
    "weights with ones, behind the division": ROOT
    + "n = Div(d, r) z = Mul(n, weight_of_three) y = Add(z, bias_of_three)",
    "axes from the front": ROOT.replace("last", "third") + "n = Div(d, r) " + END,
}

WITHOUT_BIAS = ROOT + "n = Div(d, r) y = Mul(n, weight)"
NORMAL = SPELLINGS["as torch writes it"]

# nodes that are almost a norm, and the reason that must be given
NEAR_MISSES: dict[str, tuple[str, str]] = {
    "a cube": (NORMAL.replace("two", "three"), "the exponent is 3.0, not 2"),
    "means over another axis": (NORMAL.replace("last", "second"), "the means are over axes [-2] and [-2]"),
    "means over two axes apart": (NORMAL.replace("last", "outer"), "the means are over axes [-3, -1]"),
    "means over different axes": (NORMAL.replace("(q, last)", "(q, second)"), "over axes [-1] and [-2]"),
    "axes from outside": (NORMAL.replace("last", "given"), "over axes None and None"),
    "another value's mean": ("o = Neg(x) " + NORMAL.replace("(x, last)", "(o, last)"), "another value's"),
    "no epsilon": (NORMAL.replace("e = Add(v, epsilon) ", "").replace("Sqrt(e)", "Sqrt(v)"), "no constant epsilon"),
    "a negative epsilon": (NORMAL.replace("epsilon", "negative"), "no constant epsilon"),
    "epsilon behind the root": (
        MEANS + "q = Mul(d, d) v = ReduceMean(q, last) r = Sqrt(v) e = Add(r, epsilon) n = Div(d, e) " + END,
        "no constant epsilon",
    ),
    "a variance over one fewer": (
        NORMAL.replace("e = Add(v,", "t = Mul(v, eight) u = Div(t, seven) e = Add(u,"),
        "the variance is multiplied by 1.14286, as by torch's x.var() of 8",
    ),
    "a deviation over one fewer": (
        MEANS
        + "q = Mul(d, d) v = ReduceMean(q, last) t = Mul(v, eight) u = Div(t, seven) r = Sqrt(u) e = Add(r, epsilon) "
        "n = Div(d, e) " + END,
        "the variance is multiplied by 1.14286, as by torch's x.var() of 8",
    ),
    "a variance that is scaled": (NORMAL.replace("e = Add(v,", "t = Mul(v, half) e = Add(t,"), "is multiplied by 0.5"),
    "a variance by moments": (
        MOMENTS + "e = Add(v, epsilon) r = Sqrt(e) n = Div(d, r) " + END,
        "block/Sub_5 takes the mean's square off the mean of squares, which cancels where the mean is large",
    ),
    "a variance by moments that is kept from below zero, epsilon behind the root": (
        MOMENTS.replace("Pow(x, two)", "Mul(x, x)").replace("Pow(m, two)", "Mul(m, m)")
        + "c = Relu(v) r = Sqrt(c) e = Add(r, epsilon) n = Div(d, e) "
        + END,
        "block/Sub_5 takes the mean's square off the mean of squares",
    ),
    "no root": (VARIANCE + "n = Div(d, e) " + END, "not used as a root alone"),
    "divided the other way": (ROOT + "n = Div(r, d) " + END, "not divided by alone"),
    "another value divided": (ROOT + "n = Div(x, r) " + END, "not the one that is divided"),
    "no weight": (ROOT + "y = Div(d, r)", "no constant weight"),
    "a weight for one": (WITHOUT_BIAS.replace("weight", "short"), "something else is multiplied"),
    "a weight of more axes": (WITHOUT_BIAS.replace("weight", "plane"), "plane has shape [3, 8]"),
    "a weight that adds an axis": (WITHOUT_BIAS.replace("weight", "of_four"), "of_four adds axes"),
    "another mean scaled": (
        ROOT + KERAS.replace("o = Neg(m)", "u = ReduceMax(x, last) o = Neg(u)"),
        "is not what is added",
    ),
    "the mean scaled otherwise": (ROOT + KERAS.replace("b = Mul(o, s)", "b = Mul(o, i)"), "no constant weight vector"),
    "the mean added": (ROOT + KERAS.replace("o = Neg(m)", "o = Identity(m)"), "is not what is added"),
    "the scaled mean read elsewhere": (ROOT + KERAS.replace("y =", "k =") + " y = Add(k, b)", "is not what is added"),
    "a factor": (ROOT + "n = Div(d, r) h = Mul(n, half) " + END.replace("(n,", "(h,"), "something else is multiplied"),
    "the mean read elsewhere": (NORMAL.replace("y =", "k =") + " y = Add(k, m)", "something else reads m"),
    "the differences read elsewhere": (NORMAL.replace("y =", "k =") + " y = Add(k, d)", "something else reads d"),
    "the root read elsewhere": (NORMAL.replace("y =", "k =") + " y = Add(k, r)", "not divided by alone"),
}


def model(nodes: str, dtype: str = "float", shape: str = "B,3,8") -> ir.Model:
    kinds = {"float": np.float32, "float16": np.float16, "double": np.float64}
    given = ", int64[1] given" if "given" in nodes else ""
    signature = f"norm ({dtype}[{shape}] x{given}) => ({dtype}[{shape}] y)"
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 24]> {signature} {{ {nodes} }}')
    for index, node in enumerate(proto.graph.node):
        node.name = f"block/{node.op_type}_{index}"
    # What is computed in float32 inside float16 has its constants in float32 as well.
    wide = np.float32 if "Cast" in nodes else kinds[dtype]
    used = {name for node in proto.graph.node for name in node.input}
    for name in sorted(used & (CONSTANTS.keys() | AXES.keys())):
        of_result = name.startswith(("weight", "bias"))
        array = (
            np.array(AXES[name])
            if name in AXES
            else CONSTANTS[name].astype(np.float64 if name.endswith("64") else kinds[dtype] if of_result else wide)
        )
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def by_formula(
    x: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]",
) -> "np.ndarray[tuple[int, ...], np.dtype[np.float64]]":
    d = x - x.mean(-1, keepdims=True)
    normal = d / np.sqrt((d**2).mean(-1, keepdims=True) + EPSILON)
    return np.asarray(normal * CONSTANTS["weight"] + CONSTANTS["bias"])


def test_norms_of_one_scope_have_names_of_their_own() -> None:
    """ONNX Runtime opens no graph that has a name twice."""
    first, second = NORMAL.replace(" y = ", " x2 = "), re.sub(r"\b([a-z])\b", r"\g<1>2", NORMAL)
    graph = model(f"{first} {second} y = Identity(y2)")
    before = run(graph, {"x": X.astype(np.float32)})[0]
    assert fuse(graph).fused == 2
    names = [node.name for node in graph.graph if node.op_type == "LayerNormalization"]
    assert names == ["block/LayerNormalization", "block/Add_17/LayerNormalization"]
    np.testing.assert_allclose(run(graph, {"x": X.astype(np.float32)})[0], before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_norm_fuses_and_says_the_same(name: str) -> None:
    x = X.astype(np.float32)
    before = run(model(SPELLINGS[name]), {"x": x})[0]
    graph = model(SPELLINGS[name])
    report = fuse(graph)
    assert (report.fused, report.refused) == (1, [])
    assert count(graph) == {"LayerNormalization": 1}
    (node,) = graph.graph
    assert node.name == "block/LayerNormalization"
    assert node.attributes["epsilon"].as_float() == pytest.approx(EPSILON)
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    after = run(graph, {"x": x})[0]
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-6)
    np.testing.assert_allclose(after, by_formula(X), rtol=0, atol=2e-6)


def test_a_bias_may_be_missing() -> None:
    graph = model(WITHOUT_BIAS)
    assert fuse(graph).fused == 1
    assert [len(node.inputs) for node in graph.graph] == [2]
    after = run(graph, {"x": X.astype(np.float32)})[0]
    np.testing.assert_allclose(after, by_formula(X) - CONSTANTS["bias"], rtol=0, atol=2e-6)


def test_a_bias_may_be_missing_where_the_mean_is_negated() -> None:
    graph = model(ROOT + KERAS.replace("c = Add(b, bias) y = Add(a, c)", "y = Add(a, b)"))
    assert (fuse(graph).fused, count(graph)) == (1, {"LayerNormalization": 1})
    after = run(graph, {"x": X.astype(np.float32)})[0]
    np.testing.assert_allclose(after, by_formula(X) - CONSTANTS["bias"], rtol=0, atol=2e-6)


def test_a_residual_behind_the_weight_is_no_bias() -> None:
    graph = model(WITHOUT_BIAS.replace("y =", "z =") + " y = Add(z, x)")
    assert fuse(graph).fused == 1
    assert count(graph) == {"Add": 1, "LayerNormalization": 1}


def test_several_last_axes_are_one_norm() -> None:
    nodes = WITHOUT_BIAS.replace("last", "both").replace("weight", "plane")
    before = run(model(nodes), {"x": X.astype(np.float32)})[0]
    graph = model(nodes)
    assert fuse(graph).fused == 1
    (node,) = graph.graph
    assert node.attributes["axis"].as_int() == -2
    np.testing.assert_allclose(run(graph, {"x": X.astype(np.float32)})[0], before, rtol=0, atol=2e-6)


WIDENED = "x32 = Cast<to = 1>(x) " + ROOT.replace("(x, ", "(x32, ") + "n32 = Div(d, r) n = Cast<to = 10>(n32) " + END


def test_half_precision_around_statistics_in_float32() -> None:
    """The squares of these values are beyond float16: computed in it, the norm would be zero."""
    x = (X * 1e3).astype(np.float16)
    before = run(model(WIDENED, "float16"), {"x": x})[0]
    graph = model(WIDENED, "float16")
    report = fuse(graph)
    assert (report.fused, report.refused) == (1, [])
    assert count(graph) == {"LayerNormalization": 1}
    after = run(graph, {"x": x})[0]
    assert after.dtype == before.dtype == np.float16
    np.testing.assert_allclose(after, before, rtol=0, atol=4e-3)


@pytest.mark.parametrize("wide", [1, 11], ids=["float32", "float64"])
def test_half_precision_of_which_only_the_differences_are_widened(wide: int) -> None:
    """As torch's older exporter writes it."""
    nodes = (
        f"m = ReduceMean(x, last) s = Sub(x, m) d = Cast<to = {wide}>(s) q = Pow(d, two) v = ReduceMean(q, last) "
        f"e = Add(v, epsilon) r = Sqrt(e) w = Div(d, r) n = Cast<to = 10>(w) {END}"
    )
    if wide == 11:
        nodes = nodes.replace("two", "two64").replace("epsilon", "epsilon64")
    x = X.astype(np.float16)
    before = run(model(nodes, "float16"), {"x": x})[0]
    graph = model(nodes, "float16")
    report = fuse(graph)
    assert (report.fused, report.refused) == (1, [])
    assert count(graph) == {"LayerNormalization": 1}
    np.testing.assert_allclose(run(graph, {"x": x})[0], before, rtol=0, atol=8e-3)


def test_a_widening_cast_that_feeds_others_stays() -> None:
    graph = model(WIDENED.replace("y =", "k =") + " o = Cast<to = 10>(x32) y = Add(k, o)", "float16")
    assert fuse(graph).fused == 1
    assert count(graph) == {"Add": 1, "Cast": 2, "LayerNormalization": 1}


def refuses(graph: ir.Model, reason: str) -> None:
    untouched = ir.to_proto(graph).SerializeToString(deterministic=True)
    report = fuse(graph)
    assert report.fused == 0
    assert len(report.refused) == 1
    assert report.refused[0].startswith("block/ReduceMean")
    assert reason in report.refused[0]
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == untouched


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone_and_says_why(name: str) -> None:
    nodes, reason = NEAR_MISSES[name]
    refuses(model(nodes), reason)


def test_float64_is_left_alone() -> None:
    refuses(model(NORMAL, "double"), "float64")


def test_a_result_that_was_never_widened_is_left_alone() -> None:
    """The statistics are of float32 values; narrowing x first would lose what they see."""
    text = NORMAL.replace("n = Div(d, r)", "n32 = Div(d, r) n16 = Cast<to = 10>(n32) n = Cast<to = 1>(n16)")
    refuses(model(text.replace("n = Cast<to = 1>(n16) z = Mul(n,", "z = Mul(n16,")), "another type")


def test_axes_that_are_dropped_are_left_alone() -> None:
    text = NORMAL.replace("m = ReduceMean(x, last)", "k = ReduceMean<keepdims = 0>(x, last) m = Unsqueeze(k, last)")
    graph = model(text)
    assert (fuse(graph).fused, count(graph)["ReduceMean"]) == (0, 2)  # the mean is no ReduceMean: not even nearly
    refuses(model(NORMAL.replace("v = ReduceMean(", "v = ReduceMean<keepdims = 0>("), shape="8,8,8"), "drops the axes")


def test_a_variance_without_a_root_is_no_norm_and_no_refusal() -> None:
    report = fuse(model(MEANS + "q = Mul(d, d) v = ReduceMean(q, last) y = Mul(d, v)"))
    assert (report.fused, report.refused) == (0, [])


def test_moments_without_a_root_are_no_norm_and_no_refusal() -> None:
    report = fuse(model(MOMENTS + "y = Mul(d, v)"))
    assert (report.fused, report.refused) == (0, [])


class Block(torch.nn.Module):
    """The norms, the attention and the feed-forward part of a BERT layer."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(3))
        self.out, self.inner, self.outer = (
            torch.nn.Linear(*sizes) for sizes in ((width, width), (width, 4 * width), (4 * width, width))
        )
        self.first, self.second = torch.nn.LayerNorm(width, eps=1e-12), torch.nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv)
        mixed = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x = self.first(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.second(x + self.outer(torch.nn.functional.gelu(self.inner(x))))


def test_the_norms_of_a_real_graph_all_fuse(tmp_path: Path) -> None:
    network = torch.nn.Sequential(Block(), Block()).eval()
    x, file = torch.randn(2, 5, 16), tmp_path / "bert.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the old exporter
        torch.onnx.export(
            network, (x,), file, dynamo=False, opset_version=13, dynamic_axes={"x": [0, 1]}, input_names=["x"]
        )
    converted = onnx.shape_inference.infer_shapes(convert_version(onnx.load(file), 24))
    graph = ir.from_proto(converted)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    passes.IdentityEliminationPass()(graph)  # equal weights, which the old exporter stores once
    report = fuse(graph)
    assert (report.fused, report.refused) == (4, [])
    assert count(graph)["LayerNormalization"] == 4
    after = run(graph, {"x": x.numpy()})[0]
    np.testing.assert_allclose(after, network(x).detach().numpy(), rtol=0, atol=5e-6)
