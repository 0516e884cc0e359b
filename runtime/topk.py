"""The k largest of each row, in an order that does not depend on chance.

Owns one rule: larger first, and of equals the one with the lower index. (torch.topk leaves the order of equals open, so
ids may differ from PyTorch's where two continuations score exactly the same.) It knows nothing of tokens.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 128  # wide enough that maxima are few, narrow enough that the k-th of them is near the k-th of all
SORTED_AT_ONCE = 256  # columns; beyond, selecting before sorting is faster


def top(values: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The ``k`` largest of every row of ``values`` float32 [R,N]: values [R,k], falling, and indices int64 [R,k].

    ``k`` is at most N, and no value is NaN. Long rows are first cut to the columns that reach the k-th largest of the
    blocks' maxima in some row: k values do, so nothing below it can be among the k largest.
    """
    rows, width = np.arange(len(values))[:, None], values.shape[1]
    columns: NDArray[np.int64] | None = None
    blocks = width // BLOCK
    if blocks > 2 * k:
        # A block is every blocks-th column: maxima of whole stretches of memory are the fast ones.
        maxima = values[:, : blocks * BLOCK].reshape(len(values), BLOCK, blocks).max(axis=1)
        reached = values >= np.partition(maxima, blocks - k, axis=1)[:, blocks - k, None]
        columns = np.flatnonzero(reached.any(axis=0))
        values = values[:, columns]
    if values.shape[1] <= SORTED_AT_ONCE:
        order: NDArray[Any] = np.argsort(-values, axis=1, kind="stable")[:, :k]
    else:
        order = _largest(values, k)
        order = order[rows, np.argsort(-values[rows, order], axis=1, kind="stable")]
    return values[rows, order], order if columns is None else columns[order]


def _largest(values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Where the k largest of every row are, int64 [R,k], rising; of equals those with the lower index."""
    rows, width = values.shape
    least = np.partition(values, width - k, axis=1)[:, width - k, None]
    above = values > least
    equal = values == least
    equal &= equal.cumsum(axis=1) <= k - above.sum(axis=1, keepdims=True)
    return np.nonzero(above | equal)[1].reshape(rows, k)
