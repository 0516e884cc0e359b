"""Logits of the fp32 artifact under teacher forcing, kept while one candidate after another is compared with them.

Owns the temporary file that they are in: a few hundred samples of a large vocabulary are gigabytes, which memory should not hold.
"""

import tempfile
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Rows = list[NDArray[np.float32]]

MOST = 1 << 30  # bytes; batches that do not fit any more are computed every time


@dataclass(frozen=True)
class _Place:
    offset: int
    shapes: tuple[tuple[int, int], ...]


class Kept:
    """Logits [L,V] of the rows of each batch; ``most`` bytes are kept, in a file without a name that ends with the object."""

    def __init__(self, *, most: int = MOST) -> None:
        self._most, self._end = most, 0
        self._places: dict[tuple[int, ...], _Place] = {}
        self._file: IO[Any] | None = None

    def of(self, indices: tuple[int, ...], make: Callable[[], Iterable[NDArray[np.float32]]]) -> Rows:
        """The rows of the batch of the samples ``indices``: those that ``make`` gave the first time."""
        if place := self._places.get(indices):
            return self._read(place)
        rows = [np.ascontiguousarray(row, np.float32) for row in make()]
        size = sum(row.nbytes for row in rows)
        if self._end + size <= self._most:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="txopt-")  # noqa: SIM115 - it lasts as long as the object
                weakref.finalize(self, self._file.close)
            self._file.seek(self._end)
            for row in rows:
                self._file.write(row.data)
            self._places[indices] = _Place(self._end, tuple((row.shape[0], row.shape[1]) for row in rows))
            self._end += size
        return rows

    def _read(self, place: _Place) -> Rows:
        assert self._file is not None, "a place is in it"
        self._file.seek(place.offset)
        return [
            np.frombuffer(self._file.read(4 * rows * columns), np.float32).reshape(rows, columns)
            for rows, columns in place.shapes
        ]
