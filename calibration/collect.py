"""What the weights of a model see: its decode loop run over samples, and the inputs of every product observed.

Encoder once for each source, then every decode step, by teacher forcing along the references, or along what the model itself said
where there are none; of an encoder alone, the encoder once; padding is left out. Owns which tokens are fed. What is kept of the values
is the observers' choice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.batches import Batch, batches
from txopt.calibration.evaluate import BATCH, Said
from txopt.calibration.forced import Forced
from txopt.calibration.linears import reads
from txopt.calibration.observers import Observer, SecondMoment
from txopt.calibration.samples import Samples
from txopt.runtime.artifact import Artifact
from txopt.runtime.frontend import kind_of

Kind = TypeVar("Kind", bound=Observer)
Ids = NDArray[np.int64]


class Steps(StrEnum):
    """Which positions of a target are seen."""

    LOOP = "loop"  # all of them, as a decode loop meets them
    FIRST = "first"  # what follows the start alone: a prefill and one step, what calibration elsewhere sees


def inputs_of(models: Mapping[str, ir.Model]) -> dict[str, dict[str, int]]:
    """The values [..,K] that weights are multiplied with, and K, by graph."""
    found: dict[str, dict[str, int]] = {}
    for name, model in models.items():
        found[name] = {}
        for read in reads(model.graph):
            if read.activations is not None:
                found[name][str(read.activations.name)] = read.size
    return found


def collect(
    artifact: Artifact,
    samples: Samples,
    observers: Mapping[str, Mapping[str, Kind]],
    *,
    said: Said | None = None,
    steps: Steps = Steps.LOOP,
    tails: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Shows every observer, by graph and value, what passes there.

    Args:
        artifact: in float32.
        samples: what it is run on.
        observers: changed.
        said: what the artifact itself said to the samples, for those without a reference; None where all have one.
        steps: which positions of targets are seen.
        tails: whether all of the silence behind a sound is seen, or little of it (silence.py).
        progress: samples done, and samples there are.
    """
    taps: dict[str, Sequence[str]] = {graph: list(mine) for graph, mine in observers.items()}
    size = BATCH[kind_of(artifact.manifest.frontend)]
    with Forced(artifact, taps, tails=tails) as graphs:
        for batch in batches(samples, size, progress=progress):
            for each in fed(artifact.manifest.kind, batch, said, steps):
                for seen in graphs.run(each.inputs, each.tokens, each.lengths):
                    observers[seen.graph][seen.name].update(seen.values)


@dataclass(frozen=True)
class Fed:
    """What the graphs are fed: the encoder's inputs by name, tokens [B,L] padded on the right, and how many of each row count."""

    inputs: Mapping[str, NDArray[Any]]
    tokens: Ids
    lengths: list[int]


def fed(kind: str, batch: Batch, said: Said | None, steps: Steps) -> Iterator[Fed]:
    """One batch under teacher forcing; a decoder alone takes its rows one by one, an encoder alone no tokens."""
    if kind == "encoder":
        yield Fed(batch.feeds, np.zeros((len(batch.indices), 0), np.int64), [0] * len(batch.indices))
        return
    targets = [_target(batch, row, index, said) for row, index in enumerate(batch.indices)]
    if steps is Steps.FIRST:
        targets = [target[:1] for target in targets]
    if kind == "decoder":
        for ids, mask, target in zip(batch.feeds["input_ids"], batch.feeds["attention_mask"], targets, strict=True):
            tokens = np.concatenate([ids[mask != 0], target])
            yield Fed({}, tokens[None], [len(tokens)])
        return
    rows = [np.concatenate([start, target]) for start, target in zip(batch.prompt, targets, strict=True)]
    width = max(map(len, rows))
    padded = np.stack([np.pad(row, (0, width - len(row))) for row in rows])
    yield Fed(batch.feeds, padded, [len(row) for row in rows])


def _target(batch: Batch, row: int, index: int, said: Said | None) -> Ids:
    """What the decoder is fed behind its start: all but the last token of the sample's target."""
    if batch.labels is not None:
        return batch.labels[row, : max(0, int(batch.lengths[row]) - 1)]
    return np.zeros(0, np.int64) if said is None else said.ids[index][:-1]


def second_moments(
    artifact: Artifact,
    models: Mapping[str, ir.Model],
    samples: Samples,
    *,
    said: Said | None = None,
    steps: Steps = Steps.LOOP,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """The mean of x x^T [K,K] over the inputs x of every product, by graph and value; zeros where nothing passed.

    Of the silence behind a sound little is seen.
    """
    inputs = inputs_of(models)
    observers = {
        graph: {name: SecondMoment(name, size) for name, size in mine.items()} for graph, mine in inputs.items()
    }
    collect(artifact, samples, observers, said=said, steps=steps, tails=False, progress=progress)
    return {
        graph: {name: observer.sum / max(observer.count, 1) for name, observer in mine.items()}
        for graph, mine in observers.items()
    }
