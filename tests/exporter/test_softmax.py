"""Softmaxes of opset 12 and before: known again where they are today's, left alone where they are not."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from txopt.exporter.foreign import optimize


def attention(path: Path, *, axis: int) -> Path:
    """Q, K, V [B,2,L,4] and a softmax over the scores' axes from ``axis`` on, in opset 11."""
    names = ("q", "k", "v")
    nodes = [
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["scores"]),
        helper.make_node("Mul", ["scores", "half"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["weights"], axis=axis),
        helper.make_node("MatMul", ["weights", "v"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 2, "L", 4]) for name in names]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 2, "L", 4])
    half = helper.make_tensor("half", TensorProto.FLOAT, [], [0.5])
    graph = helper.make_graph(nodes, "attention", inputs, [output], [half])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=7), path)
    return path


@pytest.mark.parametrize(("axis", "fused"), [(3, 1), (-1, 1), (1, 0), (2, 0)])
def test_only_a_softmax_over_the_last_axis_is_attention(tmp_path: Path, axis: int, fused: int) -> None:
    report = optimize(attention(tmp_path / "in.onnx", axis=axis), tmp_path / "out")
    assert report.fusions["Attention"]["fused"] == fused
    assert report.parity["largest_error"] < 1e-5


def test_the_file_that_is_read_is_not_replaced(tmp_path: Path) -> None:
    from txopt.runtime.errors import ArtifactError

    optimize(attention(tmp_path / "in.onnx", axis=3), tmp_path / "out")
    before = (tmp_path / "out" / "model.onnx").read_bytes()
    with pytest.raises(ArtifactError, match="would be replaced while it is read"):
        optimize(tmp_path / "out" / "model.onnx", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "model.onnx").read_bytes() == before
    assert np.isfinite(report_error(tmp_path))


def report_error(folder: Path) -> float:
    """Of optimizing once more, elsewhere: that is allowed."""
    return float(optimize(folder / "out" / "model.onnx", folder / "again").parity["largest_error"])
