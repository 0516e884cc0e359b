"""The report of one quantization: what was found on the way, gathered while it can be, and written at the end, also of a refusal.

Owns what is gathered, and when the page is written: whole, and only where the run ended in an artifact or in a refusal. What the page
says is txopt.page's.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from txopt.calibration.amax import Absmax
from txopt.calibration.histogram import Histogram
from txopt.calibration.layers import Rounded, layers
from txopt.calibration.linears import Read
from txopt.calibration.pictures import MOST, TAIL, outliers, pictures
from txopt.calibration.ranges import Range, Ranges
from txopt.calibration.search import chosen, front
from txopt.exporter import weights
from txopt.exporter.attempt import Ground, Progress, graphs_of
from txopt.exporter.search import Course
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import LossError, ParityError, TxoptError

logger = logging.getLogger(__name__)

Rounding = Callable[[str, Read], Rounded]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Where the page goes, and, by then, what it says; a JSON document whose keys are those of ``gather`` and ``_write``."""

    target: Path
    overwrite: bool
    document: dict[str, Any] = field(default_factory=dict)


def check(target: Path, *, overwrite: bool) -> None:
    """What can be judged before anything is done.

    Raises:
        UsageError, ArtifactError: no page may be written to ``target``. MissingDependencyError: what draws it is not installed.
    """
    from txopt.page import file, render

    render.check("--report")
    file.check(target, overwrite=overwrite)


@contextmanager
def reported(target: Path | None, facts: Mapping[str, Any], *, overwrite: bool) -> Iterator[Sheet | None]:
    """A sheet to fill in, or None where no report is asked for; the page is written when the block ends, or is refused.

    Args:
        target: the file.
        facts: what is known beforehand, for the page.
    """
    if target is None:
        yield None
        return
    sheet = Sheet(target=target, overwrite=overwrite, document=dict(facts))
    try:
        yield sheet
    except (LossError, ParityError) as err:
        try:
            _write(sheet, refused=str(err))
        except TxoptError as other:  # which must not hide the refusal
            logger.warning("no report: %s", other)
        else:
            logger.warning("refused; why is in the report, %s", target)
        raise
    _write(sheet, refused=None)


@contextmanager
def gathered(
    sheet: Sheet | None,
    course: Course[Any],
    ground: Ground,
    artifact: Artifact,
    rounding: Callable[[Any], Rounding],
    report: Progress,
    *,
    ranges: Ranges | None = None,
) -> Iterator[None]:
    """Fills in ``sheet`` when the block ends, or is refused, from what ``course`` found by then.

    Args:
        artifact: in float32, whose products are rounded: the source, or its smoothed twin.
        rounding: of a recipe, what becomes of each weight.
        ranges: of static int8.
    """
    if sheet is None:
        yield
        return
    try:
        yield
    except (LossError, ParityError):
        gather(sheet.document, course, ground, artifact, rounding(course.recipe), report, ranges=ranges)
        raise
    gather(sheet.document, course, ground, artifact, rounding(course.recipe), report, ranges=ranges)


def gather(
    document: dict[str, Any],
    course: Course[Any],
    ground: Ground,
    artifact: Artifact,
    rounding: Rounding,
    report: Progress,
    *,
    ranges: Ranges | None,
) -> None:
    """Adds to ``document`` what was found on ``course``, and what some samples show of every layer."""
    report("report")
    models = graphs_of(artifact)
    seen = pictures(
        artifact,
        models,
        ground.measured,
        said=ground.said,
        progress=lambda done, total: report("report", done, total),
    )
    best, ahead = chosen(course.points), front(course.points)
    document |= {
        "points": [
            {
                **point.to_json(),
                "speed": None if point.speed is None else asdict(point.speed),
                "chosen": index == best,
                "front": index in ahead,
            }
            for index, point in enumerate(course.points)
        ],
        "weights_before": ground.artifact.manifest.files[weights.FILE].size,
        "sensitivities": {f"{each.graph}:{each.name}": each.nats for each in course.found},
        "layers": [asdict(each) for each in layers(models, seen, rounding)],
        "outliers": [asdict(each) | {"times": each.times} for each in outliers(seen, models)],
        "observed": min(MOST, len(ground.measured)),
        "ranges": [
            _range(graph, name, None if ranges is None else ranges.tensors.get(f"{graph}:{name}"), one.histogram)
            for graph, mine in seen.items()
            for name, one in mine.items()
            if one.histogram.count
        ],
        "calibrated": ground.calibrated.to_json(),
        "measured": ground.measured.to_json(),
        "loss": None if course.attempt is None else course.attempt.verdict.certificate(),
        "finer": [] if course.attempt is None else (course.attempt.manifest.calibration or {})["finer"],
        "scheme": None if course.attempt is None else (course.attempt.manifest.calibration or {})["scheme"],
    }


def _range(graph: str, name: str, known: Range | None, histogram: Histogram) -> dict[str, Any]:
    """As calibration found it, or as the samples here show it: nothing is clipped then."""
    found = known or Range.of(histogram, Absmax())
    largest = float(histogram.absmax)
    times = largest / float(TAIL.amax(histogram)) if largest else 1.0
    return {"graph": graph, "name": name, "clipped": known is not None, "times": times, **found.to_json()}


def _write(sheet: Sheet, *, refused: str | None) -> None:
    from txopt.page import file
    from txopt.page.quantization import content
    from txopt.page.render import render

    page = render(content({**sheet.document, "refused": refused}), "quantization.html")
    file.write(sheet.target, page, overwrite=sheet.overwrite)
