"""A weight in int8 with one scale for each output channel: what static int8 (QuantizeLinear and DequantizeLinear pairs) reads.

The formula is the symmetric one of grid.py with the whole column as its block: scale = amax / 127, codes -127..127, zero point 0.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.blocks import BlockScheme, as_matrix
from txopt.calibration.grid import Grid, covering, decode, encode

_INT8 = BlockScheme(bits=8, symmetric=True)


@dataclass(frozen=True, eq=False)
class Channels:
    """Codes int8 [K,N] and scales float32 [N]; a code c stands for c * scale."""

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]

    def dequantize(self) -> NDArray[np.float32]:
        """The weight [K,N] that engines compute with."""
        return decode(self.codes, Grid(self.scales, None))


def per_channel(weight: NDArray[Any], *, name: str = "") -> Channels:
    """``weight`` [K,N] with every value at the nearest code, at most half a scale off; SourceError where it is not finite."""
    matrix = as_matrix(weight, name)
    grid = covering(matrix, _INT8)
    return Channels(encode(matrix, grid, _INT8).astype(np.int8, copy=False), grid.scales)
