"""The search for the fastest artifact that holds: a coarse attempt first, then finer ones, each measured, one kept.

Owns the loop and where the best attempt's files are meanwhile. How one attempt is made is a ``Way``'s; which weights are finer, and
which point is chosen, calibration's search.py's.
"""

import logging
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic

from txopt.calibration.search import Kind, Point, attempts, chosen
from txopt.calibration.sensitivity import Sensitivity
from txopt.calibration.speed import speed
from txopt.exporter import weights
from txopt.exporter.attempt import Attempt, Ground, clear
from txopt.runtime.errors import ParityError
from txopt.runtime.model import Model
from txopt.runtime.writer import ArtifactWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Way(Generic[Kind]):
    """How one scheme makes attempts.

    Attributes:
        recipe: the first, the coarsest.
        attempt: writes the artifact of a recipe, given the sensitivities that made it, into the writer's directory.
        sensitivities: of every weight, the most sensitive first.
    """

    recipe: Kind
    attempt: Callable[[Kind, Sequence[Sensitivity]], Attempt]
    sensitivities: Callable[[], list[Sensitivity]]


@dataclass(kw_only=True)
class Course(Generic[Kind]):
    """What was found on the way, whatever its end: every point, the sensitivities, and, of the chosen or the first one, all."""

    recipe: Kind
    points: list[Point] = field(default_factory=list)
    found: list[Sensitivity] = field(default_factory=list)
    attempt: Attempt | None = None


def searched(
    way: Way[Kind], ground: Ground, writer: ArtifactWriter, course: Course[Kind], *, timed: bool = False
) -> Attempt:
    """The first attempt, if it loses no more than is allowed; else the fastest of finer ones that does. Its files are the writer's.

    Args:
        course: filled in; what it found before, finer weights of the first recipe were chosen by.
        timed: whether the speed of a first attempt that holds is measured, too.

    Raises:
        LossError: no attempt holds; it is the first one's. ParityError: the engine does not compute what that one's graphs say.
    """
    first = course.attempt = way.attempt(way.recipe, course.found)
    goes_on = ground.max_loss is not None and not first.verdict.passed
    course.points.append(_point(ground, writer, first, timed=timed or goes_on))
    if not goes_on:
        first.verdict.require()
        return _certified(first, course)
    logger.warning("%s; trying with finer weights", first.verdict)
    course.found = course.found or way.sensitivities()
    with tempfile.TemporaryDirectory(prefix="txopt-") as folder:
        best = None
        for recipe in attempts(way.recipe, course.found):
            try:
                made = way.attempt(recipe, course.found)
            except ParityError as err:  # other ones may hold, and the first could be proved
                logger.warning("%d finer weights: %s", len(recipe.finer), err)
                continue
            course.points.append(_point(ground, writer, made, timed=True))
            if chosen(course.points) == len(course.points) - 1:
                best, course.recipe, course.attempt = made, recipe, made
                _move(writer.directory, Path(folder))
        if best is None:
            first.verdict.require()
            raise AssertionError("a verdict that has not passed raises")
        _move(Path(folder), writer.directory)
    return _certified(best, course)


def _point(ground: Ground, writer: ArtifactWriter, made: Attempt, *, timed: bool) -> Point:
    calibration = made.manifest.calibration
    assert calibration is not None, "an attempt says how it was made"
    fast = None
    if timed:
        fast = speed(ground.baseline, Model(writer.draft(made.manifest)), ground.measured, ground.said)
    alike, agreement = made.verdict.headline
    return Point(
        bytes=(writer.directory / weights.FILE).stat().st_size,
        loss=made.verdict.comparison.loss,
        agreement=agreement,
        alike=alike,
        finer=tuple(each["weight"] for each in calibration["finer"]),
        passed=made.verdict.passed,
        speed=fast,
    )


def _certified(made: Attempt, course: Course[Kind]) -> Attempt:
    """``made`` with all points in its certificate."""
    best = chosen(course.points)
    points = [{**point.to_json(), "chosen": index == best} for index, point in enumerate(course.points)]
    return replace(
        made, manifest=replace(made.manifest, calibration={**(made.manifest.calibration or {}), "search": points})
    )


def _move(source: Path, target: Path) -> None:
    clear(target)
    for file in source.iterdir():
        shutil.move(file, target / file.name)
