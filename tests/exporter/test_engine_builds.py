"""Builds of engines in odd company: caches, signals, other engines and unread inputs; what was there stays as it was."""

import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from tests.exporter.test_engine import SMALL, Make, built  # noqa: F401 - a fixture
from tests.runtime.artifacts import tree
from txopt.benchmarks.engine_graphs import graphs
from txopt.cli import main
from txopt.exporter import engine, engines, weights
from txopt.exporter.engine import Engine, Switches
from txopt.exporter.engines import Options, plan
from txopt.exporter.lowering import tensorrt
from txopt.exporter.pipeline import export
from txopt.runtime.artifact import Artifact
from txopt.runtime.backends.fitting import fitting
from txopt.runtime.engines import FILE, Profile, engines_of
from txopt.runtime.errors import ArtifactError, TxoptError, UsageError

pytest.importorskip("tensorrt_rtx_bindings", reason="the extra test brings TensorRT-RTX for Linux on x86-64")
pytestmark = [pytest.mark.slow, pytest.mark.tensorrt]

Place = Callable[[Path], Path]


@pytest.mark.parametrize("place", [lambda path: path, lambda path: path / "engines"], ids=["itself", "a folder of it"])
def test_plans_are_not_kept_inside_an_artifact(place: Place, artifacts: Make, tmp_path: Path) -> None:
    shutil.copytree(artifacts("bart").path, tmp_path / "artifact")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match=r"--timing-cache .* is inside the artifact"):
        engines.build(tmp_path / "artifact", None, replace(SMALL, kept=place(tmp_path / "artifact")))
    assert tree(tmp_path) == before


def test_a_plan_of_others_that_changes_during_a_build_is_not_vouched_for(
    built: Artifact,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(built.path, tmp_path / "artifact")
    plan = engines_of(built)[0].plans["decoder"].file

    def build(*_: Any, **__: Any) -> tuple[engine.Built, None]:
        with (tmp_path / "artifact" / plan).open("ab") as file:
            file.write(b"more")
        return engine.Built(plan=b"plan", layers={}, float_casts=0, apart=0), None

    monkeypatch.setattr(Engine, "build", build)
    with pytest.raises(ArtifactError, match=r"changed while engines were built(?s:.*)decoder\.plan"):
        engines.build(tmp_path / "artifact", None, replace(SMALL, capabilities=("SM120",)))


def test_engines_that_this_version_cannot_read_are_replaced(
    built: Artifact,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def unread(artifact: Artifact) -> Any:
        raise ArtifactError("of a later version")

    shutil.copytree(built.path, tmp_path / "artifact")
    monkeypatch.setattr(engines, "engines_of", unread)
    engines.build(tmp_path / "artifact", None, replace(SMALL, capabilities=("SM80",)))
    assert [one.capabilities for one in engines_of(Artifact.open(tmp_path / "artifact"))] == [("SM80",)]
    assert "cannot be read, and are replaced: of a later version" in caplog.text


def test_another_version_builds_anew_and_replaces_what_was_for_the_same_gpus(
    artifacts: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans that are kept are of one version; an artifact has no two of the same library and GPUs."""
    library = ["1.7.1"]

    class Versioned(Engine):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.version = library[0]

        def build(self, *_: Any, **__: Any) -> tuple[engine.Built, None]:
            return engine.Built(plan=self.version.encode(), layers={}, float_casts=0, apart=0), None

    monkeypatch.setattr(engines, "Engine", Versioned)
    shutil.copytree(artifacts("bart").path, tmp_path / "artifact")
    asked = replace(SMALL, kept=tmp_path / "kept")
    found = []
    for library[0] in ("1.7.1", "1.7.1", "1.8.0"):
        made = engines.build(tmp_path / "artifact", None, asked)
        (one,) = engines_of(made.artifact)
        plan = made.artifact.file(one.plans["decoder"].file).read_bytes()
        found.append((one.version, plan, made.builds["decoder"]["kept"]))
    assert found == [("1.7.1", b"1.7.1", False), ("1.7.1", b"1.7.1", True), ("1.8.0", b"1.8.0", False)]


def test_of_two_sets_for_a_gpu_the_later_one_serves(built: Artifact) -> None:  # noqa: F811
    (first,) = engines_of(built)
    later = replace(first, capabilities=("SM89", "SM120"))
    assert fitting((first, later), {first.runtime: first.version}, "SM89") is later


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_stops_nothing(ignored: signal.Signals, artifacts: Make, tmp_path: Path) -> None:
    sent = []

    def progress(stage: str, done: int = 0, total: int = 0) -> None:
        if stage == "build" and total and not sent:
            sent.append(signal.raise_signal(ignored))

    before = signal.signal(ignored, signal.SIG_IGN)
    try:
        made = engines.build(artifacts("bart").path, tmp_path / "out", SMALL, progress=progress)
    finally:
        signal.signal(ignored, before)
    assert sent
    assert made.artifact.file(FILE).exists()


def test_a_signal_that_somebody_else_hears_is_not_the_models_fault(artifacts: Make, tmp_path: Path) -> None:
    heard: list[int] = []

    def progress(stage: str, done: int = 0, total: int = 0) -> None:
        if stage == "build" and total and not heard:
            signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(TxoptError, match="building was stopped by SIGINT"):
            engines.build(artifacts("bart").path, tmp_path / "out", SMALL, progress=progress)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard
    assert not (tmp_path / "out").exists()


def test_no_room_is_told_with_the_place(artifacts: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Engine, "build", build)
    with pytest.raises(ArtifactError, match="out: engines cannot be written: No space left on device"):
        engines.build(artifacts("bart").path, tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_knows_the_gpus(artifacts: Make) -> None:
    path = artifacts("bart").path
    with pytest.raises(UsageError, match=r"capability: expected GPUs among SM75, .*, got SM90"):
        engines.plan(path, replace(SMALL, capabilities=("SM90",)))
    with pytest.raises(UsageError, match="capability: expected GPUs such as SM90, got 'bogus'"):
        engines.plan(path, replace(SMALL, runtime="tensorrt", capabilities=("SM90", "bogus")))
    assert engines.plan(path, replace(SMALL, capabilities=("SM89", "SM89")))["capabilities"] == ["SM89"]


@pytest.mark.parametrize("dry", [("--dry-run",), ()], ids=["dry run", "build"])
def test_the_command_refuses_the_sizes_of_a_decoder_where_there_is_none(
    dry: tuple[str, ...], artifacts: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    path = artifacts("bert").path
    before = tree(path)
    with pytest.raises(SystemExit) as done:
        main(["engine", str(path), "--capability", "SM89", "--max-beams", "4", "--cache-length", "24", "--quiet", *dry])
    assert done.value.code == 2
    said = capsys.readouterr().err
    assert "--max-beams: leave it out, for this artifact's encoder has no rows of beams (R), got 4" in said
    assert "--cache-length: leave it out, for this artifact's encoder has no cache (S), got 24" in said
    assert tree(path) == before
    assert engines.plan(path, Options(capabilities=("SM89",), batch=2, source=16))["plans"].keys() == {"encoder"}


def test_zeros_of_two_types_that_are_the_same_bytes_are_built(tmp_path: Path) -> None:
    """A fresh BERT: biases of zeros, and as many bytes of integers, which TensorRT-RTX must not find at one address."""
    import transformers as t

    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 256}
    model = t.BertForSequenceClassification(t.BertConfig(vocab_size=40, max_position_embeddings=64, **sizes)).eval()
    artifact = export(model, tmp_path / "out", target="tensorrt", precision="fp16")
    assert engines.build(artifact.path, None, Options(capabilities=("SM89",))).engines.plans.keys() == {"encoder"}


def test_a_dry_run_refuses_the_places_that_a_build_does(artifacts: Make, tmp_path: Path) -> None:
    artifact = artifacts("bart")
    options = Options(capabilities=("SM89",))
    with pytest.raises(UsageError, match="inside the artifact"):
        plan(artifact.path, replace(options, kept=artifact.path / "kept"))
    with pytest.raises(ArtifactError, match="an artifact is there already"):
        plan(artifact.path, options, artifact.path)
    assert plan(artifact.path, options, tmp_path / "out")["plans"]
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="expected the path of a directory, got None"):
        plan(None, options)  # type: ignore[arg-type]


def test_an_input_that_nothing_reads_is_given_back(artifacts: Make, tmp_path: Path) -> None:
    """An encoder of several memories takes masks that only its decoder reads."""
    artifact = artifacts("bart")
    model = ir.load(artifact.file("encoder.onnx"))
    given = ir.Value(name="unasked", shape=ir.Shape(["B", "T"]), type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.append(given)
    lowered = tensorrt.lower(model)
    assert [value.name for value in lowered.graph.outputs][-1] == "unread/unasked"
    weights.write({"encoder": lowered}, tmp_path)
    profile = Profile(name="encode", axes={"B": (1, 2, 2), "T": (1, 8, 16)})
    made, _ = Engine("tensorrt-rtx", ("SM89",), Switches()).build(
        tmp_path / "encoder.onnx", [profile], lambda done, total: None
    )
    assert made.plan


@pytest.mark.parametrize(("precision", "builds"), [("fp16", True), ("fp32", False)])
def test_turing_builds_half_precision_alone(precision: str, builds: bool, artifacts: Make, tmp_path: Path) -> None:
    artifact = artifacts("bart")
    lowered = tensorrt.lower(graphs(artifact, precision)["encoder"])
    weights.write({"encoder": lowered}, tmp_path)
    profile = Profile(name="encode", axes={"B": (1, 2, 2), "T": (1, 8, 16)})
    turing = Engine("tensorrt-rtx", ("SM75",), Switches())
    if builds:
        assert turing.build(tmp_path / "encoder.onnx", [profile], lambda done, total: None)[0].plan
    else:
        with pytest.raises(UsageError, match="SM75 builds float16 alone"):
            turing.build(tmp_path / "encoder.onnx", [profile], lambda done, total: None)
