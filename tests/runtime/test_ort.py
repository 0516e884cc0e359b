"""Where ONNX Runtime is wrong, and the runner keeps it from being so."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from txopt.runtime.backends import ort


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Relu, and a pair in E4M3 with a step of 1/2."""
    made = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["positive"]),
            helper.make_node("QuantizeLinear", ["positive", "scale", "zero"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, [], [0.5]),
            helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True),
        ],
    )
    onnx.save(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 24)], ir_version=11), tmp_path / "graph.onnx"
    )
    return tmp_path / "graph.onnx"


@pytest.fixture
def product(tmp_path: Path) -> Path:
    """Codes of activations times codes of weights, 64 of the largest each."""
    made = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "one", "zero"], ["rounded"]),
            helper.make_node("DequantizeLinear", ["weight", "one"], ["dequantized"]),
            helper.make_node("MatMul", ["rounded", "dequantized"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64])],
        [
            helper.make_tensor("one", TensorProto.FLOAT, [], [1.0]),
            helper.make_tensor("zero", TensorProto.UINT8, [], [0]),
            helper.make_tensor("weight", TensorProto.INT8, [64, 64], [127] * 64 * 64),
        ],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 24)], ir_version=11), tmp_path / "y.onnx")
    return tmp_path / "y.onnx"


X = np.array([-3, -1, 1, 3], np.float32)


def said(graph: Path) -> list[float]:
    runner = ort.Runner(graph)
    return runner.array(runner.run({"x": X})["y"]).tolist()


def test_a_relu_before_float8_stays(graph: Path) -> None:
    assert said(graph) == [0, 0, 1, 3]


def test_the_engine_left_alone_takes_it_away(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the runner says what to leave: to go when this fails."""
    monkeypatch.setattr(ort, "DISABLED", [])
    assert said(graph) == [-3, -1, 1, 3]


def test_sums_of_integers_do_not_saturate(product: Path) -> None:
    """Where the processor has no VNNI, they do unless the engine is told."""
    runner = ort.Runner(product)
    largest = np.full((1, 64), 255, np.float32)
    assert runner.array(runner.run({"x": largest})["y"]).tolist() == [[64 * 255 * 127] * 64]
