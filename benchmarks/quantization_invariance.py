"""Whether what an artifact says of a source depends on the batch that it is in: how far logits move."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.benchmarks.inputs import draw
from txopt.runtime.graphs import source_masks
from txopt.runtime.model import Model

LENGTHS = (64, 3, 17, 1, 40, 63, 8, 29)  # of the sources in a batch: each beside mates that are longer or shorter
PROMPT, STEPS = 5, 12  # tokens fed at once, then one by one


def moved(model: Model) -> float:
    """The largest difference between logits of eight sources alone, and together in one batch; a prefill, then single steps."""
    manifest = model.manifest
    inputs, tokens = draw(model.artifact, len(LENGTHS), max(LENGTHS)), _tokens(model)
    masks = source_masks(manifest.graphs)
    padded = set(masks.values())
    cut = {item.name for item in manifest.graphs["encoder"].inputs if len(item.axes) > 1 and item.axes[1] in padded}
    alone = []
    for row, length in enumerate(LENGTHS):
        for name in cut:
            inputs[name][row, length:] = 0
        own = {
            name: value[row : row + 1, :length] if name in cut else value[row : row + 1]
            for name, value in inputs.items()
        }
        alone.append(_logits(model, own, tokens[row : row + 1]))
    return float(np.abs(np.concatenate(alone) - _logits(model, inputs, tokens)).max())


def _logits(model: Model, inputs: dict[str, NDArray[Any]], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """[B,Q,V] at every one of ``tokens`` [B,Q]."""
    decoder = model.session.decoder(model.session.encode(inputs))
    prefill = decoder.feed(tokens[:, :PROMPT]).copy()
    steps = [decoder.step(column).copy()[:, None] for column in tokens[:, PROMPT:].T]
    return np.concatenate([prefill, *steps], axis=1)


def _tokens(model: Model) -> NDArray[np.int64]:
    vocabulary = next(out.axes[-1] for out in model.manifest.graphs["decoder"].outputs if out.name == "logits")
    return np.random.default_rng(0).integers(0, int(vocabulary), (len(LENGTHS), PROMPT + STEPS))
