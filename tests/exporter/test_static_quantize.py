"""Static int8 as an artifact: what it loses on g2p, what its certificate says, and what is refused."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from examples.g2p.data import load_lexicon, take
from txopt.calibration import activations, static
from txopt.calibration.amax import MSE
from txopt.calibration.collect import Steps
from txopt.calibration.data import read
from txopt.calibration.linears import Role, reads
from txopt.exporter.attempt import graphs_of
from txopt.exporter.pipeline import export
from txopt.exporter.quantize import quantize
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import LossError, StaleError, UsageError
from txopt.runtime.model import Model
from txopt.runtime.parity import verify

WORDS = 428  # 128 of them to calibrate on, 300 to measure


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of the test split, each with one of its pronunciations."""
    file = tmp_path_factory.mktemp("words") / "words.csv"
    chosen = sorted(take(load_lexicon(), "test").items())[::20][:WORDS]
    assert len(chosen) == WORDS
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["source", "target"])
        writer.writerows(
            [word, " ".join(said[0]) if not isinstance(said[0], str) else said[0]] for word, said in chosen
        )
    return file


@pytest.fixture(scope="module")
def quantized(g2p: Artifact, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("static") / "artifact"
    return quantize(g2p.path, out, scheme="static", calibration=words, limit=WORDS, metric="word-error", max_loss=1.0)


def test_g2p_loses_less_than_a_point_of_word_error(quantized: Artifact) -> None:
    loss = quantized.manifest.calibration["loss"]
    assert loss["data"]["samples"] == 300
    assert loss["loss"]["value"] <= 1.0
    assert loss["agreement"]["forced_tokens"]["value"] >= 99.0


def test_the_certificate_says_what_was_done(quantized: Artifact) -> None:
    found = quantized.manifest.calibration
    assert found["scheme"]["activations"] == "static int8, one scale for each tensor"
    assert found["scheme"]["method"] == "mse"
    assert found["data"]["samples"] == 128
    assert found["products"]["count"] == 13 + 16  # every MatMul of the decoder and of the encoder
    assert found["products"]["largest_error"] <= found["products"]["tolerance"] == 1e-5
    assert all(counted["float"] == [] for counted in found["weights"].values())
    json.dumps(found)


def test_it_holds_against_its_own_graphs_as_written(quantized: Artifact) -> None:
    report = verify(quantized.path)
    assert report.passed
    assert report.reference == "its rounded weights in float32"


def test_a_request_says_the_same_in_any_batch(quantized: Artifact) -> None:
    model = Model(quantized)
    speak = model.pipeline("text")
    words = ["cat", "pronunciation", "xylophone", "it"]
    assert [speak(word) for word in words] == speak(words)


def test_weights_are_a_byte_each(g2p: Artifact, quantized: Artifact) -> None:
    before, after = (artifact.manifest.files["weights.data"].size for artifact in (g2p, quantized))
    assert after <= 0.28 * before


def test_a_limit_that_does_not_hold_leaves_nothing(
    g2p: Artifact, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges far too small: the engine says what the graphs say, and that is nonsense."""
    found = activations.amax_of
    monkeypatch.setattr(
        activations, "amax_of", lambda *given: {name: amax / 50 for name, amax in found(*given).items()}
    )
    with pytest.raises(LossError):
        quantize(g2p.path, tmp_path / "out", scheme="static", calibration=words, limit=40, max_loss=1.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"scheme": "dynamic"}, "scheme: expected one of weights, rows, mixed, static"),
        ({"scheme": "static", "precision": "int4"}, "precision: expected one of int8, fp8"),
        ({"scheme": "static", "method": "gptq"}, "method: expected one of absmax, percentile, entropy, mse"),
        ({"scheme": "static", "block": 64}, "block: expected none"),
        ({"scheme": "weights", "method": "mse"}, "method: expected one of rtn"),
    ],
)
def test_what_a_scheme_does_not_have_is_refused(g2p: Artifact, tmp_path: Path, asked, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantize(g2p.path, tmp_path / "out", **asked)


def test_an_export_takes_the_scheme_too(words: Path, tmp_path: Path) -> None:
    with words.open(newline="") as file:
        few = [(row["source"], row["target"]) for row in csv.DictReader(file)][:24]
    made = export(
        "txopt.examples.g2p.model:factory",
        tmp_path / "out",
        precision="int8",
        scheme="static",
        method="absmax",
        calibration=few,
    )
    assert (made.manifest.precision, made.manifest.target) == ("int8", "cpu")
    assert made.manifest.calibration is not None
    assert made.manifest.calibration["scheme"]["method"] == "absmax"
    assert made.manifest.calibration["scheme"]["activations"].startswith("static int8")


def test_ranges_serve_again_while_nothing_changed(
    g2p: Artifact, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = read(words, Model(g2p), limit=24)
    names = {name: static.activations(model.graph) for name, model in graphs_of(g2p).items()}
    file = tmp_path / "ranges.json"
    first = activations.ranges(g2p, names, samples, MSE(), file=file)

    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("it was observed again")

    with monkeypatch.context() as patched:
        patched.setattr(activations, "observe", never)
        assert activations.ranges(g2p, names, samples, MSE(), file=file) == first
        for changed, named in (
            ({"method": MSE(bits=7)}, "settings.mse"),
            ({"samples": samples.part(0, 8)}, "data: expected"),
            ({"steps": Steps.FIRST}, "settings.steps"),
        ):
            given = {"samples": samples, "method": MSE(), **changed}
            with pytest.raises(StaleError, match=named):
                activations.ranges(g2p, names, file=file, **given)
    assert set(first.tensors) == {f"{graph}:{name}" for graph, mine in names.items() for name in mine}


@pytest.mark.parametrize("name", ["t5", "whisper", "bart"])
def test_every_product_and_every_input_of_one_is_quantized_once(
    name: str, artifacts: Callable[[str], Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts on models of several families, tiny as they are."""
    monkeypatch.setattr("txopt.calibration.linears.LEAST_SIZE", 64)
    for graph, model in graphs_of(artifacts(name)).items():
        products = [read for read in reads(model.graph) if read.role is not Role.TABLE]
        inputs = {read.activations for read in products}
        matmuls = count(model, "MatMul")
        placed = static.place(model.graph, dict.fromkeys(static.activations(model.graph), 4.0))
        assert products, graph
        assert (count(model, "QuantizeLinear"), placed.activations) == (len(inputs), len(inputs))
        assert count(model, "DequantizeLinear") == len(inputs) + placed.weights
        assert count(model, "MatMul") == matmuls
        assert count(model, "Attention") > 0
        for node in model.graph:
            if node.op_type == "Attention":
                assert all(value is None or not str(value.name).endswith("/rounded") for value in node.inputs)


def count(model: ir.Model, operator: str) -> int:
    return sum(node.op_type == operator for node in model.graph)
