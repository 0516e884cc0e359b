"""Agreement with the fp32 artifact: exact counts, and a divergence that is right in float64, bounded and stable."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import special
from scipy.stats import entropy

from txopt.calibration.agreement import NO_CHOICE, Agreement, Ids, choices, divergences
from txopt.runtime.errors import InputError

# Of float64 sums over a few tokens.
ROUNDING = 1e-12

ids = st.lists(st.integers(0, 2), max_size=6).map(lambda values: np.array(values, np.int64))
logits = arrays.arrays(np.float32, (3, 5), elements=st.floats(-50, 50, width=32))


def of(*values: int) -> Ids:
    return np.array(values, np.int64)


FREE: tuple[tuple[Ids, Ids, list[int]], ...] = (
    # fp32, quantized, [places before the first difference, places, equal, 1]
    (of(5, 6, 2), of(5, 6, 2), [3, 3, 1, 1]),
    (of(5, 6, 2), of(5, 7, 2), [1, 3, 0, 1]),  # the 2 behind the difference agrees by chance
    (of(5, 6, 2), of(5, 6), [2, 3, 0, 1]),
    (of(5), of(6, 7, 8), [0, 3, 0, 1]),
    (of(), of(), [1, 1, 1, 1]),
    (of(), of(5), [0, 1, 0, 1]),
)


@pytest.mark.parametrize(("baseline", "candidate", "expected"), FREE)
def test_free_running_counts_up_to_the_first_difference(baseline: Ids, candidate: Ids, expected: list[int]) -> None:
    found = Agreement.of([(of(1), of(1))], [(baseline, candidate)])
    assert found.free.tolist() == [expected]


def test_teacher_forcing_counts_every_place() -> None:
    found = Agreement.of([(of(5, 6, 7, 2), of(5, 0, 7, 2)), (of(1), of(1))], [(of(1), of(1))] * 2)
    assert found.forced.tolist() == [[3, 4], [1, 1]]
    assert found.estimates()["forced_tokens"].value == 80


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=6))
def test_agreement_is_symmetric_and_between_0_and_100(pairs: list[tuple[Ids, Ids]]) -> None:
    forced = [(of(1), of(1))] * len(pairs)
    there, back = Agreement.of(forced, pairs), Agreement.of(forced, [(b, a) for a, b in pairs])
    assert there.free.tolist() == back.free.tolist()
    for found in there.estimates().values():
        assert 0 <= found.low <= found.high <= 100
        assert 0 <= found.value <= 100


@given(st.lists(ids.filter(len), min_size=1, max_size=6))
def test_who_agrees_with_itself_agrees_in_every_resample(sequences: list[Ids]) -> None:
    same = [(row, row.copy()) for row in sequences]
    for found in Agreement.of(same, same).estimates().values():
        assert (found.low, found.value, found.high) == (100, 100, 100)


def test_nan_is_no_choice_and_agrees_with_nothing() -> None:
    said = choices(np.array([[0, 3, 1], [0, math.nan, 9]], np.float32))
    assert said.tolist() == [1, NO_CHOICE]
    assert Agreement.of([(said, said)], [(of(1), of(1))]).forced.tolist() == [[1, 2]]


@given(logits, logits)
def test_the_divergence_is_that_of_the_two_distributions(p: Any, q: Any) -> None:
    wide = p.astype(np.float64), q.astype(np.float64)
    expected = (
        special.softmax(wide[0], -1) * (special.log_softmax(wide[0], -1) - special.log_softmax(wide[1], -1))
    ).sum(-1)
    assert divergences(p, q) == pytest.approx(expected, abs=ROUNDING, rel=ROUNDING)
    assert (divergences(p, q) >= 0).all()


def test_the_divergence_of_coins() -> None:
    p, q = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    assert divergences(p, q) == pytest.approx([entropy([0.5, 0.5], [0.9, 0.1])], rel=ROUNDING)
    assert divergences(q, p) == pytest.approx([entropy([0.9, 0.1], [0.5, 0.5])], rel=ROUNDING)


@given(logits, st.floats(-1e4, 1e4))
def test_a_shift_of_all_logits_changes_nothing(p: Any, shift: float) -> None:
    assert divergences(p, p.astype(np.float64) + shift) == pytest.approx(np.zeros(3), abs=1e-9)
    assert (divergences(p, p) == 0).all()


def test_the_divergence_is_stable_where_a_softmax_overflows() -> None:
    p, q = np.array([[1e4, 0.0]], np.float32), np.array([[0.0, 1e4]], np.float32)
    assert divergences(p, q) == pytest.approx([1e4])


def test_small_divergences_are_not_lost_in_rounding() -> None:
    """Second order of a small difference d: half the variance of d under p."""
    p, d = np.zeros((1, 4)), 1e-6 * np.array([[1, -1, 1, -1]])
    assert divergences(p, p + d) == pytest.approx([0.5e-12], rel=1e-3)


def test_half_precision_is_widened_first() -> None:
    p, q = np.array([[11, 9, 8]], np.float16), np.array([[11, 9.5, 8]], np.float16)
    assert divergences(p, q).dtype == np.float64
    assert divergences(p, q).tolist() == divergences(p.astype(np.float64), q.astype(np.float64)).tolist()


INF = math.inf
IMPOSSIBLE: tuple[tuple[list[float], list[float], float], ...] = (
    ([0, 0, -INF], [0, 0, -INF], 0),
    ([0, 0, -INF], [0, 0, 0], math.log(3 / 2)),
    ([0, 0, 0], [0, 0, -INF], INF),
    ([-INF, -INF, -INF], [0, 0, 0], math.nan),
    ([0, 0, 0], [-INF, -INF, -INF], math.nan),
    ([0, math.nan, 0], [0, 0, 0], math.nan),
    ([0, 0, 0], [0, math.nan, 0], math.nan),
    ([0, INF, 0], [0, 0, 0], math.nan),
)


@pytest.mark.parametrize(("p", "q", "expected"), IMPOSSIBLE)
def test_tokens_ruled_out_and_numbers_that_are_none(p: list[float], q: list[float], expected: float) -> None:
    assert divergences(np.array([p]), np.array([q])) == pytest.approx([expected], nan_ok=True)


def test_the_divergence_is_the_mean_over_places_not_over_samples() -> None:
    same = [(of(1), of(1))] * 2
    found = Agreement.of(same, same, [np.array([0.5]), np.zeros(9)])
    assert found.divergence is not None
    assert found.divergence.tolist() == [[0.5, 1], [0, 9]]
    assert found.estimates()["divergence_nats"].value == 0.05


def test_one_nan_spoils_the_divergence() -> None:
    same = [(of(1), of(1))] * 2
    assert not Agreement.of(same, same, [np.zeros(2), np.array([math.nan])]).estimates()["divergence_nats"].finite


REFUSED: tuple[tuple[list[Any], list[Any], list[Any] | None, str], ...] = (
    ([], [], None, "found 0 of forced, 0 of free"),
    ([(of(1), of(1))], [], None, "found 1 of forced, 0 of free"),
    ([(of(1), of(1))], [(of(1), of(1))], [], "1 of free, 0 of divergence"),
    ([(of(1), of(1)), (of(1, 2), of(1))], [(of(1), of(1))] * 2, None, "sample 1: .* found 2 and 1"),
    ([(of(), of())], [(of(1), of(1))], None, "sample 0: .* found 0 and 0"),
)


@pytest.mark.parametrize(("forced", "free", "divergence", "message"), REFUSED)
def test_what_cannot_be_compared_is_refused(
    forced: list[Any], free: list[Any], divergence: list[Any] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Agreement.of(forced, free, divergence)


def test_logits_of_different_shapes_are_refused() -> None:
    with pytest.raises(InputError, match=r"found \(2, 3\) and \(3, 3\)"):
        divergences(np.zeros((2, 3)), np.zeros((3, 3)))
