"""What observers remember is what arithmetic over all values says, however these came, in memory that does not grow."""

import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from txopt.calibration.observers import ChannelMagnitude, Observer, RowSample, SecondMoment
from txopt.runtime.errors import InputError

K = 3
ROUNDING = 1e-12  # of float64 sums, relative to the largest
ROWS = arrays(np.float32, st.tuples(st.integers(0, 12), st.just(K)), elements=st.integers(-3, 3).map(np.float32))
KINDS = {
    "magnitude": lambda: ChannelMagnitude("x", K),
    "moment": lambda: SecondMoment("x", K),
    "sample": lambda: RowSample("x", K, size=5),
}


def shown(observer: Any, *updates: Any) -> list[Any]:
    """All that can be asked of ``observer`` after ``updates``."""
    for values in updates:
        observer.update(np.asarray(values, np.float32))
    names = ("count", "absmax", "mean", "sum", "rows", "times")
    return [np.asarray(getattr(observer, name)).tolist() for name in names if hasattr(observer, name)]


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    @given(parts=st.lists(ROWS, max_size=5), random=st.randoms(use_true_random=False))
    def test_order_and_batches_do_not_matter(self, kind: str, parts: list[Any], random: Any) -> None:
        rows = [row for part in parts for row in part]
        random.shuffle(rows)
        whole = np.array(rows, np.float32).reshape(1, -1, K)
        # Small integers, so that sums are exact
        assert shown(KINDS[kind](), *parts) == shown(KINDS[kind](), whole)

    @given(one=ROWS, other=ROWS)
    def test_merging_gives_what_one_would_have_given(self, kind: str, one: Any, other: Any) -> None:
        merged, second = KINDS[kind](), KINDS[kind]()
        shown(merged, one)
        before = shown(second, other)
        merged.merge(second)
        assert shown(merged) == shown(KINDS[kind](), one, other)
        assert shown(second) == before, "what was merged in stays as it is"

    def test_what_is_not_finite_is_refused_and_leaves_no_trace(self, kind: str) -> None:
        observer: Observer = KINDS[kind]()
        before = shown(observer, [[1, 2, 3]])
        with pytest.raises(InputError, match=r"^x: .*1 NaN and 1 infinite among 6"):
            observer.update(np.array([[1, 2, np.nan], [4, 5, np.inf]], np.float32))
        with pytest.raises(InputError, match=r"^x: expected 3 channels"):
            observer.update(np.zeros((5, 2), np.float32))
        assert shown(observer) == before

    def test_float16_is_seen_as_its_value(self, kind: str) -> None:
        half = (np.arange(30).reshape(10, K) / 7).astype(np.float16)
        observer = KINDS[kind]()
        observer.update(half)
        assert shown(observer) == shown(KINDS[kind](), half.astype(np.float32))

    def test_nothing_seen_is_zeros_and_no_rows(self, kind: str) -> None:
        assert not any(np.any(each) for each in shown(KINDS[kind](), np.zeros((0, K)), np.zeros((4, 0, K))))


@pytest.mark.parametrize(
    "make",
    [lambda: ChannelMagnitude("x", 64), lambda: SecondMoment("x", 64), lambda: RowSample("x", 64, size=32)],
    ids=["magnitude", "moment", "sample"],
)
def test_memory_does_not_grow_with_the_data(make: Any) -> None:
    observer, random = make(), np.random.default_rng(0)
    for _ in range(3):
        observer.update(random.normal(size=(1500, 64)).astype(np.float32))
    tracemalloc.start()
    try:
        for step in range(60):
            observer.update(random.normal(size=(1 if step % 2 else 700, 64)).astype(np.float32))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Rows of a sample may have been replaced by later ones: 32 rows of 64 float32, and Python's headers
    assert held <= 24 << 10


# One by one


def test_magnitudes_are_numpys() -> None:
    values = np.random.default_rng(0).normal(size=(40, 7, K)).astype(np.float32)
    observer = ChannelMagnitude("x", K)
    for batch in np.array_split(values, 9):
        observer.update(batch)
    flat = np.abs(values.reshape(-1, K).astype(np.float64))
    assert observer.absmax.tolist() == flat.max(axis=0).tolist()
    assert observer.mean == pytest.approx(flat.mean(axis=0), rel=ROUNDING)
    assert observer.count == 280


@pytest.mark.parametrize("batches", [[1] * 600, [255, 1, 256, 257, 600], [1500], [200, 200, 200]])
def test_the_second_moment_is_the_product_of_all_rows(batches: list[int]) -> None:
    values = np.random.default_rng(0).normal(size=(sum(batches), 16)).astype(np.float32)
    observer = SecondMoment("x", 16)
    for batch in np.split(values, np.cumsum(batches)[:-1]):
        observer.update(batch)
    exact = values.astype(np.float64).T @ values.astype(np.float64)
    assert observer.sum.dtype == np.float64
    assert np.abs(observer.sum - exact).max() <= ROUNDING * np.abs(exact).max()
    assert (observer.sum == observer.sum.T).all()
    assert observer.count == len(values)


def test_the_second_moment_may_be_asked_for_at_any_time() -> None:
    observer = SecondMoment("x", K)
    for step in range(1, 4):
        observer.update(np.ones((1, K), np.float32))
        assert observer.sum.tolist() == np.full((K, K), step).tolist()


@given(st.lists(ROWS, max_size=5), st.integers(1, 9), st.integers(0, 3))
def test_sampled_rows_came_and_are_counted_exactly(parts: list[Any], size: int, seed: int) -> None:
    observer = RowSample("x", K, size=size, seed=seed)
    shown(observer, *parts)
    came = Counter(tuple((row + 0.0).tolist()) for part in parts for row in part)
    kept = [tuple(row.tolist()) for row in observer.rows]
    assert len(kept) == len(set(kept)) == min(size, len(came))
    assert dict(zip(kept, observer.times.tolist(), strict=True)) == {row: came[row] for row in kept}


def test_rows_that_differ_in_the_sign_of_a_zero_are_one_row() -> None:
    observer = RowSample("x", 2, size=5)
    observer.update(np.array([[0.0, 1], [-0.0, 1]], np.float32))
    assert (observer.times.tolist(), np.signbit(observer.rows).any()) == ([2], False)


def test_a_sample_is_drawn_uniformly() -> None:
    rows = np.arange(40, dtype=np.float32)[:, None]
    drawn: Counter[float] = Counter()
    for seed in range(1000):
        observer = RowSample("x", 1, size=10, seed=seed)
        observer.update(rows)
        drawn.update(observer.rows[:, 0].tolist())
    # Each with probability 1/4 of a thousand: 250, standard deviation 13.7
    assert len(drawn) == 40
    assert 250 - 5 * 13.7 < min(drawn.values()) <= max(drawn.values()) < 250 + 5 * 13.7


def test_a_weighted_sample_estimates_the_mean_of_all_rows() -> None:
    random = np.random.default_rng(0)
    words = random.normal(size=(2000, 1)).astype(np.float32) + np.linspace(0, 3, 2000, dtype=np.float32)[:, None]
    often = random.choice(2000, size=30_000, p=np.linspace(0, 1, 2000) / 1000)  # some words are frequent
    observer = RowSample("x", 1, size=500)
    observer.update(words[often])
    exact = words[often].mean()
    assert np.average(observer.rows[:, 0], weights=observer.times) == pytest.approx(exact, abs=0.15)
    assert abs(observer.rows.mean() - exact) > 0.3, "without weights it does not"
