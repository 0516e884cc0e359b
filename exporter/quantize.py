"""The road from an fp32 artifact to a quantized one, stage by stage: nothing is left at OUT unless it holds.

Owns the order of the stages and what the certificate says of them. What is proved: the integers in the files stand for the rounded
weights (products.py); the graphs around them say what these weights say in float32 (parity, at the tolerance of the engine's
arithmetic); and what rounding cost in the task's own metric (docs/loss.md). The graphs come from the artifact: PyTorch is not needed.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from txopt import __version__
from txopt.calibration import evaluate, gate, metrics
from txopt.calibration.blocks import Blocks
from txopt.calibration.collect import Steps, second_moments
from txopt.calibration.data import LIMIT, read
from txopt.calibration.quantize import put, unfold
from txopt.calibration.reanswer import reanswer
from txopt.calibration.recipe import Recipe, rounded
from txopt.calibration.samples import Samples
from txopt.exporter import graph as graphs
from txopt.exporter import products, weights
from txopt.exporter.lowering import LOWERINGS
from txopt.runtime import cases
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import InputError, UsageError
from txopt.runtime.files import MANIFEST
from txopt.runtime.manifest import Manifest
from txopt.runtime.model import Model
from txopt.runtime.parity import replay
from txopt.runtime.writer import ArtifactWriter

STAGES = ("open", "data", "calibrate", "quantize", "pack", "check", "measure")
_VERSIONS = ("onnx", "onnx-ir", "onnxruntime", "numpy")

Progress = Callable[..., None]  # (stage), and (stage, done, total) while it lasts


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an artifact is quantized.

    Attributes:
        precision: "int8" or "int4".
        calibration: see ``calibration.data.read``; None: made up, with a warning.
        max_loss: points of the metric that may be lost; None: measured, not limited.
        metric: its name; None: chosen by what the artifact does.
        method: how codes are found (weights.Method); None: as recipe.METHODS.
        block: rows of a weight with one scale; None: as recipe.SCHEMES.
        limit: most samples that are measured.
        steps: which positions calibration sees.
        language: the pipeline's options for the data (source_language, target_language, language, task).
    """

    precision: str = "int8"
    calibration: Any = None
    max_loss: float | None = None
    metric: str | None = None
    method: str | None = None
    block: int | None = None
    limit: int | None = LIMIT
    steps: Steps = Steps.LOOP
    language: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> Recipe:
        """The recipe, if all that can be judged without a model is right.

        Raises:
            UsageError: it is not. InputError: there is no such file of data. MissingDependencyError: the metric needs a package.
        """
        recipe = Recipe.of(self.precision, method=self.method, block=self.block)
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
    baseline = Model(artifact)
    report("data")
    samples = read(
        options.calibration, baseline, limit=options.limit, options=options.language, progress=partial(report, "data")
    )
    with ArtifactWriter(out, overwrite=overwrite) as writer, tempfile.TemporaryDirectory(prefix="txopt-") as temporary:
        report("calibrate")
        heard = evaluate.said(baseline, samples, progress=partial(report, "calibrate"))
        models = {name: ir.load(artifact.file(spec.file)) for name, spec in artifact.manifest.graphs.items()}
        moments = (
            second_moments(
                artifact, models, samples, said=heard, steps=options.steps, progress=partial(report, "calibrate")
            )
            if recipe.looks_at_data
            else {}
        )
        report("quantize")
        blocks = {name: rounded(model, recipe, moments.get(name, {})) for name, model in models.items()}
        for name, model in models.items():
            put(model.graph, blocks[name])
        report("pack")
        _write_answers(artifact, models, writer.directory, Path(temporary) / "rounded")
        for model in models.values():
            LOWERINGS[artifact.manifest.target](model, options.precision)
        proved = products.prove(models, blocks)
        weights.write(models, writer.directory)
        _copy_rest(artifact, writer.directory)
        manifest = _manifest(artifact, models, options)
        report("check")
        draft = writer.draft(manifest)
        parity = replay(
            draft, cases.load(writer.directory), skipped=artifact.manifest.parity.get("skipped", ())
        ).require()
        report("measure")
        staged = writer.staged(manifest)
        verdict = _measured(artifact, baseline, staged, samples, heard, options, partial(report, "measure"))
        found = {
            "scheme": {**vars(recipe.scheme), "method": str(recipe.method), "activations": "int8 by row and block"},
            "weights": {name: _counted(mine) for name, mine in blocks.items()},
            "data": samples.to_json(),
            "products": proved.to_json(),
            "loss": verdict.require().certificate(),
        }
        return writer.commit(replace(manifest, parity=parity.certificate(), calibration=found))


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


def _counted(blocks: Mapping[str, Blocks]) -> dict[str, int]:
    return {"rounded": len(blocks), "numbers": sum(each.codes.size for each in blocks.values())}


def _write_answers(artifact: Artifact, models: Mapping[str, ir.Model], directory: Path, temporary: Path) -> None:
    """The artifact's reference cases, answered by the rounded weights in float32, into ``directory``."""
    floats = {name: model.clone() for name, model in models.items()}
    for model in floats.values():
        unfold(model.graph)
    temporary.mkdir()
    weights.write(floats, temporary)
    _copy_rest(artifact, temporary)
    rounded = Artifact(path=temporary, manifest=artifact.manifest)
    cases.save(reanswer(Model(rounded), cases.load(artifact.path)), directory)


def _copy_rest(artifact: Artifact, directory: Path) -> None:
    """Tokenizers, and whatever else is no graph, weight or case."""
    made = {MANIFEST, weights.FILE, cases.FILE, *(spec.file for spec in artifact.manifest.graphs.values())}
    for name in artifact.manifest.files.keys() - made:
        shutil.copyfile(artifact.file(name), directory / name)


def _measured(
    artifact: Artifact,
    baseline: Model,
    staged: Artifact,
    samples: Samples,
    heard: evaluate.Said,
    options: Options,
    progress: Callable[[int, int], None],
) -> gate.Verdict:
    candidate = Model(staged)
    after = evaluate.said(candidate, samples, progress=progress)
    references = [sample.source.target for sample in samples.entries]
    known = None if None in references else [[str(reference)] for reference in references]
    name = options.metric or metrics.pick(
        artifact.manifest.task, has_references=known is not None, frontend=artifact.manifest.frontend
    )
    return gate.judge(
        metrics.metric(name),
        references=known,
        baseline=heard.texts,
        candidate=after.texts,
        agreement=evaluate.agreement(baseline, candidate, samples, (heard, after), progress=progress),
        compared=gate.Compared(
            data=samples.sha256,
            baseline=gate.fingerprint(artifact.manifest),
            candidate=gate.fingerprint(staged.manifest),
        ),
        max_loss=options.max_loss,
    )


def _manifest(artifact: Artifact, models: Mapping[str, ir.Model], options: Options) -> Manifest:
    before = artifact.manifest
    fused = {name: {**before.fusion[name], "nodes": graphs.count(model)} for name, model in models.items()}
    versions = {**before.versions, "txopt": __version__, **{name: version(name) for name in _VERSIONS}}
    return replace(
        before, precision=options.precision, fusion=fused, versions=versions, parity={}, calibration={}, files={}
    )
