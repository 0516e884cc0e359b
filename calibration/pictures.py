"""Pictures of what products are fed: a histogram, the largest magnitude of every channel, and some rows of each input.

For people who ask why a model loses: owns what counts as an outlier. Ranges that integers are made by are activations.py's.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.amax import Percentile
from txopt.calibration.collect import Steps, collect, inputs_of
from txopt.calibration.evaluate import Said
from txopt.calibration.histogram import Histogram
from txopt.calibration.linears import reads
from txopt.calibration.observers import ChannelMagnitude, RowSample
from txopt.calibration.samples import Samples
from txopt.runtime.artifact import Artifact

MOST = 32  # samples that are looked at
TAIL = Percentile(percentile=99.9)
FAR = 3.0  # times that; the largest of a million normal numbers is 1.5 times their 99.9th percentile
_ROWS = 64

Pictures = Mapping[str, Mapping[str, "Picture"]]


class Picture:
    """What is kept of one value [..,K]; an observer."""

    def __init__(self, name: str, channels: int) -> None:
        self.name = name
        self.histogram = Histogram(name)
        self.magnitudes = ChannelMagnitude(name, channels)
        self._rows = RowSample(name, channels, size=_ROWS)

    @property
    def rows(self) -> NDArray[np.float32]:
        """[at most 64,K]: some of those that came."""
        return self._rows.rows

    def update(self, values: NDArray[Any]) -> None:
        for each in (self.histogram, self.magnitudes, self._rows):
            each.update(values)

    def merge(self, other: "Picture") -> None:
        self.histogram.merge(other.histogram)
        self.magnitudes.merge(other.magnitudes)
        self._rows.merge(other._rows)


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """A tensor whose largest magnitude, in ``channel`` of its inputs, is far above the 99.9th percentile of all, ``tail``."""

    graph: str
    name: str
    kind: str  # "activation" or "weight"
    channel: int
    largest: float
    tail: float

    @property
    def times(self) -> float:
        return self.largest / self.tail


def pictures(
    artifact: Artifact,
    models: Mapping[str, ir.Model],
    samples: Samples,
    *,
    said: Said | None = None,
    steps: Steps = Steps.LOOP,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, Picture]]:
    """Of the inputs of all products of ``models``, the artifact's graphs, by graph and name; the first MOST samples serve.

    Args:
        said: what the artifact itself said to the samples, for those without a reference.
    """
    seen = {
        graph: {name: Picture(name, size) for name, size in mine.items()} for graph, mine in inputs_of(models).items()
    }
    collect(artifact, samples.part(0, min(MOST, len(samples))), seen, said=said, steps=steps, progress=progress)
    return seen


def outliers(seen: Pictures, models: Mapping[str, ir.Model]) -> list[Outlier]:
    """Inputs of products, and weights, with a value FAR above the rest; the farthest first."""
    found = [each for each in (*_activations(seen), *_weights(models)) if each.times > FAR]
    return sorted(found, key=lambda each: (-each.times, each.graph, each.name))


def _activations(seen: Pictures) -> Iterator[Outlier]:
    for graph, mine in seen.items():
        for name, one in mine.items():
            if (largest := float(one.histogram.absmax)) > 0:
                yield Outlier(
                    graph=graph,
                    name=name,
                    kind="activation",
                    channel=int(one.magnitudes.absmax.argmax()),
                    largest=largest,
                    tail=float(TAIL.amax(one.histogram)),
                )


def _weights(models: Mapping[str, ir.Model]) -> Iterator[Outlier]:
    done: set[str] = set()
    for graph, model in models.items():
        for read in reads(model.graph):
            if read.name in done:
                continue
            done.add(read.name)
            magnitudes = np.abs(read.matrix())
            largest, place = float(magnitudes.max()), int(magnitudes.size * TAIL.percentile / 100)
            tail = float(np.partition(magnitudes.reshape(-1), place)[place])
            if tail > 0:
                channel = int(magnitudes.max(axis=1).argmax())
                yield Outlier(graph=graph, name=read.name, kind="weight", channel=channel, largest=largest, tail=tail)
