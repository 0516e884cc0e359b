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
from txopt.calibration import gate
from txopt.calibration.blocks import Blocks
from txopt.calibration.evaluate import Said
from txopt.calibration.gemms import split
from txopt.calibration.kept import Kept
from txopt.calibration.loss import Heard, judged
from txopt.calibration.quantize import put, unfold
from txopt.calibration.reanswer import reanswer
from txopt.calibration.recipe import Recipe, StaticRecipe
from txopt.calibration.rounder import Rounder
from txopt.calibration.samples import Samples
from txopt.calibration.sensitivity import Sensitivity
from txopt.exporter import graph as graphs
from txopt.exporter import products, weights
from txopt.exporter.lowering import LOWERINGS
from txopt.exporter.lowering.activations import round_activations
from txopt.exporter.lowering.choice import described
from txopt.exporter.lowering.floats import raise_blocks
from txopt.exporter.lowering.tied import turn_tables
from txopt.runtime import cases
from txopt.runtime.artifact import Artifact
from txopt.runtime.files import FOLDER, MANIFEST
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
        calibrated: samples that weights were fitted to. measured: those that decide; ``heard`` is what the baseline says to them.
        rounder: rounds the weights of ``artifact``.
        precision, target: what the result is called, and what its graphs are for. metric, max_loss: see ``quantize.Options``.
        kept: what the baseline says under teacher forcing; None where there is one attempt at most.
    """

    artifact: Artifact
    baseline: Model
    calibrated: Samples
    measured: Samples
    heard: Heard
    rounder: Rounder
    precision: str
    target: str
    metric: str | None
    max_loss: float | None
    kept: Kept | None = None

    @property
    def said(self) -> Said | None:
        """``heard`` of a model that generates; an encoder alone says nothing that could be gone on from."""
        return self.heard if isinstance(self.heard, Said) else None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A manifest, complete but for its files, and the verdict."""

    manifest: Manifest
    verdict: gate.Verdict


def graphs_of(artifact: Artifact) -> dict[str, ir.Model]:
    """The graphs as they are quantized, without Gemm, their weights still in their file."""
    models = {name: ir.load(artifact.file(spec.file)) for name, spec in artifact.manifest.graphs.items()}
    for model in models.values():
        split(model.graph)
    return models


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
    write_answers(artifact, _meant(floats, blocks, recipe), directory)
    lower(models, ground)
    proved = products.prove(models, blocks)
    around = _around(artifact, models, floats, blocks)
    manifest, verdict = finish(ground, models, writer, report)
    calibration = {
        "scheme": _scheme(recipe),
        "weights": {name: _counted(mine) for name, mine in blocks.items()},
        "finer": finer(found, recipe),
        "data": ground.calibrated.to_json(),
        "products": proved.to_json(),
        "graphs": {"largest_error": float(f"{around.largest_error:.2e}"), "tolerance": around.tolerance},
        "loss": verdict.certificate(),
    }
    return Attempt(manifest=replace(manifest, calibration=calibration), verdict=verdict)


def lower(models: Mapping[str, ir.Model], ground: Ground) -> None:
    """The quantized ``models``, changed in place to what the target opens.

    TensorRT reads weights as they are in the neutral graph, and has none of ONNX Runtime's own operators.
    """
    if ground.target == "tensorrt":
        turn_tables(models.values())
    else:
        for model in models.values():
            LOWERINGS[ground.target](model, ground.precision)


def finish(
    ground: Ground,
    models: Mapping[str, ir.Model],
    writer: ArtifactWriter,
    report: Progress,
    *,
    described: Manifest | None = None,
    measured: Artifact | None = None,
) -> tuple[Manifest, gate.Verdict]:
    """Writes the lowered ``models`` beside their answers, replays these, and measures.

    Args:
        ground, models, writer, report: see ``attempt``.
        described: the source's manifest where the graphs' dtypes are others now.
        measured: who answers the gate's data; None: the artifact itself.

    Returns the manifest, complete but for its files and what calibration has to say, and the verdict.

    Raises:
        ParityError: the engine does not give the answers.
    """
    artifact, directory = ground.artifact, writer.directory
    weights.write(models, directory)
    _copy_rest(artifact, directory)
    manifest = _manifest(described or artifact.manifest, ground, models)
    report("check")
    skipped = artifact.manifest.parity.get("skipped", ())
    parity = replay(writer.draft(manifest), cases.load(directory), skipped=skipped).require()
    report("measure")
    proven = replace(manifest, parity=parity.certificate())
    staged = writer.staged(proven)  # by its hash, which counts the parity
    return proven, _measured(ground, staged, Model(measured or staged), partial(report, "measure"))


def clear(directory: Path) -> None:
    """Takes away what an attempt before left there."""
    for file in directory.iterdir():
        file.unlink()


def _scheme(recipe: Recipe) -> dict[str, Any]:
    encoder = {} if recipe.encoder is None else {"encoder": {**vars(recipe.encoder), "activations": "int8 by row"}}
    activations = "float32"
    if recipe.rounds_activations:
        activations = "int8 by row" if recipe.scheme.block is None else "int8 by row and block"
    uneven = {"uneven": sorted(recipe.uneven)} if recipe.uneven else {}
    return {**vars(recipe.scheme), "method": str(recipe.method), "activations": activations, **encoder, **uneven}


def finer(found: Sequence[Sensitivity], recipe: Recipe | StaticRecipe) -> list[dict[str, Any]]:
    """The weights of a finer scheme, and why: what rounding each alone as the others did to the model."""
    return [
        {
            "graph": each.graph,
            "weight": each.name,
            "as": recipe.form(each.name, graph=each.graph, role=each.role) or "float32",
            "divergence_nats": float(f"{each.nats:.3g}"),
        }
        for each in found
        if each.name in recipe.finer
    ]


def _counted(blocks: Mapping[str, Blocks]) -> dict[str, int]:
    return {"rounded": len(blocks), "numbers": sum(each.codes.size for each in blocks.values())}


def twin(artifact: Artifact, models: Mapping[str, ir.Model], directory: Path) -> Artifact:
    """``artifact`` with other graphs, written to ``directory``; ``models`` have their weights there afterwards."""
    weights.write(models, directory)
    _copy_rest(artifact, directory)
    return Artifact(path=directory, manifest=artifact.manifest)


def _meant(
    floats: Mapping[str, ir.Model], blocks: Mapping[str, Mapping[str, Blocks]], recipe: Recipe
) -> dict[str, ir.Model]:
    """Twins of the graphs with rounded weights in float32, in which activations are rounded as well, where the recipe does."""
    meant = {name: model.clone() for name, model in floats.items()}
    if recipe.rounds_activations:
        for name, model in meant.items():
            widths = {f"{weight}/rounded": each.scheme.block for weight, each in blocks[name].items()}
            round_activations(model.graph, widths)
    return meant


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
    floats: Mapping[str, ir.Model],
    blocks: Mapping[str, Mapping[str, Blocks]],
) -> ParityReport:
    """That the lowered graphs, their products in float32 again, say what ``floats`` say to the first case, activations as they are."""
    raised = {name: model.clone() for name, model in models.items()}
    for name, model in raised.items():
        raise_blocks(model, blocks[name])
    with tempfile.TemporaryDirectory(prefix="txopt-") as given, tempfile.TemporaryDirectory(prefix="txopt-") as folder:
        first = replace(cases.load(artifact.path)[0], generated={})
        (answered,) = reanswer(Model(twin(artifact, floats, Path(given))), [first])
        return replay(twin(artifact, raised, Path(folder)), [answered]).require()


def _copy_rest(artifact: Artifact, directory: Path) -> None:
    """Tokenizers, and whatever else is no graph, weight or case; engines are of the graphs that were."""
    made = {MANIFEST, weights.FILE, cases.FILE, *(spec.file for spec in artifact.manifest.graphs.values())}
    for name in artifact.manifest.files.keys() - made:
        if name.startswith(f"{FOLDER}/"):
            continue
        shutil.copyfile(artifact.file(name), directory / name)


def _measured(ground: Ground, staged: Artifact, candidate: Model, progress: Callable[[int, int], None]) -> gate.Verdict:
    compared = gate.Compared(
        data=ground.measured.sha256,
        baseline=gate.fingerprint(ground.artifact.manifest),
        candidate=gate.fingerprint(staged.manifest),
    )
    return judged(
        ground.baseline,
        candidate,
        ground.measured,
        ground.heard,
        compared=compared,
        metric=ground.metric,
        max_loss=ground.max_loss,
        kept=ground.kept,
        progress=progress,
    )


def _manifest(before: Manifest, ground: Ground, models: Mapping[str, ir.Model]) -> Manifest:
    fused = {name: {**before.fusion[name], "nodes": graphs.count(model)} for name, model in models.items()}
    versions = {**before.versions, "txopt": __version__, **{name: version(name) for name in _VERSIONS}}
    return replace(
        before,
        precision=ground.precision,
        target=ground.target,
        graphs={name: described(spec, models[name]) for name, spec in before.graphs.items()},
        fusion=fused,
        versions=versions,
        parity={},
        calibration={},
        files={},
    )
