"""The loss gate: direction and size of a loss, what is refused, what a certificate holds."""

import hashlib
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime import artifacts
from txopt.calibration.agreement import Agreement, Ids
from txopt.calibration.bootstrap import Comparison, Estimate
from txopt.calibration.gate import Compared, Verdict, fingerprint, judge
from txopt.calibration.metrics import METRICS, metric
from txopt.runtime.errors import ArtifactError, InputError, LossError, UsageError
from txopt.runtime.strict_json import canonical, value_problems

COMPARED = Compared(data="d" * 64, baseline="b" * 64, candidate="c" * 64)
RIGHT = "the cat sat on the mat"
BETTER, WORSE = "the cat sat on a mat", "a cat sits on mats"


def agreeing(samples: int) -> Agreement:
    ids: Ids = np.array([4, 2])
    return Agreement.of([(ids, ids)] * samples, [(ids, ids)] * samples)


def judged(name: str, references: Any, baseline: list[str], candidate: list[str], **options: Any) -> Verdict:
    return judge(
        metric(name),
        references=references,
        baseline=baseline,
        candidate=candidate,
        compared=COMPARED,
        **{"agreement": agreeing(max(1, len(baseline)))} | options,
    )


def verdict(loss: float, *, max_loss: float | None, agreement: float = 99.0) -> Verdict:
    """As if so much had been lost."""

    def exactly(value: float) -> Estimate:
        return Estimate(value=value, low=value, high=value)

    comparison = Comparison(
        baseline=exactly(5.0), candidate=exactly(5.0 + loss), loss=exactly(loss), samples=100, changed=3
    )
    return Verdict(
        compared=COMPARED,
        metric="wer",
        signature="wer|...",
        references="data",
        comparison=comparison,
        agreement={"forced_tokens": exactly(agreement)},
        max_loss=max_loss,
    )


@pytest.mark.parametrize("name", METRICS)
def test_worse_is_a_loss_and_better_a_gain_in_every_metric(name: str) -> None:
    references = [[RIGHT]] * 4
    right, better, worse = [RIGHT] * 4, [RIGHT, RIGHT, BETTER, BETTER], [BETTER, BETTER, WORSE, WORSE]
    lost = judged(name, references, better, worse).comparison
    gained = judged(name, references, worse, better).comparison
    assert lost.loss.value > 0 > gained.loss.value
    assert lost.loss.value == -gained.loss.value == abs(lost.baseline.value - lost.candidate.value)
    assert judged(name, references, right, better).comparison.loss.value > 0


@pytest.mark.parametrize("name", METRICS)
@given(st.lists(st.sampled_from([RIGHT, BETTER, WORSE, ""]), min_size=1, max_size=5))
def test_the_same_texts_lose_nothing(name: str, said: list[str]) -> None:
    found = judged(name, [[RIGHT]] * len(said), said, list(said), max_loss=0)
    assert found.require().comparison.loss == Estimate(value=0, low=0, high=0)
    assert found.comparison.changed == 0


def test_without_references_a_change_is_a_loss() -> None:
    found = judged("exact-match", None, ["a", "b", "c", "d"], ["a", "b", "c", "x"])
    assert (found.comparison.baseline.value, found.comparison.candidate.value) == (100, 75)
    assert (found.comparison.loss.value, found.comparison.changed) == (25, 1)
    assert found.certificate()["data"]["references"] == "baseline"
    assert judged("exact-match", [["a"]], ["a"], ["a"]).certificate()["data"]["references"] == "data"


LIMITS: tuple[tuple[float, float | None, bool], ...] = (
    # lost, allowed, passes
    (0.31, 0.3, False),
    (0.3, 0.3, True),
    (5.3 - 5.0, 0.3, True),  # as floats: 0.2999...98
    (0.1 + 0.2, 0.3, True),  # as floats: 0.3000...04
    (-2.0, 0.0, True),
    (0.001, 0.0, False),
    (40.0, None, True),
    (math.nan, 0.3, False),
    (math.nan, None, False),
    (math.inf, None, False),
    (-math.inf, 0.3, False),
)


@pytest.mark.parametrize(("lost", "allowed", "passes"), LIMITS)
def test_a_loss_over_its_limit_or_not_a_number_is_refused(lost: float, allowed: float | None, passes: bool) -> None:
    found = verdict(lost, max_loss=allowed)
    assert found.passed == found.certificate()["passed"] == passes
    if passes:
        assert found.require() is found
    else:
        with pytest.raises(LossError) as err:
            found.require()
        assert err.value.exit_code == 3


@pytest.mark.parametrize("allowed", [None, 0.3])
def test_nan_in_the_agreement_is_refused_though_nothing_was_lost(allowed: float | None) -> None:
    with pytest.raises(LossError, match="forced_tokens: expected finite numbers, found nan"):
        verdict(0.0, max_loss=allowed, agreement=math.nan).require()


def test_logits_that_are_not_numbers_are_refused_whatever_the_text_says() -> None:
    ids: Ids = np.array([4, 2])
    spoiled = Agreement.of([(ids, ids)], [(ids, ids)], [np.array([0.0, math.nan])])
    found = judged("exact-match", None, ["a"], ["a"], agreement=spoiled)
    with pytest.raises(LossError, match="divergence_nats"):
        found.require()


def test_the_refusal_says_what_was_lost_and_what_to_do() -> None:
    with pytest.raises(LossError) as err:
        verdict(0.9, max_loss=0.3).require()
    assert str(err.value) == (
        "the quantized artifact is refused:\n"
        "  - wer 5.00 before, 5.90 after: lost 0.90 points (95% interval 0.90 to 0.90), allowed 0.3; "
        "3 of 100 samples scored differently; choose a higher precision or another scheme, calibrate on more data, "
        "or allow more with --max-loss"
    )


def spoken(wrong: int, of: int = 100) -> list[str]:
    return ["wrong"] * wrong + ["right"] * (of - wrong)


def test_the_point_estimate_decides_and_the_interval_warns(caplog: pytest.LogCaptureFixture) -> None:
    """One word of 100 was lost: within 2 points, though on other data it might be 3."""
    references = [["right"]] * 100
    with caplog.at_level(logging.WARNING, logger="txopt.calibration.gate"):
        found = judged("wer", references, spoken(4), spoken(5), max_loss=2)
    assert found.passed
    assert found.comparison.loss.value == pytest.approx(1)
    assert found.comparison.loss.high > 2
    assert found.certificate()["decided_by"] == "point estimate"
    assert ["may be over it on other data" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize(("wrong", "allowed"), [(5, 90.0), (5, None), (9, 1.0)])
def test_no_warning_where_nothing_is_in_doubt(
    wrong: int, allowed: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="txopt.calibration.gate"):
        judged("wer", [["right"]] * 100, spoken(4), spoken(wrong), max_loss=allowed)
    assert caplog.messages == []


def test_a_certificate_holds_what_was_compared_and_how() -> None:
    found = judged("chrf", [[RIGHT], ["a dog"]], [RIGHT, "a dog"], [RIGHT, "a log"], max_loss=50.0).certificate()
    assert found["data"] == {"sha256": "d" * 64, "samples": 2, "references": "data"}
    assert found["metric"]["name"] == "chrf"
    assert found["metric"]["signature"].startswith("chrf|nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert found["baseline"] == {"sha256": "b" * 64, "figure": {"value": 100, "low": 100, "high": 100}}
    assert found["candidate"]["sha256"] == "c" * 64
    assert 0 <= found["loss"]["low"] < found["loss"]["value"] < found["loss"]["high"]
    assert found["changed"] == 1
    assert found["agreement"].keys() == {"forced_tokens", "free_prefix", "free_sequences"}
    assert found["interval"] == {"method": "paired bootstrap", "confidence": 0.95, "resamples": 1000, "seed": 0}
    assert (found["max_loss"], found["passed"]) == (50.0, True)


def test_equal_runs_give_equal_bytes() -> None:
    one, other = (judged("bleu", [[RIGHT]] * 9, [RIGHT] * 9, [BETTER] * 9).certificate() for _ in range(2))
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize("lost", [0.1234567891, math.nan, math.inf])
def test_every_certificate_is_json(lost: float) -> None:
    found = verdict(lost, max_loss=0.3).certificate()
    assert list(value_problems(found, "")) == []
    assert json.loads(canonical(found))["loss"]["value"] == (0.123457 if math.isfinite(lost) else None)


@pytest.mark.parametrize("max_loss", [-0.1, math.nan, math.inf])
def test_a_limit_is_a_number_of_points(max_loss: float) -> None:
    with pytest.raises(UsageError, match="points of wer, a number of at least 0"):
        judged("wer", [["a"]], ["a"], ["a"], max_loss=max_loss)


REFUSED: tuple[tuple[Any, list[str], list[str], int, str], ...] = (
    # references, baseline, candidate, samples of the agreement, message
    ([["a"]] * 2, ["a"] * 2, ["a"] * 2, 1, "agreement of at least 2 samples, found that of 1"),
    ([["a"]] * 2, ["a"] * 2, ["a"], 2, "each of 1 samples, found them for 2"),
    ([["a"]], ["a"] * 2, ["a"] * 2, 2, "each of 2 samples, found them for 1"),
    (None, ["", ""], ["", ""], 2, "all are empty"),  # an artifact that says nothing proves nothing
)


@pytest.mark.parametrize(("references", "baseline", "candidate", "samples", "message"), REFUSED)
def test_what_cannot_be_judged_is_refused(
    references: Any, baseline: list[str], candidate: list[str], samples: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        judged("exact-match", references, baseline, candidate, agreement=agreeing(samples))


def test_no_samples_are_an_error() -> None:
    nothing = Agreement(forced=np.empty((0, 2)), free=np.empty((0, 4)))
    with pytest.raises(InputError, match="at least one sample"):
        judged("wer", [], [], [], agreement=nothing)


def test_the_fingerprint_of_an_fp32_artifact_is_the_hash_of_its_manifest(tmp_path: Path) -> None:
    artifact = artifacts.write(tmp_path / "out")
    written = hashlib.sha256((tmp_path / "out/manifest.json").read_bytes()).hexdigest()
    assert fingerprint(artifact.manifest) == written


def test_a_certificate_does_not_change_the_fingerprint_and_a_weight_does(tmp_path: Path) -> None:
    manifest = artifacts.write(tmp_path / "out").manifest
    certified = replace(manifest, calibration={"gate": verdict(0.1, max_loss=0.3).certificate()})
    assert fingerprint(certified) == fingerprint(manifest)
    other = replace(manifest.files["weights.data"], sha256="0" * 64)
    assert fingerprint(replace(manifest, files=manifest.files | {"weights.data": other})) != fingerprint(manifest)


@pytest.mark.parametrize("listed", [True, False])
def test_a_draft_has_no_fingerprint(listed: bool, tmp_path: Path) -> None:
    manifest = artifacts.write(tmp_path / "out").manifest
    draft = {name: replace(entry, sha256="") for name, entry in manifest.files.items()} if listed else {}
    with pytest.raises(ArtifactError):
        fingerprint(replace(manifest, files=draft))
