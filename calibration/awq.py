"""AWQ's scales: inputs that are large get finer weights, by a factor that the operator before the weight can undo.

Lin et al. 2023, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv:2306.00978. Row k of the
weight is multiplied by s[k] before it is rounded, and input k divided by s[k]: x W = (x / s) (s W). Of s = m^alpha, with m the
magnitude of each input over calibration rows, the alpha of 0, 0.05 .. 1 with the least error at the output is taken. Here m is the
root mean square, which second moments know; the paper's code takes the mean of |x|.

Who divides the input (a normalization's weight, the columns of the weight before) is folding.py's business; where nothing can, s is 1.
Several weights that read the same input share s, and are searched side by side, [K, N1 + N2 + ..].
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.blocks import BlockScheme, as_matrix, dequantize
from txopt.calibration.folding import fold, folds
from txopt.calibration.moments import checked, output_errors
from txopt.calibration.rounding import round_to_nearest

_ALPHAS = tuple(step / 20 for step in range(1, 21))
_LEAST = 1e-4  # of the largest magnitude; what is seen less than that may be seen more tomorrow


def fold_scales(graph: ir.Graph, moments: Mapping[str, NDArray[Any]], scheme: BlockScheme) -> dict[str, NDArray[Any]]:
    """Divides the inputs of products in ``graph`` by their scales, in place, and gives the second moments of what they are then.

    Args:
        graph: changed: the weights of products, and of what makes their inputs.
        moments: [K,K] by input.
        scheme: what weights are going to be rounded to.
    """
    possible, _ = folds(graph)
    scales = {
        name: input_scales(np.concatenate(one.weights, axis=1), moments[name], scheme, name=name)
        for name, one in possible.items()
        if name in moments
    }
    fold(graph, scales)
    return {
        name: seen / np.outer(scales[name], scales[name]) if name in scales else seen for name, seen in moments.items()
    }


def input_scales(
    weight: NDArray[Any], moments: NDArray[Any], scheme: BlockScheme, *, name: str = ""
) -> NDArray[np.float32]:
    """s [K], all positive, for ``weight`` [K,N] whose inputs have second moments ``moments`` [K,K]; ones where nothing is gained.

    Quantize ``weight * s[:, None]``, with ``moments / np.outer(s, s)`` where the method asks for them. s has a geometric mean of 1,
    over the inputs that calibration saw; the others have 1. SourceError where the weight is not finite, InputError where the
    moments are not of its inputs.
    """
    matrix = as_matrix(weight, name)
    seconds = checked(moments, len(matrix), name)
    sizes = _log_sizes(seconds)
    best = np.ones(len(matrix), np.float32)
    least = _error(matrix, best, seconds, scheme)
    for alpha in _ALPHAS:
        scales = np.exp(alpha * sizes).astype(np.float32)
        error = _error(matrix, scales, seconds, scheme)
        if error < least:
            best, least = scales, error
    return best


def _log_sizes(moments: NDArray[np.float64]) -> NDArray[np.float64]:
    """The logarithm of each input's root mean square [K], with mean 0; 0 for inputs that are always 0."""
    sizes = np.sqrt(np.diag(moments))
    seen = sizes > 0
    if not seen.any():
        return np.zeros_like(sizes)
    logs = np.log(np.maximum(sizes, _LEAST * sizes.max()))
    return np.where(seen, logs - logs[seen].mean(), 0)


def _error(
    matrix: NDArray[np.float32], scales: NDArray[np.float32], moments: NDArray[np.float64], scheme: BlockScheme
) -> float:
    column = scales[:, None]
    rounded = dequantize(round_to_nearest(matrix * column, scheme)) / column
    return float(output_errors(rounded - matrix, moments).sum())
