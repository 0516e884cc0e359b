"""How far two answers to one question are apart."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def difference(expected: Array, found: Array, least: float = 1.0) -> float:
    """The largest difference, relative to the largest expected number, or to ``least`` where that is more.

    Infinite where they cannot be compared: other shapes or dtypes, integers that differ, and where they are not finite at the same
    places and in the same way.
    """
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    if expected.dtype.kind not in "fV":
        return 0.0 if np.array_equal(expected, found) else float("inf")
    wide, other = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(wide)
    if not np.array_equal(wide[~finite], other[~finite], equal_nan=True) or not np.isfinite(other[finite]).all():
        return float("inf")
    scale = max(least, float(np.abs(wide[finite]).max(initial=0.0)))
    return float(np.abs(wide[finite] - other[finite]).max(initial=0.0)) / scale
