"""A histogram of |x| that needs no first pass: when a larger value comes, its range doubles and its bins merge in pairs.

The range is a power of two, and so is the number of bins. So the bin of a value is found without rounding, and depends on
the range alone: the counts are exactly those of one pass over all values at the final range, in whatever order, batches
and merges they came. It does not know where to clip; that is amax.py's.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.canary import finite

BINS = 4096  # between 2049 and 4096 of them reach up to the largest value; TensorRT and ONNX Runtime have 2048
LOWEST = -64  # the exponent of the smallest range: below 2**-64 all is one bin, so that scales stay far inside float32
BARS = 64  # of a plot
_CHUNK = 1 << 16  # values counted at once, so that what lies between stays in the processor's cache

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


class Histogram:
    """Counts of |x| in equal bins from 0 to a power of two above the largest; exact minimum, maximum and count.

    Memory: ``bins`` int64 per tensor or per channel, whatever comes. A channel has a range of its own.

    Args:
        name: the tensor's, for messages.
        channels: length K of the last axis for one histogram per channel; None for one of the whole tensor.
        bins: a power of two, at least BARS.
    """

    def __init__(self, name: str, *, channels: int | None = None, bins: int = BINS) -> None:
        assert bins >= BARS, f"{bins} bins do not merge into {BARS} bars"
        assert bins.bit_count() == 1, f"{bins} bins do not merge in pairs"
        self.name, self.channels, self.bins = name, channels, bins
        shape = () if channels is None else (channels,)
        self.count = 0  # values, of all channels together
        self.min: Floats = np.full(shape, np.inf)  # [] or [K], as max and absmax
        self.max: Floats = np.full(shape, -np.inf)
        self._exponent: Counts = np.full(shape, LOWEST, np.int64)  # of the range's upper end, a power of two
        self._counts: Counts = np.zeros((*shape, bins), np.int64)

    @property
    def counts(self) -> Counts:
        """[bins] or [K, bins]: how many |x| lie in [i * width, (i + 1) * width)."""
        return self._counts

    @property
    def width(self) -> Floats:
        """[] or [K]: of a bin."""
        return np.ldexp(1.0, self._exponent - _log2(self.bins))

    @property
    def absmax(self) -> Floats:
        """[] or [K]: the largest |x|, exactly; 0 where nothing came."""
        return np.maximum(np.maximum(self.max, -self.min), 0.0)

    def update(self, values: NDArray[Any]) -> None:
        """Count ``values``, float16 or float32 [..., K]; none is fine.

        Raises:
            InputError: as ``canary.finite``; nothing is counted then.
        """
        rows = finite(self.name, values, self.channels)
        if not rows.size:
            return
        # Adding zero makes one of the two zeros, which compare equal: which one came first must not show.
        low, high = rows.min(axis=0) + 0.0, rows.max(axis=0) + 0.0
        largest = np.maximum(high, -low)
        self._widen(np.where(largest > 0, np.frexp(largest)[1], LOWEST))  # zeros lie in any range, and ask for none
        self.count += rows.size
        self.min, self.max = np.minimum(self.min, low), np.maximum(self.max, high)
        scale = np.ldexp(np.float32(1), _log2(self.bins) - self._exponent).astype(np.float32)
        step = max(1, _CHUNK // (self.channels or 1))
        first = None if self.channels is None else np.arange(self.channels) * self.bins
        for start in range(0, len(rows), step):
            places = (np.abs(rows[start : start + step]) * scale).astype(np.intp)
            if first is None:
                self._counts += np.bincount(places, minlength=self.bins)
            else:  # a bincount would walk through all K * bins counts for every chunk
                np.add.at(self._counts.reshape(-1), (places + first).reshape(-1), 1)

    def merge(self, other: "Histogram") -> None:
        """Count what ``other`` counted, as if its values had come here."""
        assert (other.channels, other.bins) == (self.channels, self.bins), "histograms of one kind"
        self._widen(other._exponent)
        self._counts = self._counts + _coarser(other._counts, self._exponent - other._exponent)
        self.count += other.count
        self.min, self.max = np.minimum(self.min, other.min), np.maximum(self.max, other.max)

    def each(self) -> Iterator[tuple[Counts, float, float]]:
        """(counts [bins], width of a bin, absmax) of the tensor, or of every channel in turn."""
        counts = self._counts.reshape(-1, self.bins)
        yield from zip(counts, self.width.reshape(-1).tolist(), self.absmax.reshape(-1).tolist(), strict=True)

    def bars(self) -> tuple[float, tuple[int, ...]]:
        """(width of a bar, at most BARS counts) for a plot: of all channels together, up to the last that is not empty."""
        top = self._exponent.max()
        counts = _coarser(self._counts, top - self._exponent).reshape(-1, BARS, self.bins // BARS).sum(axis=(0, 2))
        used = np.flatnonzero(counts)[-1] + 1 if counts.any() else 0
        return float(np.ldexp(1.0, top - _log2(BARS))), tuple(counts[:used].tolist())

    def _widen(self, exponent: NDArray[Any]) -> None:
        wider = np.maximum(self._exponent, exponent)
        if (wider > self._exponent).any():
            self._counts = _coarser(self._counts, wider - self._exponent)
            self._exponent = wider


def _coarser(counts: Counts, doublings: Counts) -> Counts:
    """``counts`` [..., bins] as they are in a range doubled ``doublings`` [...] times."""
    coarser, bins = counts.copy(), counts.shape[-1]
    for times in np.unique(doublings[doublings > 0]):
        chosen = doublings == times  # [] or [K]; either chooses rows
        merged = 1 << min(int(times), _log2(bins))
        coarser[chosen] = 0
        coarser[chosen, : bins // merged] = counts[chosen].reshape(-1, bins // merged, merged).sum(axis=-1)
    return coarser


def _log2(power: int) -> int:
    return power.bit_length() - 1
