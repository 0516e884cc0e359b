"""Ranges of a model's activations: its decode loop run over samples, every tensor in a histogram, one way of clipping for all.

Owns what a file of ranges is stored under. Which tensors is static.py's, how they are clipped amax.py's.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from txopt.calibration.amax import Method
from txopt.calibration.collect import Steps, collect
from txopt.calibration.evaluate import Said
from txopt.calibration.histogram import Histogram
from txopt.calibration.ranges import Key, Range, Ranges, digest_of_files
from txopt.calibration.samples import Samples
from txopt.runtime.artifact import Artifact

Progress = Callable[[int, int], None]
Names = Mapping[str, Sequence[str]]


def observe(
    artifact: Artifact,
    names: Names,
    samples: Samples,
    *,
    said: Said | None = None,
    steps: Steps = Steps.LOOP,
    progress: Progress | None = None,
) -> dict[str, dict[str, Histogram]]:
    """What passes through the tensors ``names``, by graph.

    Args:
        artifact: in float32.
        names: by graph.
        samples: what it is run on.
        said: what the artifact itself said to the samples, for those without a reference; None where all have one.
        steps: which positions of targets are seen.
        progress: samples done, and samples there are.
    """
    seen = {graph: {name: Histogram(name) for name in mine} for graph, mine in names.items()}
    collect(artifact, samples, seen, said=said, steps=steps, progress=progress)
    return seen


def ranges(
    artifact: Artifact,
    names: Names,
    samples: Samples,
    method: Method,
    *,
    said: Said | None = None,
    steps: Steps = Steps.LOOP,
    key: Key | None = None,
    file: Path | None = None,
    progress: Progress | None = None,
) -> Ranges:
    """The range of each tensor, under GRAPH:NAME; see ``observe``.

    Args:
        key: what they are stored under; None: as ``key_of``.
        file: where they are read from, if it is there, and else written to.

    Raises:
        StaleError: ``file`` holds those of other graphs, data or settings. ArtifactError: it holds no ranges, or cannot be written.
        InputError: a value is not finite, or no sample reaches a tensor.
    """
    key = key or key_of(artifact, names, samples, method, steps)
    if file is not None and os.path.lexists(file):
        return Ranges.load(file, key=key)
    seen = observe(artifact, names, samples, said=said, steps=steps, progress=progress)
    tensors = {
        f"{graph}:{name}": Range.of(histogram, method)
        for graph, mine in seen.items()
        for name, histogram in mine.items()
    }
    found = Ranges(key=key, tensors=tensors)
    if file is not None:
        found.save(file)
    return found


def amax_of(found: Ranges, graph: str) -> dict[str, float]:
    """Where the tensors of one graph are clipped, by name."""
    prefix = f"{graph}:"
    return {
        name.removeprefix(prefix): float(each.amax)
        for name, each in found.tensors.items()
        if name.startswith(prefix) and not isinstance(each.amax, tuple)
    }


def key_of(
    artifact: Artifact, names: Names, samples: Samples, method: Method, steps: Steps, *, smoothed: bool = False
) -> Key:
    """What ranges of these tensors depend on; ``smoothed`` where they are not the artifact's own but those of its smoothed twin."""
    graphs = [artifact.file(spec.file) for _, spec in sorted(artifact.manifest.graphs.items())]
    weights = [artifact.file(name) for name in sorted(artifact.manifest.files) if name.endswith(".data")]
    tensors = {graph: sorted(mine) for graph, mine in names.items()}
    settings = {"steps": str(steps), "tensors": tensors, "smoothed": smoothed}
    return Key.of(graph=digest_of_files([*graphs, *weights]), data=samples.sha256, method=method, settings=settings)
