"""Each method clips where its definition, a closed form or another implementation says."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnxruntime.quantization.calibrate import HistogramCollector
from scipy.stats import entropy as kl_divergence

from txopt.calibration.amax import METHODS, MSE, Absmax, Entropy, Method, Percentile
from txopt.calibration.histogram import Histogram
from txopt.runtime.errors import UsageError

EVERY = [Absmax(), Percentile(), Percentile(percentile=50), Entropy(), MSE(), MSE(bits=4)]


def histogram(values: Any, bins: int = 2048, channels: int | None = None) -> Histogram:
    made = Histogram("x", bins=bins, channels=channels)
    made.update(np.asarray(values, np.float32))
    return made


def evenly(top: float, count: int) -> Any:
    """``count`` values spread over [0, top] as evenly as can be: a uniform distribution without noise."""
    return (np.arange(count) + 0.5) / count * top


def drawn(shape: str) -> Any:
    random = np.random.default_rng(0)
    values = random.laplace(size=200_000) if shape == "laplace" else random.normal(size=200_000)
    return {"relu": np.maximum(values, 0), "outlier": np.append(values, 40.0)}.get(shape, values).astype(np.float32)


SHAPES = ("gauss", "laplace", "relu", "outlier")


# What holds for every method


@pytest.mark.parametrize("method", EVERY, ids=repr)
class TestEveryMethod:
    @pytest.mark.parametrize("value", [3.7, -1.0, 2.0**-70, 1e-30, 3e38])
    def test_a_constant_is_not_clipped(self, method: Method, value: float) -> None:
        assert method.amax(histogram(np.full(1000, value))) == abs(np.float32(value))

    def test_only_zeros_give_zero(self, method: Method) -> None:
        assert method.amax(histogram(np.zeros(10))) == 0
        assert method.amax(histogram([])) == 0

    @given(arrays(np.float32, st.integers(1, 400), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
    def test_amax_is_between_zero_and_absmax(self, method: Method, values: Any) -> None:
        found = method.amax(histogram(values))
        assert found.shape == ()
        assert 0 <= found <= np.abs(values).max()
        assert (found > 0) == values.any()

    def test_a_channel_is_clipped_as_if_it_were_alone(self, method: Method) -> None:
        values = np.stack([drawn("gauss"), 100 * drawn("laplace"), np.zeros(200_000)], axis=1)[:5000]
        alone = [float(method.amax(histogram(channel))) for channel in values.T]
        assert method.amax(histogram(values, channels=3)).tolist() == alone

    def test_it_is_listed_by_name(self, method: Method) -> None:
        assert METHODS[method.name] is type(method)


# Percentile


@pytest.mark.parametrize(("percent", "edge"), [(50, 500), (50.05, 501), (99.9, 999), (99.99, 999.75), (100, 999.75)])
def test_a_percentile_is_the_lowest_edge_with_that_share_below(percent: float, edge: float) -> None:
    # 0.75, 1.75, ..., 999.75: one in each bin of width 1
    assert Percentile(percentile=percent).amax(histogram(np.arange(1000) + 0.75, bins=1024)) == edge


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("percent", [50.0, 99.0, 99.99])
def test_a_percentile_is_numpys_within_a_bin(shape: str, percent: float) -> None:
    values, made = drawn(shape), histogram(drawn(shape))
    exact = np.percentile(np.abs(values), percent, method="inverted_cdf")
    assert exact <= Percentile(percentile=percent).amax(made) <= exact + made.width


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("percent", [50.0, 99.0, 99.99])
def test_a_percentile_is_onnx_runtimes_within_a_bin(shape: str, percent: float, capsys: Any) -> None:
    made = histogram(drawn(shape))
    theirs = HistogramCollector("percentile", True, 2048, 128, percent, "same")
    theirs.collect({"x": drawn(shape)})
    lower_edge = float(theirs.compute_collection_result()["x"][1])
    bin_of_theirs = made.absmax / 2048
    assert (
        lower_edge - bin_of_theirs
        <= Percentile(percentile=percent).amax(made) - made.width
        <= lower_edge + bin_of_theirs
    )
    capsys.readouterr()  # it prints


# Entropy


def published_entropy(counts: Any, levels: int) -> int:
    """How many bins are kept, by the algorithm as it is published, bin by bin."""
    bins = np.trim_zeros(counts, "b").astype(float)
    bins[0] = bins[1]
    divergences = []
    for n in range(levels, len(bins) + 1):
        p = bins[:n].copy()
        p[-1] += bins[n:].sum()
        level = np.arange(n) * levels // n
        q = np.zeros(n)
        for each in range(levels):
            filled = (level == each) & (bins[:n] > 0)
            q[filled] = bins[:n][filled].mean() if filled.any() else 0
        with np.errstate(divide="ignore", invalid="ignore"):
            divergences.append(kl_divergence(p, q) if q.any() else np.inf)
    return levels + len(divergences) - 1 - int(np.argmin(divergences[::-1]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [5, 8])
def test_entropy_is_the_published_algorithms_to_the_bin(shape: str, bits: int) -> None:
    made = histogram(drawn(shape), bins=512)
    kept = published_entropy(made.counts, 1 << (bits - 1)) * float(made.width)
    assert Entropy(bits=bits).amax(made) == min(kept, made.absmax)


@pytest.mark.parametrize("bulk", [0.125, 0.25, 0.375, 0.5])
def test_entropy_is_onnx_runtimes_within_a_bin_where_its_levels_are_equally_wide(bulk: float) -> None:
    """ONNX Runtime keeps a histogram of both signs, and gives the last level what is left over by equal widths.

    Where the bulk of values ends at a multiple of 128 bins nothing is left over.
    """
    random = np.random.default_rng(0)
    values = np.concatenate([random.uniform(-bulk, bulk, 200_000), [0.999] * 3, [-0.999] * 3]).astype(np.float32)
    made = histogram(values, bins=1024)
    hist, edges = np.histogram(values, 2048, range=(-1, 1))  # of the same width
    theirs = HistogramCollector("entropy", True, 2048, 256, 99.99, "same")
    both = (hist, edges.astype(np.float32), values.min(), values.max(), np.float32(1))
    low, high = theirs.get_entropy_threshold(both, 256)  # 256 levels for both signs are 128 for one
    assert Entropy().amax(made) == bulk
    assert [-float(low), float(high)] == pytest.approx([bulk, bulk], abs=1.01 * float(made.width))


def test_entropy_does_not_clip_an_even_distribution_and_clips_outliers() -> None:
    assert Entropy().amax(histogram(evenly(1, 100_000))) == pytest.approx(1, abs=2e-5)
    assert Entropy().amax(histogram(drawn("outlier"))) < 6


def test_entropy_takes_no_heed_of_how_many_zeros_there_are() -> None:
    values = drawn("gauss")
    zeros = np.zeros(1_000_000, np.float32)
    assert Entropy().amax(histogram(np.append(values, zeros))) == Entropy().amax(histogram(values))


# Mean squared error


def squared_error(values: Any, amax: float, bits: int) -> float:
    """Of the values themselves, quantized one by one."""
    most = (1 << (bits - 1)) - 1
    codes = np.clip(np.rint(values / (amax / most)), -most, most)
    return float(np.mean((values - codes * (amax / most)) ** 2))


@pytest.mark.parametrize(("bits", "expected"), [(8, 254 / 255), (4, 14 / 15), (3, 6 / 7), (2, 2 / 3)])
def test_an_even_distribution_is_clipped_half_a_step_below_its_end(bits: int, expected: float) -> None:
    """Of [0, 1] and q codes: a**3 / (12 q**2) + (1 - a)**3 / 3 is least where a = 2q (1 - a), that is at 2q / (2q + 1)."""
    made = histogram(evenly(1, 1 << 20))
    assert MSE(bits=bits).amax(made) == pytest.approx(expected, abs=float(made.width))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_clipping_of_the_values_themselves_is_better(shape: str, bits: int) -> None:
    values, made = drawn(shape), histogram(drawn(shape))
    found = squared_error(values, float(MSE(bits=bits).amax(made)), bits)
    others = [squared_error(values, float(made.absmax) * part / 64, bits) for part in range(1, 65)]
    assert found <= min(others) * 1.005  # values are not quite uniform within a bin


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_a_normal_distribution_is_clipped_where_its_error_is_least(bits: int) -> None:
    """Against the integral over the normal density, minimised on a fine grid."""
    grid = np.linspace(-9, 9, 400_001)
    density = np.exp(-(grid**2) / 2)
    most = (1 << (bits - 1)) - 1
    candidates = np.linspace(1, 5, 401)
    errors = [
        np.sum(density * (grid - np.clip(np.rint(grid / (a / most)), -most, most) * (a / most)) ** 2)
        for a in candidates
    ]
    assert MSE(bits=bits).amax(histogram(drawn("gauss"))) == pytest.approx(candidates[np.argmin(errors)], abs=0.03)


def test_fewer_bits_clip_more() -> None:
    made = histogram(drawn("laplace"))
    found = [float(MSE(bits=bits).amax(made)) for bits in range(2, 9)]
    assert found == sorted(found)
    assert found[-1] < made.absmax


@pytest.mark.parametrize("shape", SHAPES)
def test_looking_closely_around_the_best_loses_nothing_to_trying_every_edge(shape: str) -> None:
    made = histogram(drawn(shape))
    counts, width, absmax = next(made.each())
    counts, method = np.trim_zeros(counts, "b"), MSE()
    edges = np.append(np.arange(1, len(counts)), absmax / width)
    errors = np.concatenate([method._errors(counts, part) for part in np.array_split(edges, 32)])
    found = method.amax(made).reshape(1) / width
    assert method._errors(counts, found) <= errors.min() * 1.001


# Settings


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Percentile(percentile=0), "percentile: .* found 0"),
        (lambda: Percentile(percentile=100.1), "percentile: .* found 100.1"),
        (lambda: Percentile(percentile=float("nan")), "percentile: .* found nan"),
        (lambda: Entropy(bits=1), "bits: expected 2 to 8, found 1"),
        (lambda: MSE(bits=16), "bits: expected 2 to 8, found 16"),
    ],
)
def test_impossible_settings_are_refused(make: Any, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        make()
