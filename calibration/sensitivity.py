"""What rounding one weight alone does to a model: how far it moves the distributions of a decode loop.

Measured on what is generated, not on the weight: every decode step of some samples, under teacher forcing, all other weights in
float32. Owns the measurement; what is done about sensitive weights is search.py's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.agreement import divergences
from txopt.calibration.batches import batches
from txopt.calibration.blocks import Blocks, dequantize
from txopt.calibration.collect import Fed, Steps, fed
from txopt.calibration.evaluate import BATCH, Said
from txopt.calibration.forced import Forced
from txopt.calibration.linears import Role, reads
from txopt.calibration.samples import Samples
from txopt.runtime.artifact import Artifact
from txopt.runtime.frontend import kind_of

Array = NDArray[Any]
_LOGITS = {"decoder": ["logits"]}


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What rounding the weight ``name`` costs: ``nats`` of divergence, the mean over places; ``numbers`` is the weight's size."""

    graph: str
    name: str
    nats: float
    numbers: int


def sensitivities(
    artifact: Artifact,
    blocks: Mapping[str, Mapping[str, Blocks]],
    samples: Samples,
    *,
    said: Said | None,
    tables: Mapping[str, set[str]],
    most: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sensitivity]:
    """Of every rounded weight, the most sensitive per number first.

    Args:
        artifact: in float32.
        blocks: its rounded weights by graph and name.
        samples: what it is asked; the first ``most`` of them serve.
        said: what the artifact itself said, for samples without a reference.
        tables: names of weights that are tables, by graph: their blocks are of the transpose.
        progress: weights done, and weights there are.
    """
    asked = list(_asked(artifact, samples, said, most))
    both = {name: (_LOGITS["decoder"] if name == "decoder" else []) for name in artifact.manifest.graphs}
    found = []
    with Forced(artifact, both) as whole:
        given = [whole.encoded(each.inputs) for each in asked]
        before = [_logits(whole, each, sources) for each, sources in zip(asked, given, strict=True)]
        names = [(graph, name) for graph, mine in blocks.items() for name in mine]
        for done, (graph, name) in enumerate(names):
            rounded = dequantize(blocks[graph][name])
            changed = {graph: {name: np.ascontiguousarray(rounded.T) if name in tables[graph] else rounded}}
            with Forced(artifact, {graph: both[graph]}, weights=changed) as one:
                after = [
                    _logits(one, each, sources)
                    if graph == "decoder"
                    else _logits(whole, each, one.encoded(each.inputs))
                    for each, sources in zip(asked, given, strict=True)
                ]
            apart = [divergences(old, new) for old, new in zip(before, after, strict=True)]
            nats = float(np.concatenate(apart).mean())
            found.append(Sensitivity(graph=graph, name=name, nats=nats, numbers=rounded.size))
            if progress is not None:
                progress(done + 1, len(names))
    return sorted(found, key=lambda each: (-each.nats / each.numbers, each.graph, each.name))


def tables_of(graph: Any) -> set[str]:
    """The names of the weights of ``graph`` that are tables."""
    return {read.name for read in reads(graph) if read.role is not Role.LINEAR}


def _asked(artifact: Artifact, samples: Samples, said: Said | None, most: int) -> Iterator[Fed]:
    left = most
    for batch in batches(samples, min(most, BATCH[kind_of(artifact.manifest.frontend)])):
        if left <= 0:
            return
        left -= len(batch.indices)
        yield from fed(artifact.manifest.kind, batch, said, Steps.LOOP)


def _logits(graphs: Forced, asked: Fed, given: Mapping[str, Array]) -> Array:
    """[places, V] of one batch."""
    seen: Sequence[Array] = [each.values for each in graphs.decoded(given, asked.tokens, asked.lengths)]
    return seen[0]
