"""The grid of one block: each column's scale and zero point, and rounding to it.

Symmetric: scale = amax / 127 for 8 bits and amax / 7.5 for 4, codes round(w / scale) in -127..127 and -8..7. The step of 4 bits is the
one that spreads 16 codes over -amax..amax: both ends are half a step off, like everything else, and no value is further off. amax / 7
would leave the code -8 unused and loses more from blocks of 32 on. A scale of either sign that puts -8 on the value of largest
magnitude is better still, but TensorRT takes positive scales only (says its IDequantizeLayer), and clipping.py finds nearly all
that it gains.

Asymmetric: low = min(w, 0), high = max(w, 0), scale = (high - low) / (2**bits - 1), zero = round(-low / scale), codes round(w /
scale) + zero. So 0 is always exact.

Scales are float32 numbers that float16 holds too (``short``), so that files keep them in two bytes: in blocks of 32 codes of 4 bits
that is a tenth of the file. They grow by at most 1/1024 of themselves, before codes are rounded to them.

Rounding is half to even and w / scale is a float32 division, as in ONNX's QuantizeLinear. A column of zeros has scale 1. Scales are
normal numbers, never less than 2**-126, so that w / scale is finite for denormals too.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.blocks import BlockScheme, Codes

LEAST_SCALE = np.finfo(np.float32).tiny  # the least normal number, 2**-126


class Grid(NamedTuple):
    """Scales [N] float32, all positive, and zeros [N] float32 with whole values, or None where symmetric."""

    scales: NDArray[np.float32]
    zeros: NDArray[np.float32] | None


def covering(rows: NDArray[np.float32], scheme: BlockScheme, part: float = 1.0) -> Grid:
    """The grid that covers every value of ``rows`` [b,N], one block; or ``part`` of its range, for those who clip the rest."""
    if scheme.symmetric:
        amax = part * np.abs(rows).max(axis=0).astype(np.float64)
        return Grid(_scales(amax / (127 if scheme.bits == 8 else 7.5)), None)
    low = part * np.minimum(rows.min(axis=0), 0).astype(np.float64)
    high = part * np.maximum(rows.max(axis=0), 0).astype(np.float64)
    scales = _scales((high - low) / scheme.highest)
    zeros = np.clip(np.rint(-low / scales), scheme.lowest, scheme.highest)
    return Grid(scales, zeros.astype(np.float32))


def encode(rows: NDArray[np.float32], grid: Grid, scheme: BlockScheme) -> Codes:
    """The nearest codes to ``rows`` [..,N], of the same shape; what lies outside the grid gets its first or last code."""
    codes = np.rint(rows / grid.scales)
    if grid.zeros is not None:
        codes += grid.zeros
    np.clip(codes, scheme.lowest, scheme.highest, out=codes)
    return codes.astype(np.int8 if scheme.symmetric else np.uint8)


def decode(codes: Codes, grid: Grid) -> NDArray[np.float32]:
    """What ``codes`` [..,N] stand for, float32 of the same shape."""
    values = codes.astype(np.float32)
    if grid.zeros is not None:
        values -= grid.zeros
    values *= grid.scales
    return values


def short(scales: NDArray[np.floating]) -> NDArray[np.float32]:
    """``scales`` [N] as the next larger numbers that float16 holds; those outside of its normal range stay as they are."""
    wide = np.asarray(scales, np.float32)
    limits = np.finfo(np.float16)
    normal = (wide >= limits.tiny) & (wide <= limits.max)
    near = np.where(normal, wide, 1).astype(np.float16)
    near = np.where(near < wide, np.nextafter(near, limits.max, dtype=np.float16), near)
    return np.where(normal, near.astype(np.float32), wide)


def _scales(steps: NDArray[np.float64]) -> NDArray[np.float32]:
    return short(np.where(steps == 0, 1, np.maximum(steps, LEAST_SCALE)))
