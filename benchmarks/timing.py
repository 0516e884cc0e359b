"""Repeated timing with medians and spread; peers take turns, so that what else the machine does hits all of them."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one thing, run several times."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """Fastest and slowest run."""
        return min(self.seconds), max(self.seconds)

    def to_json(self) -> dict[str, float]:
        low, high = self.spread
        return {
            "median_ms": round(self.median * 1e3, 3),
            "fastest_ms": round(low * 1e3, 3),
            "slowest_ms": round(high * 1e3, 3),
        }


def in_turn(calls: Mapping[str, Callable[[], Any]], *, repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Times every call ``repeats`` times, one after the other in each round."""
    for _ in range(warmup):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(seconds=tuple(values)) for name, values in seconds.items()}


def ratio(ours: Timing, theirs: Timing) -> dict[str, float]:
    """How many times faster ``ours`` is: of the medians, and the least and most of the paired rounds."""
    pairs: Sequence[float] = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    return {
        "median": round(theirs.median / ours.median, 2),
        "least": round(min(pairs), 2),
        "most": round(max(pairs), 2),
    }
