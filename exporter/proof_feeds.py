"""What traced graphs are fed with where their rewrites are proved: the recorded cases, and caches that are drawn.

Only one call of each graph is needed: a rewrite has to hold for any contents of the cache, so these are random.
"""

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from txopt.exporter.fusion.recording import Array, Feeds
from txopt.runtime.cases import Case
from txopt.runtime.graphs import MASKS, GraphSpec, TensorSpec

_ROWS = 2  # of each source, as two beams have them
_QUERIES = (3, 1)  # of the cases in turn: a prefill, and one step
_FREE = 5  # places behind the last query that nothing was written to
_SEED = 7
_DTYPES = {"bfloat16": ml_dtypes.bfloat16}


def feeds(specs: Mapping[str, GraphSpec], cases: Sequence[Case], limit: int | None) -> dict[str, list[Feeds]]:
    """By graph, one set for each of the first two cases; ``limit`` is the model's number of target positions."""
    chosen = list(zip(cases, _QUERIES, strict=False))
    result: dict[str, list[Feeds]] = {}
    if "encoder" in specs:
        result["encoder"] = [_encoder(specs["encoder"], case) for case, _ in chosen]
    if "decoder" in specs:
        random = np.random.default_rng(_SEED)
        result["decoder"] = [_decoder(specs["decoder"], case, queries, limit, random) for case, queries in chosen]
    return result


def _encoder(spec: GraphSpec, case: Case) -> Feeds:
    return {item.name: case.inputs[item.name].astype(_dtype(item)) for item in spec.inputs}


def _decoder(spec: GraphSpec, case: Case, queries: int, limit: int | None, random: np.random.Generator) -> Feeds:
    """One call at different positions of every row; mask and source length are the case's."""
    tokens = np.repeat(case.tokens[:, :queries], _ROWS, axis=0)
    sources, (rows, queries) = len(case.tokens), tokens.shape
    masks = {item.name: item for item in spec.inputs if item.name.startswith(MASKS)}
    last = max(0, min(rows - 1, (limit or 1 << 20) - queries))
    lengths = {"B": sources, "R": rows, "Q": queries, "S": min(last + queries + _FREE, limit or 1 << 20)}
    lengths["T"] = _length(case)
    given = {"input_ids": tokens, "position": np.arange(rows) % (last + 1)}
    for name, item in masks.items():
        given[name] = case.inputs[name.removeprefix(MASKS)]
        lengths |= dict(zip(map(str, item.axes), given[name].shape, strict=True))
    return {
        item.name: np.asarray(given[item.name], _dtype(item)) if item.name in given else _drawn(item, lengths, random)
        for item in spec.inputs
    }


def _length(case: Case) -> int:
    """The source length of a model that pads nothing; where it is fixed, no axis of the decoder asks for it."""
    return next(iter(case.inputs.values())).shape[1] if case.inputs else 1


def _drawn(item: TensorSpec, lengths: Mapping[str, int], random: np.random.Generator) -> Array:
    shape = [axis if isinstance(axis, int) else lengths[axis] for axis in item.axes]
    return random.normal(size=shape).astype(_dtype(item))


def _dtype(item: TensorSpec) -> np.dtype[np.generic]:
    return np.dtype(_DTYPES.get(item.dtype, item.dtype))
