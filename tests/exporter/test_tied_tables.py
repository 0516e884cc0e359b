"""Tables for TensorRT: one of 8 bits that has a head is stored as the head multiplies with it, and says the same to the bit."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from tests.calibration.graphs import engine, operators, parsed
from tests.calibration.made import normal
from txopt.calibration.blocks import Blocks, BlockScheme, dequantize
from txopt.calibration.quantize import found, put
from txopt.exporter import weights
from txopt.exporter.lowering.tied import turn_tables
from txopt.exporter.products import prove
from txopt.runtime.backends.ort import Runner
from txopt.runtime.errors import ParityError

V, M = 90, 128
EIGHT, COLUMNS, FOUR = (BlockScheme(bits=bits, block=block) for bits, block in ((8, 64), (8, None), (4, 64)))
TIED = (
    "(int64[B,Q] ids, float[B,Q,128] x) => (float[B,Q,M] e, float[B,Q,V] y) "
    "{ e = Gather(w, ids)  t = Transpose(w)  y = MatMul(x, t) }"
)
LOOKUP = "(int64[B,Q] ids) => (float[B,Q,M] e) { e = Gather<axis=0>(w, ids) }"
HEAD = "(float[B,Q,128] x) => (float[B,Q,V] y) { t = Transpose<perm=[1,0]>(w)  y = MatMul(x, t) }"


def exactly(scheme: BlockScheme) -> Blocks:
    """Codes and powers of two as scales: sums with small integers are exact, in whatever order an engine takes them."""
    drawn = np.random.default_rng(3)
    codes = drawn.integers(scheme.lowest, scheme.highest + 1, (M, V)).astype(np.int8)
    scales = np.exp2(drawn.integers(-6, -2, (scheme.count(M), V))).astype(np.float32)
    return Blocks(codes, scales, None, scheme)


def placed(text: str, scheme: BlockScheme) -> ir.Model:
    """``text`` with its weight w, a table [V,M], or [M,V] where a product reads it, in blocks."""
    model = parsed(text, w=np.zeros((M, V) if "MatMul(x, w)" in text else (V, M), np.float32))
    put(model.graph, {"w": exactly(scheme)})
    return model


def given(model: ir.Model) -> dict[str, NDArray[Any]]:
    drawn = np.random.default_rng(5)
    feeds = {"ids": drawn.integers(0, V, (2, 7)), "x": drawn.integers(-9, 10, (2, 7, M)).astype(np.float32)}
    feeds["ids"][0, :2] = 0, V - 1
    return {str(value.name): feeds[str(value.name)] for value in model.graph.inputs}


@pytest.mark.parametrize("scheme", [EIGHT, COLUMNS], ids=["blocks", "columns"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TIED, ["DequantizeLinear", "Gather", "Transpose", "MatMul"]),
        (HEAD, ["DequantizeLinear", "MatMul"]),
        (
            TIED.replace("[B,Q]", "[B]").replace("[B,Q,M]", "[B,M]"),
            ["DequantizeLinear", "Gather", "Transpose", "MatMul"],
        ),
    ],
    ids=["tied", "a head alone", "one token a row"],
)
def test_a_head_of_8_bits_multiplies_with_codes_as_they_lie(
    text: str, expected: list[str], scheme: BlockScheme
) -> None:
    model = placed(text, scheme)
    feeds = given(model)
    if "int64[B]" in text:
        feeds["ids"] = feeds["ids"][0]
    before = engine(model, as_written=True, **feeds)
    turn_tables([model])
    assert operators(model) == expected
    codes = model.graph.initializers["w/turned"].const_value
    assert codes is not None
    np.testing.assert_array_equal(codes.numpy(), exactly(scheme).codes)
    assert set(model.graph.initializers) == {"w/turned", "w/steps"}
    (blocks,) = found(model.graph).values()
    np.testing.assert_array_equal(blocks.scales, exactly(scheme).scales)
    for after, was in zip(engine(model, as_written=True, **feeds), before, strict=True):
        np.testing.assert_array_equal(after, was)


@pytest.mark.parametrize(("text", "scheme"), [(TIED, FOUR), (LOOKUP, EIGHT), (LOOKUP, COLUMNS)])
def test_four_bits_and_tables_without_a_head_stay(text: str, scheme: BlockScheme) -> None:
    model = placed(text, scheme)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    turn_tables([model])
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("scheme", [EIGHT, COLUMNS, FOUR], ids=str)
def test_a_table_is_stored_once_for_both_graphs(scheme: BlockScheme, tmp_path: Path) -> None:
    models = {"encoder": placed(LOOKUP, scheme), "decoder": placed(TIED, scheme)}
    before = {name: engine(model, as_written=True, **given(model)) for name, model in models.items()}
    turn_tables(models.values())
    for name, model in models.items():
        for after, was in zip(engine(model, as_written=True, **given(model)), before[name], strict=True):
            np.testing.assert_array_equal(after, was)
    assert weights.write(models, tmp_path) == V * M * scheme.bits // 8 + 4 * V * scheme.count(M)


@pytest.mark.parametrize("scheme", [EIGHT, COLUMNS, FOUR], ids=str)
def test_products_and_lookups_are_proved_alone(scheme: BlockScheme) -> None:
    blocks = {"decoder": {"w": exactly(scheme)}}
    model = placed(TIED, scheme)
    turn_tables([model])
    proved = prove({"decoder": model}, blocks)
    assert proved.count == 2
    assert proved.largest_error < 1e-6


@pytest.mark.parametrize("scheme", [EIGHT, FOUR], ids=str)
def test_the_runtimes_engine_leaves_activations_in_float32(scheme: BlockScheme, tmp_path: Path) -> None:
    """ONNX Runtime makes one kernel of such a product, and rounds its activations to 8 bits if not told otherwise."""
    model = placed("(float[B,Q,128] x) => (float[B,Q,V] y) { y = MatMul(x, w) }", scheme)
    x = normal(2, 7, M)
    ir.save(model, tmp_path / "product.onnx")
    runner = Runner(tmp_path / "product.onnx")
    exact = x.astype(np.float64) @ dequantize(exactly(scheme))
    untold = onnxruntime.InferenceSession(tmp_path / "product.onnx", providers=["CPUExecutionProvider"])
    got, rounded = runner.array(runner.run({"x": x})["y"]), untold.run(None, {"x": x})[0]
    assert np.abs(got - exact).max() < 1e-5 * np.abs(exact).max() < 1e-2 * np.abs(rounded - exact).max()


@pytest.mark.parametrize("part", ["codes", "scales"])
@pytest.mark.parametrize("scheme", [COLUMNS, FOUR], ids=str)
def test_one_wrong_number_fails_the_proof(scheme: BlockScheme, part: str) -> None:
    blocks, model = exactly(scheme), placed(TIED, scheme)
    turn_tables([model])
    wrong = getattr(blocks, part).copy()
    wrong[0, 5] = wrong[0, 5] + 1 if part == "scales" else 3 - wrong[0, 5] % 2
    changed = Blocks(**{**vars(blocks), part: wrong})
    with pytest.raises(ParityError, match=r"(?s)decoder: .* is off by .*decoder: .* is off by"):
        prove({"decoder": model}, {"decoder": {"w": changed}})
