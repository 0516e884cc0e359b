"""The road from an fp32 artifact to a quantized one, stage by stage: nothing is left at OUT unless it holds.

Owns the order of the stages, and the search for weights that need a finer scheme where a limit is set; one attempt is attempt.py's.
The graphs come from the artifact: PyTorch is not needed.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from txopt.calibration import activations, evaluate, gate, metrics
from txopt.calibration.collect import Steps, second_moments
from txopt.calibration.data import LIMIT, read
from txopt.calibration.heads import head_of
from txopt.calibration.kept import Kept
from txopt.calibration.layers import in_blocks, in_channels
from txopt.calibration.linears import LEAST_SIZE, reads, roles
from txopt.calibration.loss import check_metric, heard
from txopt.calibration.recipe import Recipe, Scheme, StaticRecipe, recipe_of
from txopt.calibration.rounder import Rounder
from txopt.calibration.samples import Samples
from txopt.calibration.sensitivity import (
    Alone,
    Sensitivity,
    alone_in_blocks,
    alone_static,
    sensitivities,
)
from txopt.calibration.weights import Method
from txopt.exporter.attempt import Attempt, Ground, Progress, attempt, graphs_of
from txopt.exporter.budget import within
from txopt.exporter.halves import HALVES, HalfRecipe, half_attempt
from txopt.exporter.report import Rounding, Sheet, gathered, reported
from txopt.exporter.report import check as check_page
from txopt.exporter.scaled import scaled
from txopt.exporter.search import Course, Way, searched
from txopt.exporter.static import prepared, static_attempt
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import InputError, UsageError
from txopt.runtime.files import MANIFEST
from txopt.runtime.manifest import Manifest
from txopt.runtime.model import Model
from txopt.runtime.writer import ArtifactWriter

FEW = 16  # samples; fewer are not parted
MOST_CALIBRATED = 128  # samples; more hardly change second moments

logger = logging.getLogger(__name__)

STAGES = ("open", "data", "calibrate", "quantize", "pack", "check", "measure", "sensitivity", "report")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an artifact is quantized.

    Attributes:
        precision: "int8", "int4" or "fp8"; "fp16" or "bf16".
        target: what the graphs are for: "cpu"; of the schemes "weights" and "static" also "tensorrt", of "fp16" also "cuda".
        calibration: see ``calibration.data.read``; None: made up, with a warning.
        max_loss: points of the metric that may be lost; None: measured, not limited.
        metric: its name; None: chosen by what the artifact does.
        scheme: "weights" (in blocks), "rows", "mixed" or "static" (recipe.Scheme).
        method: how codes are found (weights.Method), None: as recipe.METHODS; of the static scheme, how ranges are (amax.METHODS).
        block: rows of a weight with one scale; None: as recipe.SCHEMES, or recipe.TENSORRT.
        limit: most samples that are measured.
        steps: which positions calibration sees.
        ranges: of the static scheme, where ranges of activations are read from, or written to where nothing is.
        report: where a page about it is written, also of a refusal.
        language: the pipeline's options for the data (source_language, target_language, language, task).
    """

    precision: str = "int8"
    target: str = "cpu"
    calibration: Any = None
    max_loss: float | None = None
    metric: str | None = None
    scheme: str = Scheme.WEIGHTS
    method: str | None = None
    block: int | None = None
    limit: int | None = LIMIT
    steps: Steps = Steps.LOOP
    ranges: Path | None = None
    report: Path | None = None
    language: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> Recipe | StaticRecipe | HalfRecipe:
        """The recipe, if all that can be judged without a model is right.

        Raises:
            UsageError: it is not. InputError: there is no such file of data. MissingDependencyError: the metric needs a package.
        """
        given: Any = {"method": self.method, "block": self.block}
        recipe: Recipe | StaticRecipe | HalfRecipe
        if self.precision in HALVES:
            recipe = HalfRecipe.of(self.precision, self.target, scheme=self.scheme, **given)
        else:
            recipe = recipe_of(self.scheme, self.precision, self.target, **given)
        if self.metric is not None:
            metrics.metric(self.metric)
        gate.check_limit(self.metric, self.max_loss)
        if self.ranges is not None and not isinstance(recipe, StaticRecipe):
            raise UsageError("--ranges: are of the scheme static alone (int8, fp8); leave it out here")
        if self.report is not None and isinstance(recipe, HalfRecipe):
            raise UsageError(f"--report: is about integers and fp8; leave it out at {self.precision}")
        if isinstance(self.calibration, str | Path) and not Path(self.calibration).is_file():
            raise InputError(f"{self.calibration}: expected a file of calibration data, found none; check the name")
        return recipe


def quantize(
    artifact: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    precision: str = "int8",
    target: str = "cpu",
    calibration: Any = None,
    max_loss: float | None = None,
    metric: str | None = None,
    scheme: str = Scheme.WEIGHTS,
    method: str | None = None,
    block: int | None = None,
    limit: int | None = LIMIT,
    ranges: str | os.PathLike[str] | None = None,
    report: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Makes the quantized twin of an fp32 artifact; see ``Options`` for the arguments, ``quantize_artifact`` for the errors."""
    options = Options(
        precision=precision,
        target=target,
        calibration=calibration,
        max_loss=max_loss,
        metric=metric,
        scheme=scheme,
        method=method,
        block=block,
        limit=limit,
        ranges=None if ranges is None else Path(ranges),
        report=None if report is None else Path(report),
    )
    return quantize_artifact(artifact, out, options, overwrite=overwrite, progress=progress)


def quantize_artifact(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: Options,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Makes the quantized twin of the fp32 artifact ``source`` at ``out``; there as a whole, or not at all.

    Raises:
        UsageError: ``source`` is not what can be quantized, or the options contradict each other. InputError: the data cannot be used.
        LossError: more was lost than ``max_loss`` allows. ParityError: the engine does not compute what the integers stand for.
    """
    recipe = options.check()
    if options.ranges is not None:
        _check_beside(options.ranges, Path(source), Path(out))
    if options.report is not None:
        check_page(options.report, overwrite=overwrite)
    facts = {"out": Path(out).name, "precision": options.precision, "max_loss": options.max_loss}
    with reported(options.report, facts, overwrite=overwrite) as sheet:
        return _quantized(Artifact.open(source), out, options, recipe, sheet, overwrite=overwrite, progress=progress)


def _quantized(
    artifact: Artifact,
    out: str | os.PathLike[str],
    options: Options,
    recipe: Recipe | StaticRecipe | HalfRecipe,
    sheet: Sheet | None,
    *,
    overwrite: bool,
    progress: Progress | None,
) -> Artifact:
    report = progress or (lambda stage, done=0, total=0: None)
    report("open")
    _check(artifact.manifest, options.metric)
    if sheet is not None:
        sheet.document["source"] = str(artifact.manifest.source.get("name") or artifact.path.name)
    if not any(reads(model.graph) for model in graphs_of(artifact).values()):
        raise UsageError(
            f"expected weights that can be rounded, matrices of at least {LEAST_SIZE} numbers, found none; keep it in fp32"
        )
    baseline = Model(artifact)
    report("data")
    samples = read(
        options.calibration, baseline, limit=options.limit, options=options.language, progress=partial(report, "data")
    )
    calibrated, measured = _parted(samples) if recipe.looks_at_data else (samples, samples)
    with ArtifactWriter(out, overwrite=overwrite) as writer, tempfile.TemporaryDirectory(prefix="txopt-") as folder:
        report("calibrate")
        before = heard(baseline, measured, progress=partial(report, "calibrate"))
        moments: Mapping[str, Any] = {}
        if isinstance(recipe, Recipe) and recipe.looks_at_data:
            moments = _moments(artifact, baseline, calibrated, options.steps, partial(report, "calibrate"))
        if isinstance(recipe, Recipe) and recipe.method is Method.AWQ:
            artifact, moments = scaled(artifact, moments, recipe.scheme, Path(folder))
        ground = Ground(
            artifact=artifact,
            baseline=baseline,
            calibrated=calibrated,
            measured=measured,
            heard=before,
            rounder=Rounder(moments),
            precision=options.precision,
            target=options.target,
            metric=options.metric,
            max_loss=options.max_loss,
            kept=None if options.max_loss is None else Kept(),
        )
        if isinstance(recipe, HalfRecipe):
            return writer.commit(half_attempt(ground, recipe, writer, report, options.steps))
        if isinstance(recipe, Recipe):
            made = _in_blocks(ground, recipe, writer, report, sheet)
        else:
            made = _static(ground, recipe, options, writer, report, sheet)
        return writer.commit(made.manifest)


def _in_blocks(
    ground: Ground, recipe: Recipe, writer: ArtifactWriter, report: Progress, sheet: Sheet | None
) -> Attempt:
    artifact, models, rounder = ground.artifact, graphs_of(ground.artifact), ground.rounder
    recipe, known = within(ground, recipe.fitted(model.graph for model in models.values()), report)

    def made(recipe: Recipe, found: Sequence[Sensitivity]) -> Attempt:
        return attempt(ground, recipe, writer, report, found)

    def sense() -> list[Sensitivity]:
        read_as = {name: roles(model.graph) for name, model in models.items()}
        alone = alone_in_blocks(artifact, rounder.blocks(models, recipe), read_as)
        return _sensitivities(ground, artifact, alone, report)

    def rounding(recipe: Recipe) -> Rounding:
        return partial(in_blocks, rounder.blocks(models, recipe), recipe)

    course = Course(recipe=recipe, found=list(known))
    with gathered(sheet, course, ground, artifact, rounding, report):
        way = Way(recipe=recipe, attempt=made, sensitivities=sense)
        return searched(way, ground, writer, course, timed=sheet is not None)


def _static(
    ground: Ground,
    recipe: StaticRecipe,
    options: Options,
    writer: ArtifactWriter,
    report: Progress,
    sheet: Sheet | None,
) -> Attempt:
    with prepared(ground, recipe, report, options.steps, file=options.ranges) as given:
        models = graphs_of(given.artifact)
        amax = {name: activations.amax_of(given.ranges, name) for name in models}

        def made(recipe: StaticRecipe, found: Sequence[Sensitivity]) -> Attempt:
            return static_attempt(ground, given, recipe, writer, report, found)

        def sense() -> list[Sensitivity]:
            return _sensitivities(
                ground, given.artifact, alone_static(given.artifact, models, amax, recipe.codes), report
            )

        def rounding(recipe: StaticRecipe) -> Rounding:
            return partial(in_channels, amax, recipe)

        course = Course(recipe=recipe)
        with gathered(sheet, course, ground, given.artifact, rounding, report, ranges=given.ranges):
            way = Way(recipe=recipe, attempt=made, sensitivities=sense)
            return searched(way, ground, writer, course, timed=sheet is not None)


def _sensitivities(ground: Ground, artifact: Artifact, alone: Sequence[Alone], report: Progress) -> list[Sensitivity]:
    report("sensitivity")
    return sensitivities(artifact, alone, ground.measured, said=ground.said, progress=partial(report, "sensitivity"))


def _parted(samples: Samples) -> tuple[Samples, Samples]:
    """Samples to calibrate on, and others to measure on: what was fitted to must not judge the fit. Few samples serve both."""
    if len(samples) < FEW:
        logger.warning(
            "%d samples are too few to be parted: what is fitted to data is fitted to those that the loss is measured on, which "
            "flatters it; give at least %d",
            len(samples),
            FEW,
        )
        return samples, samples
    first = min(MOST_CALIBRATED, len(samples) // 2)
    return samples.part(0, first), samples.part(first, len(samples))


def _moments(
    artifact: Artifact, baseline: Model, samples: Samples, steps: Steps, progress: Callable[[int, int], None]
) -> Mapping[str, Any]:
    """Second moments of what every product sees; samples without a reference are continued by the model itself."""
    said = evaluate.continued(baseline, samples, progress=progress)
    return second_moments(artifact, graphs_of(artifact), samples, said=said, steps=steps, progress=progress)


def _check_beside(ranges: Path, *artifacts: Path) -> None:
    folder = Path(os.path.realpath(ranges.parent))
    for artifact in artifacts:
        made = not artifact.exists() or (artifact / MANIFEST).is_file()
        if made and folder.is_relative_to(os.path.realpath(artifact)):
            raise UsageError(
                f"--ranges {ranges}: is inside the artifact, which holds the files of its manifest and no others; keep it elsewhere"
            )


def _check(manifest: Manifest, metric: str | None) -> None:
    if manifest.precision != "fp32":
        raise UsageError(
            f"expected an artifact in fp32 to quantize, got one in {manifest.precision}; export the model again with --precision fp32"
        )
    if manifest.target != "cpu":
        raise UsageError(
            f"expected an artifact for the cpu target, got one for {manifest.target}; export the model again with --target cpu"
        )
    if manifest.kind == "encoder" and head_of(manifest) is None:
        named = ", ".join(item.name for item in manifest.graphs["encoder"].outputs)
        raise UsageError(
            "expected a model that generates, or an encoder that gives logits or an embedding, of which it can be measured what they "
            f"lose; this encoder gives {named}"
        )
    check_metric(manifest, metric)
