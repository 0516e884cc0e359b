"""What an encoder alone answers to samples: logits, numbers, or embeddings, without padding.

Owns how samples are run, in batches. It measures nothing: what answers come to is heads.py's, how alike they are likeness.py's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.batches import batches
from txopt.calibration.evaluate import BATCH
from txopt.calibration.heads import Head, chosen, head_of
from txopt.calibration.samples import Samples
from txopt.runtime.frontend import kind_of
from txopt.runtime.graphs import source_masks
from txopt.runtime.model import Model

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Answered:
    """What one artifact answered to N samples: of each float32 [P,C] (heads.py)."""

    head: Head
    values: tuple[NDArray[np.float32], ...]

    @property
    def chosen(self) -> tuple[NDArray[Any], ...]:
        """What a metric judges: see ``heads.chosen``."""
        return tuple(chosen(self.head, value) for value in self.values)


def answered(model: Model, samples: Samples, *, progress: Progress | None = None) -> Answered:
    """The answer of ``model``, an encoder alone with a head, to every sample; numbers as ``classify()`` gives them."""
    head = head_of(model.manifest)
    assert head is not None, "whoever asks looked"
    axes = next(item.axes for item in model.manifest.graphs["encoder"].outputs if item.name == head.output)
    mask = next((name for name, axis in source_masks(model.manifest.graphs).items() if axis == axes[1]), None)
    found: dict[int, NDArray[np.float32]] = {}
    for batch in batches(samples, BATCH[kind_of(model.manifest.frontend)], progress=progress):
        if head is Head.NUMBERS:
            given = model.classify(**batch.feeds)
        else:
            given = model.session.array(model.encode(**batch.feeds).values[head.output])
        for row, index in enumerate(batch.indices):
            if head is not Head.TOKENS:
                found[index] = given[row : row + 1].astype(np.float32)
            else:
                seen = given[row] if mask is None else given[row][batch.feeds[mask][row] != 0]
                found[index] = seen.astype(np.float32)
    return Answered(head, tuple(found[index] for index in range(len(samples))))
