"""Whole models as torch's old exporter writes them, of fourteen architectures: every attention block and norm fuses, proved."""

from pathlib import Path

import pytest

from txopt.benchmarks.foreign_models import NAMES, Size, build, write
from txopt.exporter import foreign

WINDOWED = {"LED": 2}  # blocks of its encoder, which attend within windows


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in WINDOWED])
def test_everything_fuses_and_is_proved(name: str, tmp_path: Path) -> None:
    model = build(name, Size())
    write(model, "torchscript", tmp_path / "in.onnx")
    report = foreign.optimize(tmp_path / "in.onnx", tmp_path / "out")
    assert report.fusions["Attention"] == {"fused": model.blocks, "refused": []}
    assert report.operators["Attention"] == model.blocks
    assert "Softmax" not in report.operators
    assert report.operators.get("LayerNormalization", 0) + report.operators.get("RMSNormalization", 0) == model.norms
    assert report.parity["largest_error"] < 1e-5


@pytest.mark.slow
def test_windows_are_no_attention_that_could_fuse(tmp_path: Path) -> None:
    model = build("LED", Size())
    write(model, "torchscript", tmp_path / "in.onnx")
    document = foreign.inspect(tmp_path / "in.onnx")
    assert document["fusions"]["Attention"] == {"fused": model.blocks - WINDOWED["LED"], "refused": []}
