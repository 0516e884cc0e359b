"""Which of many sources calibration uses: as many as asked for, spread over lengths, the same ones wherever they are asked for.

Owns the draw. A source's place in it is a hash of the seed and of what the source is, so neither the order of a file nor that of a
file system matters; a pool of the first few times as many as are asked for is all that is kept (a bottom-k sample: uniform), and
out of it one comes from each stretch of the lengths.
"""

import hashlib
import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

POOL = 8  # times the limit

Item = TypeVar("Item")


def place(seed: int, identity: bytes) -> int:
    """A source's place in the draw, 64 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}:".encode() + identity).digest()[:8], "big")


@dataclass(frozen=True, kw_only=True)
class Candidate(Generic[Item]):
    """A source with its ``place`` in the draw and its ``length``, in whatever unit all of them have."""

    place: int
    length: float
    item: Item


@dataclass
class Pool(Generic[Item]):
    """The candidates that come first in the draw; ``most`` None: all of them.

    ``found`` counts what was added, ``duplicates`` what was added before: 8 bytes a source are remembered for that.
    """

    most: int | None
    found: int = 0
    duplicates: int = 0
    _heap: list[tuple[int, Candidate[Item]]] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)

    def add(self, candidate: Candidate[Item]) -> None:
        self.found += 1
        if candidate.place in self._seen:
            self.duplicates += 1
            return
        self._seen.add(candidate.place)
        entry = (-candidate.place, candidate)
        if self.most is None or len(self._heap) < self.most:
            heapq.heappush(self._heap, entry)
        elif entry[0] > self._heap[0][0]:
            heapq.heapreplace(self._heap, entry)

    def candidates(self) -> list[Candidate[Item]]:
        """In the draw's order."""
        return [candidate for _, candidate in sorted(self._heap, key=lambda entry: -entry[0])]


def spread(candidates: Sequence[Candidate[Item]], limit: int | None, total: float | None) -> list[Candidate[Item]]:
    """At most ``limit`` candidates, whose lengths sum to at most ``total``, in the draw's order; at least one of any.

    The candidates sorted by length are cut into as many stretches as are chosen; the first in the draw comes out of each.
    """
    count = len(candidates) if limit is None else min(limit, len(candidates))
    ordered = sorted(candidates, key=lambda candidate: (candidate.length, candidate.place))
    if total is not None and ordered:
        mean = sum(candidate.length for candidate in ordered) / len(ordered)
        count = max(1, min(count, int(2 * total / mean) if mean else count))
    chosen = _one_of_each(ordered, count)
    while total is not None and len(chosen) > 1 and sum(candidate.length for candidate in chosen) > total:
        chosen = _one_of_each(ordered, len(chosen) - 1)
    return sorted(chosen, key=lambda candidate: candidate.place)


def _one_of_each(ordered: Sequence[Candidate[Item]], count: int) -> list[Candidate[Item]]:
    edges = [index * len(ordered) // count for index in range(count + 1)] if count else []
    stretches = (ordered[first:last] for first, last in itertools.pairwise(edges))
    return [min(stretch, key=lambda candidate: candidate.place) for stretch in stretches]
