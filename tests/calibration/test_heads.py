"""Heads of encoders alone: which one a manifest describes, what an answer comes to, and how far two are apart."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.calibration.models import EMBEDDING, LOGITS, TOKEN_LOGITS, model
from tests.runtime.artifacts import tensor
from txopt.calibration.heads import Head, apart, chosen, head_of

ROUNDING = 1e-12
ONE = (tensor("logits", "float32", "B", 1),)
STATES = (tensor("memory", "float32", "B", "T", 8),)
HEADS: tuple[tuple[Any, str | None, Head | None, str], ...] = (
    # outputs, scores, head, metric
    (LOGITS, None, Head.LABEL, "accuracy"),
    (LOGITS, "softmax", Head.LABEL, "accuracy"),
    (LOGITS, "sigmoid", Head.LABELS, "accuracy"),
    (LOGITS, "none", Head.NUMBERS, "r-squared"),
    (ONE, "sigmoid", Head.NUMBERS, "r-squared"),
    (ONE, "none", Head.NUMBERS, "r-squared"),
    (TOKEN_LOGITS, "softmax", Head.TOKENS, "accuracy"),
    (EMBEDDING, None, Head.EMBEDDING, "cosine"),
    (STATES, None, None, ""),
)


@pytest.mark.parametrize(("outputs", "scores", "head", "metric"), HEADS)
def test_the_head_of_a_manifest(
    outputs: Any, scores: str | None, head: Head | None, metric: str, tmp_path: Path
) -> None:
    frontend = {"type": "arrays", **({} if scores is None else {"scores": scores})}
    found = head_of(model(tmp_path, frontend, kind="encoder", outputs=outputs).manifest)
    assert found is head
    assert found is None or found.metric == metric


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder"])
def test_models_that_generate_have_none(kind: str, tmp_path: Path) -> None:
    assert head_of(model(tmp_path, {"type": "arrays"}, kind=kind).manifest) is None


def test_what_answers_are_judged_as() -> None:
    logits = np.array([[1, 3, 2], [5, -1, np.nan]], np.float32)
    assert chosen(Head.TOKENS, logits).tolist() == [1, -1]
    assert chosen(Head.LABEL, logits[:1]).tolist() == [1]
    assert chosen(Head.LABELS, np.array([[0.1, -0.1, 0.0]], np.float32)).tolist() == [True, False, False]
    assert chosen(Head.NUMBERS, np.array([[1.5, 2]], np.float32)).tolist() == [1.5, 2]
    assert chosen(Head.EMBEDDING, np.array([[0.6, 0.8]], np.float64)).tolist() == [0.6, 0.8]


def floats(*rows: list[float]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(rows, np.float32)


APART: tuple[tuple[Head, list[Any], list[Any], list[float]], ...] = (
    # head, two samples before, after, nats of all places
    (Head.LABEL, [floats([0, 0]), floats([1, 1])], [floats([0, np.log(3)]), floats([4, 4])], [np.log(4 / 3) / 2, 0]),
    (Head.TOKENS, [floats([0, 0], [9, 9])], [floats([2, 2], [0, np.log(3)])], [0, np.log(4 / 3) / 2]),
    # a half each against a quarter and three quarters: the same, once for each label that moved
    (Head.LABELS, [floats([0, 0])], [floats([np.log(3), -np.log(3)])], [np.log(4 / 3)]),
    # of variance 4 and 1: 2^2 / 8, and 1 / 8 + 1 / 2
    (Head.NUMBERS, [floats([0, 0]), floats([4, 2])], [floats([2, 0]), floats([5, 3])], [1 / 2, 1 / 8 + 1 / 2]),
    (Head.NUMBERS, [floats([7])], [floats([9])], [2]),
    # at any length: 1 - cos of 0, 90 and 180 degrees
    (Head.EMBEDDING, [floats([1, 0]), floats([2, 0])], [floats([3, 0]), floats([0, 5])], [0, 1]),
    (Head.EMBEDDING, [floats([1, 0])], [floats([-1, 0])], [2]),
)


@pytest.mark.parametrize(("head", "before", "after", "nats"), APART)
def test_nats_between_answers(head: Head, before: list[Any], after: list[Any], nats: list[float]) -> None:
    found = np.concatenate(apart(head, before, after))
    np.testing.assert_allclose(found, nats, rtol=1e-6, atol=ROUNDING)


@pytest.mark.parametrize("head", Head)
def test_nothing_is_between_equal_answers_and_nan_is_no_number_of_nats(head: Head) -> None:
    answers = [floats([0.3, -2, 0.1]), floats([1, 2, 3])]
    assert [values.tolist() for values in apart(head, answers, [each.copy() for each in answers])] == [[0], [0]]
    spoiled = [answers[0], floats([1, np.nan, 3])]
    (good,), (bad,) = apart(head, answers, spoiled)
    assert good == 0
    assert np.isnan(bad)
