"""From an fp32 artifact to a quantized one: the certificate is whole, and where something is wrong nothing is left."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import txopt
from tests.runtime.artifacts import fill, manifest, tree
from txopt.calibration import gate
from txopt.calibration.packing import Packed
from txopt.exporter import lowering, products
from txopt.exporter.quantize import Options, quantize_artifact
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import ArtifactError, InputError, LossError, ParityError, TxoptError, UsageError
from txopt.runtime.model import Model
from txopt.runtime.writer import ArtifactWriter
from txopt.summary import of_artifact, of_parity

pytestmark = pytest.mark.slow

WORDS = {
    "hello": "HH AH0 L OW1",
    "calibration": "K AE2 L AH0 B R EY1 SH AH0 N",
    "cat": "K AE1 T",
    "windows": "W IH1 N D OW0 Z",
    "tree": "T R IY1",
    "encyclopedia": "IH0 N S AY2 K L AH0 P IY1 D IY0 AH0",
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "words.csv"
    path.write_text("source,target\n" + "".join(f"{word},{spoken}\n" for word, spoken in WORDS.items()), "utf-8")
    return path


@pytest.fixture(scope="module")
def int8(g2p: Artifact, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return quantize_artifact(
        g2p.path, tmp_path_factory.mktemp("int8") / "out", Options(calibration=words, metric="word-error")
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where OUT would be, two folders down that are not there yet."""
    folder = tmp_path / "place"
    folder.mkdir()
    (folder / "thesis.txt").write_text("three years of work")
    return folder


def refused(error: type[BaseException], said: str, source: Path, place: Path, options: Options) -> None:
    """The road ends in ``error``, and nothing is where OUT would be, nor beside it."""
    before = tree(place)
    with pytest.raises(error, match=said):
        quantize_artifact(source, place / "new" / "out", options)
    assert tree(place) == before


def test_the_certificate_is_complete(int8: Artifact, g2p: Artifact, words: Path) -> None:
    manifest = Artifact.open(int8.path).manifest
    assert (manifest.precision, manifest.target, manifest.kind) == ("int8", "cpu", "encoder-decoder")
    certificate = manifest.calibration
    assert certificate is not None
    assert certificate.keys() >= {"scheme", "weights", "finer", "data", "products", "loss"}
    assert certificate["scheme"] == {
        "bits": 8,
        "block": 64,
        "symmetric": True,
        "method": "rtn",
        "activations": "int8 by row and block",
    }
    assert all(counted["rounded"] > 10 for counted in certificate["weights"].values())
    assert certificate["products"]["count"] > 25
    assert certificate["products"]["largest_error"] < certificate["products"]["tolerance"]
    data = certificate["data"]
    assert (data["samples"], data["references"], data["synthetic"]) == (len(WORDS), len(WORDS), False)
    loss = certificate["loss"]
    assert loss["metric"]["name"] == "word-error"
    assert loss["data"] == {"sha256": data["sha256"], "samples": len(WORDS), "references": "data"}
    assert loss["passed"] is True
    assert loss["max_loss"] is None
    assert {"forced_tokens", "free_prefix", "free_sequences", "divergence_nats"} == loss["agreement"].keys()
    assert loss["agreement"]["forced_tokens"]["value"] > 90
    assert manifest.parity["passed"]
    assert manifest.source == g2p.manifest.source
    assert manifest.fusion["decoder"]["nodes"]["com.microsoft::MatMulNBits"] > 10
    assert manifest.fusion["decoder"]["patterns"] == g2p.manifest.fusion["decoder"]["patterns"]


def test_the_certificate_names_the_two_artifacts_by_their_fingerprints(int8: Artifact, g2p: Artifact) -> None:
    """Whoever has them can tell that it is these that were compared."""
    assert int8.manifest.calibration is not None
    loss = int8.manifest.calibration["loss"]
    source = hashlib.sha256((g2p.path / "manifest.json").read_bytes()).hexdigest()
    assert loss["baseline"]["sha256"] == source == gate.fingerprint(g2p.manifest)
    assert loss["candidate"]["sha256"] == gate.fingerprint(Artifact.open(int8.path).manifest)


def test_the_proof_can_be_repeated(int8: Artifact) -> None:
    report = txopt.verify(int8.path)
    assert report.passed
    assert report.precision == "int8"
    assert report.invariance == {"padding": 0.0, "batch": 0.0}
    assert "rounded weights" in of_parity(report)


def test_it_is_smaller_and_holds_what_the_original_held(int8: Artifact, g2p: Artifact) -> None:
    assert int8.manifest.files.keys() == g2p.manifest.files.keys()
    before, after = (each.manifest.files["weights.data"].size for each in (g2p, int8))
    assert after < 0.3 * before  # positions and norms are a larger share of so small a model


def test_activations_can_be_rounded_row_by_row(int8: Artifact, g2p: Artifact, words: Path, tmp_path: Path) -> None:
    options = Options(scheme="rows", calibration=words, metric="word-error")
    made = quantize_artifact(g2p.path, tmp_path / "rows", options)
    found = made.manifest.calibration or {}
    assert found["scheme"] == {
        "bits": 8,
        "block": None,
        "symmetric": True,
        "method": "rtn",
        "activations": "int8 by row",
    }
    assert found["products"]["count"] > 0
    assert found["graphs"]["largest_error"] <= found["graphs"]["tolerance"]
    assert txopt.verify(made.path).invariance == {"padding": 0.0, "batch": 0.0}
    rows, blocks = (artifact.manifest.files["weights.data"].size for artifact in (made, int8))
    assert rows < blocks
    said = [txopt.load(artifact.path).pipeline("text")(list(WORDS)) for artifact in (made, int8)]
    assert sum(one == other for one, other in zip(*said, strict=True)) >= len(WORDS) - 1


def test_the_encoder_can_be_rounded_row_by_row_alone(g2p: Artifact, words: Path, tmp_path: Path) -> None:
    options = Options(scheme="mixed", calibration=words, metric="word-error")
    made = quantize_artifact(g2p.path, tmp_path / "mixed", options)
    found = made.manifest.calibration or {}
    assert found["scheme"]["block"] == 64
    assert found["scheme"]["encoder"] == {"bits": 8, "block": None, "symmetric": True, "activations": "int8 by row"}
    operators = {
        name: {node.op_type for node in ir.load(made.file(spec.file)).graph}
        for name, spec in made.manifest.graphs.items()
    }
    assert "MatMulIntegerToFloat" in operators["encoder"] - operators["decoder"]
    assert "MatMulNBits" in operators["decoder"] - operators["encoder"]


def test_equal_roads_end_in_equal_bytes(int8: Artifact, g2p: Artifact, words: Path, tmp_path: Path) -> None:
    again = quantize_artifact(g2p.path, tmp_path / "out", Options(calibration=words, metric="word-error"))
    assert {name: entry.sha256 for name, entry in again.manifest.files.items()} == {
        name: entry.sha256 for name, entry in int8.manifest.files.items()
    }
    assert again.manifest == int8.manifest


def test_the_result_serves_as_any_other(int8: Artifact, g2p: Artifact) -> None:
    model, original = txopt.load(int8.path), Model(g2p)
    pipeline = model.pipeline("text")
    said, before = pipeline(list(WORDS)), original.pipeline("text")(list(WORDS))
    assert sum(one == other for one, other in zip(said, before, strict=True)) >= len(WORDS) - 1
    feeds, _ = pipeline.prepare(list(WORDS))
    greedy = model.generate(**feeds, num_beams=1).sequences
    streamed = np.stack(list(model.stream(**feeds)), 1)
    np.testing.assert_array_equal(streamed, greedy[:, 1:])
    assert "".join(pipeline.stream("windows")) == said[list(WORDS).index("windows")]
    beams = model.generate(**feeds, num_beams=4)
    assert beams.scores is not None
    np.testing.assert_allclose(beams.scores, original.generate(**feeds, num_beams=4).scores, atol=0.1)


def test_inspect_says_what_was_lost(int8: Artifact) -> None:
    document, text = of_artifact(int8)
    assert json.loads(json.dumps(document))["calibration"]["loss"]["metric"]["name"] == "word-error"
    assert "int8 for cpu" in text
    assert "weights: 8 bits in blocks of 64, symmetric, by rtn" in text
    assert re.search(r"word-error \d+\.\d\d before, \d+\.\d\d after: lost -?\d\.\d\d points", text)
    assert "MatMulNBits" in text
    assert "verified against its rounded weights in float32" in text


def test_the_page_says_what_it_was_verified_against(int8: Artifact) -> None:
    from txopt.exporter import foreign
    from txopt.page import content

    page = content.of_artifact(
        int8.manifest, "out", foreign.stored(int8.path, {name: f"{name}.onnx" for name in int8.manifest.graphs})
    )
    assert page["verdict"] == {"passed": True, "text": "verified against its rounded weights in float32"}


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every candidate loses a point, whatever is rounded; the number of weights that were, attempt by attempt."""
    judged, prove, rounded = gate.judge, products.prove, []

    def judge(*arguments: Any, **named: Any) -> gate.Verdict:
        verdict = judged(*arguments, **named)
        loss = replace(verdict.comparison.loss, value=1.0)
        return replace(verdict, comparison=replace(verdict.comparison, loss=loss))

    def counting(models: Any, blocks: Any) -> products.Products:
        rounded.append(sum(map(len, blocks.values())))
        return prove(models, blocks)

    monkeypatch.setattr(gate, "judge", judge)
    monkeypatch.setattr(products, "prove", counting)
    return rounded


def test_what_loses_too_much_is_refused(g2p: Artifact, words: Path, place: Path, lossy: list[int]) -> None:
    """After finer recipes, none of which leaves everything in float: that would lose nothing, and be no quantized artifact."""
    options = Options(calibration=words, max_loss=0.5)
    refused(LossError, "lost 1.00 points", g2p.path, place, options)
    assert len(lossy) > 2
    assert lossy == sorted(lossy, reverse=True)
    assert lossy[-1] > 0


def test_without_a_limit_a_loss_is_measured_and_kept(g2p: Artifact, words: Path, place: Path, lossy: list[int]) -> None:
    made = quantize_artifact(g2p.path, place / "out", Options(calibration=words))
    assert made.manifest.calibration is not None
    assert made.manifest.calibration["loss"]["loss"]["value"] == 1.0
    assert len(lossy) == 1


CORRUPTED = ("for_matmul_nbits", "for_gather")


@pytest.mark.parametrize("what", CORRUPTED)
def test_codes_that_lie_elsewhere_are_found(
    what: str, g2p: Artifact, words: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One code of each weight is another one: a difference that no comparison of texts would see."""
    packed = getattr(lowering.blocks, what)

    def corrupted(blocks: Any) -> Packed:
        good = packed(blocks)
        codes = good.codes.numpy().copy()
        codes.reshape(-1)[:1] ^= 0x40
        return replace(good, codes=ir.Tensor(codes))

    monkeypatch.setattr(lowering.blocks, what, corrupted)
    refused(ParityError, "integers do not stand for the weights", g2p.path, place, Options(calibration=words))


def test_arithmetic_that_is_wrong_around_the_products_is_found(
    g2p: Artifact, words: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bias that got lost on the way to the engine's operator."""
    monkeypatch.setattr(lowering.blocks._Weight, "_multiply", _without_bias(lowering.blocks._Weight._multiply))
    refused(ParityError, "deviat", g2p.path, place, Options(calibration=words))


def _without_bias(multiply: Callable[..., None]) -> Callable[..., None]:
    def changed(self: Any, node: ir.Node) -> None:
        users = [user for user, _ in node.outputs[0].uses()]
        multiply(self, node)
        for other in self._graph:
            if other.op_type == "MatMulNBits" and len(other.inputs) > 5 and users:
                other.replace_input_with(5, None)

    return changed


SOURCES: dict[str, tuple[dict[str, Any], str]] = {
    "quantized already": ({"precision": "int8"}, "expected an artifact in fp32 to quantize, got one in int8"),
    "of float16": ({"precision": "fp16"}, "expected an artifact in fp32 to quantize, got one in fp16"),
    "for another engine": ({"target": "cuda"}, "expected an artifact for the cpu target, got one for cuda"),
}


@pytest.mark.parametrize("what", SOURCES)
def test_artifacts_that_are_no_source_are_refused(what: str, g2p: Artifact, words: Path, place: Path) -> None:
    changed, said = SOURCES[what]
    with ArtifactWriter(place / "source") as writer:
        for name in g2p.manifest.files:
            (writer.directory / name).write_bytes(g2p.file(name).read_bytes())
        made = writer.commit(replace(g2p.manifest, **changed))
    refused(UsageError, said, made.path, place, Options(calibration=words))


def test_an_encoder_whose_answers_nobody_knows_is_refused(place: Path) -> None:
    described = manifest()
    encoder = {"encoder": described.graphs["encoder"]}
    with ArtifactWriter(place / "source") as writer:
        fill(writer.directory)
        made = writer.commit(replace(described, kind="encoder", graphs=encoder, cache=None))
    refused(UsageError, "expected a model that generates, .* this encoder gives memory, ", made.path, place, Options())


def test_models_without_a_weight_to_round_are_refused(
    g2p: Artifact, words: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("txopt.calibration.linears.LEAST_SIZE", 1 << 40)
    refused(UsageError, "expected weights that can be rounded", g2p.path, place, Options(calibration=words))


OPTIONS: dict[str, tuple[dict[str, Any], type[TxoptError], str]] = {
    "no such precision": ({"precision": "int5"}, UsageError, "precision: expected one of int8, int4"),
    "no such method": ({"method": "guess"}, UsageError, "method: expected one of"),
    "no such metric": ({"metric": "taste"}, UsageError, "expected a metric"),
    "no such block": ({"block": 48}, UsageError, "block: expected 16"),
    "blocks in whole columns": (
        {"scheme": "rows", "block": 64},
        UsageError,
        "scheme rows: expected int8 without blocks",
    ),
    "a mixture of 4 bits": (
        {"scheme": "mixed", "precision": "int4"},
        UsageError,
        "scheme mixed: expected int8, got int4",
    ),
    "whole columns of 4 bits": ({"scheme": "rows", "precision": "int4"}, UsageError, "scheme rows: expected int8"),
    "a limit below zero": ({"max_loss": -1}, UsageError, "--max-loss"),
    "no number as a limit": ({"max_loss": float("nan")}, UsageError, "--max-loss"),
    "no such file": ({"calibration": "nowhere.csv"}, InputError, "nowhere.csv"),
    "sound for a model of text": ({"calibration": [np.zeros(16000, np.float32)]}, InputError, "text"),
    "arrays of another model": ({"calibration": {"pixel_values": np.zeros((2, 3, 8, 8))}}, InputError, "input_ids"),
    "nothing in it": ({"calibration": []}, InputError, "expected at least one source"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options_and_data_that_do_not_fit_are_refused(what: str, g2p: Artifact, words: Path, place: Path) -> None:
    given, error, said = OPTIONS[what]
    refused(error, said, g2p.path, place, Options(**{"calibration": words, **given}))


def test_files_of_another_modality_are_refused(g2p: Artifact, place: Path, tmp_path: Path) -> None:
    (tmp_path / "clips.tsv").write_text("a.wav\thello\n")
    refused(InputError, "takes text", g2p.path, place, Options(calibration=tmp_path / "clips.tsv"))


STAGES = ("open", "data", "calibrate", "quantize", "pack", "check", "measure")


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_leaves_nothing(stage: str, g2p: Artifact, words: Path, place: Path, tmp_path: Path) -> None:
    def progress(name: str, done: int = 0, total: int = 0) -> None:
        if name == stage:
            raise KeyboardInterrupt

    before = tree(place)
    with pytest.raises(KeyboardInterrupt):
        quantize_artifact(g2p.path, place / "out", Options(calibration=words), progress=progress)
    assert tree(place) == before


def test_stages_are_reported_in_order(g2p: Artifact, words: Path, place: Path) -> None:
    seen: list[str] = []
    quantize_artifact(g2p.path, place / "out", Options(calibration=words), progress=lambda name, *_: seen.append(name))
    assert tuple(dict.fromkeys(seen)) == STAGES


def test_an_artifact_is_replaced_only_when_asked_to(int8: Artifact, g2p: Artifact, words: Path, place: Path) -> None:
    out = quantize_artifact(g2p.path, place / "out", Options(calibration=words)).path
    with pytest.raises(ArtifactError, match="overwrite"):
        quantize_artifact(g2p.path, out, Options(calibration=words))
    options = Options(calibration=words, precision="int4", method="rtn")
    assert quantize_artifact(g2p.path, out, options, overwrite=True).manifest.precision == "int4"
    assert Artifact.open(out).manifest.precision == "int4"


def test_staged_files_are_those_of_the_artifact(tmp_path: Path) -> None:
    """What a certificate refers to before the artifact is there."""
    with ArtifactWriter(tmp_path / "out") as writer:
        fill(writer.directory)
        staged = writer.staged(manifest())
        assert staged.path == writer.directory
        assert not (writer.directory / "manifest.json").exists()
        drafted = writer.draft(manifest())
        assert {entry.sha256 for entry in drafted.manifest.files.values()} == {""}
        made = writer.commit(manifest())
    assert staged.manifest == made.manifest == Artifact.open(tmp_path / "out").manifest
