"""Where ONNX Runtime is wrong, and the runner keeps it from being so."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.runtime.fake_cuda import FakeCuda
from tests.runtime.far import Far
from txopt.runtime.artifact import Artifact
from txopt.runtime.backends import ort, ort_session
from txopt.runtime.backends.cuda import Device
from txopt.runtime.model import load


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
    monkeypatch.setattr(ort_session, "DISABLED", [])
    assert said(graph) == [-3, -1, 1, 3]


def test_sums_of_integers_do_not_saturate(product: Path) -> None:
    """Where the processor has no VNNI, they do unless the engine is told."""
    runner = ort.Runner(product)
    largest = np.full((1, 64), 255, np.float32)
    assert runner.array(runner.run({"x": largest})["y"]).tolist() == [[64 * 255 * 127] * 64]


GPUS: list[Device] = []


class Reachable(Far):
    """CUDA can be called, where there is a GPU of GPUS."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._gpu = GPUS[-1] if GPUS else None


@pytest.mark.parametrize("reachable", [False, True], ids=["through the host", "where they lie"])
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 1}], ids=str)
def test_tensors_of_a_device_are_kept_in_step(
    search: dict[str, Any], reachable: bool, g2p: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU does differently, without one: inputs are sent, outputs fetched, and rows moved by CUDA where it can be called."""
    source: dict[str, Any] = {"input_ids": np.array([[5, 6, 7, 2], [9, 2, 0, 0]])}
    expected = load(g2p.path, threads=1).generate(**source, **search).sequences
    cuda = FakeCuda()
    cuda.mapped = True
    monkeypatch.setattr(ort, "Runner", Reachable)
    if reachable:
        GPUS.append(Device(cuda, 0))
    try:
        got = load(g2p.path, threads=1).generate(**source, **search).sequences
    finally:
        GPUS.clear()
    np.testing.assert_array_equal(got, expected)
    assert ("cudaMemcpy3DAsync" in cuda.calls) is (reachable and "num_beams" in search)
    gc.collect()
    assert cuda.left() == cuda.faults == []
