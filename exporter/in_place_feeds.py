"""What a graph with buffers is asked, and what it must say: the original's own inputs and outputs, with its pasts in longer buffers.

past [B,H,P,D]       -> buffer [B,H,S,D]: the past, and numbers behind it that must neither be seen nor changed
present [B,H,P+L,D]  <- the first P+L places of the buffer that comes back
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, cycle, islice, permutations

import numpy as np
import onnx_ir as ir

from txopt.exporter.foreign_feeds import Array, Sizes, axes, candidates, index_bound, symbols
from txopt.exporter.foreign_original import Answer, Original
from txopt.exporter.in_place import Cache, Pair

_RUNS = (  # batch, past, what is new, and all else in turn; a one there might be taken for what it is not
    (2, 6, 4, (7, 5, 8)),
    (3, 9, 1, (5, 8, 4)),
    (1, 1, 2, (4, 9, 3)),
    (2, 16, 3, (9, 2, 5)),
    (2, 0, 5, (4, 6, 7)),
)
SETS = len(_RUNS)
_MOST_SUMS = 20  # files may name every axis otherwise
_BEHIND = (4, 1, 0, 7, 3)  # places of a buffer that stay empty
_JUNK = 30.0  # so large that whoever sees one of these says something else


def sizes(found: Sequence[Pair]) -> Callable[[ir.Model, Collection[str]], Iterator[Sizes]]:
    """``foreign_feeds.candidates`` for a graph with pasts, which have one length; what is new, tokens by their ids, is short.

    A length may be that of past and new tokens together, as a mask's is: where the file takes no other, it is looked for.
    """

    def of(model: ir.Model, apart: Collection[str]) -> Iterator[Sizes]:
        inputs = [value for value in model.graph.inputs if value.shape]
        inputs.sort(key=lambda value: index_bound(value) is None)
        rows = _symbols((value, 0) for value in inputs).keys() - set(apart)
        pasts = _symbols((pair.past, 2) for pair in found)
        every = _symbols((value, axis) for value in inputs for axis in range(len(value.shape or ())))
        others = [name for name in every if name not in rows and name not in pasts]
        for sum_of in (None, *islice(permutations(others, 2), _MOST_SUMS)):
            for batch, past, new, lengths in _RUNS:
                given = dict(zip(others, chain([new], cycle(lengths)), strict=False))
                if sum_of is not None:
                    given[sum_of[1]] = past + given[sum_of[0]]
                yield {**dict.fromkeys(rows, batch), **dict.fromkeys(pasts, past), **given}
        yield from candidates(model, apart)

    return of


def _symbols(places: Iterable[tuple[ir.Value, int]]) -> dict[str, None]:
    """The names in lengths of inputs, in their order."""
    return {symbol: None for value, axis in places for symbol in symbols(axes(value)[axis])}


@dataclass(frozen=True)
class InBuffers(Answer):
    """``behind``: by output, what is in its buffer behind the places that the original fills."""

    behind: Mapping[str, Array] = field(default_factory=dict)

    def errors(self, found: Mapping[str, Array]) -> dict[str, float]:
        """As ``Answer`` has them; of a buffer both parts count, and what is behind must be the same bits."""
        errors = super().errors({name: self._filled(name, array) for name, array in found.items()})
        for name, rest in self.behind.items():
            if not np.array_equal(found[name][:, :, self.outputs[name].shape[2] :], rest):
                errors[name] = float("inf")
        return errors

    def _filled(self, name: str, array: Array) -> Array:
        return array[:, :, : self.outputs[name].shape[2]] if name in self.behind else array


def in_buffers(original: Original, cache: Cache) -> Original:
    """``original`` as it would be asked and would answer if its pasts were the buffers of ``cache``."""
    answers: list[Answer] = [_in_buffers(answer, cache, seed) for seed, answer in enumerate(original.answers)]
    return replace(original, answers=answers)


def _in_buffers(answer: Answer, cache: Cache, seed: int) -> InBuffers:
    random = np.random.default_rng(seed)
    feeds, behind = dict(answer.feeds), {}
    for past, present in cache.buffers.items():
        before, after = feeds[past], answer.outputs[present]
        places = after.shape[2] + _BEHIND[seed % len(_BEHIND)]
        shape = (*before.shape[:2], places - before.shape[2], before.shape[3])
        feeds[past] = np.concatenate([before, (_JUNK * random.normal(size=shape)).astype(before.dtype)], axis=2)
        behind[present] = feeds[past][:, :, after.shape[2] :]
        feeds[cache.position] = np.array([before.shape[2]])
    return InBuffers({**answer.sizes, cache.length: places}, feeds, answer.outputs, behind)
