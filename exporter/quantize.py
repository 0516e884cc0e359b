"""The road from an fp32 artifact to a quantized one, stage by stage: nothing is left at OUT unless it holds.

Owns the order of the stages, and the search for weights that need a finer scheme where a limit is set; one attempt is attempt.py's.
The graphs come from the artifact: PyTorch is not needed.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from txopt.calibration import evaluate, gate, metrics
from txopt.calibration.collect import Steps, second_moments
from txopt.calibration.data import LIMIT, read
from txopt.calibration.linears import LEAST_SIZE, reads
from txopt.calibration.recipe import Recipe, Scheme, StaticRecipe, recipe_of
from txopt.calibration.rounder import Rounder
from txopt.calibration.samples import Samples
from txopt.calibration.search import attempts
from txopt.calibration.sensitivity import sensitivities, tables_of
from txopt.calibration.weights import Method
from txopt.exporter.attempt import Attempt, Ground, Progress, attempt, graphs_of
from txopt.exporter.budget import within
from txopt.exporter.scaled import scaled
from txopt.exporter.static import static_attempt
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import InputError, UsageError
from txopt.runtime.manifest import Manifest
from txopt.runtime.model import Model
from txopt.runtime.writer import ArtifactWriter

FEW = 16  # samples; fewer are not parted
MOST_CALIBRATED = 128  # samples; more hardly change second moments

logger = logging.getLogger(__name__)

STAGES = ("open", "data", "calibrate", "quantize", "pack", "check", "measure", "sensitivity")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an artifact is quantized.

    Attributes:
        precision: "int8" or "int4".
        calibration: see ``calibration.data.read``; None: made up, with a warning.
        max_loss: points of the metric that may be lost; None: measured, not limited.
        metric: its name; None: chosen by what the artifact does.
        scheme: "weights" (in blocks) or "static" (recipe.Scheme).
        method: how codes are found (weights.Method), None: as recipe.METHODS; of the static scheme, how ranges are (amax.METHODS).
        block: rows of a weight with one scale; None: as recipe.SCHEMES.
        limit: most samples that are measured.
        steps: which positions calibration sees.
        language: the pipeline's options for the data (source_language, target_language, language, task).
    """

    precision: str = "int8"
    calibration: Any = None
    max_loss: float | None = None
    metric: str | None = None
    scheme: str = Scheme.WEIGHTS
    method: str | None = None
    block: int | None = None
    limit: int | None = LIMIT
    steps: Steps = Steps.LOOP
    language: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> Recipe | StaticRecipe:
        """The recipe, if all that can be judged without a model is right.

        Raises:
            UsageError: it is not. InputError: there is no such file of data. MissingDependencyError: the metric needs a package.
        """
        recipe = recipe_of(self.scheme, self.precision, method=self.method, block=self.block)
        if self.metric is not None:
            metrics.metric(self.metric)
        gate.check_limit(self.metric, self.max_loss)
        if isinstance(self.calibration, str | Path) and not Path(self.calibration).is_file():
            raise InputError(f"{self.calibration}: expected a file of calibration data, found none; check the name")
        return recipe


def quantize(
    artifact: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    precision: str = "int8",
    calibration: Any = None,
    max_loss: float | None = None,
    metric: str | None = None,
    scheme: str = Scheme.WEIGHTS,
    method: str | None = None,
    block: int | None = None,
    limit: int | None = LIMIT,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Makes the quantized twin of an fp32 artifact; see ``Options`` for the arguments, ``quantize_artifact`` for the errors."""
    options = Options(
        precision=precision,
        calibration=calibration,
        max_loss=max_loss,
        metric=metric,
        scheme=scheme,
        method=method,
        block=block,
        limit=limit,
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
    report = progress or (lambda stage, done=0, total=0: None)
    report("open")
    artifact = Artifact.open(source)
    _check(artifact.manifest)
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
        heard = evaluate.said(baseline, measured, progress=partial(report, "calibrate"))
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
            heard=heard,
            rounder=Rounder(moments),
            precision=options.precision,
            metric=options.metric,
            max_loss=options.max_loss,
        )
        if isinstance(recipe, StaticRecipe):
            return writer.commit(static_attempt(ground, recipe, writer, report, options.steps))
        made = _searched(ground, recipe, writer, report)
        return writer.commit(made.manifest)


def _parted(samples: Samples) -> tuple[Samples, Samples]:
    """Samples to calibrate on, and others to measure on: what was fitted to must not judge the fit. Few samples serve both."""
    if len(samples) < FEW:
        logger.warning(
            "%d samples are too few to be parted: integers are fitted to those that the loss is measured on, which flatters them; "
            "give at least %d",
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
    whole = all(entry.labels is not None for entry in samples.entries)
    said = None if whole else evaluate.said(baseline, samples, progress=progress)
    return second_moments(artifact, graphs_of(artifact), samples, said=said, steps=steps, progress=progress)


def _searched(ground: Ground, recipe: Recipe, writer: ArtifactWriter, report: Progress) -> Attempt:
    """The first attempt that loses no more than is allowed; LossError of the coarsest one where none does."""
    recipe, found = within(ground, recipe, report)
    first = attempt(ground, recipe, writer, report, found)
    if first.verdict.passed or ground.max_loss is None:
        first.verdict.require()
        return first
    logger.warning("%s; trying with finer weights", first.verdict)
    report("sensitivity")
    found = found or sensitivities(
        ground.artifact,
        first.blocks,
        ground.measured,
        said=ground.heard,
        tables={name: tables_of(model.graph) for name, model in graphs_of(ground.artifact).items()},
        progress=partial(report, "sensitivity"),
    )
    for finer in attempts(recipe, found):
        made = attempt(ground, finer, writer, report, found)
        if made.verdict.passed:
            return made
    first.verdict.require()
    raise AssertionError("a verdict that has not passed raises")


def _check(manifest: Manifest) -> None:
    if manifest.precision != "fp32":
        raise UsageError(
            f"expected an artifact in fp32 to quantize, got one in {manifest.precision}; export the model again with --precision fp32"
        )
    if manifest.target != "cpu":
        raise UsageError(
            f"expected an artifact for the cpu target, got one for {manifest.target}: its engine has no such integers"
        )
    if manifest.cache is None:
        raise UsageError(
            "expected a model that generates; what an encoder alone loses is not measured yet, so it is not quantized"
        )
