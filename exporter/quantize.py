"""The road from an fp32 artifact to a quantized one, stage by stage: nothing is left at OUT unless it holds.

Owns the order of the stages and what the certificate says of them. What is proved: the integers in the files stand for the rounded
weights (against those in float32, engine arithmetic in float32: ``exact``); the engine computes with them (parity, at the tolerance of
its arithmetic); and what rounding cost in the task's own metric (loss.md). The graphs come from the artifact, so no PyTorch is needed.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from txopt import __version__
from txopt.calibration import evaluate, gate, metrics
from txopt.calibration.blocks import Blocks, BlockScheme
from txopt.calibration.data import LIMIT, read
from txopt.calibration.linears import Role, reads
from txopt.calibration.quantize import put, unfold
from txopt.calibration.reanswer import reanswer
from txopt.calibration.samples import Samples
from txopt.calibration.weights import Method, quantize
from txopt.exporter import graph as graphs
from txopt.exporter import weights
from txopt.exporter.lowering import LOWERINGS
from txopt.exporter.lowering.blocks import exact
from txopt.runtime import cases
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import UsageError
from txopt.runtime.files import MANIFEST
from txopt.runtime.manifest import QUANTIZED, Manifest
from txopt.runtime.model import Model
from txopt.runtime.parity import ParityReport, replay
from txopt.runtime.writer import ArtifactWriter

STAGES = ("open", "read data", "calibrate", "quantize", "write", "verify", "measure")
# Blocks whose products come out equal to the bit for one row and for many; wider ones are smaller, and do not (docs/quantization.md).
BLOCK = {"int8": 64, "int4": 32}
_BITS = {"int8": 8, "int4": 4}
_VERSIONS = ("onnx", "onnx-ir", "onnxruntime", "numpy")

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an artifact is quantized.

    Attributes:
        precision: "int8" or "int4".
        calibration: see ``calibration.data.read``; None: made up, with a warning.
        max_loss: points of the metric that may be lost; None: measured, not limited.
        metric: its name; None: chosen by what the artifact does.
        method: how codes are found.
        block: rows of a weight with one scale; None: as BLOCK.
        limit: most samples that are measured.
        language: the pipeline's options for the data (source_language, target_language, language, task).
    """

    precision: str = "int8"
    calibration: Any = None
    max_loss: float | None = None
    metric: str | None = None
    method: Method = Method.RTN
    block: int | None = None
    limit: int | None = LIMIT
    language: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scheme(self) -> BlockScheme:
        return BlockScheme(bits=_BITS[self.precision], block=self.block or BLOCK[self.precision])


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
    report = progress or (lambda stage: None)
    report("open")
    artifact = Artifact.open(source)
    _check(artifact.manifest, options)
    baseline = Model(artifact)
    report("read data")
    samples = read(options.calibration, baseline, limit=options.limit, options=options.language)
    with ArtifactWriter(out, overwrite=overwrite) as writer, tempfile.TemporaryDirectory(prefix="txopt-") as temporary:
        report("calibrate")
        heard = evaluate.said(baseline, samples)
        report("quantize")
        models = {name: ir.load(artifact.file(spec.file)) for name, spec in artifact.manifest.graphs.items()}
        counted = {name: _rounded(model, options) for name, model in models.items()}
        report("write")
        _write_answers(artifact, models, writer.directory, Path(temporary) / "rounded")
        for model in models.values():
            LOWERINGS[artifact.manifest.target](model, options.precision)
        weights.write(models, writer.directory)
        _copy_rest(artifact, writer.directory)
        manifest = _manifest(artifact, models, options)
        report("verify")
        draft = writer.draft(manifest)
        proved = _proved(draft, Path(temporary) / "exact")
        parity = replay(
            draft, cases.load(writer.directory), skipped=artifact.manifest.parity.get("skipped", ())
        ).require()
        report("measure")
        staged = writer.staged(manifest)
        verdict = _measured(artifact, baseline, staged, samples, heard, options)
        found = {
            "scheme": {**vars(options.scheme), "method": str(options.method), "activations": "int8 by row and block"},
            "weights": counted,
            "data": samples.to_json(),
            "exact": proved.certificate(),
            "loss": verdict.require().certificate(),
        }
        return writer.commit(replace(manifest, parity=parity.certificate(), calibration=found))


def _check(manifest: Manifest, options: Options) -> None:
    if manifest.precision != "fp32":
        raise UsageError(
            f"expected an artifact in fp32 to quantize, got one in {manifest.precision}; export the model again with --precision fp32"
        )
    if manifest.target != "cpu":
        raise UsageError(
            f"expected an artifact for the cpu target, got one for {manifest.target}: its engine has no such integers"
        )
    if options.precision not in QUANTIZED:
        raise UsageError(f"precision: expected one of {', '.join(QUANTIZED)}, got {options.precision!r}")
    if manifest.cache is None:
        raise UsageError(
            "expected a model that generates; what an encoder alone loses is not measured yet, so it is not quantized"
        )


def _rounded(model: ir.Model, options: Options) -> dict[str, int]:
    """Rounds every weight of ``model`` that can be, in place; how many were, of how many bytes, and the bytes of all others."""
    found: dict[str, Blocks] = {}
    before = 0
    for use in reads(model.graph):
        if use.name in found or use.weight.const_value is None:
            continue
        matrix = use.weight.const_value.numpy()
        before += matrix.nbytes
        turned = matrix if use.role is Role.LINEAR else matrix.T
        found[use.name] = quantize(turned, options.scheme, options.method, name=use.name)
    put(model.graph, found)
    return {"quantized": len(found), "float_bytes": before}


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


def _proved(draft: Artifact, temporary: Path) -> ParityReport:
    """That the engine's integers stand for the rounded weights: its products in float32, against the answers to the first case.

    The tolerance is float32's. One case is enough, it reads every weight, and such products are slow.
    """
    temporary.mkdir()
    shutil.copyfile(draft.path / weights.FILE, temporary / weights.FILE)
    for spec in draft.manifest.graphs.values():
        model = ir.load(draft.file(spec.file))
        exact(model)
        ir.save(model, temporary / spec.file)
    first = replace(cases.load(draft.path)[0], generated={})
    twin = Artifact(path=temporary, manifest=replace(draft.manifest, precision="fp32"))
    return replay(twin, [first]).require()


def _measured(
    artifact: Artifact, baseline: Model, staged: Artifact, samples: Samples, heard: evaluate.Said, options: Options
) -> gate.Verdict:
    candidate = Model(staged)
    after = evaluate.said(candidate, samples)
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
        agreement=evaluate.agreement(baseline, candidate, samples, (heard, after)),
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
