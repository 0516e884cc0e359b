"""Sources padded to whole lanes, so that what a quantized artifact says of one does not depend on the lengths of its batch mates.

Padding is masked and changes nothing by itself. But engines sum over a source lane by lane, and what is left over at its end in
another order: float results move in their last bits with the padded length. Where activations are rounded to integers, such a bit
can move a value to the next integer, and the difference is one that shows. With lengths that are multiples of LANES nothing is left
over.

What is promised of int8 and int4 artifacts for the CPU with their own blocks (64 and 32 wide), at one number of threads, and tried in
tests/calibration/test_invariance.py: a source's logits, and so its ids, are equal to the bit alone and in any batch, whatever the
lengths of its mates and its own padding, in prefills and in steps, up to the last position that the model has; and so are the logits,
states and embeddings of an encoder alone, which have as many places as the caller gave. Where that is no
multiple of LANES a source is padded to it: what is then left over is padding, zeros that no order of a sum changes, or the source is
that long wherever it is. Buffers of the self-cache grow by the same rule. A decoder alone keeps it for prompts padded on the left.
What is not promised:
- other blocks: products of 8 bits with blocks of 128, or of 4 bits with blocks of 64, differ between one row and several;
- other engines, processors and numbers of threads: there the bits may be others, for all rows alike;
- tokens fed at once against the same tokens one by one, and beams: their queries meet the sources in one product, of other sizes;
- samples of sound, whose frames are as many as the encoder makes of them: they stay as they are;
- encoders whose own arithmetic sees padding (SpeechT5's first norm): the certificate's "invariance" says how much;
- artifacts in fp32, fp16 and bf16, where a last bit stays a last bit: they are not padded.
"""

from collections.abc import Mapping

import numpy as np

from txopt.runtime.arrays import Array
from txopt.runtime.graphs import SOURCE_AXES, Axes, GraphSpec
from txopt.runtime.inputs import Bound

LANES = 8


def whole(length: int, most: int | None = None) -> int:
    """``length`` made a multiple of LANES, or ``most`` where that is less."""
    rounded = -(-length // LANES) * LANES
    return rounded if most is None else min(rounded, most)


def aligned(
    spec: GraphSpec, feeds: Mapping[str, Array], masks: Mapping[str, str | int], bounds: Mapping[str, Bound]
) -> dict[str, Array]:
    """``feeds`` with more padding at the end of every source length that a mask of ``masks`` is about; zeros, in the masks too."""
    sizes = source_lengths(feeds, masks)
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


def source_lengths(feeds: Mapping[str, Array], masks: Mapping[str, str | int]) -> dict[str, int]:
    """By axis, the source lengths that a mask of ``masks`` is about."""
    return {str(axis): feeds[name].shape[1] for name, axis in masks.items() if axis in SOURCE_AXES}


def cut(axes: Axes, value: Array, lengths: Mapping[str, int]) -> Array:
    """A copy of ``value`` without the places that ``aligned`` added: as long along each of ``lengths`` as these say."""
    kept = tuple(slice(lengths.get(axis) if isinstance(axis, str) else None) for axis in axes)
    return value[kept].copy()
