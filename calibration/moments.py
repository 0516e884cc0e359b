"""Second moments of a layer's inputs, and what an error in its weight costs by them.

H = E[x x^T] [K,K] over calibration rows x [K]. For an error E [K,N] of the weight, the mean squared error of output n is
E[:,n]^T H E[:,n]. GPTQ's Hessian is 2 H; no method here depends on a factor.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.errors import InputError


def second_moments(rows: NDArray[Any]) -> NDArray[np.float64]:
    """H [K,K] of ``rows`` [..,K]. Means of parts, weighted by their counts of rows, are the mean of all."""
    flat = rows.reshape(-1, rows.shape[-1]).astype(np.float64)
    return flat.T @ flat / max(len(flat), 1)


def checked(moments: NDArray[Any], size: int, name: str) -> NDArray[np.float64]:
    """``moments`` as float64 [size,size], symmetric to the bit; InputError where weight ``name`` has no such inputs."""
    if moments.shape != (size, size):
        raise InputError(
            f"weight {name}: expected second moments [{size},{size}] of its inputs, got {list(moments.shape)}; "
            "collect them from the tensor that this weight multiplies"
        )
    matrix = moments.astype(np.float64)
    if not np.isfinite(matrix).all() or (np.diag(matrix) < 0).any():
        raise InputError(
            f"weight {name}: expected finite second moments of its inputs, got infinite or negative ones; "
            "some calibration sample makes the model overflow: find it and leave it out"
        )
    return (matrix + matrix.T) / 2


def damped(moments: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """``moments`` [K,K] with ``share`` of the mean H[k,k] added to each; inputs that calibration never saw have 1."""
    result = moments.copy()
    diagonal = np.einsum("kk->k", result)  # a view
    unseen = diagonal == 0
    diagonal += share * diagonal.mean()
    diagonal[unseen] = 1  # the rest of its row is 0, so it gives and takes nothing
    return result


def output_errors(errors: NDArray[np.float32], moments: NDArray[np.float64]) -> NDArray[np.float32]:
    """The mean squared error [N] of each output for the weight's ``errors`` [K,N]."""
    return np.einsum("kn,kn->n", errors, moments.astype(np.float32) @ errors)
