"""What rounding does to a layer, in numbers that can be worked out, and which values are outliers."""

import numpy as np
import onnx_ir as ir
import pytest

from tests.calibration.graphs import graph, linear, node, rows
from tests.calibration.made import normal
from txopt.calibration.formats import INT8
from txopt.calibration.layers import Rounded, by_row_and_block, by_tensor, in_channels, layers
from txopt.calibration.pictures import Picture, outliers
from txopt.calibration.recipe import StaticRecipe

WIDTH = 64


def model(weight: np.ndarray | None = None) -> ir.Model:
    constants = {"first.weight": normal(WIDTH, WIDTH) if weight is None else weight, "first.bias": normal(WIDTH)}
    return graph(*linear("x", "first", "y"), constants=constants, inputs=rows(WIDTH))


def seen(values: np.ndarray) -> dict[str, dict[str, Picture]]:
    picture = Picture("x", WIDTH)
    picture.update(values)
    return {"decoder": {"x": picture}}


def test_errors_are_shares_of_what_is_exact() -> None:
    weight = normal(WIDTH, WIDTH)
    halved = Rounded(matrix=weight / 2, form="half", inputs=lambda given: given)
    (found,) = layers({"decoder": model(weight)}, seen(normal(20, WIDTH)), lambda graph, read: halved)
    assert (found.graph, found.name, found.rows, found.columns) == ("decoder", "first.weight", WIDTH, WIDTH)
    assert found.form == "half"
    assert found.weight == pytest.approx(0.5)
    assert found.output == pytest.approx(0.5)


def test_inputs_are_rounded_too() -> None:
    exact = normal(WIDTH, WIDTH)
    doubled = Rounded(matrix=exact, form="same", inputs=lambda given: 2 * given)
    (found,) = layers({"decoder": model(exact)}, seen(normal(20, WIDTH)), lambda graph, read: doubled)
    assert (found.weight, found.output) == (0.0, pytest.approx(1.0))


def test_an_input_that_never_came_has_no_error() -> None:
    same = Rounded(matrix=normal(WIDTH, WIDTH), form=None, inputs=lambda given: given)
    (found,) = layers({"decoder": model()}, {"decoder": {"x": Picture("x", WIDTH)}}, lambda graph, read: same)
    assert found.output is None


def test_a_table_that_tokens_alone_read_has_no_product() -> None:
    from onnx import TensorProto

    table = graph(
        node("Gather", "table ids", "y"),
        constants={"table": normal(80, WIDTH)},
        inputs={"ids": (TensorProto.INT64, ["B", "T"])},
    )
    (found,) = layers({"encoder": table}, {"encoder": {}}, lambda *given: in_channels({}, StaticRecipe(), *given))
    assert (found.rows, found.columns, found.output) == (WIDTH, 80, None)
    assert 0 < found.weight < 0.01


def test_what_is_kept_in_float_has_no_error() -> None:
    recipe = StaticRecipe().with_finer({"first.weight"})
    (found,) = layers(
        {"decoder": model()},
        seen(normal(9, WIDTH)),
        lambda *given: in_channels({"decoder": {"x": 1.0}}, recipe, *given),
    )
    assert (found.form, found.weight, found.output) == (None, 0.0, 0.0)


def test_rows_are_rounded_by_row_and_block() -> None:
    given = np.array([[127, 63.6, 1270, 4], [0, 0, 0, 0]], np.float32)
    np.testing.assert_array_equal(by_row_and_block(2)(given), [[127, 64, 1270, 0], [0, 0, 0, 0]])


def test_rows_are_rounded_by_tensor_and_clipped() -> None:
    np.testing.assert_array_equal(by_tensor(127.0, INT8)(np.array([[1.6, -300, 200]], np.float32)), [[2, -127, 127]])


def test_a_value_far_above_the_rest_is_an_outlier_with_its_channel() -> None:
    values, weight = normal(400, WIDTH), normal(WIDTH, WIDTH)
    values[7, 11], weight[5, 9] = -90, 70
    far = outliers(seen(values), {"decoder": model(weight)})
    assert [(each.kind, each.name, each.channel, each.largest) for each in far] == [
        ("activation", "x", 11, 90),
        ("weight", "first.weight", 5, 70),
    ]
    assert all(each.times > 10 for each in far)
    assert outliers(seen(normal(400, WIDTH)), {"decoder": model()}) == []
