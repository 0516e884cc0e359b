"""Where to clip: from a histogram of |x| to amax, the largest magnitude that symmetric integers will still hold.

Owns the four methods. Symmetric only, -amax to amax, because TensorRT accepts nothing else. An amax is never above the
largest value seen, and 0 only where all values were 0; what scale that makes is quantize.py's. Where there are channels,
each is clipped on its own.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from txopt.calibration.histogram import Counts, Floats, Histogram
from txopt.runtime.errors import UsageError

_COARSE = 128  # candidates that MSE looks at before it looks closely


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """How amax is chosen; the fields of a method are its settings."""

    name: ClassVar[str]

    def amax(self, histogram: Histogram) -> Floats:
        """[] or [K], as the histogram's absmax."""
        every = [
            min(self._clip(counts[: np.flatnonzero(counts)[-1] + 1], width, absmax), absmax) if absmax else 0.0
            for counts, width, absmax in histogram.each()
        ]
        return np.array(every).reshape(histogram.absmax.shape)

    @abstractmethod
    def _clip(self, counts: Counts, width: float, absmax: float) -> float:
        """Where to clip ``counts`` [n], whose last is not 0; more than absmax is taken for absmax."""


@dataclass(frozen=True, kw_only=True)
class Absmax(Method):
    """No clipping."""

    name: ClassVar[str] = "absmax"

    def _clip(self, counts: Counts, width: float, absmax: float) -> float:
        return absmax


@dataclass(frozen=True, kw_only=True)
class Percentile(Method):
    """The lowest edge of a bin with at least ``percentile`` percent of |x| below it."""

    name: ClassVar[str] = "percentile"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise UsageError(f"percentile: expected more than 0 and at most 100, found {self.percentile}")

    def _clip(self, counts: Counts, width: float, absmax: float) -> float:
        # In fractions: 99.99 in binary is a little less than what was asked for, which can be one value less.
        needed = math.ceil(Fraction(str(self.percentile)) * int(counts.sum()) / 100)
        return float(np.searchsorted(np.cumsum(counts), needed) + 1) * width


@dataclass(frozen=True, kw_only=True)
class Entropy(Method):
    """The clipping that loses the least information, measured by Kullback-Leibler divergence.

    S. Migacz, 8-bit Inference with TensorRT, GTC 2017 (s7310), slides 33 to 38; the same algorithm is in TensorRT's
    entropy calibrator, pytorch-quantization's histogram.py and ONNX Runtime's quantization/calibrate.py. For every number
    of bins n from 2**(bits-1) on: P is the first n bins, with all values above added to the last; Q is the first n bins
    without these, made as coarse as the integers (2**(bits-1) levels) and spread evenly over each level's bins that are
    not empty. The n with the smallest KL(P || Q) wins, the largest of equals.

    As in pytorch-quantization, bin 0 counts as much as bin 1, since zero itself costs nothing, and levels have nearly
    equal widths; ONNX Runtime makes all but the last equally wide, and the last takes what is left. Where Q is 0 and P is
    not, the divergence is infinite.
    """

    name: ClassVar[str] = "entropy"
    bits: int = 8

    def __post_init__(self) -> None:
        _check_bits(self.bits)

    def _clip(self, counts: Counts, width: float, absmax: float) -> float:
        levels = 1 << (self.bits - 1)
        if len(counts) <= levels:
            return absmax  # every bin has a level of its own
        bins = counts.astype(np.float64)
        bins[0] = bins[1]
        # With prefix sums a divergence costs as many steps as there are levels, not bins: KL(P || Q) is
        # (sum P log P - sum P log Q) / |P| - log |P| + log |Q|, and Q is constant over the bins of a level.
        below = _prefix(bins)  # [n + 1]
        filled = _prefix(bins > 0)
        p_log_p = _prefix(_x_log(bins, bins))
        n = np.arange(levels, len(bins) + 1)  # [candidates]
        starts = -(-np.arange(levels + 1) * n[:, None] // levels)  # [candidates, levels + 1]: ceil(level * n / levels)
        inside = np.diff(below[starts])
        with np.errstate(divide="ignore", invalid="ignore"):
            per_bin = inside / np.diff(filled[starts])  # Q; NaN in a level without values, of which P has none either
        above, last = below[-1] - below[n], bins[n - 1]
        p = inside.copy()
        p[:, -1] += above
        entropy_p = p_log_p[n - 1] + _x_log(last + above, last + above)
        divergence = (entropy_p - _x_log(p, per_bin).sum(axis=1)) / below[-1] - np.log(below[-1])
        with np.errstate(divide="ignore"):
            divergence += np.log(below[n])
        divergence[(last == 0) & (above > 0)] = np.inf
        best = len(n) - 1 - int(np.argmin(divergence[::-1]))
        return float(n[best]) * width


@dataclass(frozen=True, kw_only=True)
class MSE(Method):
    """The edge of a bin, or absmax, with the smallest expected squared error of symmetric integers of ``bits`` bits.

    Values are taken to be uniform within their bin, so the error of rounding to the nearest of -q..q times amax / q, with
    q = 2**(bits-1) - 1, is an integral in closed form. All edges in steps of a hundredth of the range are tried, then
    every edge around the best of these.
    """

    name: ClassVar[str] = "mse"
    bits: int = 8

    def __post_init__(self) -> None:
        _check_bits(self.bits)

    def _clip(self, counts: Counts, width: float, absmax: float) -> float:
        last, stride = absmax / width, max(1, len(counts) // _COARSE)  # in bins, as all that follows
        coarse = np.append(np.arange(stride, len(counts), stride), last)
        best = coarse[np.argmin(self._errors(counts, coarse))]
        around = np.arange(max(1, math.floor(best) - stride), min(len(counts) - 1, math.ceil(best) + stride) + 1)
        fine = np.append(around, last)
        return float(fine[np.argmin(self._errors(counts, fine))]) * width

    def _errors(self, counts: Counts, amax: Floats) -> Floats:
        """[candidates]: the summed squared error of ``counts`` [n] clipped at ``amax`` [candidates], all in bins."""
        most = (1 << (self.bits - 1)) - 1
        step = (amax / most)[:, None]
        filled = np.flatnonzero(counts)
        low, high = (self._integral(edge, step, most) for edge in (filled, filled + 1))
        return (high - low) @ counts[filled].astype(np.float64)

    @staticmethod
    def _integral(edge: Counts, step: Floats, most: int) -> Floats:
        """Integral of the squared error from 0 to ``edge``: a full step**3 / 12 for each code, and what is left of the last.

        The last code is never left behind, so that what lies above it is the error of clipping.
        """
        code = np.minimum(np.rint(edge / step), most)
        return code * step**3 / 12 + (edge - code * step) ** 3 / 3


METHODS: dict[str, type[Method]] = {method.name: method for method in (Absmax, Percentile, Entropy, MSE)}


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise UsageError(f"bits: expected 2 to 8, found {bits}")


def _prefix(values: Floats | np.ndarray[tuple[int, ...], np.dtype[np.bool]]) -> Floats:
    return np.concatenate(([0.0], np.cumsum(values, dtype=np.float64)))


def _x_log(x: Floats, y: Floats) -> Floats:
    """x * log(y), and 0 where x is 0."""
    return x * np.log(np.where(x > 0, y, 1.0))
