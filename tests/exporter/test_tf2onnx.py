"""Files that tf2onnx made of Keras and TensorFlow: every attention block and norm is one operator, and they say what they said."""

import lzma
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from txopt import cli
from txopt.exporter.foreign_child import optimize

DATA = Path(__file__).parents[1] / "data" / "tf2onnx"
BLOCKS = {"encoder": 2, "masked": 2, "translator": 6, "keras2": 2, "bert": 2}
NORMS = {"encoder": 4, "masked": 4, "translator": 10, "keras2": 4, "bert": 4}
PACKED = {
    "encoder": 2,
    "masked": 2,
    "translator": 4,
    "keras2": 2,
    "bert": 0,
}  # a translator's other two are cross-attentions
UNPACKED = {"bert": 2}  # its shapes are stacked from what a Split cut a shape into
WRITTEN_OUT = {"Softmax", "GlobalAveragePool", "BatchNormalization", "ReduceMean", "Sqrt", "Reciprocal", "Gemm", "Max"}

MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]], np.int32)  # the last row masks everything
SOURCE = np.array([[5, 6, 7, 8, 9, 3, 2], [5, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]], np.int32)  # zeros are padding
TARGET = np.array([[4, 9, 8, 7], [30, 6, 0, 0], [1, 2, 3, 0]], np.int32)
FEEDS = {
    "encoder": {"ids": SOURCE},
    "masked": {"ids": SOURCE[:, :5], "mask": MASK},
    "translator": {"source": SOURCE, "target": TARGET},
    "keras2": {"x": np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32), "mask": MASK},
    "bert": {"ids": SOURCE[:, :5], "mask": MASK},
}


def unpacked(name: str, folder: Path) -> Path:
    file = folder / f"{name}.onnx"
    file.write_bytes(lzma.decompress((DATA / f"{name}.onnx.xz").read_bytes()))
    return file


@pytest.fixture(scope="module", params=BLOCKS)
def optimized(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, Any]]:
    """The file's name, its folder with what ``txopt optimize --prove`` makes of it beside it, and the report."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    report = optimize(unpacked(request.param, folder), folder, lambda stage: None, prove=True)
    return request.param, folder, report


def answer(file: Path, feeds: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
    found: list[NDArray[np.float32]] = onnxruntime.InferenceSession(file).run(None, feeds)
    return found[0]


def test_every_block_and_every_norm_is_one_operator(optimized: tuple[str, Path, dict[str, Any]]) -> None:
    name, _, report = optimized
    assert report["operators"]["Attention"] == BLOCKS[name]
    assert report["operators"]["LayerNormalization"] == NORMS[name]
    assert report["fusions"]["QKV"]["fused"] == PACKED[name]
    assert not WRITTEN_OUT & report["operators"].keys()


def test_nothing_is_refused_and_every_rewrite_is_proved(optimized: tuple[str, Path, dict[str, Any]]) -> None:
    name, _, report = optimized
    fusions = report["fusions"]
    assert {operator: len(fusion["refused"]) for operator, fusion in fusions.items() if fusion["refused"]} == (
        {"QKV": UNPACKED[name]} if name in UNPACKED else {}
    )
    for operator in ("Attention", "LayerNormalization", "MatMul", "Projection", "Where", "Reduction", "QKV"):
        assert fusions[operator]["proof"]["held"] == fusions[operator]["fused"]
        assert fusions[operator]["proof"]["unproved"] == []


@pytest.mark.parametrize("rows", [[0], [0, 1], [0, 1, 2]], ids=["no padding", "padding", "a row of padding alone"])
def test_the_file_says_what_it_said(optimized: tuple[str, Path, dict[str, Any]], rows: list[int]) -> None:
    name, folder, _ = optimized
    feeds = {key: array[rows] for key, array in FEEDS[name].items()}
    before, after = answer(folder / f"{name}.onnx", feeds), answer(folder / "model.onnx", feeds)
    assert np.isfinite(before).all()
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)


def test_a_changed_scale_is_seen(optimized: tuple[str, Path, dict[str, Any]], tmp_path: Path) -> None:
    name, folder, _ = optimized
    model = onnx.load(folder / "model.onnx")
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Attention" else ():
            if attribute.name == "scale":
                attribute.f *= 1.01
    onnx.save(model, tmp_path / "changed.onnx")
    assert not np.allclose(
        answer(tmp_path / "changed.onnx", FEEDS[name]), answer(folder / "model.onnx", FEEDS[name]), atol=1e-5
    )


def test_the_command_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["optimize", str(unpacked("translator", tmp_path)), str(tmp_path / "out"), "--quiet"])
    assert done.value.code == 0
    said = capsys.readouterr().out
    assert "LayerNormalization: 10 fused, 0 refused" in said
    assert "Attention: 6 fused, 0 refused" in said
