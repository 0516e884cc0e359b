"""What data mean to the gate: references that some samples lack, labels in arrays; and where ranges may not be kept."""

from pathlib import Path

import numpy as np
import pytest

from tests.exporter.test_quantize_artifact import WORDS, refused
from txopt.exporter.quantize import Options, quantize_artifact
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import UsageError
from txopt.runtime.model import Model
from txopt.runtime.pipeline import Pipeline

pytestmark = pytest.mark.slow


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "given.csv"
    path.write_text("source,target\n" + "".join(f"{word},{spoken}\n" for word, spoken in WORDS.items()), "utf-8")
    return path


def test_where_some_references_are_missing_the_others_judge(
    g2p: Artifact, words: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = tmp_path / "words.csv"
    given.write_text(words.read_text("utf-8").replace("K AE1 T\n", "W R AO1 NG\n") + "zebra,\n", "utf-8")
    made = quantize_artifact(g2p.path, tmp_path / "out", Options(calibration=given))
    assert made.manifest.calibration is not None
    loss = made.manifest.calibration["loss"]
    assert (loss["data"]["references"], loss["data"]["samples"]) == ("data", len(WORDS))
    assert loss["baseline"]["figure"]["value"] < 100
    assert "1 of 7 samples have no reference: chrf is measured on the 6 that have one" in caplog.text


def test_labels_in_arrays_are_references(g2p: Artifact, tmp_path: Path) -> None:
    spoken = Model(g2p)
    feeds, _ = Pipeline(spoken).prepare(list(WORDS))
    said = spoken.generate(**feeds).sequences[:, 1:]
    right = tmp_path / "right.npz"
    np.savez(right, **feeds, labels=said)
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, **feeds, labels=np.roll(said, 1, axis=0))
    figures = []
    for number, data in enumerate((right, wrong)):
        made = quantize_artifact(g2p.path, tmp_path / f"out{number}", Options(calibration=data, metric="exact-match"))
        assert made.manifest.calibration is not None
        loss = made.manifest.calibration["loss"]
        assert loss["data"]["references"] == "data"
        figures.append(loss["baseline"]["figure"]["value"])
    assert figures == [100, 0]


def test_ranges_are_not_kept_inside_of_what_is_made(g2p: Artifact, words: Path, tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    inside = tmp_path / "place" / "new" / "out" / "ranges.json"
    refused(
        UsageError,
        "is inside the artifact",
        g2p.path,
        tmp_path / "place",
        Options(calibration=words, scheme="static", ranges=inside),
    )
