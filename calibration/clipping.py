"""A block's range made narrower where that lowers its error: a few large values are clipped, all others get finer steps.

The search of AWQ (Lin et al. 2023, arXiv:2306.00978): cover a part of the range, keep the part with the least error of each block and
column. Parts are multiples of 1/32, so that 15/16 is among them: it lays a symmetric 4-bit block's largest value, where that is
negative, on the code -8 exactly. 15/14 lays it on 7, where that is better.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.blocks import Blocks, BlockScheme, as_matrix
from txopt.calibration.grid import Grid, covering, decode, encode
from txopt.calibration.moments import checked
from txopt.calibration.rounding import round_to_nearest

_PARTS = (15 / 14, *(part / 32 for part in range(31, 15, -1)))
_DAMPING = (
    0.1  # of the mean second moment, added to each: inputs that calibration hardly saw are not to be clipped freely
)


def clip(weight: NDArray[Any], scheme: BlockScheme, *, name: str = "", moments: NDArray[Any] | None = None) -> Blocks:
    """``weight`` [K,N] rounded to nearest on narrowed grids; by second moments [K,K] of its inputs where there are any.

    SourceError where it is not finite, InputError where the moments are none of its inputs.
    """
    matrix = as_matrix(weight, name)
    if moments is None:
        return round_to_nearest(matrix, scheme, name=name, choose=lambda rows, _: narrowed(rows, scheme))
    damped = checked(moments, len(matrix), name)
    diagonal = np.einsum("kk->k", damped)  # a view
    diagonal += _DAMPING * diagonal.mean()
    return round_to_nearest(
        matrix, scheme, name=name, choose=lambda rows, span: narrowed(rows, scheme, damped[span, span])
    )


def narrowed(rows: NDArray[np.float32], scheme: BlockScheme, moments: NDArray[np.float64] | None = None) -> Grid:
    """The grid for ``rows`` [b,N], one block, with the least error of those that cover 1/2 to 15/14 of its range.

    The error of a column e [b] is e^T M e with the ``moments`` M [b,b] of the block's inputs, what the block alone adds to the squared
    error of an output; without moments it is the sum of squares.
    """
    best = covering(rows, scheme)
    least = _errors(rows, best, scheme, moments)
    for part in _PARTS:
        grid = covering(rows, scheme, part)
        errors = _errors(rows, grid, scheme, moments)
        better = errors < least
        best = selected(better, grid, best)
        least = np.where(better, errors, least)
    return best


def selected(where: NDArray[np.bool_], grid: Grid, other: Grid) -> Grid:
    """``grid`` in the columns [N] where ``where`` is true, ``other`` in the rest."""
    zeros = None if grid.zeros is None or other.zeros is None else np.where(where, grid.zeros, other.zeros)
    return Grid(np.where(where, grid.scales, other.scales), zeros)


def _errors(
    rows: NDArray[np.float32], grid: Grid, scheme: BlockScheme, moments: NDArray[np.float64] | None
) -> NDArray[np.float32]:
    errors = decode(encode(rows, grid, scheme), grid) - rows
    weighted = errors if moments is None else moments.astype(np.float32) @ errors
    return np.einsum("kn,kn->n", errors, weighted)
