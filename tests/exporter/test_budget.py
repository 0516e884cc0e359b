"""Room under a limit of size goes to the weights that lose most, and the limit holds."""

from pathlib import Path

import pytest

from txopt.calibration.linears import Role
from txopt.calibration.recipe import SIZES, Recipe
from txopt.calibration.sensitivity import Sensitivity
from txopt.exporter import weights
from txopt.exporter.budget import chosen
from txopt.exporter.quantize import Options, quantize_artifact
from txopt.runtime.artifact import Artifact

WORDS = [("hello", "HH AH0 L OW1"), ("cat", "K AE1 T"), ("windows", "W IH1 N D OW0 Z"), ("tree", "T R IY1")]


def found(*names: str) -> list[Sensitivity]:
    return [Sensitivity(graph="decoder", name=name, role=Role.LINEAR, nats=0.1, numbers=8) for name in names]


@pytest.mark.parametrize(
    ("room", "names"),
    [
        (9, set()),
        (10, {"a"}),
        (29, {"a", "c"}),  # b does not fit beside a, what comes behind does
        (40, {"a", "b"}),
        (59, {"a", "b", "c"}),
    ],
)
def test_the_most_sensitive_weights_that_fit_are_chosen(room: float, names: set[str]) -> None:
    costs = {"a": 10.0, "b": 30.0, "c": 19.0, "never": float("inf")}
    assert chosen(found("a", "never", "b", "c"), costs, room) == names


def test_a_weight_of_two_graphs_is_chosen_and_paid_once() -> None:
    assert chosen(found("a", "a", "b"), {"a": 10.0, "b": 10.0}, 20) == {"a", "b"}


def test_the_default_of_int4_fills_its_size_and_no_other_method_has_one() -> None:
    assert Recipe.of("int4").size == 0.17
    assert Recipe.of("int4", method="descent").size == 0.17
    assert {Recipe.of("int4", method=method).size for method in ("rtn", "hqq", "clip", "gptq")} == {None}
    assert Recipe.of("int8", method="descent").size is None


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0.1, 0.2])
def test_an_artifact_is_as_fine_as_its_limit_allows(
    limit: float, g2p: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, ("int4", Recipe.of("int4").method), limit)
    made = quantize_artifact(g2p.path, tmp_path / "out", Options(precision="int4", calibration=WORDS))
    share = made.manifest.files[weights.FILE].size / g2p.manifest.files[weights.FILE].size
    finer = (made.manifest.calibration or {})["finer"]
    if limit == 0.1:  # below what 4 bits take
        assert (finer, share < 0.18) == ([], True)
        return
    assert limit - 0.02 < share <= limit
    assert {each["as"] for each in finer} == {"8 bits in blocks of 32"}
    assert [each["divergence_nats"] > 0 for each in finer] == [True] * len(finer)
