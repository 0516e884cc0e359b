"""Sources padded to whole lanes, so that what a quantized artifact says of one does not depend on the lengths of its batch mates.

Padding is masked and changes nothing by itself. But engines sum over a source lane by lane, and what is left over at its end in
another order: float results move in their last bits with the padded length. Where activations are rounded to integers, such a bit
can move a value to the next integer, and the difference is one that shows. With lengths that are multiples of LANES nothing is left
over, and results are equal to the bit (tests/calibration/test_invariance.py).
"""

from collections.abc import Mapping

import numpy as np

from txopt.runtime.arrays import Array
from txopt.runtime.graphs import GraphSpec
from txopt.runtime.inputs import Bound

LANES = 8


def whole(length: int, most: int | None = None) -> int:
    """``length`` made a multiple of LANES, or ``most`` where that is less."""
    rounded = -(-length // LANES) * LANES
    return rounded if most is None else min(rounded, most)


def aligned(
    spec: GraphSpec, feeds: Mapping[str, Array], masks: Mapping[str, str | int], bounds: Mapping[str, Bound]
) -> dict[str, Array]:
    """``feeds`` with more padding at the end of every axis that a mask of ``masks`` is about; zeros, in the masks too."""
    sizes = {axis: feeds[name].shape[1] for name, axis in masks.items() if isinstance(axis, str)}
    room: dict[str, int] = {}
    for item in spec.inputs:
        positions = bounds[item.name].positions if item.name in bounds else None
        for axis in item.axes[1:2]:
            if isinstance(axis, str) and axis in sizes and positions is not None:
                room[axis] = min(positions, room.get(axis, positions))
    more = {axis: whole(size, room.get(axis)) - size for axis, size in sizes.items()}
    padded = {}
    for item in spec.inputs:
        wider = [(0, more.get(axis, 0) if isinstance(axis, str) else 0) for axis in item.axes]
        padded[item.name] = np.pad(feeds[item.name], wider) if any(end for _, end in wider) else feeds[item.name]
    return padded
