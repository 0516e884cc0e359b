"""Round to nearest: every value of a weight becomes the code next to it, block by block.

No data needed. What a block's grid is may be chosen: the one that covers all of its values, or a narrower one (clipping.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.blocks import Blocks, BlockScheme, Codes, as_matrix
from txopt.calibration.grid import Grid, covering, encode

Choice = Callable[[NDArray[np.float32], slice], Grid]
"""(rows [b,N] of one block, their place in the weight) -> the block's grid"""


def round_to_nearest(
    weight: NDArray[Any], scheme: BlockScheme, *, name: str = "", choose: Choice | None = None
) -> Blocks:
    """``weight`` [K,N] with every value at the nearest code, at most half a scale off; SourceError where it is not finite.

    ``choose`` gives each block's grid, by default the one that covers all of its values.
    """
    matrix = as_matrix(weight, name)
    codes = empty_codes(matrix, scheme)
    grids = []
    for span in scheme.spans(len(matrix)):
        rows = matrix[span]
        grids.append(covering(rows, scheme) if choose is None else choose(rows, span))
        codes[span] = encode(rows, grids[-1], scheme)
    return assembled(codes, grids, scheme)


def empty_codes(matrix: NDArray[np.float32], scheme: BlockScheme) -> Codes:
    """Room for the codes of ``matrix``."""
    return np.empty(matrix.shape, np.int8) if scheme.symmetric else np.empty(matrix.shape, np.uint8)


def assembled(codes: Codes, grids: Sequence[Grid], scheme: BlockScheme) -> Blocks:
    """Blocks of ``codes`` [K,N] and the grids of its blocks, in order."""
    scales = np.stack([grid.scales for grid in grids])
    zeros = [grid.zeros for grid in grids if grid.zeros is not None]
    return Blocks(codes, scales, np.stack(zeros).astype(np.uint8) if zeros else None, scheme)
