"""Metrics of encoders' answers: counted by hand in tables, and equal to what they are defined as."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from txopt.calibration.bootstrap import compare
from txopt.calibration.metrics import OF_ANSWERS, Measured, metric

ROUNDING = 1e-9  # points

Numbers = NDArray[np.float64]


def figure(measured: Measured) -> float:
    return float(measured.metric.figures(measured.statistics.sum(axis=0, keepdims=True))[0])


def test_a_label_is_right_or_wrong() -> None:
    said = [np.array([1]), np.array([0]), np.array([2]), np.array([-1])]
    found = metric("accuracy").measure(said, [[np.array([1])], [np.array([1])], [np.array([2])], [np.array([-1])]])
    assert found.statistics.tolist() == [[1, 1], [0, 1], [1, 1], [0, 1]]  # a choice among NaN is never right
    assert found.signature == "accuracy|refs:one|unit:place"


def test_of_several_labels_all_must_be_right() -> None:
    said = [np.array([True, False]), np.array([True, True]), np.array([False, False])]
    right = [[np.array([True, False])], [np.array([True, False])], [np.array([False, False])]]
    found = metric("accuracy").measure(said, right)
    assert found.statistics.tolist() == [[1, 1], [0, 1], [1, 1]]
    assert found.signature == "accuracy|refs:one|unit:text"


def test_each_token_that_counts_is_a_place() -> None:
    said = [np.array([0, 1, 2, 0]), np.array([1])]
    found = metric("accuracy").measure(said, [[np.array([-100, 1, 1, -100])], [np.array([1])]])
    assert found.statistics.tolist() == [[1, 2], [1, 1]]
    assert figure(found) == pytest.approx(100 * 2 / 3)


def test_cosines_do_not_depend_on_lengths() -> None:
    said = [np.array([2.0, 0.0]), np.array([1.0, 1.0]), np.array([0.0, 3.0])]
    found = metric("cosine").measure(said, [[np.array([1.0, 0.0])]] * 3)
    np.testing.assert_allclose(found.statistics, [[1, 1], [0.5**0.5, 1], [0, 1]], atol=1e-15)


@given(arrays(np.float64, st.tuples(st.integers(2, 9), st.integers(1, 3)), elements=st.floats(-9, 9)), st.randoms())
def test_r_squared_is_what_it_is_defined_as(right: Numbers, random: object) -> None:
    said = right + np.random.default_rng(len(right)).standard_normal(right.shape)
    measured = metric("r-squared").measure(list(said), [[row] for row in right])
    scatter = np.square(right - right.mean(axis=0)).sum(axis=0)
    if (scatter > 1e-6).all():
        expected = 100 * (1 - np.square(said - right).sum(axis=0) / scatter).mean()
        assert figure(measured) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("said", "points"), [([5.0, 5.0], 100), ([5.0, 6.0], 0)])
def test_r_squared_of_references_that_are_all_the_same(said: list[float], points: float) -> None:
    measured = metric("r-squared").measure([np.array([each]) for each in said], [[np.array([5.0])]] * 2)
    assert figure(measured) == points


def test_r_squared_has_an_interval_though_resamples_may_draw_one_sample_only() -> None:
    right = [[np.array([1e6 + number])] for number in range(3)]
    said = [one + 1e-3 for (one,) in right]
    rows = metric("r-squared").measure(said, right)
    same = metric("r-squared").measure([one for (one,) in right], right)
    found = compare(same.statistics, rows.statistics, rows.metric.figures, higher_is_better=True)
    assert found.candidate.finite
    assert found.candidate.low >= 0
    assert 0 < found.loss.value < 1e-3


ANSWERS: dict[str, list[NDArray[np.float64]]] = {
    "accuracy": [np.array([1]), np.array([0]), np.array([1])],
    "r-squared": [np.array([1.0]), np.array([0.5]), np.array([2.0])],
    "cosine": [np.array([1.0, 2.0]), np.array([0.5, -1.0]), np.array([2.0, 0.3])],
}


@pytest.mark.parametrize("name", OF_ANSWERS)
def test_who_answers_the_reference_is_perfect_and_loses_nothing(name: str) -> None:
    said = ANSWERS[name]
    found = metric(name).measure(said, [[one.copy()] for one in said])
    assert figure(found) == pytest.approx(100, abs=ROUNDING)
    again = metric(name).measure([one.copy() for one in said], [[one] for one in said])
    lost = compare(found.statistics, again.statistics, found.metric.figures, higher_is_better=True)
    assert (lost.loss.value, lost.loss.low, lost.loss.high, lost.changed) == (0, 0, 0, 0)


@pytest.mark.parametrize("name", OF_ANSWERS)
def test_other_answers_lose(name: str) -> None:
    right = ANSWERS[name]
    said = [right[1], right[2], right[0]]
    assert figure(metric(name).measure(said, [[one] for one in right])) < 100 - ROUNDING


@pytest.mark.parametrize("name", ["r-squared", "cosine"])
def test_nan_is_no_figure(name: str) -> None:
    said = [ANSWERS[name][0] * np.nan, *ANSWERS[name][1:]]
    assert np.isnan(figure(metric(name).measure(said, [[one] for one in ANSWERS[name]])))
