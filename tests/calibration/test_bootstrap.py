"""The bootstrap: exact where the answer is known, covering where it is random, the same for the same seed, and fast."""

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from txopt.calibration.bootstrap import Statistics, _times_drawn, compare, estimate, mean, percent

Bools = NDArray[np.bool_]


def wrong(flags: Bools) -> Statistics:
    """Rows (errors, words) of samples of one word each."""
    return np.stack([flags, np.ones(len(flags))], axis=1).astype(np.float64)


def rates(samples: int, seed: int) -> Statistics:
    """Rows (errors, words) as of a corpus: 0 to 30 words, a tenth of them wrong."""
    generator = np.random.default_rng(seed)
    words = generator.integers(31, size=samples)
    return np.stack([generator.binomial(words, 0.1), words], axis=1).astype(np.float64)


@st.composite
def corpora(draw: st.DrawFn) -> Statistics:
    rows = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20))
    return np.array(rows, np.float64)


@given(corpora())
def test_a_system_loses_nothing_to_itself_in_any_resample(statistics: Statistics) -> None:
    found = compare(statistics, statistics.copy(), percent, higher_is_better=True, resamples=50)
    assert (found.loss.low, found.loss.value, found.loss.high) == (0, 0, 0)
    assert found.baseline == found.candidate
    assert found.changed == 0


@given(corpora(), st.integers(0, 2**32), st.randoms(use_true_random=False))
def test_the_loss_turns_its_sign_with_the_systems_and_with_the_direction(
    statistics: Statistics, seed: int, random: Any
) -> None:
    other = statistics.copy()
    other[:, 0] = [random.randrange(10) for _ in other]
    worse = compare(statistics, other, percent, higher_is_better=False, resamples=50, seed=seed).loss
    for found in (
        compare(other, statistics, percent, higher_is_better=False, resamples=50, seed=seed).loss,
        compare(statistics, other, percent, higher_is_better=True, resamples=50, seed=seed).loss,
    ):
        assert (found.low, found.value, found.high) == pytest.approx((-worse.high, -worse.value, -worse.low))


@given(corpora(), st.integers(0, 2**32))
def test_every_resample_draws_as_many_samples_as_there_are(statistics: Statistics, seed: int) -> None:
    drawn = np.concatenate(list(_times_drawn(len(statistics), 20, seed)))
    assert drawn.shape == (20, len(statistics))
    assert (drawn.sum(axis=1) == len(statistics)).all()


def test_every_sample_is_drawn_alike() -> None:
    drawn = np.concatenate(list(_times_drawn(50, 4000, 1)))
    assert drawn.mean(axis=0) == pytest.approx(np.ones(50), abs=0.1)
    assert drawn.var() == pytest.approx(1 - 1 / 50, abs=0.02)  # of a multinomial


def test_the_draws_come_in_parts_that_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("txopt.calibration.bootstrap._DRAWS_AT_ONCE", 7 * 30)
    parts = list(_times_drawn(30, 20, 3))
    assert [len(part) for part in parts] == [7, 7, 6]
    assert (np.concatenate(parts).sum(axis=1) == 30).all()
    assert not (parts[0] == parts[1]).all()


def test_one_seed_gives_one_interval_and_another_gives_another() -> None:
    statistics = rates(200, 1)
    assert estimate(statistics, percent, seed=5) == estimate(statistics, percent, seed=5)
    assert estimate(statistics, percent, seed=5) != estimate(statistics, percent, seed=6)


def test_the_figure_is_the_corpus_and_not_the_mean_of_its_samples() -> None:
    statistics = np.array([[1, 1], [0, 9]], np.float64)
    assert estimate(statistics, percent).value == 10
    assert estimate(statistics, mean).value == 0.1


def test_the_interval_of_a_share_is_that_of_the_binomial() -> None:
    flags = np.arange(1000) < 200
    found = estimate(wrong(flags), percent, resamples=4000)
    expected = 1.96 * 100 * (0.2 * 0.8 / 1000) ** 0.5
    assert found.value == 20
    assert (20 - found.low, found.high - 20) == pytest.approx((expected, expected), rel=0.1)


def test_the_interval_of_a_rare_loss_reaches_down_to_nothing() -> None:
    """The example of decision 27: draws of two words of 300, Poisson with mean 2, of which 95 % are 0 to 5."""
    found = compare(
        wrong(np.zeros(300, bool)), wrong(np.arange(300) < 2), percent, higher_is_better=False, resamples=4000
    )
    assert (found.loss.value, found.loss.low, found.loss.high) == pytest.approx((2 / 3, 0, 5 / 3))
    assert found.changed == 2


def test_the_interval_covers_the_true_loss_about_as_often_as_it_says() -> None:
    """Two systems with 10 % and 12 % of errors, alike on most samples: 95 % of the intervals hold the true 2 points."""
    generator, trials = np.random.default_rng(0), 400
    covered = 0
    for trial in range(trials):
        before = generator.random(600) < 0.10
        after = before ^ (generator.random(600) < np.where(before, 0.10, 0.10 * (0.10 + 0.20) / 0.90))
        loss = compare(wrong(before), wrong(after), percent, higher_is_better=False, resamples=300, seed=trial).loss
        covered += loss.low <= 2.0 <= loss.high
    assert 0.92 <= covered / trials <= 0.98


def test_pairing_is_what_makes_the_interval_narrow() -> None:
    """On its own each figure is uncertain by points; the difference between two that agree on most samples is not."""
    statistics = rates(500, 2)
    other = statistics.copy()
    other[::50, 0] += 1
    found = compare(statistics, other, percent, higher_is_better=False)
    alone = found.baseline.high - found.baseline.low
    assert 0 < found.loss.low < found.loss.value < found.loss.high
    assert found.loss.high - found.loss.low < alone / 5
    assert found.changed == 10


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_what_is_not_finite_spoils_the_interval(poison: float) -> None:
    statistics = rates(50, 3)
    spoiled = statistics.copy()
    spoiled[7, 0] = poison
    assert not estimate(spoiled, mean).finite
    assert not compare(statistics, spoiled, mean, higher_is_better=False).loss.finite
    assert not compare(spoiled, spoiled, mean, higher_is_better=False).loss.finite


def test_a_resample_without_any_word_is_a_number() -> None:
    """Two samples, one of silence: a quarter of the resamples draws only that."""
    assert estimate(np.array([[0, 0], [1, 2]], np.float64), percent).finite


def test_a_thousand_resamples_of_ten_thousand_samples_are_quick() -> None:
    statistics = np.tile(rates(10_000, 4), (1, 9))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        compare(statistics, statistics, lambda sums: sums[:, 0] / sums[:, 1], higher_is_better=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 2
