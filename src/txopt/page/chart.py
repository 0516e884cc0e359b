"""Numbers to places on a chart: scales with round ticks, and labels that do not lie on each other. It knows no HTML."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_NEAR_X, _NEAR_Y = 16.0, 13.0  # of a label


@dataclass(frozen=True)
class Scale:
    """From numbers to places: ``low`` is at ``start``, ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float

    def at(self, number: float) -> float:
        return round(self.start + (number - self.low) / (self.high - self.low) * (self.end - self.start), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and texts of a few round numbers."""
        step = _step(self.high - self.low)
        digits = max(0, -math.floor(math.log10(step)))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [(self.at(index * step), f"{index * step + 0.0:.{digits}f}") for index in range(first, last + 1)]


def scale(numbers: Sequence[float], start: float, end: float) -> Scale:
    """One that holds ``numbers`` with some room."""
    low, high = min(numbers), max(numbers)
    room = 0.06 * (high - low) or 0.5 * (abs(high) or 1.0)
    return Scale(0.0 if 0 <= low < 0.5 * high else low - room, high + room, start, end)


def apart(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where the labels of ``places`` go: above to the right, or as far up as it takes not to lie on another."""
    taken: list[tuple[float, float]] = []
    for x, y in places:
        at = (x + 8, y - 7)
        while any(abs(at[0] - other[0]) < _NEAR_X and abs(at[1] - other[1]) < _NEAR_Y for other in taken):
            at = (at[0], at[1] - _NEAR_Y)
        taken.append(at)
    return [(round(x, 2), round(y, 2)) for x, y in taken]


def bars(counts: Sequence[int], width: float, height: float) -> str:
    """The outline of bars as an SVG path; heights are logarithms, or tails could not be seen."""
    top = math.log1p(max(counts, default=0)) or 1.0
    step = width / max(1, len(counts))
    parts = [f"M0 {height:g}"]
    for index, count in enumerate(counts):
        y = height * (1 - math.log1p(count) / top)
        parts.append(f"V{y:.1f}H{(index + 1) * step:.1f}")
    return "".join(parts) + f"V{height:g}Z"


def _step(span: float) -> float:
    """1, 2 or 5 times a power of ten, so that some five ticks fit into ``span``."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= span / 5 * 0.999)
