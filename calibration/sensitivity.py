"""What rounding one weight alone does to a model: how far it moves the distributions of a decode loop.

Measured on what is generated, not on the weight: every decode step of some samples, under teacher forcing, all other weights in
float32; of an encoder alone on its answers (heads.apart). In static int8 a product is rounded alone, its weight and its input. Owns
the measurement; what is done about sensitive weights is search.py's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration import static
from txopt.calibration.batches import batches
from txopt.calibration.blocks import Blocks, dequantize
from txopt.calibration.collect import Fed, Steps, fed
from txopt.calibration.evaluate import BATCH, Said
from txopt.calibration.forced import Forced, Seen
from txopt.calibration.formats import Format
from txopt.calibration.heads import Head, apart, head_of
from txopt.calibration.linears import Role, reads
from txopt.calibration.samples import Samples
from txopt.runtime.artifact import Artifact
from txopt.runtime.frontend import kind_of

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What rounding the weight ``name`` costs: ``nats`` of divergence, the mean over places; ``numbers`` is the weight's size.

    ``role`` is how ``graph`` reads it, on which its schemes depend.
    """

    graph: str
    name: str
    role: Role
    nats: float
    numbers: int


@dataclass(frozen=True, kw_only=True)
class Alone:
    """The weight ``name``, of so many ``numbers``, rounded alone: ``opened`` gives its graph like that, with values exposed."""

    graph: str
    name: str
    role: Role
    numbers: int
    opened: Callable[[Mapping[str, Sequence[str]]], Forced]


def alone_in_blocks(
    artifact: Artifact, blocks: Mapping[str, Mapping[str, Blocks]], roles: Mapping[str, Mapping[str, Role]]
) -> list[Alone]:
    """Each of the rounded weights ``blocks``, read in ``roles``, both by graph and name."""

    def opened(graph: str, name: str, taps: Mapping[str, Sequence[str]]) -> Forced:
        rounded = dequantize(blocks[graph][name])
        changed = rounded if roles[graph][name] is Role.LINEAR else np.ascontiguousarray(rounded.T)
        return Forced(artifact, taps, weights={graph: {name: changed}})

    return [
        Alone(
            graph=graph,
            name=name,
            role=roles[graph][name],
            numbers=one.codes.size,
            opened=partial(opened, graph, name),
        )
        for graph, mine in blocks.items()
        for name, one in mine.items()
    ]


def alone_static(
    artifact: Artifact, models: Mapping[str, ir.Model], amax: Mapping[str, Mapping[str, float]], codes: Format
) -> list[Alone]:
    """Each weight of ``models``, the artifact's graphs, with its product in static ``codes``: both its operands.

    ``amax`` says where activations are clipped, by graph and name.
    """

    def opened(graph: str, keep: set[str], taps: Mapping[str, Sequence[str]]) -> Forced:
        return Forced(artifact, taps, edits={graph: partial(static.place, amax=amax[graph], codes=codes, keep=keep)})

    found = []
    for graph, model in models.items():
        mine = {read.name: read for read in reads(model.graph)}
        found += [
            Alone(
                graph=graph,
                name=name,
                role=read.role,
                numbers=read.numbers,
                opened=partial(opened, graph, mine.keys() - {name}),
            )
            for name, read in mine.items()
        ]
    return found


def sensitivities(
    artifact: Artifact,
    alone: Sequence[Alone],
    samples: Samples,
    *,
    said: Said | None,
    most: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[Sensitivity]:
    """Of every weight that is rounded ``alone``, the most sensitive per number first.

    Args:
        artifact: in float32.
        alone: its weights.
        samples: what it is asked; the first ``most`` of them serve.
        said: what the artifact itself said, for samples without a reference.
        progress: weights done, and weights there are.
    """
    asked, head = list(_asked(artifact, samples, said, most)), head_of(artifact.manifest)
    # A decoder's words are distributions over labels, too.
    moved = partial(apart, head or Head.TOKENS)
    taps = {"encoder": [] if head is None else [head.output], "decoder": ["logits"]}
    taps = {name: taps[name] for name in artifact.manifest.graphs}
    found = []
    with Forced(artifact, taps) as whole:
        given = [whole.encoded(each.inputs) if head is None else {} for each in asked]

        def answers(changed: Forced, graph: str) -> list[Array]:
            """What the model says with ``graph`` as it is in ``changed``, the other as it was: [places, C] of each batch."""
            if head is not None:
                return [_tapped(changed.run(each.inputs, each.tokens, each.lengths)) for each in asked]
            changes = graph == "encoder"
            sources = [changed.encoded(each.inputs) for each in asked] if changes else given
            decoder = whole if changes else changed
            pairs = zip(asked, sources, strict=True)
            return [_tapped(decoder.decoded(source, each.tokens, each.lengths)) for each, source in pairs]

        before = answers(whole, "decoder")
        for done, one in enumerate(alone):
            with one.opened({one.graph: taps[one.graph]}) as changed:
                after = answers(changed, one.graph)
            nats = float(np.concatenate(moved(before, after)).mean())
            found.append(Sensitivity(graph=one.graph, name=one.name, role=one.role, nats=nats, numbers=one.numbers))
            if progress is not None:
                progress(done + 1, len(alone))
    return sorted(found, key=lambda each: (-each.nats / each.numbers, each.graph, each.name))


def _asked(artifact: Artifact, samples: Samples, said: Said | None, most: int) -> Iterator[Fed]:
    left = most
    for batch in batches(samples, min(most, BATCH[kind_of(artifact.manifest.frontend)])):
        if left <= 0:
            return
        left -= len(batch.indices)
        yield from fed(artifact.manifest.kind, batch, said, Steps.LOOP)


def _tapped(seen: Iterator[Seen]) -> Array:
    """What the one tap of some graphs holds, after all of them ran."""
    (values,) = [each.values for each in seen]
    return values
