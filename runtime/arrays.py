"""What a caller gives as an array: lists become arrays here, and what cannot become one is refused by name.

Owns that one step; which arrays a graph takes is inputs.py's.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.errors import InputError

Array = NDArray[Any]


def as_array(name: str, value: Any) -> Array:
    """``value`` as an array, or InputError that calls it ``name``."""
    try:
        return np.asarray(value)
    except ValueError as err:
        raise InputError(f"{name}: rows differ in length; pad them, and give an attention_mask") from err
