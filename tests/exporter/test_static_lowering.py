"""What the CPU's lowering makes of static int8: the same numbers, in the kernels that multiply integers."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from tests.calibration.graphs import engine, graph, linear, node, opened, operators, reference, rows
from tests.calibration.made import normal
from txopt.calibration.static import place
from txopt.exporter.lowering.static import lower_static

WIDTH = 64


def shared() -> ir.Model:
    """Two products of one tensor."""
    names = ("left", "right")
    model = graph(
        *linear("x", "left", "a"),
        *linear("x", "right", "b"),
        node("Add", "a b", "y"),
        constants={f"{name}.weight": normal(WIDTH, WIDTH, seed=seed) for seed, name in enumerate(names)}
        | {f"{name}.bias": normal(WIDTH, seed=seed) for seed, name in enumerate(names)},
        inputs=rows(WIDTH),
    )
    place(model.graph, {"x": 4.0})
    return model


def tied() -> ir.Model:
    model = graph(
        node("Gather", "table ids", "x"),
        node("Transpose", "table", "head", perm=[1, 0]),
        node("MatMul", "x head", "y"),
        constants={"table": normal(80, WIDTH)},
        inputs={"ids": (TensorProto.INT64, ["B", "T"])},
    )
    place(model.graph, {"x": 4.0})
    return model


def activated() -> ir.Model:
    """Two products with a Relu between them."""
    model = graph(
        *linear("x", "left", "a"),
        node("Relu", "a", "h"),
        *linear("h", "right", "y"),
        constants={f"{name}.weight": normal(WIDTH, WIDTH, seed=seed) for seed, name in enumerate(("left", "right"))}
        | {f"{name}.bias": normal(WIDTH, seed=seed) for seed, name in enumerate(("left", "right"))},
        inputs=rows(WIDTH),
    )
    place(model.graph, {"x": 4.0, "h": 20.0})
    return model


FEEDS = {"x": normal(2, 3, WIDTH, seed=5)}
IDS = {"ids": np.array([[0, 79, 3], [3, 4, 5]])}


@pytest.mark.parametrize(
    ("make", "feeds"), [(shared, FEEDS), (activated, FEEDS), (tied, IDS)], ids=["shared", "activated", "tied"]
)
def test_lowering_changes_no_number(make, feeds) -> None:
    neutral, lowered = make(), make()
    lower_static(lowered)
    assert np.array_equal(reference(lowered, **feeds)[0], reference(neutral, **feeds)[0])
    assert np.array_equal(engine(lowered, as_written=True, **feeds)[0], engine(neutral, as_written=True, **feeds)[0])
    assert np.allclose(engine(lowered, **feeds)[0], engine(neutral, as_written=True, **feeds)[0], rtol=1e-5, atol=1e-4)


def test_the_grid_is_the_same_at_both_ends() -> None:
    neutral, lowered = shared(), shared()
    lower_static(lowered)
    x = np.array([1000, -1000, 4.0, -4.0, 4.0315, -4.0316], np.float32).repeat(11)[:WIDTH].reshape(1, 1, WIDTH)
    assert np.array_equal(reference(lowered, x=x)[0], reference(neutral, x=x)[0])


@pytest.mark.parametrize(
    ("make", "products"), [(shared, 2), (activated, 2), (tied, 1)], ids=["shared", "activated", "tied"]
)
def test_every_product_is_one_of_integers_and_no_table_is_dequantized_in_a_run(make, products, tmp_path: Path) -> None:
    lowered = make()
    lower_static(lowered)
    file = tmp_path / "optimized.onnx"
    opened(lowered, optimized=str(file))
    optimized = onnx.load(file).graph
    counted = Counter(each.op_type for each in optimized.node)
    assert counted["MatMulIntegerToFloat"] == products
    assert counted["MatMul"] == 0
    constants = {each.name for each in optimized.initializer}
    assert not [n for n in optimized.node if n.op_type == "DequantizeLinear" and n.input[0] in constants]


def test_without_the_lowering_products_that_share_a_tensor_are_computed_in_float(tmp_path: Path) -> None:
    """Why the lowering is there: to go when this fails."""
    file = tmp_path / "optimized.onnx"
    opened(shared(), optimized=str(file))
    counted = Counter(each.op_type for each in onnx.load(file).graph.node)
    assert counted["MatMul"] == 2


def test_large_sums_do_not_saturate() -> None:
    """Products of uint8 and int8 are added in pairs: where that is done in 16 bits, 2 * 255 * 127 does not fit."""
    model = graph(
        node("MatMul", "x w", "y"),
        constants={"w": np.full((WIDTH, WIDTH), 127, np.float32)},
        inputs=rows(WIDTH),
    )
    place(model.graph, {"x": 127.0})
    lower_static(model)
    x = np.full((1, 2, WIDTH), 127, np.float32)
    assert (engine(model, x=x)[0] == WIDTH * 127 * 127).all()


def test_lowered_graphs_are_standard_and_codes_are_looked_up_by_row() -> None:
    model = tied()
    lower_static(model)
    assert {each.domain for each in model.graph} == {""}
    assert operators(model).count("Gather") == 2
    blocked = next(each for each in model.graph if "block_size" in each.attributes)
    assert blocked.attributes["block_size"].as_int() == WIDTH


def test_a_graph_without_pairs_stays_as_it_is() -> None:
    model = graph(
        node("Gather", "table ids", "y"),
        constants={"table": normal(80, WIDTH)},
        inputs={"ids": (TensorProto.INT64, ["B", "T"])},
    )
    lower_static(model)
    assert operators(model) == ["Gather"]
