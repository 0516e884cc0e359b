"""Static int8: integers by hand, where pairs of QuantizeLinear and DequantizeLinear stand, and what stays in float."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from tests.calibration.graphs import engine, graph, linear, node, operators, reference, rows
from tests.calibration.made import normal
from txopt.calibration.formats import INT8
from txopt.calibration.static import activations, place
from txopt.runtime.errors import InputError

WIDTH = 64
IDS = {"ids": (TensorProto.INT64, ["B", "T"])}


def block(width: int = WIDTH) -> ir.Model:
    """A norm, two products of what it gives, a Relu, a product, and the residual sum."""
    return graph(
        node("LayerNormalization", "x norm.weight norm.bias", "normed", axis=-1),
        *linear("normed", "left", "a"),
        *linear("normed", "right", "b"),
        node("Mul", "a b", "gated"),
        node("Relu", "gated", "h"),
        *linear("h", "out", "o"),
        node("Add", "x o", "y"),
        constants={
            "norm.weight": 1 + 0.1 * normal(width, seed=1),
            "norm.bias": normal(width, seed=2),
            **{
                f"{name}.weight": 0.1 * normal(width, width, seed=seed)
                for seed, name in enumerate(("left", "right", "out"))
            },
            **{f"{name}.bias": 0.1 * normal(width, seed=seed) for seed, name in enumerate(("left", "right", "out"))},
        },
        inputs=rows(width),
    )


def tied(rows_of_table: int = 80, width: int = WIDTH) -> ir.Model:
    """Tokens looked up in a table, and its transpose as the head."""
    return graph(
        node("Gather", "table ids", "x"),
        node("Transpose", "table", "head", perm=[1, 0]),
        node("MatMul", "x head", "y"),
        constants={"table": normal(rows_of_table, width)},
        inputs=IDS,
    )


AMAX = {"normed": 4.0, "h": 8.0, "x": 4.0}


# --- arithmetic


def test_integers_are_those_of_the_standard_by_hand() -> None:
    """Scales of 1 and of powers of two leave nothing to float rounding: every product is a sum of integers."""
    codes = np.random.default_rng(0).integers(-127, 128, (WIDTH, WIDTH))
    codes[0] = 127  # every column's largest, so that its scale is the power of two
    steps = 2.0 ** np.arange(-8, 8).repeat(4)
    model = graph(node("MatMul", "x w", "y"), constants={"w": (codes * steps).astype(np.float32)}, inputs=rows(WIDTH))
    place(model.graph, {"x": 127.0})
    x = np.zeros((1, 2, WIDTH), np.float32)
    x[0, 0, :8] = [0.5, 1.5, 2.5, -0.5, -1.5, 3.49, 300, -300]
    x[0, 1] = np.arange(WIDTH) - 20
    integers = np.rint(x[0]).astype(np.int64)
    integers[0, :8] = [0, 2, 2, 0, -2, 3, 127, -128]  # half to even; saturated at the ends of int8
    expected = (integers @ codes) * steps
    assert np.abs(expected).max() > 0
    for got in (engine(model, x=x)[0], engine(model, as_written=True, x=x)[0], reference(model, x=x)[0]):
        assert np.array_equal(got[0], expected)


@pytest.mark.parametrize(
    ("amax", "scale"),
    [(127.0, 1.0), (1.0, np.float32(1 / 127)), (0.0, 1.0), (1e-44, np.finfo(np.float32).tiny)],
    ids=["one", "a fraction", "always zero", "below float32"],
)
def test_a_scale_reaches_amax_and_is_a_normal_number(amax: float, scale: float) -> None:
    assert INT8.scale(amax) == scale
    assert INT8.scale(amax).dtype == np.float32


def test_a_weight_has_a_scale_for_each_output() -> None:
    model = block()
    left = model.graph.initializers["left.weight"].const_value.numpy()
    place(model.graph, AMAX)
    scales = model.graph.initializers["left.weight/scales"].const_value.numpy()
    rounded = model.graph.initializers["left.weight/codes"].const_value.numpy() * scales
    assert scales.shape == (WIDTH,)
    assert (np.abs(rounded - left) <= scales / 2 * (1 + 1e-6)).all()


def test_a_table_has_a_scale_for_each_row() -> None:
    model = tied()
    table = model.graph.initializers["table"].const_value.numpy()
    place(model.graph, {"x": 4.0})
    scales = model.graph.initializers["table/scales"].const_value.numpy()
    rounded = model.graph.initializers["table/codes"].const_value.numpy() * scales[:, None]
    assert scales.shape == (80,)
    assert (np.abs(rounded - table) <= scales[:, None] / 2 * (1 + 1e-6)).all()


# --- placement


def test_a_tensor_that_two_products_read_has_one_pair() -> None:
    model = block()
    placed = place(model.graph, AMAX)
    assert (placed.activations, placed.weights, placed.floats) == (2, 3, ())
    counted = Counter(operators(model))
    assert counted["QuantizeLinear"] == 2
    assert counted["DequantizeLinear"] == 2 + 3
    readers = {node.op_type for node, _ in by_name(model, "normed/rounded").uses()}
    assert readers == {"MatMul"}
    assert [node.op_type for node, _ in by_name(model, "normed").uses()] == ["QuantizeLinear"]


def test_what_is_not_read_by_a_product_stays_as_it_was() -> None:
    model = block()
    place(model.graph, AMAX)
    assert {node.op_type for node, _ in by_name(model, "x").uses()} == {"LayerNormalization", "Add"}
    assert "left.bias" in model.graph.initializers
    assert "left.weight" not in model.graph.initializers


def test_a_product_that_is_kept_is_untouched_and_listed() -> None:
    model = block()
    placed = place(model.graph, {"normed": 4.0}, keep=["out.weight"])
    assert placed.floats == ("out.weight",)
    assert "out.weight" in model.graph.initializers
    assert activations(block().graph, keep=["out.weight"]) == ["normed"]
    kept = block()
    place(kept.graph, {"normed": 4.0, "h": 8.0}, keep=["left.weight"])
    left = next(node for node in kept.graph if node.inputs[1] is not None and node.inputs[1].name == "left.weight")
    assert left.inputs[0].name == "normed"  # in float, beside a product that reads codes


def test_products_of_attention_stay_in_float() -> None:
    model = graph(
        node("MatMul", "x w", "q"),
        node("Transpose", "x", "k", perm=[0, 2, 1]),
        node("MatMul", "q k", "scores"),
        node("MatMul", "scores x", "y"),
        constants={"w": normal(WIDTH, WIDTH)},
        inputs=rows(WIDTH),
    )
    place(model.graph, {"x": 4.0})
    assert Counter(operators(model))["QuantizeLinear"] == 1
    scores = by_name(model, "scores").producer()
    assert [value.name for value in scores.inputs] == ["q", "k"]


def test_a_tied_table_is_stored_once() -> None:
    model = tied()
    place(model.graph, {"x": 4.0})
    stored = [name for name, value in model.graph.initializers.items() if value.const_value.size >= 80 * WIDTH]
    assert stored == ["table/codes"]


def test_everything_is_int8_symmetric_and_standard() -> None:
    for model, amax in ((block(), AMAX), (tied(), AMAX)):
        place(model.graph, amax)
        assert {node.domain for node in model.graph} == {""}
        for each in model.graph:
            if each.op_type == "QuantizeLinear":
                zero = each.inputs[2].const_value.numpy()
                assert zero == 0
                assert zero.dtype == np.int8


def test_every_weight_has_zero_points_of_its_own() -> None:
    """Left out or shared, ONNX Runtime cannot make the codes unsigned, which it does where the processor has no VNNI."""
    model = block()
    place(model.graph, AMAX)
    weights = [each for each in model.graph if each.name.endswith(".weight/dequantize")]
    assert len({each.inputs[2] for each in weights}) == 3
    for each in weights:
        assert each.inputs[2].shape == each.inputs[1].shape
        assert not each.inputs[2].const_value.numpy().any()


def test_a_tensor_without_a_range_is_named() -> None:
    with pytest.raises(InputError, match=r"no range.*(.|\n)*normed(.|\n)*h"):
        place(block().graph, {})


# --- engines


def test_the_engine_says_what_the_standard_says() -> None:
    model, x = block(), normal(2, 5, WIDTH, seed=9)
    exact = reference(model, x=x)[0]
    place(model.graph, AMAX)
    said, written = reference(model, x=x)[0], engine(model, as_written=True, x=x)[0]
    assert np.abs(written - said).max() < 1e-4  # no value lies at a boundary between two codes here
    assert np.abs(engine(model, x=x)[0] - said).max() < 1e-4
    assert 0 < np.abs(said - exact).max() < 0.5


def test_a_near_miss_is_seen() -> None:
    """The tolerance above tells a scale that is one part in a hundred off."""
    model, x = block(), normal(2, 5, WIDTH, seed=9)
    wrong = block()
    place(model.graph, AMAX)
    place(wrong.graph, {**AMAX, "h": 8.08})
    assert np.abs(reference(wrong, x=x)[0] - reference(model, x=x)[0]).max() > 1e-3


def by_name(model: ir.Model, name: str) -> ir.Value:
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    return next(value for value in values if value.name == name)
