"""The two formats of 8 bits that static products are computed in: integers, and floats of four exponent bits (E4M3).

A code c stands for c * scale, and amax for the largest code: scale = amax / 127 (int8; -128 is left to what lies beyond) or amax / 448
(E4M3). Both round half to even. E4M3 is the OCP 8-bit Floating Point Specification's (revision 1.0), ONNX's float8e4m3fn: three bits
of mantissa from 2**-6 to 448, steps of 2**-9 below, no infinities. The step of int8 is the same over the whole range, that of E4M3 a
sixteenth to an eighth of the number itself.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.grid import LEAST_SCALE


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a code is.

    Attributes:
        name: the precision of artifacts that have it. title: for people.
        largest: the code that amax gets.
        dtype: how graphs store it.
    """

    name: str
    title: str
    largest: int
    dtype: ir.DataType

    def scale(self, amax: float) -> np.float32:
        """The step that reaches ``amax``, a normal number; 1 for a tensor that was always 0."""
        return np.float32(max(amax / self.largest, float(LEAST_SCALE))) if amax else np.float32(1)

    def encode(self, values: NDArray[Any]) -> NDArray[Any]:
        """The nearest codes to ``values``, which are divided by their scale already; what is beyond amax gets the largest code."""
        limited = np.clip(values, -self.largest, self.largest)
        return (np.rint(limited) if self is INT8 else limited).astype(self.dtype.numpy())

    def zero(self) -> NDArray[Any]:
        """The zero point [] of symmetric codes."""
        return np.zeros((), self.dtype.numpy())


INT8 = Format(name="int8", title="int8", largest=127, dtype=ir.DataType.INT8)
FP8 = Format(name="fp8", title="fp8 (E4M3)", largest=448, dtype=ir.DataType.FLOAT8E4M3FN)
FORMATS = {each.name: each for each in (INT8, FP8)}
