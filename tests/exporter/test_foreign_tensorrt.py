"""Files of torch's two exporters after ``txopt optimize``: the graphs are neutral, so TensorRT-RTX parses and builds them as well."""

from pathlib import Path

import pytest

from tests.exporter import rtx
from tests.exporter.cached_decoders import LAYERS, Causal, Grouped, Unmasked, exported
from txopt.benchmarks.foreign_models import EXPORTERS, Size, build, write
from txopt.exporter import foreign

pytestmark = [pytest.mark.slow, pytest.mark.tensorrt]


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", ["T5", "BART", "Whisper"])
def test_what_was_fused_builds(name: str, exporter: str, tmp_path: Path) -> None:
    model = build(name, Size())
    write(model, exporter, tmp_path / "in.onnx")
    report = foreign.optimize(tmp_path / "in.onnx", tmp_path / "out")
    assert report.operators["Attention"] == model.blocks
    assert rtx.build(tmp_path / "out" / "model.onnx").layers["ATTENTION_OUTPUT"] == model.blocks


@pytest.mark.parametrize("dynamo", [True, False], ids=EXPORTERS)
@pytest.mark.parametrize("kind", [Causal, Grouped], ids=lambda kind: kind.__name__)
def test_buffers_that_are_updated_in_place_build(kind: type[Unmasked], dynamo: bool, tmp_path: Path) -> None:
    """Of the length that TensorRT must know; with groups of heads the buffers hold few of them."""
    foreign.optimize(exported(kind, tmp_path, dynamo=dynamo), tmp_path / "out", in_place_cache=True)
    (tmp_path / "fixed").mkdir()
    file = rtx.with_a_fixed_cache(tmp_path / "out" / "model.onnx", tmp_path / "fixed", axis="cache_length")
    layers = rtx.build(file).layers
    assert (layers["ATTENTION_OUTPUT"], layers["KV_CACHE_UPDATE"]) == (LAYERS, 2 * LAYERS)
