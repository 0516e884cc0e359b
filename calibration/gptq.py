"""GPTQ: each row's rounding error is made up for by the rows that are not rounded yet, as the inputs' second moments allow.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv:2210.17323. For
inputs x with second moments H = E[x x^T] the squared error of a column's output is e^T H e. With H^-1 = U^T U, U upper triangular,
rounding row k by an error d changes every later row j by -d U[k,j] / U[k,k]. Where this is not the paper's code:
- A block's grid is chosen when its first row is reached and all rows before it are made up for, whatever the block's size; the
paper's code does so only where its batches of rows are the groups. It is the narrowed grid of clipping.py, by the weights alone.
- U comes from one factorization of H from its last row up, H = R R^T with R upper triangular and U = R^-1, not from an inverse of H.
- Weights of inputs that calibration never saw (H[k,k] = 0) are rounded to nearest; the paper's code sets them to zero.
- A column that rounding to nearest serves better keeps that: greedy steps can lose, mostly in small matrices.
Rows go in their order. The paper's code can take those of large H[k,k] first ("act-order"), which either tears blocks apart or, within
blocks, was sometimes better and sometimes worse on inputs that were not calibrated on.

onnxruntime.quantization has GPTQ too. It is not used: in 1.32 its feedback reads the empty half of its triangular factor, so that it
rounds to nearest.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.blocks import Blocks, BlockScheme, as_matrix, dequantize
from txopt.calibration.clipping import narrowed
from txopt.calibration.grid import decode, encode
from txopt.calibration.moments import checked, damped, output_errors
from txopt.calibration.rounding import Choice, assembled, empty_codes, round_to_nearest
from txopt.runtime.errors import InputError

DAMPING = 0.01  # of the mean H[k,k], added to each, as in the paper
_PANEL = 64  # rows whose errors reach the rows behind them together, as one matrix product
_SMALL = 64  # a triangular matrix that is inverted as it is


def gptq(
    weight: NDArray[Any], moments: NDArray[Any], scheme: BlockScheme, *, name: str = "", choose: Choice | None = None
) -> Blocks:
    """``weight`` [K,N] rounded for inputs with second moments ``moments`` [K,K] (moments.py).

    No column's output error is larger, by these moments, than after rounding to nearest. ``choose`` gives a block's grid instead of
    clipping.py. SourceError where the weight is not finite, InputError where the moments are none of this weight's inputs.
    """
    matrix = as_matrix(weight, name)
    hessian = checked(moments, len(matrix), name)
    blocks = _fed_back(matrix, _feedback(hessian, name), scheme, choose)
    nearest = round_to_nearest(matrix, scheme, name=name, choose=choose)
    return _better(blocks, nearest, matrix, hessian)


def _fed_back(
    matrix: NDArray[np.float32], feedback: NDArray[np.float32], scheme: BlockScheme, choose: Choice | None
) -> Blocks:
    """Rounds row after row; ``feedback`` [K,K] is U with each row divided by its diagonal."""
    left = matrix.copy()
    codes = empty_codes(matrix, scheme)
    grids = []
    for span in scheme.spans(len(matrix)):
        grid = narrowed(left[span], scheme) if choose is None else choose(left[span], span)
        grids.append(grid)
        for start in range(span.start, span.stop, _PANEL):
            stop = min(start + _PANEL, span.stop)
            errors = np.empty_like(left[start:stop])
            for k in range(start, stop):
                codes[k] = encode(left[k], grid, scheme)
                error = errors[k - start] = left[k] - decode(codes[k], grid)
                left[k + 1 : stop] -= np.outer(feedback[k, k + 1 : stop], error)
            left[stop:] -= feedback[start:stop, stop:].T @ errors
    return assembled(codes, grids, scheme)


def _feedback(moments: NDArray[np.float64], name: str) -> NDArray[np.float32]:
    """U / diag(U) [K,K]: its row k says how the error of row k changes the rows behind it."""
    try:
        factor = np.linalg.cholesky(damped(moments, DAMPING)[::-1, ::-1])[::-1, ::-1]
    except np.linalg.LinAlgError as err:
        raise InputError(
            f"weight {name}: expected second moments of its inputs, got a matrix that is not positive semidefinite; "
            "build it as the mean of x x^T over calibration rows (moments.second_moments)"
        ) from err
    inverse = _inverse(factor)
    return (inverse / np.diag(inverse)[:, None]).astype(np.float32)


def _inverse(upper: NDArray[np.floating]) -> NDArray[np.floating]:
    """The inverse of an upper triangular matrix by halves: a sixth of what numpy's general inverse costs."""
    size = len(upper)
    if size <= _SMALL:
        return np.triu(np.linalg.inv(upper))
    half = size // 2
    result = np.zeros_like(upper)
    result[:half, :half] = _inverse(upper[:half, :half])
    result[half:, half:] = _inverse(upper[half:, half:])
    result[:half, half:] = -result[:half, :half] @ upper[:half, half:] @ result[half:, half:]
    return result


def _better(blocks: Blocks, other: Blocks, matrix: NDArray[np.float32], moments: NDArray[np.float64]) -> Blocks:
    """Of each column the one with the smaller error at the output."""
    errors, others = (output_errors(dequantize(each) - matrix, moments) for each in (blocks, other))
    keep = errors <= others
    if keep.all():
        return blocks
    zeros = None
    if blocks.zeros is not None and other.zeros is not None:
        zeros = np.where(keep, blocks.zeros, other.zeros)
    codes = np.where(keep, blocks.codes, other.codes)
    return Blocks(codes, np.where(keep, blocks.scales, other.scales), zeros, blocks.scheme)
