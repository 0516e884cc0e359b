"""Weights as blocks in a graph: what put leaves, what found and unfold read back."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.calibration.graphs import INT8, SCHEMES, engine, operators, parsed, rounded
from tests.calibration.made import SCHEMES as EVERY_SCHEME
from tests.calibration.made import normal
from txopt.calibration.blocks import BlockScheme, dequantize
from txopt.calibration.quantize import constant, found, is_weight, put, remove, unfold
from txopt.calibration.rounding import round_to_nearest

TIED = "(int64[B,Q] ids) => (float[B,Q,V] y) { h = Gather(w, ids)  t = Transpose(w)  y = MatMul(h, t) }"
LAYERS = "(float[B,Q,K] x) => (float[B,Q,K] y) { h = MatMul(x, a)  y = MatMul(h, b) }"


def test_a_weight_becomes_a_standard_node() -> None:
    model = parsed(LAYERS, a=normal(100, 100), b=normal(100, 100, seed=1))
    put(model.graph, {"a": round_to_nearest(normal(100, 100), INT8)})
    assert sorted(operators(model)) == ["DequantizeLinear", "MatMul", "MatMul"]
    assert sorted(model.graph.initializers) == ["a/codes", "a/scales", "b"]
    node = next(node for node in model.graph if is_weight(node))
    assert {name: attribute.as_int() for name, attribute in node.attributes.items()} == {"axis": 0, "block_size": 64}
    codes, scales = (value.const_value for value in node.inputs if value is not None)
    assert codes is not None
    assert scales is not None
    assert (codes.dtype, list(codes.shape)) == (ir.DataType.INT8, [100, 100])
    assert (scales.dtype, list(scales.shape)) == (ir.DataType.FLOAT, [2, 100])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_table_is_dequantized_once_for_all_its_readers(scheme: BlockScheme) -> None:
    model = parsed(TIED, w=normal(90, 70))
    (blocks,) = rounded(model, scheme).values()
    assert sorted(operators(model)) == ["DequantizeLinear", "Gather", "MatMul", "Transpose"]
    node = next(iter(found(model.graph)))
    assert node.attributes["axis"].as_int() == 1
    codes = node.inputs[0]
    assert codes is not None
    assert codes.shape == ir.Shape([90, 70])
    assert codes.type == ir.TensorType(getattr(ir.DataType, f"{'' if scheme.symmetric else 'U'}INT{scheme.bits}"))
    assert blocks.codes.shape == (70, 90)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("text", [TIED, LAYERS.replace("b)", "a)")], ids=["a table", "a weight of two layers"])
def test_unfolded_floats_are_what_the_integers_stand_for(text: str, scheme: BlockScheme) -> None:
    """Held against the engine's own DequantizeLinear, and against the arithmetic of blocks.py."""
    size = (90, 70) if text is TIED else (70, 70)
    model = parsed(text, **{"w" if text is TIED else "a": normal(*size) / 8})
    given = {"ids": np.array([[0, 89, 5]])} if text is TIED else {"x": normal(2, 3, 70)}
    ((name, blocks),) = rounded(model, scheme).items()
    floats = model.clone()
    unfold(floats.graph)
    assert list(floats.graph.initializers) == [f"{name}/rounded"]
    weight = floats.graph.initializers[f"{name}/rounded"].const_value
    assert weight is not None
    want = dequantize(blocks)
    np.testing.assert_array_equal(weight.numpy(), want.T if text is TIED else want)
    (got,), (expected,) = engine(floats, **given), engine(model, **given)
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 12),
    scheme=st.sampled_from(EVERY_SCHEME),
    table=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_come_back_as_they_were_put(
    rows: int, columns: int, scheme: BlockScheme, table: bool, seed: int
) -> None:
    columns += 4096 // rows
    weight = normal(rows, columns, seed=seed)
    text = TIED if table else LAYERS.replace("y = MatMul(h, b)", "y = Neg(h)").replace("a)", "w)")
    model = parsed(text, w=weight.T.copy() if table else weight)
    (want,) = rounded(model, scheme).values()
    (got,) = found(model.graph).values()
    assert got.scheme == want.scheme
    for field in ("codes", "scales", "zeros"):
        np.testing.assert_array_equal(getattr(got, field), getattr(want, field))


def test_what_is_not_asked_for_stays_as_it_is() -> None:
    """Names that are no weights of this graph are another graph's."""
    model = parsed(LAYERS, a=normal(100, 100), b=normal(100, 100))
    before = engine(model, x=normal(1, 2, 100))
    put(model.graph, {})
    put(model.graph, {"of the other graph": round_to_nearest(normal(100, 100), INT8)})
    assert sorted(operators(model)) == ["MatMul", "MatMul"]
    np.testing.assert_array_equal(engine(model, x=normal(1, 2, 100)), before)


def test_a_graph_that_was_put_is_done() -> None:
    """What is quantized has no readers of its floats any more, so asking again finds nothing."""
    model = parsed(TIED, w=normal(90, 70))
    rounded(model, INT8)
    before = operators(model)
    assert rounded(model, INT8) == {}
    assert operators(model) == before


def test_other_dequantized_values_are_no_weights() -> None:
    """Activations of static int8 have no blocks, and a dequantized input no constants."""
    model = parsed(
        "(int8[64,64] x, float[64] s, int8[64,64] z) => (float[64,64] y, float[64,64] v)"
        " { y = DequantizeLinear<axis=0>(x, s)  v = DequantizeLinear<axis=0, block_size=64>(z, g) }",
        g=np.ones((1, 64), np.float32),
    )
    assert found(model.graph) == {}


def test_constants_are_made_once_and_go_with_their_last_reader() -> None:
    model = parsed("(float[B,64] x) => (float[B,64] y) { p = Neg(x)  y = Neg(p) }")
    one = constant(model.graph, "one", ir.tensor(np.ones(64, np.float32)))
    assert constant(model.graph, "one", ir.tensor(np.zeros(64, np.float32))) is one
    nodes = [ir.node("Add", [model.graph.inputs[0], one]) for _ in range(2)]
    model.graph.extend(nodes)
    remove(model.graph, nodes[0])
    assert "one" in model.graph.initializers
    remove(model.graph, nodes[1])
    assert "one" not in model.graph.initializers
    assert [str(value.name) for value in model.graph.inputs] == ["x"]


def test_unfolding_a_clone_leaves_the_graph_as_it_is() -> None:
    model = parsed(TIED, w=normal(90, 70))
    rounded(model, INT8)
    twin = model.clone()
    unfold(twin.graph)
    assert len(found(model.graph)) == 1
    assert found(twin.graph) == {}
