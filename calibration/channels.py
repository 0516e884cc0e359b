"""A weight in 8 bits with one scale for each output channel: what static products (QuantizeLinear and DequantizeLinear pairs) read.

The formula is the symmetric one of grid.py with the whole column as its block: scale = amax / largest code, zero point 0.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.blocks import as_matrix
from txopt.calibration.formats import INT8, Format
from txopt.calibration.grid import short


@dataclass(frozen=True, eq=False)
class Channels:
    """Codes [K,N], of the format's dtype, and scales float32 [N]; a code c stands for c * scale."""

    codes: NDArray[Any]
    scales: NDArray[np.float32]

    def dequantize(self) -> NDArray[np.float32]:
        """The weight [K,N] that engines compute with."""
        return self.codes.astype(np.float32) * self.scales


def per_channel(weight: NDArray[Any], codes: Format = INT8, *, name: str = "") -> Channels:
    """``weight`` [K,N] with every value at the nearest code; SourceError where it is not finite."""
    matrix = as_matrix(weight, name)
    scales = short(np.array([codes.scale(amax) for amax in np.abs(matrix).max(axis=0).astype(np.float64)]))
    return Channels(codes.encode(matrix / scales), scales)
