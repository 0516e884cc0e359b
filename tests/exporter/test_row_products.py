"""Products whose activations are rounded row by row: integers as written down, equal in any batch, proved one by one."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.calibration.graphs import engine, operators, parsed, reference, rounded
from tests.calibration.made import normal
from txopt.calibration.blocks import Blocks, BlockScheme, dequantize
from txopt.calibration.quantize import put, unfold
from txopt.calibration.recipe import COLUMNS
from txopt.calibration.rounding import round_to_nearest
from txopt.exporter import row_products
from txopt.exporter.lowering.activations import round_activations
from txopt.exporter.lowering.floats import raise_blocks
from txopt.exporter.lowering.ort import lower_for_cpu
from txopt.exporter.lowering.rows import PRODUCT, lower_rows
from txopt.exporter.products import TOLERANCE, prove
from txopt.exporter.row_products import round_rows
from txopt.runtime.errors import ParityError

K, N, V = 96, 80, 70
LINEAR = f"(float[B,Q,{K}] x) => (float[B,Q,{N}] y) {{ y = MatMul(x, w) }}"
TIED = (
    f"(int64[B,Q] ids) => (float[B,Q,{V}] y) "
    "{ e = Gather(table, ids)  p = MatMul(e, w)  h = Add(p, b)  turned = Transpose<perm=[1,0]>(table)  y = MatMul(h, turned) }"
)
WEIGHTS = {"table": normal(V, K), "w": normal(K, K, seed=1), "b": normal(K, seed=2)}


def placed(text: str, scheme: BlockScheme = COLUMNS, **weights: NDArray[Any]) -> tuple[ir.Model, dict[str, Blocks]]:
    model = parsed(text, **weights)
    return model, rounded(model, scheme)


def test_the_neutral_form_has_one_scale_for_each_output() -> None:
    model, blocks = placed(TIED, **WEIGHTS)
    axes = {node.name: node.attributes["axis"].as_int() for node in model.graph if node.op_type == "DequantizeLinear"}
    assert axes == {"table/dequantize": 0, "w/dequantize": 1}
    assert model.graph.initializers["w/scales"].const_value.shape.numpy() == (K,)  # type: ignore[union-attr]
    ids = np.array([[1, 5, 69]])
    weight, table = dequantize(blocks["w"]), dequantize(blocks["table"]).T
    expected = (table[ids] @ weight + WEIGHTS["b"]) @ table.T
    unfolded = model.clone()
    unfold(unfolded.graph)
    for each in (reference(model, ids=ids)[0], engine(unfolded, ids=ids)[0]):
        np.testing.assert_allclose(each, expected, rtol=1e-4, atol=1e-4)


@given(
    rows=st.integers(1, 9),
    magnitudes=st.lists(st.sampled_from([0.0, 1e-38, 1e-6, 1.0, 3e4, 1e30]), min_size=9, max_size=9),
    seed=st.integers(0, 99),
)
def test_a_row_is_what_its_integers_say(rows: int, magnitudes: list[float], seed: int) -> None:
    model, blocks = placed(LINEAR, w=normal(K, N))
    lower_rows(model)
    x = normal(1, rows, K, seed=seed) * np.float32(magnitudes[:rows])[:, None]
    rounded, weight = round_rows(x), dequantize(blocks["w"]).astype(np.float64)
    got = engine(model, x=x)[0]
    assert (np.abs(got - rounded @ weight) <= 1e-6 * (np.abs(rounded) @ np.abs(weight)) + 1e-35).all()


def test_codes_are_the_nearest_integers() -> None:
    """127 for the largest of a row, half of a step at most for all others."""
    x = np.array([[127, 63.5, -127, 0.49, 0.5, -0.5, 1], [1, 0, 0, 0, 0, 0, 0]], np.float32)
    assert round_rows(x)[0].tolist() == [127, 64, -127, 0, 1, 0, 1]
    assert round_rows(x)[1].tolist() == [1, 0, 0, 0, 0, 0, 0]
    drawn = normal(50, 300)
    step = np.abs(drawn).max(axis=-1, keepdims=True) / 127
    assert (np.abs(round_rows(drawn) - drawn) <= 0.5001 * step).all()


def test_a_row_does_not_depend_on_its_batch() -> None:
    model, _ = placed(LINEAR, w=normal(K, N))
    lower_rows(model)
    x = normal(5, 7, K) * np.float32(10) ** np.arange(-3, 2, dtype=np.float32)[:, None, None]
    together = engine(model, x=x)[0]
    for b in range(5):
        for q in range(7):
            alone = engine(model, x=x[b : b + 1, q : q + 1])[0]
            assert (alone == together[b, q]).all()


def test_a_value_is_rounded_once_for_all_its_products() -> None:
    text = f"(float[B,Q,{K}] x) => (float[B,Q,{K}] y) {{ a = MatMul(x, v)  b = MatMul(x, w)  c = Add(a, b)  y = MatMul(c, w) }}"
    model, blocks = placed(text, v=normal(K, K, seed=1), w=normal(K, K))
    lower_rows(model)
    found = operators(model)
    assert found.count(PRODUCT) == 3
    assert found.count("ReduceMax") == 2
    x = normal(2, 3, K)
    weights = {name: dequantize(each).astype(np.float64) for name, each in blocks.items()}
    inner = round_rows(x) @ weights["v"] + round_rows(x) @ weights["w"]
    expected = round_rows(inner.astype(np.float32)) @ weights["w"]
    np.testing.assert_allclose(engine(model, x=x)[0], expected, rtol=2e-2, atol=1.0)


def test_a_tied_table_is_stored_once_and_looked_up_by_its_codes() -> None:
    model, blocks = placed(TIED, **WEIGHTS)
    lower_for_cpu(model, "int8")
    assert [node.op_type for node in model.graph if node.op_type == PRODUCT] == [PRODUCT] * 2
    eight = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8]
    assert sorted(str(value.name) for value in eight) == ["table/codes", "w/codes"]
    ids = np.array([[1, 5, 69], [0, 2, 2]])
    table = dequantize(blocks["table"]).T
    inner = round_rows(table[ids]) @ dequantize(blocks["w"]).astype(np.float64) + WEIGHTS["b"]
    expected = round_rows(inner.astype(np.float32)) @ table.T.astype(np.float64)
    np.testing.assert_allclose(engine(model, ids=ids)[0], expected, rtol=1e-2, atol=0.5)


def test_blocks_and_columns_live_in_one_graph() -> None:
    model = parsed(TIED, **WEIGHTS)
    blocks = {
        "table": round_to_nearest(WEIGHTS["table"].T, COLUMNS),
        "w": round_to_nearest(WEIGHTS["w"], BlockScheme(bits=8, block=32)),
    }
    put(model.graph, blocks)
    lower_for_cpu(model, "int8")
    assert {"MatMulNBits", PRODUCT} <= set(operators(model))
    assert prove({"decoder": model}, {"decoder": blocks}).count == 2


def test_raised_it_computes_with_the_rounded_weights() -> None:
    model, blocks = placed(TIED, **WEIGHTS)
    plain = model.clone()
    unfold(plain.graph)
    lower_for_cpu(model, "int8")
    raise_blocks(model, blocks)
    assert PRODUCT not in operators(model)
    ids = np.array([[3, 1, 4, 1, 5]])
    np.testing.assert_allclose(engine(model, ids=ids)[0], engine(plain, ids=ids)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("large", [False, True], ids=["drawn", "codes at their ends"])
def test_every_product_is_proved(large: bool) -> None:
    weights = {**WEIGHTS, "w": np.full((K, K), 0.7, np.float32)} if large else WEIGHTS
    model, blocks = placed(TIED, **weights)
    lower_for_cpu(model, "int8")
    found = prove({"decoder": model}, {"decoder": blocks})
    assert found.count == 2
    assert found.largest_error <= TOLERANCE


def test_codes_that_are_others_are_found() -> None:
    model, blocks = placed(TIED, **WEIGHTS)
    lower_for_cpu(model, "int8")
    codes = model.graph.initializers["table/codes"]
    assert codes.const_value is not None
    codes.const_value = ir.Tensor(np.roll(codes.const_value.numpy(), 1, axis=0), name=codes.name)
    with pytest.raises(ParityError, match=r"decoder: .* is off by"):
        prove({"decoder": model}, {"decoder": blocks})


def test_an_engine_that_saturates_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model, blocks = placed(TIED, **WEIGHTS)
    lower_for_cpu(model, "int8")
    run = row_products._run
    monkeypatch.setattr(row_products, "_run", lambda *given: np.clip(run(*given), -1000, 1000))
    with pytest.raises(ParityError, match=r"decoder: .* is off by"):
        prove({"decoder": model}, {"decoder": blocks})


def test_what_is_meant_can_be_computed_in_float32() -> None:
    model, _ = placed(TIED, **WEIGHTS)
    meant = model.clone()
    unfold(meant.graph)
    round_activations(meant.graph, {"w/rounded": None, "table/rounded": None})
    assert operators(meant).count("ReduceMax") == 2
    lower_for_cpu(model, "int8")
    ids = np.array([[3, 1, 4, 1, 5]])
    np.testing.assert_allclose(engine(model, ids=ids)[0], engine(meant, ids=ids)[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("width", [96, 80], ids=["whole blocks", "a short last block"])
@pytest.mark.parametrize(
    "scheme",
    [BlockScheme(bits=8, block=64), BlockScheme(bits=8, block=32), BlockScheme(bits=4, block=32, symmetric=False)],
)
def test_what_products_in_blocks_mean_can_be_computed_in_float32(scheme: BlockScheme, width: int) -> None:
    text = f"(float[B,Q,{width}] x) => (float[B,Q,{N}] y) {{ y = MatMul(x, w) }}"
    model, _ = placed(text, scheme, w=normal(width, N))
    plain, meant = model.clone(), model.clone()
    for each in (plain, meant):
        unfold(each.graph)
    round_activations(meant.graph, {"w/rounded": scheme.block})
    lower_for_cpu(model, "int8")
    x = normal(3, 4, width, seed=5)
    got, exact, unrounded = (engine(each, x=x)[0] for each in (model, meant, plain))
    np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-4)
    assert np.abs(got - unrounded).max() > 0.05
