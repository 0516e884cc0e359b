"""Observers: what is remembered of a tensor while its values stream by, in memory that does not grow with them.

Owns the three that keep channels apart: magnitudes (SmoothQuant, AWQ), the second moment (GPTQ), and a sample of rows. The
fourth, for ranges, is histogram.py's. Callers leave masked positions out. What an observer holds depends on the values
alone, not on their order, their batches, or on which of several merged observers saw them; sums of floats agree to
rounding in float64, everything else exactly.
"""

import hashlib
from bisect import bisect_left
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.canary import Values, finite
from txopt.calibration.histogram import Floats

_ROWS = (
    256  # gathered before they are multiplied: a decode step brings one, and adding [K, K] for it costs K times as much
)


class Observer(Protocol):
    """Sees a tensor's values batch by batch; ``update`` raises InputError as ``canary.finite`` does, having kept nothing."""

    name: str

    def update(self, values: NDArray[Any]) -> None:
        """See ``values``, float16 or float32 [..., K]."""

    def merge(self, other: Self) -> None:
        """See what ``other``, of the same kind and size, has seen."""


class ChannelMagnitude:
    """Largest and mean |x| of every channel.

    SmoothQuant's scales come from the first (https://arxiv.org/abs/2211.10438, eq. 4), AWQ's from the second
    (https://arxiv.org/abs/2306.00978, eq. 5).
    """

    def __init__(self, name: str, channels: int) -> None:
        self.name, self.channels = name, channels
        self.count = 0  # rows
        self.absmax: Floats = np.zeros(channels)  # [K]
        self._sum: Floats = np.zeros(channels)

    @property
    def mean(self) -> Floats:
        """[K] of |x|; 0 where nothing came."""
        return self._sum / max(self.count, 1)

    def update(self, values: NDArray[Any]) -> None:
        rows = np.abs(finite(self.name, values, self.channels))
        self.count += len(rows)
        self.absmax = np.maximum(self.absmax, rows.max(axis=0, initial=0.0))
        self._sum += rows.sum(axis=0, dtype=np.float64)

    def merge(self, other: Self) -> None:
        assert other.channels == self.channels, "observers of one size"
        self.count += other.count
        self.absmax = np.maximum(self.absmax, other.absmax)
        self._sum += other._sum


class SecondMoment:
    """Sum of x x^T over rows x [K], in float64: half of GPTQ's Hessian (https://arxiv.org/abs/2210.17323, section 3).

    Memory: [K, K] and a few hundred rows, in float64.
    """

    def __init__(self, name: str, channels: int) -> None:
        self.name, self.channels = name, channels
        self.count = 0  # rows
        self._sum: Floats = np.zeros((channels, channels))
        self._waiting: Floats = np.empty((_ROWS, channels))
        self._filled = 0

    @property
    def sum(self) -> Floats:
        """[K, K], symmetric."""
        if self._filled:
            self._multiply(self._waiting[: self._filled])
            self._filled = 0
        return self._sum

    def update(self, values: NDArray[Any]) -> None:
        rows = finite(self.name, values, self.channels)
        self.count += len(rows)
        if len(rows) >= _ROWS:
            self._multiply(rows.astype(np.float64))
            return
        room = _ROWS - self._filled
        for part in (rows[:room], rows[room:]):
            self._waiting[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            if self._filled == _ROWS:
                self._multiply(self._waiting)
                self._filled = 0

    def merge(self, other: Self) -> None:
        assert other.channels == self.channels, "observers of one size"
        self.count += other.count
        self._sum += other.sum

    def _multiply(self, rows: Floats) -> None:
        self._sum += rows.T @ rows  # numpy sees that this is symmetric, and does half of the work


class RowSample:
    """At most ``size`` different rows, drawn uniformly, each with the exact number of times it came.

    Kept are the rows with the smallest hashes (bottom-k sampling, Cohen and Kaplan, PODC 2007): a reservoir that depends on
    nothing but the values and the seed. The smallest so far are a superset of those among the smallest in the end, so a
    row that is kept was kept since it first came, and its number is exact. Weighted by it, means over the sample estimate
    means over all rows.

    Memory: ``size`` rows in float32.
    """

    def __init__(self, name: str, channels: int, *, size: int, seed: int = 0) -> None:
        assert size >= 1, "a sample of at least one row"
        self.name, self.channels, self.size, self.seed = name, channels, size, seed
        self.count = 0  # rows that came
        self._kept: list[tuple[bytes, bytes]] = []  # sorted (hash, row)
        self._times: dict[bytes, int] = {}  # by row

    @property
    def rows(self) -> Values:
        """[at most size, K], in the order of their hashes."""
        return np.array([np.frombuffer(row, np.float32) for _, row in self._kept]).reshape(-1, self.channels)

    @property
    def times(self) -> NDArray[np.int64]:
        """[at most size]: how often each of ``rows`` came."""
        return np.array([self._times[row] for _, row in self._kept], np.int64)

    def update(self, values: NDArray[Any]) -> None:
        rows = finite(self.name, values, self.channels) + np.float32(0)  # equal rows are equal bytes: no negative zeros
        self.count += len(rows)
        salt = self.seed.to_bytes(hashlib.blake2b.SALT_SIZE, "little")
        for row in map(np.ndarray.tobytes, rows):
            self._add((hashlib.blake2b(row, digest_size=8, salt=salt).digest(), row), 1)

    def merge(self, other: Self) -> None:
        assert (other.channels, other.size, other.seed) == (self.channels, self.size, self.seed), "samples of one kind"
        self.count += other.count
        for entry in other._kept:
            self._add(entry, other._times[entry[1]])

    def _add(self, entry: tuple[bytes, bytes], times: int) -> None:
        row = entry[1]
        if row in self._times:
            self._times[row] += times
            return
        if len(self._kept) == self.size:
            if entry > self._kept[-1]:
                return
            del self._times[self._kept.pop()[1]]
        self._kept.insert(bisect_left(self._kept, entry), entry)
        self._times[row] = times
