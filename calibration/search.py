"""Which weights get a finer scheme when a coarse one loses too much: the most sensitive ones, more of them with every attempt.

Owns the order of attempts, what is kept of each as a point, and which point is chosen. Each attempt is a whole artifact, measured by
the gate on the task itself: sensitivities only say whom to ask first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from txopt.calibration.bootstrap import Estimate
from txopt.calibration.recipe import Recipe, StaticRecipe
from txopt.calibration.sensitivity import Sensitivity
from txopt.calibration.speed import Speed

# Of all weights. Every attempt costs a measurement, so the share doubles; the last one leaves nothing in the coarse scheme.
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)

Kind = TypeVar("Kind", Recipe, StaticRecipe)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One attempt.

    Attributes:
        bytes: of the weights' file.
        loss: points of the metric that were lost.
        agreement: with the fp32 artifact, in percent. alike: its name (gate.Verdict.headline).
        finer: names of the weights in a finer scheme.
        passed: whether the gate lets it through.
        speed: beside the fp32 artifact; None where it was not measured.
    """

    bytes: int
    loss: Estimate
    agreement: Estimate
    finer: tuple[str, ...]
    passed: bool
    speed: Speed | None = None
    alike: str = "forced_tokens"

    def to_json(self) -> dict[str, Any]:
        """For the certificate: all but the speed, for equal runs are equal bytes."""
        return {
            "weights_bytes": self.bytes,
            "loss": self.loss.to_json(),
            self.alike: self.agreement.to_json(),
            "finer": list(self.finer),
            "passed": self.passed,
        }


def attempts(recipe: Kind, found: Sequence[Sensitivity]) -> Iterator[Kind]:
    """Recipes that lose less and less; ``found`` has the most sensitive weight first.

    None leaves all weights in float: that is the artifact that there is already, and no quantized one.
    """
    last = recipe
    for share in SHARES:
        made = recipe.with_finer({each.name for each in found[: max(1, round(share * len(found)))]})
        if all(made.form(each.name, graph=each.graph, role=each.role) is None for each in found):
            return
        if made != last:
            yield made
        last = made


def chosen(points: Sequence[Point]) -> int | None:
    """Which of ``points``, smallest first, is the fastest that holds: a larger one must be faster by more than noise.

    None where none holds.
    """
    best: int | None = None
    for index, point in enumerate(points):
        if point.passed and (best is None or _is_faster(point.speed, points[best].speed)):
            best = index
    return best


def _is_faster(one: Speed | None, other: Speed | None) -> bool:
    return one is not None and other is not None and one.low > other.high


def front(points: Sequence[Point]) -> list[int]:
    """The indices of points that no other beats: none is at least as small, as fast and as good, and better in one of these."""
    return [index for index, one in enumerate(points) if not any(_beats(other, one) for other in points)]


def _beats(one: Point, other: Point) -> bool:
    pairs = [(one.bytes, other.bytes), (one.loss.value, other.loss.value)]
    if one.speed is not None and other.speed is not None:
        pairs.append((-one.speed.median, -other.speed.median))
    return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)
