"""What an observer may be shown: finite floats, with the channels it was made for. NaN and infinity stop here.

Owns that one check, so that every observer refuses the same things in the same words, before it has counted anything.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.errors import InputError

Values = NDArray[np.float32]


def finite(name: str, values: NDArray[Any], channels: int | None = None) -> Values:
    """``values`` of the tensor ``name`` in float32, as [N], or as [rows, channels] where there are channels.

    Raises:
        InputError: they are not float16 or float32, their last axis is not ``channels`` long, or some are NaN or infinite.
    """
    if values.dtype not in (np.float16, np.float32):
        raise InputError(
            f"{name}: expected float16 or float32 values, found {values.dtype}; observe float tensors only"
        )
    if channels is not None and (not values.ndim or values.shape[-1] != channels):
        raise InputError(f"{name}: expected {channels} channels in the last axis, found shape {list(values.shape)}")
    rows = values.astype(np.float32, copy=False).reshape(-1 if channels is None else (-1, channels))
    # Minimum and maximum carry a NaN or an infinity through, in a fraction of the time of asking each value.
    if rows.size and not (np.isfinite(rows.min()) and np.isfinite(rows.max())):
        nan, infinite = np.count_nonzero(np.isnan(rows)), np.count_nonzero(np.isinf(rows))
        raise InputError(
            f"{name}: expected finite values, found {nan} NaN and {infinite} infinite among {rows.size}; "
            "the model overflows on this input: calibrate it in fp32, or look at the input"
        )
    return rows
