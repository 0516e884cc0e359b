"""Confidence intervals by the bootstrap: of one system's figure, and of the difference between two over the same samples.

Owns the resampling. It does not know what a figure means: whoever asks brings one row of counts per sample, and a function from
the rows' sum to points.

A resample draws as many samples as there are, with replacement; its figure is that of the sum of the drawn rows. The interval holds
the middle 95 % of the figures of 1000 resamples: the percentile bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap",
1993, chapter 13). For a difference both systems are summed over the same draws: the paired bootstrap (Koehn, "Statistical
Significance Tests for Machine Translation Evaluation", EMNLP 2004). What both find hard then cancels out, and two systems that
say the same differ by 0 in every resample.

What it cannot show: a kind of failure that no sample has. Where none of N samples changed, the interval is [0, 0], and up to about
3 / N of all sources may change all the same (95 %; Hanley and Lippman-Hand, "If Nothing Goes Wrong, Is Everything All Right?", JAMA
1983).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# float64 [N,C]: C counts of each of N samples. Whole numbers are summed exactly up to 2**53, in any order.
Statistics = NDArray[np.float64]
# Sums of rows [R,C] to figures in points, float64 [R].
Figures = Callable[[Statistics], NDArray[np.float64]]

RESAMPLES = 1000
SEED = 0
CONFIDENCE = 0.95
_DRAWS_AT_ONCE = 1 << 20  # 8 MB of indices
_WRITTEN = 6  # decimal places in a certificate: equal runs on machines that sum in another order are equal bytes


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure over all samples, and the interval of its resamples from ``low`` to ``high``; NaN where any of them is not finite."""

    value: float
    low: float
    high: float

    @property
    def finite(self) -> bool:
        return bool(np.isfinite([self.value, self.low, self.high]).all())

    def to_json(self) -> dict[str, float | None]:
        """null stands for what is no finite number."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {
            name: round(number, _WRITTEN) + 0.0 if math.isfinite(number) else None for name, number in numbers.items()
        }

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two systems over the same samples.

    Attributes:
        baseline, candidate: their figures, in points.
        loss: what the candidate lost, in points: positive is worse, whichever direction the figure has.
        samples: how many were compared.
        changed: how many have other counts under the candidate than under the baseline.
    """

    baseline: Estimate
    candidate: Estimate
    loss: Estimate
    samples: int
    changed: int


def estimate(statistics: Statistics, figures: Figures, *, resamples: int = RESAMPLES, seed: int = SEED) -> Estimate:
    """The figure of ``statistics`` [N,C] with its interval."""
    sums = _resampled(statistics, resamples, seed)
    return _estimate(_total(statistics, figures), figures(sums))


def compare(
    baseline: Statistics,
    candidate: Statistics,
    figures: Figures,
    *,
    higher_is_better: bool,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """The paired bootstrap of two systems' counts [N,C]; row i of both is sample i."""
    assert baseline.shape == candidate.shape, (baseline.shape, candidate.shape)
    columns = baseline.shape[1]
    sums = _resampled(np.concatenate((baseline, candidate), axis=1), resamples, seed)
    before, after = figures(sums[:, :columns]), figures(sums[:, columns:])
    value_before, value_after = _total(baseline, figures), _total(candidate, figures)
    sign = -1.0 if higher_is_better else 1.0
    with np.errstate(invalid="ignore"):  # of two infinite figures; the loss is then NaN, as it must be
        losses, loss = sign * (after - before), float(sign * (np.float64(value_after) - value_before))
    return Comparison(
        baseline=_estimate(value_before, before),
        candidate=_estimate(value_after, after),
        loss=_estimate(loss, losses),
        samples=len(baseline),
        changed=int((baseline != candidate).any(axis=1).sum()),
    )


def percent(sums: Statistics) -> NDArray[np.float64]:
    """100 * a / b of sums [R,2] of (a, b). Where b is 0, a is divided by 1: jiwer's word error rate of a silent reference."""
    return 100 * mean(sums)


def mean(sums: Statistics) -> NDArray[np.float64]:
    """a / b of sums [R,2] of (a, b); where b is 0, a."""
    result: NDArray[np.float64] = sums[:, 0] / np.where(sums[:, 1] == 0, 1, sums[:, 1])
    return result


def _total(statistics: Statistics, figures: Figures) -> float:
    return float(figures(statistics.sum(axis=0, keepdims=True))[0])


def _estimate(value: float, resampled: NDArray[np.float64]) -> Estimate:
    if not np.isfinite(resampled).all():  # a quantile would pass over an infinity
        return Estimate(value=value, low=float("nan"), high=float("nan"))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail))
    return Estimate(value=value, low=float(low), high=float(high))


def _resampled(statistics: Statistics, resamples: int, seed: int) -> Statistics:
    """Sums [resamples,C] of N rows drawn with replacement from ``statistics`` [N,C]."""
    # An infinity that is not drawn is 0 * inf, NaN: an interval over infinities is NaN in any case.
    with np.errstate(invalid="ignore"):
        return np.concatenate([times @ statistics for times in _times_drawn(len(statistics), resamples, seed)])


def _times_drawn(samples: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each resample draws each sample, float64 [some resamples, samples], until all resamples were drawn.

    A sum is then a matrix product, of which BLAS makes short work; gathering rows would touch each of them C times.
    """
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWS_AT_ONCE // samples)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = generator.integers(samples, size=(rows, samples))
        drawn += np.arange(rows)[:, None] * samples
        yield np.bincount(drawn.ravel(), minlength=rows * samples).reshape(rows, samples).astype(np.float64)
