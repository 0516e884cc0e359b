"""Shape arithmetic said twice: which lengths are known to be one, which reshapes are saved or kept and why, same numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from tests.exporter.plain_engine import run
from txopt.exporter.fusion.reshape import fuse
from txopt.exporter.graph import count

Array = NDArray[Any]
Axes = Sequence[int | str | None]  # None has no name


class Chain:
    """Nodes over inputs, one after the other, each named after what it gives; an input that is called "shape" is one."""

    def __init__(self, *, half: bool = False, **inputs: Axes) -> None:
        self.dtype, self.inputs = np.float16 if half else np.float32, inputs
        self.constants: dict[str, Array] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.outputs: list[str] = []

    def then(self, op: str, *inputs: str | Sequence[int], to: str, **attributes: Any) -> "Chain":
        """One more node; numbers among its inputs are a constant."""
        names = [name if isinstance(name, str) else f"{to}/{index}" for index, name in enumerate(inputs)]
        constants = {name: value for name, value in zip(names, inputs, strict=True) if not isinstance(value, str)}
        self.constants |= {name: np.array(value, np.int64) for name, value in constants.items()}
        self.nodes.append(onnx.helper.make_node(op, names, [to], name=to, **attributes))
        return self

    def give(self, *names: str) -> "Chain":
        self.outputs.extend(names)
        return self

    def model(self) -> ir.Model:
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        info = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            self.nodes,
            "chain",
            [
                info(name, onnx.TensorProto.INT64 if name == "shape" else kind, axes)
                for name, axes in self.inputs.items()
            ],
            [onnx.helper.make_empty_tensor_value_info(name) for name in self.outputs],
            [onnx.numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=10)
        return ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))


def numbers(*lengths: int) -> Array:
    return np.arange(np.prod(lengths), dtype=np.float32).reshape(lengths)


def check_same(chain: Chain, model: ir.Model, **feeds: Array) -> None:
    """``model`` is valid and says what ``chain`` says, to the bit."""
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert [value.name for value in model.graph.outputs] == chain.outputs
    feeds = {name: value if name == "shape" else value.astype(chain.dtype) for name, value in feeds.items()}
    for before, after in zip(run(chain.model(), feeds), run(model, feeds), strict=True):
        assert after.dtype == before.dtype
        np.testing.assert_array_equal(after, before)


def two_shapes(x: Axes, first: Mapping[str, int], y: Axes, second: Mapping[str, int]) -> Chain:
    chain = Chain(x=x, y=y).then("Shape", "x", to="a", **first).then("Shape", "y", to="b", **second)
    return chain.then("Neg", "a", to="of a").then("Abs", "b", to="of b").give("of a", "of b")


# axes of x and what is read of them, axes of y and what is read of them; B is 2, T is 3
EQUAL: dict[str, tuple[Axes, dict[str, int], Axes, dict[str, int]]] = {
    "all axes": (["B", "T"], {}, ["B", "T"], {}),
    "first axes": (["B", "T"], {"end": 1}, ["B", 8], {"start": 0, "end": 1}),
    "one name in two places": (["B", "T"], {"start": 1}, ["T", "B"], {"end": 1}),
    "counted from the end": (["B", 8, "T"], {"start": -1}, [8, "T", "B"], {"start": -2, "end": -1}),
    "an end beyond the last axis": (["B", "T"], {"start": 1, "end": 9}, ["T"], {}),
    "a slice and all axes": (["B", "T", 8], {"start": 1}, ["T", 8], {}),
    "no names beside the slice": (["B", None], {"end": 1}, [None, "B"], {"start": 1}),
    "numbers": ([2, "T"], {"end": 1}, ["B", 2], {"start": 1}),
    "expressions": (["2*B", "T"], {"end": 1}, ["2*B"], {}),
    "nothing": (["B", "T"], {"end": 0}, ["T"], {"start": 1}),
}
DIFFERENT: dict[str, tuple[Axes, dict[str, int], Axes, dict[str, int]]] = {
    "other names": (["B", "T"], {"end": 1}, ["T", "B"], {"end": 1}),
    "names in another order": (["B", "T"], {}, ["T", "B"], {}),
    "other places": (["B", "T"], {"end": 1}, ["B", "T"], {"start": 1}),
    "one axis more": (["B", "T"], {}, ["B", "T"], {"end": 1}),
    "a name and a number": (["B", "T"], {}, ["B", 3], {}),
    "other numbers": ([2, "T"], {"end": 1}, [3, "T"], {"end": 1}),
    "an expression": (["B"], {}, ["2*B"], {}),
    "no names": ([None], {}, [None], {}),
    "one name of two": (["B", None], {}, ["B", None], {}),
}


@pytest.mark.parametrize("name", [*EQUAL, *DIFFERENT])
def test_shapes_of_equal_named_axes_become_one_and_no_others(name: str) -> None:
    case = EQUAL.get(name) or DIFFERENT[name]
    model = two_shapes(*case).model()
    report = fuse(model)
    assert (report.operator, report.fused, report.refused) == ("Reshape", 0, [])
    assert count(model) == {"Abs": 1, "Neg": 1, "Shape": 1 if name in EQUAL else 2}
    lengths = {"B": 2, "T": 3, "2*B": 4, None: 5}
    x, y = (
        numbers(*(axis if isinstance(axis, int) else lengths[axis] for axis in axes)) for axes in (case[0], case[2])
    )
    check_same(two_shapes(*case), model, x=x, y=y)


def test_shapes_of_unknown_rank_are_left_alone() -> None:
    model = two_shapes(["B"], {}, ["B"], {}).model()
    for value in model.graph.inputs:
        value.shape = None
    fuse(model)
    assert count(model)["Shape"] == 2


def test_what_is_made_of_equal_shapes_becomes_one_too() -> None:
    chain = Chain(x=["B", "T"], y=["B", 8]).then("Shape", "x", to="a", end=1).then("Shape", "y", to="b", end=1)
    chain.then("Concat", "a", [1], to="of a", axis=0).then("Concat", "b", "of a/1", to="of b", axis=0)
    model = chain.then("Neg", "of a", to="c").then("Abs", "of b", to="d").give("c", "d").model()
    fuse(model)
    assert count(model) == {"Abs": 1, "Concat": 1, "Neg": 1, "Shape": 1}
    check_same(chain, model, x=numbers(2, 3), y=numbers(2, 8))


@pytest.mark.parametrize("outputs", [("a",), ("b",), ("a", "b"), ("b", "a")], ids=" and ".join)
def test_a_shape_that_is_an_output_keeps_its_name(outputs: Sequence[str]) -> None:
    chain = Chain(x=["B", "T"], y=["B"]).then("Shape", "x", to="a", end=1).then("Shape", "y", to="b")
    chain.then("Neg", "a", to="of a").then("Abs", "b", to="of b").give(*outputs, "of a", "of b")
    model = chain.model()
    fuse(model)
    check_same(chain, model, x=numbers(2, 3), y=numbers(2))


def twice(shape: str | Sequence[int], inner: Sequence[int] = (-1, 4), **options: Any) -> Chain:
    """x [B,6] reshaped to ``inner``, and that to ``shape``, which may be "shape" from outside or "made" of lengths."""
    chain = Chain(half=options.pop("half", False), x=["B", 6])
    if shape == "shape":
        chain.inputs["shape"] = [2]
    if shape == "made":
        chain.then("Shape", "x", to="rows", end=1).then("Concat", "rows", [6], to="made", axis=0)
    return chain.then("Reshape", "x", inner, to="inner").then("Reshape", "inner", shape, to="y", **options).give("y")


# chains that become their last Reshape
MATCHES: dict[str, dict[str, Any]] = {
    "one length left open": {"shape": [3, -1]},
    "all lengths given": {"shape": [8, 3]},
    "another rank": {"shape": [-1]},
    "zeros that are lengths": {"shape": [4, 6], "allowzero": 1},
    "a shape made of lengths": {"shape": "made"},
    "a shape made of lengths, said in full": {"shape": "made", "allowzero": 1},
    "a shape from outside": {"shape": "shape", "allowzero": 1},
    "the first copies lengths": {"shape": [3, -1], "inner": [0, 2, 3]},
}


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", MATCHES)
def test_a_reshape_of_a_reshape_becomes_the_second(name: str, half: bool) -> None:
    chain = twice(**MATCHES[name], half=half)
    model = chain.model()
    report = fuse(model)
    assert (report.operator, report.fused, report.refused) == ("Reshape", 1, [])
    assert count(model)["Reshape"] == 1
    check_same(chain, model, x=numbers(4, 6), **({"shape": np.array([3, 8])} if "shape" in chain.inputs else {}))


def test_zeros_of_allowzero_are_lengths_of_nothing() -> None:
    chain = twice("made", [0, 6], allowzero=1)
    model = chain.model()
    assert fuse(model).fused == 1
    check_same(chain, model, x=numbers(0, 6))


def test_three_reshapes_become_the_last() -> None:
    chain = twice([3, -1]).then("Reshape", "y", [2, -1], to="z")
    chain.outputs = ["z"]
    model = chain.model()
    assert fuse(model).fused == 2
    assert count(model) == {"Reshape": 1}
    check_same(chain, model, x=numbers(4, 6))


@pytest.mark.parametrize("reader", ["output", "node"])
def test_a_first_reshape_that_something_else_reads_stays(reader: str) -> None:
    chain = twice([3, -1])
    chain.give("inner") if reader == "output" else chain.then("Neg", "inner", to="other").give("other")
    model = chain.model()
    fuse(model)
    assert count(model)["Reshape"] == 2
    assert {node.inputs[0] for node in model.graph if node.op_type == "Reshape"} == {model.graph.inputs[0]}
    check_same(chain, model, x=numbers(4, 6))


# second reshapes that may copy lengths of the first
NEAR_MISSES: dict[str, dict[str, Any]] = {
    "a zero": {"shape": [0, -1]},
    "a zero, said in full": {"shape": [-1, 0], "allowzero": 0},
    "a shape from outside": {"shape": "shape"},
    "a shape from outside, said in full": {"shape": "shape", "allowzero": 0},
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone_and_says_why(name: str) -> None:
    model = twice(**NEAR_MISSES[name]).model()
    untouched = ir.to_proto(model).SerializeToString(deterministic=True)
    report = fuse(model)
    assert (report.fused, report.refused) == (0, ["y: its shape may copy lengths of inner"])
    assert ir.to_proto(model).SerializeToString(deterministic=True) == untouched


def test_without_the_first_a_copied_length_is_another() -> None:
    """The broken twin: what the refusal prevents."""
    model, merged = twice([0, -1]).model(), twice([0, -1]).model()
    merged.graph.node("y").replace_input_with(0, merged.graph.inputs[0])
    shapes = [run(each, {"x": numbers(4, 6)})[0].shape for each in (model, merged)]
    assert shapes == [(6, 4), (4, 6)]


def test_a_refused_reshape_does_not_keep_the_next_from_merging() -> None:
    chain = twice([0, -1]).then("Reshape", "y", [2, -1], to="z")
    chain.outputs = ["z"]
    model = chain.model()
    report = fuse(model)
    assert (report.fused, report.refused) == (1, ["y: its shape may copy lengths of inner"])
    check_same(chain, model, x=numbers(4, 6))


def test_reshapes_with_anything_between_are_left_alone() -> None:
    chain = Chain(x=["B", 6]).then("Reshape", "x", [-1, 4], to="inner").then("Neg", "inner", to="negative")
    model = chain.then("Reshape", "negative", [3, -1], to="y").give("y").model()
    untouched = ir.to_proto(model).SerializeToString(deterministic=True)
    report = fuse(model)
    assert (report.fused, report.refused) == (0, [])
    assert ir.to_proto(model).SerializeToString(deterministic=True) == untouched


def between(shape: str | Sequence[int], **options: Any) -> Chain:
    """x [B,T,6] activated, reshaped to ``shape``, which may be "made" of lengths of x, and activated again."""
    chain = Chain(x=["B", "T", 6]).then("Shape", "x", to="rows", end=1).then("Shape", "x", to="tokens", start=1, end=2)
    chain.then("Concat", "rows", "tokens", [6], to="made", axis=0).then(
        "Concat", "tokens", "rows", [6], to="swapped", axis=0
    )
    chain.then("Concat", "rows", [-1, 6], to="open", axis=0)
    return (
        chain.then("Neg", "x", to="a").then("Reshape", "a", shape, to="b", **options).then("Abs", "b", to="y").give("y")
    )


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("made", {}),
        ("made", {"allowzero": 1}),
        ("open", {}),
        ([0, 0, 6], {}),
        ([0, 0, -1], {}),
        ([0, -1, 6], {}),
        ([-1, 0, 6], {}),
    ],
)
def test_a_reshape_to_the_shape_that_is_there_goes(shape: str | Sequence[int], options: dict[str, int]) -> None:
    chain = between(shape, **options)
    model = chain.model()
    assert fuse(model).fused == 1
    assert count(model) == {"Abs": 1, "Neg": 1}
    check_same(chain, model, x=numbers(2, 3, 6))


@pytest.mark.parametrize("shape", ["swapped", [-1, 2, 6], [0, 0, 2, 3], [0, -1]])
def test_a_reshape_to_another_shape_stays(shape: str | Sequence[int]) -> None:
    model = between(shape).model()
    assert (fuse(model).fused, count(model)["Reshape"]) == (0, 1)
