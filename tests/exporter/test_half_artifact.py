"""From an fp32 artifact to one in half precision: islands where numbers are large, nothing where float16 does not hold."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from txopt.calibration.islands import LARGEST, MARGIN, Islands
from txopt.exporter import halves, pipeline
from txopt.exporter.pipeline import export
from txopt.exporter.quantize import quantize
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import LossError, ParityError, UsageError
from txopt.runtime.model import Model
from txopt.runtime.parity import TOLERANCE, verify
from txopt.summary import of_artifact

pytestmark = pytest.mark.slow

SOURCES = [{"input_ids": np.arange(2, 2 + length)[None]} for length in (3, 7, 12, 5, 9, 4, 20, 16)]
WORDS = ["cat", "windows", "encyclopedia", "tree", "phonology", "it"]


def operators(island: dict[str, Any]) -> list[str]:
    """Of an island's nodes, which are named PLACE/OPERATOR_NUMBER."""
    return [name.rpartition("/")[2].split("_")[0] for name in island["nodes"]]


def louder(source: Path, target: Path, names: tuple[str, ...], factor: float) -> Path:
    """A copy of a checkpoint with matrices halved, and those that end in ``names`` larger; all still fit into float16."""
    shutil.copytree(source, target)
    for file in target.glob("*.safetensors"):
        tensors = {name: value / 2 if value.ndim > 1 else value for name, value in load_file(file).items()}
        for value in (value for name, value in tensors.items() if name.endswith(names)):
            value *= factor
            assert np.abs(value).max() < LARGEST / MARGIN
        save_file(tensors, file, {"format": "pt"})
    return target


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory, checkpoints: Callable[[str], Path]) -> Artifact:
    """A T5 whose first feed-forward blocks give 300,000: all weights fit into float16, what they make does not."""
    directory = tmp_path_factory.mktemp("loud")
    blocks = [("encoder", 1), ("decoder", 2)]
    names = tuple(f"{part}.block.0.layer.{n}.DenseReluDense.{w}.weight" for part, n in blocks for w in ("wi", "wo"))
    return export(louder(checkpoints("t5"), directory / "source", names, 150), directory / "artifact")


@pytest.fixture(scope="module")
def half(loud: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return quantize(loud.path, tmp_path_factory.mktemp("half") / "out", precision="fp16", calibration=SOURCES)


def test_t5_keeps_the_second_projection_and_the_residual_stream_behind_it(half: Artifact) -> None:
    certificate = half.manifest.calibration
    assert certificate is not None
    islands = certificate["islands"]
    stream = ["Add", "RMSNormalization"]
    assert [operators(island) for island in islands["encoder"]] == [["MatMul", *stream * 3]]
    assert [operators(island) for island in islands["decoder"]] == [["MatMul", *stream * 4]]
    for graph, wo in (("encoder", "layer.1.DenseReluDense.wo"), ("decoder", "layer.2.DenseReluDense.wo")):
        island = islands[graph][0]
        assert f"{graph}.block.0.{wo}" in island["nodes"][0]
        assert f"{graph}.final_layer_norm" in island["nodes"][-1]
        assert {reason["why"] for reason in island["reasons"]} == {"overflow"}
        assert all(reason["largest"] > LARGEST for reason in island["reasons"])


def test_with_islands_it_says_what_float32_says(half: Artifact, loud: Artifact) -> None:
    report = verify(half.path)
    assert report.passed
    assert report.tolerance == TOLERANCE["fp16"]
    assert report.reference == "its rounded weights in float32"
    assert half.manifest.calibration is not None
    around, loss = half.manifest.calibration["graphs"], half.manifest.calibration["loss"]
    assert 0 < around["largest_error"] <= around["tolerance"] == TOLERANCE["fp16"]
    assert loss["agreement"]["forced_tokens"]["value"] >= 99.0
    ids = np.arange(2, 14)[None]
    logits = []
    for artifact in (half, loud):
        model = Model(artifact)
        encoded = model.encode(input_ids=ids, attention_mask=np.ones_like(ids))
        logits.append(model.decode(encoded).prefill(np.array([[0, 5, 6, 7]])))
    assert np.abs(logits[0] - logits[1]).max() <= TOLERANCE["fp16"] * np.abs(logits[1]).max()


def test_weights_and_caches_are_float16_and_logits_are_not(half: Artifact, loud: Artifact) -> None:
    manifest = half.manifest
    assert manifest.cache is not None
    assert (manifest.precision, manifest.cache.dtype) == ("fp16", "float16")
    for name, spec in manifest.graphs.items():
        graph = onnx.load(half.file(spec.file), load_external_data=False).graph
        large = {tensor.data_type for tensor in graph.initializer if np.prod(tensor.dims) >= 1024}
        assert large == {onnx.TensorProto.FLOAT16}, name
        assert {item.name: item.dtype for item in spec.outputs}.get("logits", "float32") == "float32"
    sizes = [artifact.manifest.files["weights.data"].size for artifact in (half, loud)]
    assert sizes[0] < 0.6 * sizes[1]


def test_without_islands_it_is_refused(loud: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "choose", lambda model, seen: Islands(nodes={}))
    with pytest.raises(ParityError, match="memory deviates by nan"):
        quantize(loud.path, tmp_path / "out", precision="fp16", calibration=SOURCES)
    assert not (tmp_path / "out").exists()


def test_the_canary_looks_at_every_output_over_the_data(
    loud: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the reference cases do not overflow, the data still may."""
    monkeypatch.setattr(halves, "choose", lambda model, seen: Islands(nodes={}))
    monkeypatch.setattr(halves, "proved", lambda *given: {})
    with pytest.raises(ParityError, match=r"float16 overflows(?s:.*)encoder: memory: (\d+) of \1 numbers are NaN"):
        quantize(loud.path, tmp_path / "out", precision="fp16", calibration=SOURCES)
    assert not (tmp_path / "out").exists()


def test_a_cache_that_float16_does_not_hold_is_refused(
    loud: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = halves.magnitudes

    def larger(*given: Any, **named: Any) -> Any:
        found = measured(*given, **named)
        found["decoder"].values["present_value.1"] = 1e5  # type: ignore[index]
        return found

    monkeypatch.setattr(halves, "magnitudes", larger)
    with pytest.raises(UsageError, match=r"cache holds numbers that float16 does not.*present_value\.1"):
        quantize(loud.path, tmp_path / "out", precision="fp16", calibration=SOURCES)


def test_cross_keys_that_are_large_stay_float32(
    loud: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = halves.magnitudes

    def larger(*given: Any, **named: Any) -> Any:
        found = measured(*given, **named)
        for graph in ("encoder", "decoder"):
            found[graph].values["cross_key.0"] = 1e5
        return found

    monkeypatch.setattr(halves, "magnitudes", larger)
    made = quantize(loud.path, tmp_path / "out", precision="fp16", calibration=SOURCES)
    dtypes = {
        (name, item.name): item.dtype
        for name, spec in made.manifest.graphs.items()
        for item in (*spec.inputs, *spec.outputs)
    }
    assert dtypes["encoder", "cross_key.0"] == dtypes["decoder", "cross_key.0"] == "float32"
    assert dtypes["encoder", "cross_value.0"] == dtypes["decoder", "cross_value.0"] == "float16"
    assert verify(made.path).passed


@pytest.fixture(scope="module")
def spoken(g2p: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return quantize(g2p.path, tmp_path_factory.mktemp("spoken") / "out", precision="fp16", calibration=WORDS)


def test_g2p_needs_no_island_and_loses_nothing(spoken: Artifact) -> None:
    certificate = spoken.manifest.calibration
    assert certificate is not None
    assert certificate["islands"] == {"encoder": [], "decoder": []}
    assert certificate["limit"] == {"largest": LARGEST, "margin": MARGIN}
    assert certificate["canary"]["samples"] == len(WORDS)
    assert certificate["canary"]["outputs"] == sum(len(spec.outputs) for spec in spoken.manifest.graphs.values())
    assert certificate["loss"]["agreement"]["forced_tokens"]["value"] == 100.0
    json.dumps(certificate)
    assert Artifact.open(spoken.path).manifest == spoken.manifest


def test_inspect_says_what_was_kept_and_why(half: Artifact, spoken: Artifact) -> None:
    _, lines = of_artifact(half)
    assert "weights: float16; activations: float16 between nodes, float32 in islands" in lines
    assert "nodes in float32 from encoder.block.0.layer.1.DenseReluDense.wo/" in lines
    assert "overflow of " in lines
    _, lines = of_artifact(spoken)
    assert "nodes in float32" not in lines


def test_bart_in_float16(artifacts: Callable[[str], Artifact], tmp_path: Path) -> None:
    made = quantize(artifacts("bart").path, tmp_path / "out", precision="fp16", calibration=SOURCES)
    assert made.manifest.calibration is not None
    assert made.manifest.calibration["islands"] == {"encoder": [], "decoder": []}
    assert verify(made.path).passed


def test_an_export_that_overflows_on_a_gpu_alone_is_refused_and_holds_with_data(
    checkpoints: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BART keeps no weight in float32 by itself; ONNX Runtime's CPU provider does not store what overflows."""
    names = ("encoder.layers.0.fc1.weight", "encoder.layers.0.fc2.weight")
    source = louder(checkpoints("bart"), tmp_path / "source", names, 2000)
    with pytest.raises(ParityError, match="memory deviates by nan"):
        export(source, tmp_path / "out", target="cuda", precision="fp16")
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "prove_stored", lambda *given: None)
        assert export(source, tmp_path / "hidden", target="cuda", precision="fp16").manifest.parity["passed"]
    made = export(source, tmp_path / "out", target="cuda", precision="fp16", calibration=SOURCES)
    assert made.manifest.calibration is not None
    islands = made.manifest.calibration["islands"]
    assert [operators(island) for island in islands["encoder"]] == [["MatMul", "Add", "Add", "LayerNormalization"]]
    assert islands["decoder"] == []


def test_lengths_of_frames_are_counted_in_float32(artifacts: Callable[[str], Artifact], tmp_path: Path) -> None:
    """SpeechT5 divides numbers of samples, of which float16 counts 2048."""
    sounds = [{"input_values": np.sin(np.arange(length) / 7)[None].astype(np.float32)} for length in (900, 500, 700)]
    made = quantize(artifacts("speecht5").path, tmp_path / "out", precision="fp16", calibration=sounds)
    assert made.manifest.calibration is not None
    islands = made.manifest.calibration["islands"]
    assert {reason["why"] for island in islands["encoder"] for reason in island["reasons"]} == {"counted"}
    assert any("Floor" in name for island in islands["encoder"] for name in island["nodes"])


def test_bfloat16_is_stored_and_computed_with_in_float32(g2p: Artifact, tmp_path: Path) -> None:
    made = quantize(g2p.path, tmp_path / "out", precision="bf16", calibration=WORDS)
    assert made.manifest.calibration is not None
    assert made.manifest.calibration["scheme"]["format"] == "bfloat16"
    assert "islands" not in made.manifest.calibration
    assert verify(made.path).tolerance == TOLERANCE["fp32"]
    sizes = [artifact.manifest.files["weights.data"].size for artifact in (made, g2p)]
    assert sizes[0] < 0.55 * sizes[1]


def test_an_export_finds_its_islands_on_calibration_data(g2p: Artifact, tmp_path: Path) -> None:
    seen: list[str] = []
    made = export(
        "txopt.examples.g2p.model:factory",
        tmp_path / "out",
        target="cuda",
        precision="fp16",
        calibration=WORDS,
        progress=lambda stage, *_: seen.append(stage),
    )
    assert (made.manifest.precision, made.manifest.target) == ("fp16", "cuda")
    assert made.manifest.calibration is not None
    assert made.manifest.calibration["islands"] == {"encoder": [], "decoder": []}
    assert {"trace", "calibrate", "measure"} <= set(seen)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": "fp16", "method": "gptq"}, "method: expected none, got gptq"),
        ({"precision": "bf16", "block": 32}, "block: expected none, got 32"),
        ({"precision": "fp16", "scheme": "static"}, "scheme: expected none, got static"),
    ],
)
def test_choices_of_integers_are_refused(g2p: Artifact, tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantize(g2p.path, tmp_path / "out", calibration=WORDS, **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": "fp16", "max_loss": 1.0}, "max_loss: needs calibration data at fp16"),
        ({"precision": "fp32", "calibration": WORDS}, "calibration: is for int8, int4, fp8; leave it out at fp32"),
        ({"precision": "bf16", "target": "cuda"}, "bf16 for the cuda target cannot be proved"),
        ({"precision": "bf16", "target": "cuda", "calibration": WORDS}, "bf16 for the cuda target cannot be proved"),
    ],
)
def test_options_of_an_export_that_mean_nothing_are_refused(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export("txopt.examples.g2p.model:factory", tmp_path / "out", **given)


def test_a_limit_that_does_not_hold_leaves_nothing(
    g2p: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights on a grid of 0.5: engine and graphs agree, and that is nonsense."""
    monkeypatch.setattr(halves, "_nearest_bfloat16", lambda array: np.round(array * 2) / 2)
    with pytest.raises(LossError):
        quantize(g2p.path, tmp_path / "out", precision="bf16", calibration=WORDS, max_loss=1.0)
    assert not (tmp_path / "out").exists()
