"""One attempt at a quantized artifact: rounded, written, proved, and measured.

What is proved: the integers in the files stand for the rounded weights (products.py); the graphs around them say what these weights
say (in float32, at its tolerance); the engine says it too (parity, at the tolerance of activations of 8 bits). What rounding cost is
measured in the task's own metric (docs/loss.md). Owns what the certificate says of all this. It judges nothing: whoever asks looks at
the verdict.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from txopt import __version__
from txopt.calibration import evaluate, gate, metrics
from txopt.calibration.blocks import Blocks
from txopt.calibration.quantize import put, unfold
from txopt.calibration.reanswer import reanswer
from txopt.calibration.recipe import Recipe
from txopt.calibration.rounder import Rounder
from txopt.calibration.samples import Samples
from txopt.calibration.sensitivity import Sensitivity
from txopt.exporter import graph as graphs
from txopt.exporter import products, weights
from txopt.exporter.lowering import LOWERINGS
from txopt.exporter.lowering.floats import raise_blocks
from txopt.runtime import cases
from txopt.runtime.artifact import Artifact
from txopt.runtime.files import MANIFEST
from txopt.runtime.manifest import Manifest
from txopt.runtime.model import Model
from txopt.runtime.parity import ParityReport, replay
from txopt.runtime.writer import ArtifactWriter

_VERSIONS = ("onnx", "onnx-ir", "onnxruntime", "numpy")

Progress = Callable[..., None]  # (stage), and (stage, done, total) while it lasts


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What every attempt starts from.

    Attributes:
        artifact: in float32. baseline: the same, opened.
        calibrated: samples that weights were fitted to. measured: those that decide; ``heard`` is what the baseline said to them.
        rounder: rounds the weights of ``artifact``.
        precision: what the result is called. metric, max_loss: see ``quantize.Options``.
    """

    artifact: Artifact
    baseline: Model
    calibrated: Samples
    measured: Samples
    heard: evaluate.Said
    rounder: Rounder
    precision: str
    metric: str | None
    max_loss: float | None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A manifest, complete but for its files; the verdict; and the rounded weights by graph and name."""

    manifest: Manifest
    verdict: gate.Verdict
    blocks: Mapping[str, Mapping[str, Blocks]]


def graphs_of(artifact: Artifact) -> dict[str, ir.Model]:
    """The graphs, their weights still in their file."""
    return {name: ir.load(artifact.file(spec.file)) for name, spec in artifact.manifest.graphs.items()}


def attempt(
    ground: Ground, recipe: Recipe, writer: ArtifactWriter, report: Progress, found: Sequence[Sensitivity] = ()
) -> Attempt:
    """Writes the artifact of ``recipe`` into the writer's directory, over what an attempt before left there.

    Args:
        found: what made the recipe's finer weights finer, for the certificate.

    Raises:
        ParityError: the engine does not compute what the integers stand for.
    """
    artifact, directory = ground.artifact, writer.directory
    clear(directory)
    report("quantize")
    models = graphs_of(artifact)
    blocks = ground.rounder.blocks(models, recipe)
    for name, model in models.items():
        put(model.graph, blocks[name])
    report("pack")
    floats = {name: model.clone() for name, model in models.items()}
    for model in floats.values():
        unfold(model.graph)
    write_answers(artifact, floats, directory)
    for model in models.values():
        LOWERINGS[artifact.manifest.target](model, ground.precision)
    proved = products.prove(models, blocks)
    around = _around(artifact, models, blocks, directory)
    manifest, verdict = finish(ground, models, writer, report)
    calibration = {
        "scheme": {**vars(recipe.scheme), "method": str(recipe.method), "activations": "int8 by row and block"},
        "weights": {name: _counted(mine) for name, mine in blocks.items()},
        "finer": [_finer(each, recipe) for each in found if each.name in recipe.finer],
        "data": ground.calibrated.to_json(),
        "products": proved.to_json(),
        "graphs": {"largest_error": float(f"{around.largest_error:.2e}"), "tolerance": around.tolerance},
        "loss": verdict.certificate(),
    }
    return Attempt(manifest=replace(manifest, calibration=calibration), verdict=verdict, blocks=blocks)


def finish(
    ground: Ground, models: Mapping[str, ir.Model], writer: ArtifactWriter, report: Progress
) -> tuple[Manifest, gate.Verdict]:
    """Writes the lowered ``models`` beside their answers, replays these, and measures.

    Returns the manifest, complete but for its files and what calibration has to say, and the verdict.

    Raises:
        ParityError: the engine does not give the answers.
    """
    artifact, directory = ground.artifact, writer.directory
    weights.write(models, directory)
    _copy_rest(artifact, directory)
    manifest = _manifest(artifact, models, ground.precision)
    report("check")
    skipped = artifact.manifest.parity.get("skipped", ())
    parity = replay(writer.draft(manifest), cases.load(directory), skipped=skipped).require()
    report("measure")
    proven = replace(manifest, parity=parity.certificate())
    return proven, _measured(
        ground, writer.staged(proven), partial(report, "measure")
    )  # by its hash, which counts the parity


def clear(directory: Path) -> None:
    """Takes away what an attempt before left there."""
    for file in directory.iterdir():
        file.unlink()


def _finer(found: Sensitivity, recipe: Recipe) -> dict[str, Any]:
    """A weight of a finer scheme, and why: what rounding it alone as the others did to the model."""
    scheme = recipe.scheme_of(found.name)
    kept = "float32" if scheme is None else f"{scheme.bits} bits in blocks of {scheme.block}"
    return {"graph": found.graph, "weight": found.name, "as": kept, "divergence_nats": float(f"{found.nats:.3g}")}


def _counted(blocks: Mapping[str, Blocks]) -> dict[str, int]:
    return {"rounded": len(blocks), "numbers": sum(each.codes.size for each in blocks.values())}


def twin(artifact: Artifact, models: Mapping[str, ir.Model], directory: Path) -> Artifact:
    """``artifact`` with other graphs, written to ``directory``; ``models`` have their weights there afterwards."""
    weights.write(models, directory)
    _copy_rest(artifact, directory)
    return Artifact(path=directory, manifest=artifact.manifest)


def write_answers(
    artifact: Artifact, models: Mapping[str, ir.Model], directory: Path, *, as_written: bool = False
) -> None:
    """The artifact's reference cases, answered by ``models``, into ``directory``; see ``Runner`` for ``as_written``."""
    with tempfile.TemporaryDirectory(prefix="txopt-") as folder:
        answering = Model(twin(artifact, models, Path(folder)), as_written=as_written)
        cases.save(reanswer(answering, cases.load(artifact.path)), directory)


def _around(
    artifact: Artifact,
    models: Mapping[str, ir.Model],
    blocks: Mapping[str, Mapping[str, Blocks]],
    directory: Path,
) -> ParityReport:
    """That the lowered graphs, their products in float32 again, give the answers to the first case that are in ``directory``."""
    floats = {name: model.clone() for name, model in models.items()}
    for name, model in floats.items():
        raise_blocks(model, blocks[name])
    with tempfile.TemporaryDirectory(prefix="txopt-") as folder:
        weights.write(floats, Path(folder))
        _copy_rest(artifact, Path(folder))
        first = replace(cases.load(directory)[0], generated={})
        return replay(Artifact(path=Path(folder), manifest=artifact.manifest), [first]).require()


def _copy_rest(artifact: Artifact, directory: Path) -> None:
    """Tokenizers, and whatever else is no graph, weight or case."""
    made = {MANIFEST, weights.FILE, cases.FILE, *(spec.file for spec in artifact.manifest.graphs.values())}
    for name in artifact.manifest.files.keys() - made:
        shutil.copyfile(artifact.file(name), directory / name)


def _measured(ground: Ground, staged: Artifact, progress: Callable[[int, int], None]) -> gate.Verdict:
    samples, before, artifact = ground.measured, ground.heard, ground.artifact
    candidate = Model(staged)
    after = evaluate.said(candidate, samples, progress=progress)
    references = [entry.source.target for entry in samples.entries]
    known = None if None in references else [[str(reference)] for reference in references]
    name = ground.metric or metrics.pick(
        artifact.manifest.task, has_references=known is not None, frontend=artifact.manifest.frontend
    )
    return gate.judge(
        metrics.metric(name),
        references=known,
        baseline=before.texts,
        candidate=after.texts,
        agreement=evaluate.agreement(ground.baseline, candidate, samples, (before, after), progress=progress),
        compared=gate.Compared(
            data=samples.sha256,
            baseline=gate.fingerprint(artifact.manifest),
            candidate=gate.fingerprint(staged.manifest),
        ),
        max_loss=ground.max_loss,
    )


def _manifest(artifact: Artifact, models: Mapping[str, ir.Model], precision: str) -> Manifest:
    before = artifact.manifest
    fused = {name: {**before.fusion[name], "nodes": graphs.count(model)} for name, model in models.items()}
    versions = {**before.versions, "txopt": __version__, **{name: version(name) for name in _VERSIONS}}
    return replace(before, precision=precision, fusion=fused, versions=versions, parity={}, calibration={}, files={})
