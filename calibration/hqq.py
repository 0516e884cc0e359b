"""HQQ, half-quadratic quantization: each block's grid is fitted to its values, outliers set aside. Needs no data.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (mobiusml.github.io/hqq_blog). It minimises
sum |w - q|^p, p = 0.7, over a block's grid, by turns: a part e of the error r = w - q is set aside by shrinkage,
e = sign(r) max(|r| - |r|^(p-1) / beta, 0), then the grid is fitted to the rest, w - e, by least squares, and beta grows.

The paper fits the zero point, a real number, and leaves the scale. Here zero points are codes, which every engine reads, and the
fitted zero point of a turn, rounded, is the one it started from, in every weight tried. So here the scale is fitted, to the same
target: scale = <l, w - e> / <l, l> for levels l = code - zero. The zero point stays where the range puts it. Shrinkage measures r
in parts of the block's largest value, so that a weight and its double have the same codes. Each block keeps the best grid it has
seen, by sum |w - q|; the first is the one that covers its range.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.blocks import Blocks, BlockScheme, Codes
from txopt.calibration.clipping import selected
from txopt.calibration.grid import LEAST_SCALE, Grid, covering, decode, encode, short
from txopt.calibration.rounding import round_to_nearest

# The constants of the published code.
_NORM = 0.7
_BETA = 10.0
_GROWTH = 1.01
_TURNS = 20


def hqq(weight: NDArray[Any], scheme: BlockScheme, *, name: str = "") -> Blocks:
    """``weight`` [K,N] on half-quadratic grids; no block's sum of |w - q| is larger than after rounding to nearest.

    SourceError where it is not finite.
    """
    return round_to_nearest(weight, scheme, name=name, choose=lambda rows, _: half_quadratic(rows, scheme))


def half_quadratic(rows: NDArray[np.float32], scheme: BlockScheme) -> Grid:
    """The fitted grid of one block, ``rows`` [b,N]."""
    grid = best = covering(rows, scheme)
    amax = np.abs(rows).max(axis=0)
    amax[amax == 0] = 1
    least = np.full(rows.shape[1], np.inf, np.float32)
    beta = _BETA
    for _ in range(_TURNS):
        codes = encode(rows, grid, scheme)
        errors = rows - decode(codes, grid)
        total = np.abs(errors).sum(axis=0)
        better = total < least
        if not better.any():
            break
        best = selected(better, grid, best)
        least = np.where(better, total, least)
        grid = _fitted(rows - amax * _aside(errors / amax, beta), codes, grid)
        beta *= _GROWTH
    return best


def _aside(errors: NDArray[np.float32], beta: float) -> NDArray[np.float32]:
    """What shrinkage takes out of ``errors``; it is 0 below beta^(1 / (p - 2))."""
    sizes = np.maximum(np.abs(errors), beta ** (1 / (_NORM - 2)))
    return np.sign(errors) * np.maximum(sizes - sizes ** (_NORM - 1) / beta, 0)


def _fitted(target: NDArray[np.float32], codes: Codes, grid: Grid) -> Grid:
    """The grid on which ``codes`` come closest to ``target`` [b,N], with the zero points of ``grid``."""
    levels = decode(codes, Grid(np.ones_like(grid.scales), grid.zeros))
    squares = np.einsum("kn,kn->n", levels, levels)
    scales = short(np.einsum("kn,kn->n", levels, target) / np.maximum(squares, 1))
    return Grid(np.where(scales >= LEAST_SCALE, scales, grid.scales), grid.zeros)
