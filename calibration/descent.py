"""Coordinate descent: GPTQ's codes and scales improved in turns, until little is left to gain by changing one number alone.

Behdin et al. 2023, "QuantEase: Optimization-based Quantization for Language Models", arXiv:2309.01885: with second moments H of the
inputs, the error E = W - Q of a column costs E^T H E, a parabola in each of its codes, whose least whole number is known. Rows go in
turn, and each sees what all others have become, where GPTQ looks at a row once. Here scales take turns with codes: the scale of a
block that fits its codes best is the least of a parabola, too. Zero points stay as GPTQ chose them.

H is damped more than in gptq.py, by a tenth of the mean H[k,k] instead of a hundredth: less is fitted to inputs that happened to come.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.blocks import Blocks, BlockScheme, as_matrix
from txopt.calibration.gptq import gptq
from txopt.calibration.grid import LEAST_SCALE, Grid, decode, encode, short
from txopt.calibration.moments import checked, damped

Floats = NDArray[np.float32]

DAMPING = 0.1
TURNS = 2  # a third gains little
_PANEL = 64  # rows whose changes reach the rows behind them together, as one matrix product
_COLUMNS = 1024  # columns do not depend on each other; so many stay in the processor's cache


def descended(weight: NDArray[Any], moments: NDArray[Any], scheme: BlockScheme, *, name: str = "") -> Blocks:
    """``weight`` [K,N] rounded for inputs with second moments ``moments`` [K,K] (moments.py).

    No column's error is larger, by the damped moments, than after GPTQ with these. SourceError where the weight is not finite,
    InputError where the moments are none of this weight's inputs.
    """
    matrix = as_matrix(weight, name)
    hessian = damped(checked(moments, len(matrix), name), DAMPING)
    hessian /= np.diag(hessian).mean()  # so that float32 holds it
    return descend(gptq(matrix, hessian, scheme, name=name), matrix, hessian.astype(np.float32))


def descend(blocks: Blocks, matrix: Floats, hessian: Floats, turns: int = TURNS) -> Blocks:
    """``blocks`` of ``matrix`` [K,N] after some turns, by ``hessian`` [K,K], whose diagonal is positive."""
    codes, scales = blocks.codes.copy(), blocks.scales.copy()
    zeros = None if blocks.zeros is None else blocks.zeros.astype(np.float32)
    for first in range(0, matrix.shape[1], _COLUMNS):
        some = slice(first, first + _COLUMNS)
        part = _Part(
            matrix[:, some],
            hessian,
            blocks.scheme,
            codes[:, some],
            scales[:, some],
            zeros if zeros is None else zeros[:, some],
        )
        for _ in range(turns):
            part.fit_scales()
            part.round_again()
    return Blocks(codes, scales, blocks.zeros, blocks.scheme)


class _Part:
    """Some columns; ``codes`` [K,n] and ``scales`` [blocks,n] are changed in place."""

    def __init__(
        self,
        matrix: Floats,
        hessian: Floats,
        scheme: BlockScheme,
        codes: NDArray[Any],
        scales: Floats,
        zeros: Floats | None,
    ) -> None:
        self._matrix, self._hessian, self._scheme = np.ascontiguousarray(matrix), hessian, scheme
        self._codes, self._scales, self._zeros = codes, scales, zeros
        self._errors = np.empty_like(self._matrix)  # Q - W
        for g, span in enumerate(scheme.spans(len(matrix))):
            self._errors[span] = decode(codes[span], self._grid(g)) - self._matrix[span]

    def fit_scales(self) -> None:
        """Gives each block the scale that fits its codes best, all other blocks being what they are."""
        for g, span in enumerate(self._scheme.spans(len(self._matrix))):
            grid = self._grid(g)
            levels = decode(self._codes[span], Grid(np.ones_like(grid.scales), grid.zeros))
            slopes = np.einsum("kn,kn->n", levels, self._hessian[span] @ self._errors)
            bends = np.einsum("kn,kn->n", levels, self._hessian[span, span] @ levels)
            best = grid.scales - slopes / np.where(bends > 0, bends, np.inf)  # a block of zeros keeps its scale
            near = short(best)
            gains = (near >= LEAST_SCALE) & (np.abs(near - best) < np.abs(grid.scales - best))
            self._scales[g] = np.where(gains, near, grid.scales)
            self._errors[span] = decode(self._codes[span], self._grid(g)) - self._matrix[span]

    def round_again(self) -> None:
        """Gives each row in turn the codes that are best by what all other rows have become."""
        for g, span in enumerate(self._scheme.spans(len(self._matrix))):
            grid = self._grid(g)
            for start in range(span.start, span.stop, _PANEL):
                stop = min(start + _PANEL, span.stop)
                slopes = self._hessian[start:stop] @ self._errors
                for k in range(start, stop):
                    wanted = self._matrix[k] + self._errors[k] - slopes[k - start] / self._hessian[k, k]
                    self._codes[k] = encode(wanted, grid, self._scheme)
                    errors = decode(self._codes[k], grid) - self._matrix[k]
                    slopes[k + 1 - start :] += np.outer(self._hessian[k + 1 : stop, k], errors - self._errors[k])
                    self._errors[k] = errors

    def _grid(self, g: int) -> Grid:
        return Grid(self._scales[g], None if self._zeros is None else self._zeros[g])
