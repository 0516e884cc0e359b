"""Decomposed RMS norms: what fuses, what must not and why, and that the numbers stay."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from tests.exporter.plain_engine import run
from txopt.exporter.fusion.rms_norm import fuse
from txopt.exporter.graph import count

Array = NDArray[Any]

WEIGHT = np.linspace(0.5, 2, 8)
X = np.random.default_rng(0).normal(size=(2, 3, 8)) * 3


class Chain:
    """T5's norm as PyTorch exports it, node by node; ``half``: float16 around statistics in float32.

    ``numerator``: over the root, as TorchScript has it; None: the Reciprocal of PyTorch's newer exporter.
    """

    def __init__(
        self, *, half: bool = False, exponent: float = 2, axis: int = -1, numerator: float | None = None
    ) -> None:
        self.dtype = np.float16 if half else np.float32
        self.constants: dict[str, Array] = {
            "exponent": np.array(exponent, np.float32),
            "axes": np.array([axis], np.int64),
            "epsilon": np.array(0.01, np.float32),
            "weight": WEIGHT.astype(self.dtype),
        }
        if numerator is not None:
            self.constants["numerator"] = np.array(numerator, np.float32)
        wide, narrow = ("wide", "narrow") if half else ("x", "scaled")
        chain: list[tuple[str, Sequence[str], str]] = [
            ("Pow", (wide, "exponent"), "squared"),
            ("ReduceMean", ("squared", "axes"), "mean"),
            ("Add", ("mean", "epsilon"), "shifted"),
            ("Sqrt", ("shifted",), "root"),
            ("Reciprocal", ("root",), "inverse") if numerator is None else ("Div", ("numerator", "root"), "inverse"),
            ("Mul", (wide, "inverse"), "scaled"),
            ("Mul", ("weight", narrow), "y"),
        ]
        self.nodes = [
            onnx.helper.make_node(op, inputs, [output], name=f"block/{output}") for op, inputs, output in chain
        ]
        if half:
            cast = [("x", "wide", onnx.TensorProto.FLOAT), ("scaled", "narrow", onnx.TensorProto.FLOAT16)]
            first, last = (onnx.helper.make_node("Cast", [a], [b], name=f"block/{b}", to=to) for a, b, to in cast)
            self.nodes = [first, *self.nodes[:-1], last, self.nodes[-1]]
        self.inputs = {"x": self.dtype}
        self.outputs = ["y"]

    def model(self) -> ir.Model:
        kind = onnx.helper.np_dtype_to_tensor_dtype
        info = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            self.nodes,
            "norm",
            [
                info(name, kind(np.dtype(dtype)), [] if name != "x" else ["B", "T", 8])
                for name, dtype in self.inputs.items()
            ],
            [onnx.helper.make_empty_tensor_value_info(name) for name in self.outputs],
            [onnx.numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=10)
        return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def by_formula(x: Array, weight: Array) -> Array:
    """y = x / sqrt(mean(x^2) + epsilon) * weight, in float64."""
    wide = x.astype(np.float64)
    return np.asarray(wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 0.01) * weight)


@pytest.mark.parametrize(("half", "atol"), [(False, 1e-6), (True, 4e-3)], ids=["fp32", "fp16 with casts"])
def test_a_norm_fuses_and_says_the_same(half: bool, atol: float) -> None:
    chain = Chain(half=half)
    x = X.astype(chain.dtype)
    before = run(chain.model(), {"x": x})[0]
    model = chain.model()
    report = fuse(model)
    assert (report.fused, report.refused) == (1, [])
    assert count(model) == {"RMSNormalization": 1}
    after = run(model, {"x": x})[0]
    assert after.dtype == before.dtype == chain.dtype
    np.testing.assert_allclose(after, before, rtol=0, atol=atol)
    np.testing.assert_allclose(after, by_formula(x, chain.constants["weight"]), rtol=0, atol=atol)


def test_one_over_the_root_is_its_reciprocal_and_two_is_not() -> None:
    chain, model = Chain(numerator=1), Chain(numerator=1).model()
    assert fuse(model).fused == 1
    np.testing.assert_allclose(
        run(model, {"x": X.astype(np.float32)})[0], by_formula(X, chain.constants["weight"]), atol=1e-5
    )
    other = fuse(Chain(numerator=2).model())
    assert (other.fused, len(other.refused)) == (0, 1)


def test_the_statistics_of_half_precision_stay_in_float32() -> None:
    """The squares of these values are beyond float16: computed in it, the norm would be zero."""
    chain = Chain(half=True)
    x = (X * 1e4 / 3).clip(-6e4, 6e4).astype(np.float16)
    model = chain.model()
    fuse(model)
    np.testing.assert_allclose(run(model, {"x": x})[0], by_formula(x, chain.constants["weight"]), rtol=2e-3, atol=1e-3)


def test_what_the_norm_becomes_is_a_valid_node_of_the_same_scope() -> None:
    model = Chain().model()
    fuse(model)
    node = next(iter(model.graph))
    assert node.name == "block/RMSNormalization"
    assert {name: node.attributes[name].value for name in ("axis", "stash_type")} == {"axis": -1, "stash_type": 1}
    assert node.attributes["epsilon"].as_float() == pytest.approx(0.01)
    assert [value.name for value in model.graph.outputs] == ["y"]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_weight_and_factors_may_stand_on_either_side() -> None:
    chain = Chain()
    for node in chain.nodes:
        if node.op_type in ("Mul", "Add"):
            node.input.reverse()
    model = chain.model()
    assert fuse(model).fused == 1
    np.testing.assert_allclose(run(model, {"x": X.astype(np.float32)})[0], by_formula(X, WEIGHT), rtol=0, atol=2e-6)


def test_a_widening_cast_that_feeds_others_stays() -> None:
    chain = Chain(half=True)
    chain.nodes.append(onnx.helper.make_node("Neg", ["wide"], ["other"]))
    chain.outputs.append("other")
    model = chain.model()
    assert fuse(model).fused == 1
    assert count(model) == {"Cast": 1, "Neg": 1, "RMSNormalization": 1}


def test_one_plus_a_weight_that_is_too_large_to_fold_is_a_weight() -> None:
    """As Gemma writes it; what adds the one stays, and gives the weight."""
    chain = Chain()
    chain.constants["one"] = np.array(1, np.float32)
    chain.nodes.insert(0, onnx.helper.make_node("Add", ["weight", "one"], ["more"]))
    chain.nodes[-1].input[0] = "more"
    model = chain.model()
    assert fuse(model).fused == 1
    assert count(model) == {"Add": 1, "RMSNormalization": 1}
    np.testing.assert_allclose(run(model, {"x": X.astype(np.float32)})[0], by_formula(X, WEIGHT + 1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("divided", [False, True], ids=["times the inverse", "divided by the root"])
def test_what_is_normed_may_be_a_product_itself(divided: bool) -> None:
    """Gemma scales its embedding before the first norm."""
    chain = Chain()
    chain.constants["three"] = np.array(3, np.float32)
    for node in chain.nodes:
        node.input[:] = ["tripled" if name == "x" else name for name in node.input]
    if divided:
        del chain.nodes[4]  # the Reciprocal
        chain.nodes[4] = onnx.helper.make_node("Div", ["tripled", "root"], ["scaled"], name="block/scaled")
    chain.nodes.insert(0, onnx.helper.make_node("Mul", ["x", "three"], ["tripled"]))
    model = chain.model()
    report = fuse(model)
    assert (report.fused, report.refused) == (1, [])
    assert count(model) == {"Mul": 1, "RMSNormalization": 1}
    np.testing.assert_allclose(run(model, {"x": X.astype(np.float32)})[0], by_formula(3 * X, WEIGHT), rtol=0, atol=2e-6)


def used_elsewhere(name: str) -> Chain:
    chain = Chain()
    chain.nodes.append(onnx.helper.make_node("Neg", [name], ["other"]))
    chain.outputs.append("other")
    return chain


def given_out(name: str) -> Chain:
    chain = Chain()
    chain.outputs.append(name)
    return chain


def not_constant(name: str) -> Chain:
    chain = Chain()
    chain.inputs[name] = chain.constants.pop(name).dtype.type
    return chain


def scaling_something_else() -> Chain:
    chain = Chain()
    chain.nodes.insert(0, onnx.helper.make_node("Neg", ["x"], ["negative"]))
    scaled = next(node for node in chain.nodes if "scaled" in node.output)
    scaled.input[0] = "negative"
    return chain


def scaling_a_multiple() -> Chain:
    chain = Chain()
    chain.constants["three"] = np.array(3, np.float32)
    chain.nodes.insert(0, onnx.helper.make_node("Mul", ["x", "three"], ["tripled"]))
    scaled = next(node for node in chain.nodes if "scaled" in node.output)
    scaled.input[0] = "tripled"
    return chain


def of_more_axes(name: str) -> Chain:
    chain = Chain()
    chain.constants[name] = chain.constants[name].reshape(1, 1, 1, 1)
    return chain


def dropping_the_axis() -> Chain:
    chain = Chain()
    chain.nodes[1].attribute.append(onnx.helper.make_attribute("keepdims", 0))
    return chain


def summing() -> Chain:
    chain = Chain()
    chain.nodes[1].op_type = "ReduceSum"
    return chain


def summing_and_scaling() -> Chain:
    """By another number than how many there are."""
    chain = summing()
    chain.constants["quarter"] = np.array(0.25, np.float32)
    chain.nodes[1].output[0] = "sum"
    chain.nodes.insert(2, onnx.helper.make_node("Mul", ["sum", "quarter"], ["mean"], name="block/quarter"))
    return chain


def without_weight() -> Chain:
    chain = Chain()
    chain.nodes = chain.nodes[:-1]
    chain.nodes[-1].output[0] = "y"
    return chain


# a chain that is almost a norm, and the reason that must be given
NEAR_MISSES: dict[str, tuple[Chain, str]] = {
    "exponent 3": (Chain(exponent=3), "the exponent is 3"),
    "mean over axis 1": (Chain(axis=1), "over axes [-2], not [-1]"),
    "a mean that drops its axis": (dropping_the_axis(), "drops the axis"),
    "an epsilon that adds axes": (of_more_axes("epsilon"), "epsilon adds axes"),
    "an exponent that adds axes": (of_more_axes("exponent"), "exponent adds axes"),
    "epsilon from outside": (not_constant("epsilon"), "no constant epsilon"),
    "exponent from outside": (not_constant("exponent"), "the exponent is None"),
    "mean read elsewhere": (used_elsewhere("mean"), "something else reads mean"),
    "root read elsewhere": (used_elsewhere("root"), "not divided by alone"),
    "inverse read elsewhere": (used_elsewhere("inverse"), "no constant weight vector"),
    "inverse is an output": (given_out("inverse"), "no constant weight vector"),
    "scaled read elsewhere": (used_elsewhere("scaled"), "no constant weight vector"),
    "scaled is an output": (given_out("scaled"), "no constant weight vector"),
    "another value scaled": (scaling_something_else(), "not the one that is divided or scaled"),
    "a multiple scaled": (scaling_a_multiple(), "something else is multiplied in between"),
    "no weight": (without_weight(), "no constant weight vector"),
    "a sum": (summing(), "block/mean sums the squares, the operator averages them"),
    "a sum scaled": (summing_and_scaling(), "block/mean sums the squares, the operator averages them"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone_and_says_why(name: str) -> None:
    chain, reason = NEAR_MISSES[name]
    model = chain.model()
    untouched = ir.to_proto(model).SerializeToString(deterministic=True)
    report = fuse(model)
    assert report.fused == 0
    assert len(report.refused) == 1
    assert report.refused[0].startswith("block/squared: ")
    assert reason in report.refused[0]
    assert ir.to_proto(model).SerializeToString(deterministic=True) == untouched


def test_squares_that_something_else_reads_are_left_alone() -> None:
    model = used_elsewhere("squared").model()
    assert fuse(model).fused == 0
    assert count(model) == count(used_elsewhere("squared").model())


def test_a_power_without_a_mean_is_no_norm_and_no_refusal() -> None:
    chain = Chain()
    chain.nodes = [onnx.helper.make_node("Pow", ["x", "exponent"], ["y"])]
    report = fuse(chain.model())
    assert (report.fused, report.refused) == (0, [])


LENGTHS = {
    "a length and epsilon": (
        "n = ReduceL2(x, axes) s = Mul(n, half) e = Add(s, epsilon) d = Div(x, e) y = Mul(d, weight)",
        1,
    ),
    "a length alone": ("n = ReduceL2(x, axes) d = Div(x, n) y = Mul(d, weight)", 0),
    "a length that divides something else": ("n = ReduceL2(x, axes) e = Add(n, epsilon) y = Div(weight, e)", 0),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_vectors_length_with_epsilon_behind_the_root_is_left_alone_and_says_why(name: str) -> None:
    nodes, refused = LENGTHS[name]
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 24]> norm (float[B,T,8] x) => (float[B,T,8] y) {{ {nodes} }}'
    )
    proto.graph.node[0].name = "block/length"
    constants = {**Chain().constants, "half": np.array(0.5, np.float32)}
    used = {one for node in proto.graph.node for one in node.input} & constants.keys()
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(constants[one], one) for one in sorted(used))
    report = fuse(ir.from_proto(onnx.shape_inference.infer_shapes(proto)))
    assert report.fused == 0
    assert report.refused == ["block/length: epsilon is added to the root, not inside of it"] * refused
