"""AWQ on the road: the scaled twin says what the artifact says, and what is made of it is proved like any other."""

from pathlib import Path

import numpy as np
import pytest

from txopt.calibration.collect import inputs_of
from txopt.calibration.recipe import SCHEMES
from txopt.exporter.attempt import graphs_of
from txopt.exporter.quantize import Options, quantize_artifact
from txopt.exporter.scaled import scaled
from txopt.runtime import cases
from txopt.runtime.artifact import Artifact
from txopt.runtime.parity import replay

pytestmark = pytest.mark.slow

WORDS = [("hello", "HH AH0 L OW1"), ("cat", "K AE1 T"), ("windows", "W IH1 N D OW0 Z"), ("tree", "T R IY1")]


def test_the_twin_says_the_same_with_other_weights(g2p: Artifact, tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    moments = {
        graph: {name: np.diag(np.exp(drawn.standard_normal(size))) for name, size in mine.items()}
        for graph, mine in inputs_of(graphs_of(g2p)).items()
    }
    twin, seen = scaled(g2p, moments, SCHEMES["int4"], tmp_path)
    replay(twin, cases.load(g2p.path)).require()
    changed = [name for graph, mine in seen.items() for name in mine if mine[name] is not moments[graph][name]]
    assert changed, "norms were there to divide"


def test_the_method_is_one_of_the_road(g2p: Artifact, tmp_path: Path) -> None:
    made = quantize_artifact(g2p.path, tmp_path / "out", Options(precision="int4", method="awq", calibration=WORDS))
    certificate = made.manifest.calibration or {}
    assert certificate["scheme"]["method"] == "awq"
    assert certificate["finer"] == []
    assert {file.name for file in made.path.iterdir()} == {file.name for file in g2p.path.iterdir()}
