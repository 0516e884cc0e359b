"""What two artifacts of one model say to the same samples: texts, ids, and their choices under teacher forcing.

Owns how samples are run: in batches, with the artifact's own generation options. It measures nothing: texts go to metrics.py, ids and
choices to agreement.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.agreement import Agreement, Pair, choices, divergences
from txopt.calibration.batches import Batch, batches
from txopt.calibration.kept import Kept
from txopt.calibration.samples import Samples
from txopt.runtime.frontend import kind_of
from txopt.runtime.model import Model
from txopt.runtime.options import GenerationOptions
from txopt.runtime.pipeline import Pipeline

Ids = NDArray[np.int64]
Progress = Callable[[int, int], None]

# Samples in a batch: sounds and images are large before a decoder sees them, and logits are where many tokens meet a vocabulary.
BATCH = {"audio": 4, "image": 4, "text": 16, "arrays": 8}


@dataclass(frozen=True)
class Said:
    """What one artifact said to N samples: ids behind the decoder's start, the end included and padding not, and their texts."""

    ids: tuple[Ids, ...]
    texts: tuple[str, ...]


def said(model: Model, samples: Samples, *, progress: Progress | None = None) -> Said:
    """``generate()`` of every sample, with the samples' options and else the artifact's own."""
    ids: dict[int, Ids] = {}
    options = GenerationOptions.merge(model.manifest.generation, samples.options)
    ends = options.eos_ids
    for batch in batches(samples, BATCH[kind_of(model.manifest.frontend)], progress=progress):
        start = {"decoder_input_ids": batch.prompt} if batch.prompt.shape[1] else {}
        sequences = model.generate(**batch.feeds, **start, **samples.options).sequences
        skipped = batch.prompt.shape[1] or batch.feeds["input_ids"].shape[1]
        for index, row in zip(batch.indices, sequences, strict=True):
            ids[index] = _to_the_end(row[skipped:], ends)
    ordered = tuple(ids[index] for index in range(len(samples)))
    reader = Pipeline(model)
    return Said(ordered, tuple(reader.text(row) for row in ordered))


def continued(model: Model, samples: Samples, *, progress: Progress | None = None) -> Said | None:
    """What ``model`` itself says to ``samples``, for teacher forcing where some have no reference.

    None where all have one, and of an encoder alone, which says nothing.
    """
    if model.manifest.kind == "encoder" or all(entry.labels is not None for entry in samples.entries):
        return None
    return said(model, samples, progress=progress)


def agreement(
    baseline: Model,
    candidate: Model,
    samples: Samples,
    free: tuple[Said, Said],
    *,
    kept: Kept | None = None,
    progress: Progress | None = None,
) -> Agreement:
    """How often both choose the same tokens: free running, and along the references, or the baseline's own words without any.

    What the baseline says under teacher forcing is taken from ``kept``, where an earlier comparison over the same samples left it.
    """
    kept = kept or Kept(most=0)
    forced: dict[int, Pair] = {}
    apart: dict[int, NDArray[np.float64]] = {}
    for batch in batches(samples, BATCH[kind_of(baseline.manifest.frontend)], progress=progress):
        targets = [_target(batch, row, free[0].ids[index]) for row, index in enumerate(batch.indices)]
        known = kept.of(batch.indices, partial(_forced, baseline, batch, targets))
        for index, before, after in zip(batch.indices, known, _forced(candidate, batch, targets), strict=True):
            forced[index] = choices(before), choices(after)
            apart[index] = divergences(before, after)
    order = range(len(samples))
    pairs = list(zip(free[0].ids, free[1].ids, strict=True))
    return Agreement.of([forced[index] for index in order], pairs, [apart[index] for index in order])


def _target(batch: Batch, row: int, generated: Ids) -> Ids:
    """What is fed to both: the sample's labels, or what the baseline generated; at least one token."""
    if batch.labels is not None:
        return batch.labels[row, : batch.lengths[row]]
    return generated if len(generated) else np.zeros(1, np.int64)


def _forced(model: Model, batch: Batch, targets: Sequence[Ids]) -> Iterator[NDArray[np.float32]]:
    """Logits [L,V] of every sample at each token of its target."""
    if model.manifest.kind == "decoder":
        for ids, mask, target in zip(batch.feeds["input_ids"], batch.feeds["attention_mask"], targets, strict=True):
            tokens = np.concatenate([ids[mask != 0], target[:-1]])
            yield model.session.decoder(None).feed(tokens[None])[0, -len(target) :]
        return
    width = max(map(len, targets)) - 1
    rest = np.stack([np.pad(target[:-1], (0, width - len(target) + 1)) for target in targets])
    decoder = model.session.decoder(model.session.encode(batch.feeds))
    logits = decoder.feed(np.concatenate([batch.prompt, rest], axis=1))
    first = batch.prompt.shape[1] - 1
    for row, target in zip(logits, targets, strict=True):
        yield row[first : first + len(target)]


def _to_the_end(row: Ids, ends: Sequence[int]) -> Ids:
    """``row`` up to the first end of sequence, that one included."""
    found = np.flatnonzero(np.isin(row, ends))
    return row[: found[0] + 1] if len(found) else row
