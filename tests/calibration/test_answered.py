"""What encoders alone answer to samples, whatever batches they are in, and how alike two artifacts' answers are."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from txopt.calibration import evaluate
from txopt.calibration.answered import Answered, answered
from txopt.calibration.data import read
from txopt.calibration.heads import Head
from txopt.calibration.likeness import Likeness
from txopt.calibration.loss import check_metric
from txopt.calibration.samples import Samples
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import UsageError
from txopt.runtime.model import Model

TOLERANCE = 1e-5  # float32 logits of a model of two layers; batches move last bits
LENGTHS = (3, 9, 5, 17, 1, 12)
HEADS = {"bert": Head.LABEL, "roberta": Head.TOKENS, "distilbert": Head.EMBEDDING}


@pytest.fixture(params=[1, 2, 16])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Samples in a batch."""
    monkeypatch.setattr(evaluate, "BATCH", dict.fromkeys(evaluate.BATCH, request.param))
    monkeypatch.setattr("txopt.calibration.answered.BATCH", evaluate.BATCH)
    return int(request.param)


def drawn(model: Model) -> Samples:
    generator = np.random.default_rng(0)
    return read([{"input_ids": generator.integers(3, 90, length)} for length in LENGTHS], model)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_answers_are_those_of_each_sample_alone(name: str, size: int, artifacts: Callable[[str], Artifact]) -> None:
    model = Model(artifacts(name))
    samples = drawn(model)
    found = answered(model, samples)
    assert found.head is HEADS[name]
    for sample, value in zip(samples, found.values, strict=True):
        alone = model.session.array(model.encode(**sample.feeds).values[found.head.output])
        alone = alone[0] if found.head is Head.TOKENS else alone
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, alone, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("scores", "head"), [("none", Head.NUMBERS), ("sigmoid", Head.LABELS)])
def test_what_logits_stand_for_is_the_manifests_to_say(
    scores: str, head: Head, artifacts: Callable[[str], Artifact]
) -> None:
    whole = artifacts("bert")
    manifest = replace(whole.manifest, frontend={**whole.manifest.frontend, "scores": scores})
    model = Model(Artifact(path=whole.path, manifest=manifest))
    samples = drawn(model)
    found = answered(model, samples)
    assert found.head is head
    for sample, value in zip(samples, found.chosen, strict=True):
        scored = model.classify(**sample.feeds)[0]
        np.testing.assert_allclose(value, scored > 0.5 if head is Head.LABELS else scored, atol=TOLERANCE)


@pytest.mark.slow
def test_progress_counts_samples(artifacts: Callable[[str], Artifact]) -> None:
    seen: list[tuple[int, int]] = []
    model = Model(artifacts("bert"))
    answered(model, drawn(model), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(LENGTHS), len(LENGTHS))


def answers(head: Head, *rows: Any) -> Answered:
    return Answered(head, tuple(np.array(row, np.float32, ndmin=2) for row in rows))


def alike(before: Answered, after: Answered) -> dict[str, float]:
    found = Likeness.of(before, after)
    assert found.samples == len(before.values)
    estimates = found.estimates()
    assert all(each.finite and each.low <= each.value <= each.high for each in estimates.values())
    return {name: round(each.value, 9) for name, each in estimates.items()}


ANSWERS: Mapping[Head, list[Any]] = {
    Head.LABEL: [[1, 2], [3, 0], [1, 0], [0, 4]],
    Head.LABELS: [[1, -2], [3, 1], [-1, -1], [1, 4]],
    Head.TOKENS: [[[1, 2], [3, 0]], [[1, 0]], [[0, 4], [2, 0], [5, 0]]],
    Head.NUMBERS: [[1], [3], [-1], [4]],
    Head.EMBEDDING: [[1, 0], [0.9, 0.1], [0, 1], [-0.1, 1]],
}


@pytest.mark.parametrize("head", Head)
def test_an_artifact_is_like_itself(head: Head) -> None:
    mine = answers(head, *ANSWERS[head])
    name = {Head.NUMBERS: "r_squared", Head.EMBEDDING: "same_neighbour"}.get(head, "same_labels")
    assert alike(mine, answers(head, *ANSWERS[head])) == {name: 100, "divergence_nats": 0}
    assert next(iter(Likeness.of(mine, mine).estimates())) == name  # the one that stands for all


CHANGED: Mapping[Head, tuple[list[Any], float]] = {
    Head.LABEL: ([[2, 1], [3, 0], [1, 0], [0, 3]], 75),
    Head.LABELS: ([[1, -2], [3, -1], [-1, 1], [1, 4]], 50),
    Head.TOKENS: ([[[1, 2], [0, 3]], [[1, 0]], [[0, 4], [2, 0], [5, 0]]], 100 * 5 / 6),
    Head.NUMBERS: ([[2], [3], [-1], [4]], 100 * (1 - 1 / 14.75)),
    Head.EMBEDDING: ([[1, 0], [0, 1], [0.1, 1], [-1, 0]], 0),
}


@pytest.mark.parametrize("head", Head)
def test_other_answers_are_counted(head: Head) -> None:
    changed, percent = CHANGED[head]
    found = alike(answers(head, *ANSWERS[head]), answers(head, *changed))
    assert next(iter(found.values())) == pytest.approx(percent)
    assert found["divergence_nats"] > 0


def test_who_has_no_other_has_no_other_neighbour() -> None:
    assert alike(answers(Head.EMBEDDING, [1, 0]), answers(Head.EMBEDDING, [0, 1]))["same_neighbour"] == 100


@pytest.mark.parametrize("head", Head)
def test_nan_is_no_likeness(head: Head) -> None:
    good = answers(head, *ANSWERS[head])
    bad = Answered(head, (good.values[0] * np.nan, *good.values[1:]))
    assert not Likeness.of(good, bad).estimates()["divergence_nats"].finite


METRICS: tuple[tuple[str, str, str | None], ...] = (
    # artifact, metric, what is said where it does not fit
    ("bert", "accuracy", None),
    ("distilbert", "cosine", None),
    ("g2p", "word-error", None),
    ("bert", "wer", "expected of a model for text-classification accuracy, which it is judged by, found 'wer'"),
    ("bert", "cosine", "expected of a model for text-classification accuracy"),
    ("distilbert", "accuracy", "expected of a model for embedding cosine"),
    ("g2p", "accuracy", "expected of a model for text-to-text one of wer, "),
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "metric", "said"), METRICS)
def test_metrics_of_other_artifacts_are_refused(
    name: str, metric: str, said: str | None, artifacts: Callable[[str], Artifact], g2p: Artifact
) -> None:
    manifest = (g2p if name == "g2p" else artifacts(name)).manifest
    if said is None:
        check_metric(manifest, metric)
        return
    with pytest.raises(UsageError, match=said):
        check_metric(manifest, metric)
