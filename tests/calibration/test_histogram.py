"""Histograms count exactly, in whatever order and batches values come, in memory that does not grow."""

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from txopt.calibration.histogram import BARS, BINS, Histogram
from txopt.runtime.errors import InputError

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = arrays(np.float32, st.tuples(st.integers(0, 12), st.just(3)), elements=FLOATS)


def histogram(*updates: Any, channels: int | None = None, bins: int = 64) -> Histogram:
    made = Histogram("x", channels=channels, bins=bins)
    for values in updates:
        made.update(np.asarray(values, np.float32))
    return made


def state(made: Histogram) -> list[Any]:
    whole = [made.count, made.width, made.min, made.max, made.absmax, made.counts, *made.bars()]
    return [np.asarray(each).tolist() for each in whole]


def test_each_magnitude_is_in_its_bin_and_a_range_ends_above_the_largest() -> None:
    made = histogram([0, 0.5, -0.5, 63, -63.99])
    assert made.width == 1
    assert made.counts.nonzero()[0].tolist() == [0, 63]
    assert made.counts[[0, 63]].tolist() == [3, 2]
    assert histogram([64]).width == 2, "64 itself needs the next range"


def test_when_the_range_doubles_bins_merge_in_pairs() -> None:
    made = histogram(np.arange(64), [127])
    assert made.width == 2
    assert made.counts.tolist() == [2] * 32 + [0] * 31 + [1]


def test_a_far_larger_value_leaves_the_others_in_bin_0() -> None:
    made = histogram(np.arange(64), [2.0**100])
    assert made.counts.nonzero()[0].tolist() == [0, 32]
    assert made.counts[0] == 64


def test_minimum_maximum_and_count_are_exact() -> None:
    made = histogram([0.1, -0.7], [0.3])
    assert (made.min, made.max, made.absmax, made.count) == (np.float32(-0.7), np.float32(0.3), np.float32(0.7), 3)


@pytest.mark.parametrize(("low", "high"), [(0.0, -0.0), (-0.0, 0.0)])
def test_which_zero_comes_first_does_not_show(low: float, high: float) -> None:
    made = histogram([low, high], [low], [high])
    assert not np.signbit([made.min, made.max, made.absmax]).any()


def test_zeros_need_no_range() -> None:
    made = histogram(np.zeros(5), np.zeros(2))
    assert (made.counts[0], made.absmax, made.bars()[1]) == (7, 0, (7,))


def test_nothing_is_a_fine_update() -> None:
    for made in (histogram([]), histogram(np.zeros((0, 3)), np.zeros((4, 0, 3)), channels=3)):
        assert (made.count, made.absmax.max(), made.counts.sum(), made.bars()[1]) == (0, 0, 0, ())


def test_a_channel_has_a_range_of_its_own() -> None:
    made = histogram([[1, 100, 0]], [[[-3, 10, 0]], [[0, 1, 0]]], channels=3)
    for channel, values in enumerate([[1, -3, 0], [100, 10, 1], [0, 0, 0]]):
        alone = histogram(values)
        assert made.counts[channel].tolist() == alone.counts.tolist()
        assert (made.width[channel], made.absmax[channel]) == (alone.width, alone.absmax)
    assert made.count == 9


def test_float16_counts_as_its_value() -> None:
    values = np.array([[1 / 3, -60000, 6e-8]], np.float16)
    half = Histogram("x", bins=64)
    half.update(values)
    assert state(half) == state(histogram(values.astype(np.float32)))


@given(st.lists(ROWS, max_size=5), st.randoms(use_true_random=False), st.sampled_from([None, 3]))
def test_order_and_batches_do_not_matter(parts: list[Any], random: Any, channels: int | None) -> None:
    rows = [row for part in parts for row in part]
    random.shuffle(rows)
    whole = np.array(rows, np.float32).reshape(-1, 3)
    assert state(histogram(*parts, channels=channels)) == state(histogram(whole, channels=channels))


@given(ROWS, ROWS, st.sampled_from([None, 3]))
def test_merging_gives_what_one_would_have_given(one: Any, other: Any, channels: int | None) -> None:
    merged, second = histogram(one, channels=channels), histogram(other, channels=channels)
    before = state(second)
    merged.merge(second)
    assert state(merged) == state(histogram(one, other, channels=channels))
    assert state(second) == before, "what was merged in stays as it is"


@given(arrays(np.float32, st.integers(1, 200), elements=FLOATS))
def test_counts_are_numpys_over_the_same_range(values: Any) -> None:
    made = histogram(values)
    magnitudes = np.abs(values.astype(np.float64))
    expected, _ = np.histogram(magnitudes, bins=64, range=(0, 64 * float(made.width)))
    assert made.counts.tolist() == expected.tolist()
    assert magnitudes.max() < 64 * made.width


@given(ROWS, st.sampled_from([None, 3]))
def test_bars_count_every_value_once(values: Any, channels: int | None) -> None:
    made = histogram(values, channels=channels, bins=256)
    width, bars = made.bars()
    assert len(bars) <= BARS
    assert sum(bars) == made.count == values.size
    if bars:
        assert (len(bars) - 1) * width <= made.absmax.max() < len(bars) * width


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ([1, np.nan], "1 NaN and 0 infinite among 2"),
        ([1, np.inf], "0 NaN and 1 infinite among 2"),
        ([1, -np.inf], "0 NaN and 1 infinite among 2"),
        ([np.inf, 1, -np.inf, np.nan], "1 NaN and 2 infinite among 4"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_nan_and_infinity_are_counted_named_and_refused(bad: list[float], expected: str, dtype: Any) -> None:
    made = histogram([1, 2])
    before = state(made)
    with pytest.raises(InputError, match=f"^x: .*{expected}"):
        made.update(np.array(bad, dtype))
    assert state(made) == before


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.zeros(3), "found float64"),
        (np.zeros(3, np.int64), "found int64"),
        (np.zeros((2, 4), np.float32), r"expected 3 channels in the last axis, found shape \[2, 4\]"),
        (np.float32(1), r"found shape \[\]"),
    ],
)
def test_what_is_no_float_or_has_other_channels_is_refused(values: Any, expected: str) -> None:
    with pytest.raises(InputError, match=f"^x: .*{expected}"):
        histogram(channels=3).update(values)


@pytest.mark.parametrize("channels", [None, 384])
def test_memory_does_not_grow_with_the_data(channels: int | None) -> None:
    values = np.random.default_rng(0).normal(size=(1500, 384)).astype(np.float32)
    made = Histogram("x", channels=channels, bins=1024)
    made.update(values)
    bound = 5 * made.counts.nbytes + (4 << 20)  # counts, their twin while a range doubles, and one chunk on its way
    tracemalloc.start()
    try:
        for scale in range(1, 20):
            made.update(values * np.float32(scale))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held <= made.counts.nbytes + (64 << 10)
    assert peak <= bound + values.nbytes


def test_five_minutes_of_whisper_tiny_take_seconds() -> None:
    """Ten windows of 30 seconds, 1500 frames each, through the encoder's four layers: six tensors of 384 and one of 1536."""
    random = np.random.default_rng(0)
    narrow, wide = (random.normal(size=(1500, size)).astype(np.float32) for size in (384, 1536))
    made = {name: Histogram(name) for name in ("narrow", "wide")}
    start = time.perf_counter()
    for _ in range(10 * 4):
        for _ in range(6):
            made["narrow"].update(narrow)
        made["wide"].update(wide)
    seconds = time.perf_counter() - start
    assert made["narrow"].count == 240 * narrow.size
    assert seconds < 10  # many times what it takes: the machine may be busy


def test_the_default_resolves_as_finely_as_the_calibrators_of_tensorrt_and_onnx_runtime() -> None:
    for largest in (1.0, 1.5, 1.999):
        made = Histogram("x")
        made.update(np.array([largest], np.float32))
        assert 2048 <= made.absmax / made.width < BINS
