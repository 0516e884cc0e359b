"""Encoders alone, quantized: a trained classifier keeps its labels, every kind of answer is measured, and a limit refuses."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from examples.classifier.train import LABELS, main, sentences
from tests.exporter.models import BUILDERS
from tests.runtime.artifacts import tree
from tests.test_page import Reader
from txopt.calibration import gate
from txopt.exporter.pipeline import export
from txopt.exporter.quantize import quantize
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import InputError, LossError, UsageError
from txopt.runtime.model import Model, load
from txopt.runtime.parity import verify
from txopt.summary import of_artifact

pytestmark = pytest.mark.slow

HELD_OUT = 100
HEADS = {
    # model, metric, the agreement that stands for all
    "bert": ("accuracy", "same_labels"),
    "roberta": ("accuracy", "same_labels"),
    "distilbert": ("cosine", "same_neighbour"),
    "several": ("accuracy", "same_labels"),
    "numbers": ("r-squared", "r_squared"),
}
OTHERS: dict[str, dict[str, Any]] = {
    "several": {"num_labels": 3, "problem_type": "multi_label_classification"},
    "numbers": {"num_labels": 1, "problem_type": "regression"},
}
Make = Callable[[str], Artifact]


def held_out() -> list[tuple[str, int]]:
    """What examples.classifier.train does not train on."""
    random.seed(0)
    data = sentences()
    random.shuffle(data)
    return data[:HELD_OUT]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "checkpoint"
    main(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(checkpoint: Path) -> Artifact:
    return export(checkpoint, checkpoint.parent / "artifact")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "held_out.csv"
    rows = [f"{text},{LABELS[label]}\n" for text, label in held_out()]
    path.write_text("source,target\n" + "".join(rows))
    return path


@pytest.fixture(scope="module")
def tiny(artifacts: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Artifacts of HEADS, of random weights."""
    made: dict[str, Artifact] = {}

    def make(name: str) -> Artifact:
        if name not in OTHERS:
            return artifacts(name)
        if name not in made:
            config = BUILDERS["bert"]().config.to_dict() | OTHERS[name]
            for derived in ("id2label", "label2id"):
                config.pop(derived)
            model = transformers.BertForSequenceClassification(transformers.BertConfig(**config))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(4 if parameter.dim() > 1 else 1)  # as those of tests.exporter.models
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder / "checkpoint")
            made[name] = export(folder / "checkpoint", folder / "artifact")
        return made[name]

    return make


def sources(count: int = 24) -> list[dict[str, Any]]:
    drawn = np.random.default_rng(0)
    return [{"input_ids": drawn.integers(3, 90, length)} for length in drawn.integers(4, 20, count)]


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("int8", {}),
        ("int8", {"scheme": "rows"}),
        ("int8", {"scheme": "static"}),
        ("int4", {}),
        ("int4", {"method": "gptq"}),
        ("int4", {"method": "awq"}),
    ],
    ids=["int8", "rows", "static", "int4", "gptq", "awq"],
)
def test_a_trained_classifier_keeps_its_labels(
    precision: str, options: dict[str, Any], classifier: Artifact, labelled: Path, tmp_path: Path
) -> None:
    made = quantize(classifier.path, tmp_path / "out", precision=precision, calibration=labelled, max_loss=2, **options)
    manifest = Artifact.open(made.path).manifest
    assert (manifest.kind, manifest.precision, manifest.cache) == ("encoder", precision, None)
    assert manifest.calibration is not None
    loss = manifest.calibration["loss"]
    assert loss["metric"] == {"name": "accuracy", "signature": "accuracy|refs:one|unit:place"}
    assert loss["data"]["references"] == "data"
    assert loss["baseline"]["figure"]["value"] == 100  # what train.py prints
    assert loss["agreement"].keys() == {"same_labels", "divergence_nats"}
    assert loss["agreement"]["same_labels"]["value"] == loss["candidate"]["figure"]["value"] >= 98
    assert verify(made.path).passed
    assert made.manifest.files["weights.data"].size < 0.45 * classifier.manifest.files["weights.data"].size


@pytest.fixture(scope="module")
def int8(classifier: Artifact, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return quantize(classifier.path, tmp_path_factory.mktemp("int8") / "out", calibration=labelled)


def test_it_serves_as_any_other(int8: Artifact, classifier: Artifact) -> None:
    quantized, whole = load(int8.path), Model(classifier)
    texts = [text for text, _ in held_out()]
    feeds, _ = quantized.pipeline("text").prepare(texts)
    scores = quantized.classify(**feeds)
    assert scores.shape == (len(texts), len(LABELS))
    np.testing.assert_allclose(scores, whole.classify(**feeds), atol=0.05)
    assert quantized.labels == list(LABELS)


def test_a_text_is_answered_alike_in_any_batch(int8: Artifact) -> None:
    """To the bit, in batches of eight of mixed lengths."""
    model = Model(int8, threads=1)
    texts = [text for text, _ in held_out()]
    pipeline = model.pipeline("text")
    alone = {text: model.classify(**pipeline.prepare([text])[0])[0] for text in texts}
    for start in range(0, len(texts), 8):
        batch = texts[start : start + 8]
        for text, scores in zip(batch, model.classify(**pipeline.prepare(batch)[0]), strict=True):
            np.testing.assert_array_equal(scores, alone[text])


def test_the_proof_can_be_repeated(int8: Artifact) -> None:
    report = verify(int8.path)
    assert report.passed
    assert report.invariance == {"padding": 0.0, "batch": 0.0}


def test_inspect_says_what_was_lost(int8: Artifact) -> None:
    document, text = of_artifact(int8)
    assert json.loads(json.dumps(document))["calibration"]["loss"]["metric"]["name"] == "accuracy"
    assert re.search(r"accuracy 100\.00 before, \d+\.\d\d after: lost -?\d\.\d\d points", text)
    assert re.search(r"\d+\.\d\d% of labels chosen alike", text)


def test_from_a_checkpoint_in_one_step(checkpoint: Path, labelled: Path, int8: Artifact, tmp_path: Path) -> None:
    made = export(checkpoint, tmp_path / "out", precision="int8", calibration=labelled, max_loss=2)
    assert made.manifest.files["encoder.onnx"] == int8.manifest.files["encoder.onnx"]
    assert made.manifest.files["weights.data"] == int8.manifest.files["weights.data"]


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", HEADS)
def test_every_kind_of_answer_is_measured(name: str, precision: str, tiny: Make, tmp_path: Path) -> None:
    """Without references beside fp32's answers, which lose nothing against themselves."""
    made = quantize(tiny(name).path, tmp_path / "out", precision=precision, calibration=sources())
    loss = (made.manifest.calibration or {})["loss"]
    metric, agreement = HEADS[name]
    assert loss["metric"]["name"] == metric
    assert loss["data"]["references"] == "baseline"
    assert loss["baseline"]["figure"]["value"] == pytest.approx(100)
    assert loss["loss"]["value"] == pytest.approx(100 - loss["candidate"]["figure"]["value"], abs=1e-5)
    assert next(iter(loss["agreement"])) != "divergence_nats"
    assert loss["agreement"][agreement]["value"] <= 100
    assert loss["agreement"]["divergence_nats"]["value"] > 0
    (point,) = (made.manifest.calibration or {})["search"]
    assert point[agreement] == loss["agreement"][agreement]
    assert verify(made.path).passed


def test_tokens_with_labels_are_counted_where_these_count(tiny: Make, tmp_path: Path) -> None:
    """As fp32 labels them, but for the first of each, which does not count, and one that is wrong."""
    whole = Model(tiny("roberta"))
    data = sources(4)
    for sample in data:
        sample["labels"] = whole.classify(input_ids=sample["input_ids"][None])[0].argmax(-1)
        sample["labels"][0] = -100
    data[0]["labels"][1] = (data[0]["labels"][1] + 1) % 3
    counted = sum(len(sample["labels"]) - 1 for sample in data)
    made = quantize(whole.artifact.path, tmp_path / "out", calibration=data)
    loss = (made.manifest.calibration or {})["loss"]
    assert loss["data"]["references"] == "data"
    assert loss["baseline"]["figure"]["value"] == pytest.approx(100 * (counted - 1) / counted, abs=1e-5)


def test_a_regression_is_held_against_numbers(tiny: Make, tmp_path: Path) -> None:
    whole = Model(tiny("numbers"))
    data = sources(12)
    for number, sample in enumerate(data):
        sample["labels"] = whole.classify(input_ids=sample["input_ids"][None])[0] + 0.01 * (-1) ** number
    made = quantize(whole.artifact.path, tmp_path / "out", calibration=data)
    loss = (made.manifest.calibration or {})["loss"]
    assert loss["data"]["references"] == "data"
    assert loss["baseline"]["figure"]["value"] < 100
    assert loss["agreement"]["r_squared"]["value"] > 0


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_half_precision_keeps_the_answers(name: str, tiny: Make, tmp_path: Path) -> None:
    made = quantize(tiny(name).path, tmp_path / "out", precision="fp16", calibration=sources())
    manifest = Artifact.open(made.path).manifest
    assert (manifest.precision, manifest.cache) == ("fp16", None)
    found = manifest.calibration or {}
    assert found["canary"]["samples"] > 0
    assert found["loss"]["agreement"]["divergence_nats"]["value"] < 1e-3
    assert verify(made.path).passed


def test_bfloat16_stores_them_in_half(tiny: Make, tmp_path: Path) -> None:
    made = quantize(tiny("distilbert").path, tmp_path / "out", precision="bf16", calibration=sources())
    assert (made.manifest.calibration or {})["loss"]["loss"]["value"] < 1


def losses_of(whole: Artifact, out: Path, **options: Any) -> float:
    made = quantize(whole.path, out, calibration=sources(), overwrite=True, **options)
    return float((made.manifest.calibration or {})["loss"]["loss"]["value"])


@pytest.mark.parametrize(
    "options", [{"precision": "int4", "method": "rtn"}, {"scheme": "static"}], ids=["int4", "static"]
)
def test_a_limit_starts_a_search_for_finer_weights(options: dict[str, Any], tiny: Make, tmp_path: Path) -> None:
    """Whose last attempts lose less than the first; which weights are finer, and why, is in the manifest."""
    whole = tiny("distilbert")
    coarse = losses_of(whole, tmp_path / "out", **options)
    made = quantize(
        whole.path, tmp_path / "out", calibration=sources(), max_loss=0.8 * coarse, overwrite=True, **options
    )
    found = made.manifest.calibration or {}
    assert len(found["search"]) > 2
    assert found["search"][0]["loss"]["value"] == pytest.approx(coarse)
    assert not found["search"][0]["passed"]
    assert found["loss"]["loss"]["value"] <= 0.8 * coarse
    assert [each["weight"] for each in found["finer"]]
    nats = [each["divergence_nats"] for each in found["finer"]]
    assert all(number > 0 for number in nats)
    assert {each["graph"] for each in found["finer"]} == {"encoder"}
    assert all("same_neighbour" in point for point in found["search"])


def test_a_limit_that_nothing_holds_refuses(tiny: Make, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(LossError, match=r"cosine 100\.00 before, .* allowed 0;") as raised:
        quantize(tiny("distilbert").path, place / "out", calibration=sources(), max_loss=0)
    assert raised.value.exit_code == 3
    assert tree(place) == {}


def test_the_command_line_ends_with_3_and_writes_why(tiny: Make, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input_ids=np.arange(3, 83).reshape(8, 10))
    command = [str(Path(sys.executable).with_name("txopt")), "quantize", str(tiny("distilbert").path), "out"]
    command += ["--calibration", "a.npz", "--max-loss", "0", "--report", "why.html"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 3, done.stderr
    assert "cosine 100.00 before" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "why.html"]
    text = " ".join(Reader((tmp_path / "why.html").read_text()).text.split())
    assert "same neighbours" in text
    assert "refused" in text


def test_what_an_int8_artifact_loses_is_its_gates_to_say(
    classifier: Artifact, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A label that was lost counts as a point of a hundred texts."""
    judged = gate.judge

    def judge(*arguments: Any, **named: Any) -> gate.Verdict:
        turned = 1 - named["candidate"][0]
        return judged(*arguments, **{**named, "candidate": (turned, *named["candidate"][1:])})

    monkeypatch.setattr(gate, "judge", judge)
    with pytest.raises(LossError, match=r"lost 1\.00 points"):
        quantize(classifier.path, tmp_path / "out", calibration=labelled, max_loss=0.5)
    assert quantize(classifier.path, tmp_path / "out", calibration=labelled, max_loss=1.5).path.exists()


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another metric": (
        {"metric": "wer"},
        UsageError,
        "text-classification accuracy, which it is judged by, found 'wer'",
    ),
    "labels of another model": (
        {"calibration": [("the soup was cold", "grumpy")]},
        InputError,
        "one of negative, positive",
    ),
    "nothing": ({"calibration": []}, InputError, "expected at least one source"),
}


def test_numbers_that_are_all_the_same_are_no_references(tiny: Make, tmp_path: Path) -> None:
    same = [{**source, "labels": [1.0]} for source in sources()]
    with pytest.raises(InputError, match="r-squared: expected references that differ from each other"):
        quantize(tiny("numbers").path, tmp_path / "out", calibration=same)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", REFUSED)
def test_options_and_data_that_do_not_fit_are_refused(
    what: str, classifier: Artifact, labelled: Path, tmp_path: Path
) -> None:
    given, error, said = REFUSED[what]
    with pytest.raises(error, match=said):
        quantize(classifier.path, tmp_path / "out", **{"calibration": labelled, **given})
    assert not (tmp_path / "out").exists()


def test_the_graph_is_one_of_integers(int8: Artifact) -> None:
    operators = [node.op_type for node in ir.load(int8.file("encoder.onnx")).graph]
    assert operators.count("MatMulNBits") == 8 + 1  # of two layers, and the pooler
    assert operators.count("GatherBlockQuantized") == 1
