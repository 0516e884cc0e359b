"""The tail of a sound that is shorter than what a model hears at once: one frame, again and again, up to the window's end.

Models without masks compute with it (Whisper pads to 30 seconds), so it is no padding that could be left out whole. But where most
rows that calibration sees are alike, rounding errors become small for these, at the cost of the rows that something is said in.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

SHARE = 16  # one of so many places of a tail is kept


def counted(features: NDArray[Any], places: int) -> NDArray[np.bool_]:
    """Which of an encoder's ``places`` count, bool [B,places], for ``features`` [B,F,T]; T is a multiple of ``places``.

    All up to the last frame that differs from the one at the end, and one of SHARE behind it.
    """
    frames = features.shape[2]
    differs = (features != features[:, :, -1:]).any(axis=1)
    ends = np.where(differs.any(axis=1), frames - differs[:, ::-1].argmax(axis=1), 0)
    index = np.arange(places)
    return (index * (frames // places) < ends[:, None]) | (index % SHARE == 0)
