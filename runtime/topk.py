"""The k largest of each row, in an order that does not depend on chance.

Owns one rule: larger first, and of equals the one with the lower index. (torch.topk leaves the order of equals open, so
ids may differ from PyTorch's where two continuations score exactly the same.) It knows nothing of tokens.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 128  # wide enough that a block's maximum costs little per element, narrow enough that k blocks are few elements


def top(values: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The ``k`` largest of every row of ``values`` float32 [R,N]: values [R,k], falling, and indices int64 [R,k].

    ``k`` is at most N, and no value is NaN. Long rows are first cut to the k blocks with the largest maxima: whatever
    is not in them has k betters.
    """
    rows, width = values.shape
    blocks = width // BLOCK
    if blocks > 2 * k:
        head = values[:, : blocks * BLOCK].reshape(rows, blocks, BLOCK)
        chosen = _largest(head.max(axis=2), k)
        columns = (chosen[:, :, None] * BLOCK + np.arange(BLOCK)).reshape(rows, k * BLOCK)
        if blocks * BLOCK < width:
            tail = np.broadcast_to(np.arange(blocks * BLOCK, width), (rows, width - blocks * BLOCK))
            columns = np.concatenate([columns, tail], axis=1)
        candidates = _take(values, columns)
        indices = _take(columns, _largest(candidates, k))
    else:
        indices = _largest(values, k)
    found = _take(values, indices)
    order = np.argsort(-found, axis=1, kind="stable")
    return _take(found, order), _take(indices, order)


def _take(values: NDArray[Any], columns: NDArray[np.int64]) -> NDArray[Any]:
    return values[np.arange(len(values))[:, None], columns]


def _largest(values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Where the k largest of every row are, int64 [R,k], rising; of equals those with the lower index."""
    rows, width = values.shape
    if k == width:
        return np.broadcast_to(np.arange(width), (rows, width))
    least = np.partition(values, width - k, axis=1)[:, width - k, None]
    above = values > least
    equal = values == least
    equal &= equal.cumsum(axis=1) <= k - above.sum(axis=1, keepdims=True)
    return np.nonzero(above | equal)[1].reshape(rows, k)
