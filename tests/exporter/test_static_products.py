"""Every product of static int8 alone: integers in numpy and in the engine are the same, and what is wrong is named."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from tests.calibration.graphs import graph, linear, node, rows
from tests.calibration.made import normal
from txopt.calibration.static import place
from txopt.exporter.lowering.static import lower_static
from txopt.exporter.products import TOLERANCE
from txopt.exporter.static_products import prove_static
from txopt.runtime.errors import ParityError

WIDTH = 64


def placed() -> ir.Model:
    """A linear layer of large codes, and a head."""
    model = graph(
        node("Gather", "table ids", "x"),
        *linear("x", "first", "h"),
        node("Transpose", "table", "head", perm=[1, 0]),
        node("MatMul", "h head", "y"),
        constants={
            "table": normal(80, WIDTH),
            "first.weight": np.full((WIDTH, WIDTH), 0.7, np.float32),
            "first.bias": normal(WIDTH),
        },
        inputs={"ids": (TensorProto.INT64, ["B", "T"])},
    )
    place(model.graph, {"x": 4.0, "h": 100.0})
    return model


@pytest.mark.parametrize("lowered", [False, True], ids=["neutral", "lowered"])
def test_products_are_those_of_their_integers(lowered: bool) -> None:
    model = placed()
    if lowered:
        lower_static(model)
    found = prove_static({"decoder": model})
    assert found.count == 2
    assert found.largest_error <= TOLERANCE


def test_what_an_engine_computes_otherwise_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that saturate, as those of uint8 and int8 do in 16 bits."""
    from txopt.exporter import static_products

    run = static_products._run
    monkeypatch.setattr(static_products, "_run", lambda *given: np.clip(run(*given), -50, 50))
    with pytest.raises(ParityError, match=r"decoder: .* is off by"):
        prove_static({"decoder": placed()})


def test_a_graph_without_codes_has_nothing_to_prove() -> None:
    model = graph(node("MatMul", "x w", "y"), constants={"w": normal(WIDTH, WIDTH)}, inputs=rows(WIDTH))
    assert prove_static({"decoder": model}).count == 0
