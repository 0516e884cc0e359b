"""The road from a source to a verified artifact, stage by stage, written once.

Owns the order of the stages and what the manifest says of them; every stage lives in a file of its own. An export that fails
parity leaves nothing at OUT.
"""

import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from txopt import __version__
from txopt.exporter import checkpoint, fusion, graph, optimum, proof_feeds, reference, weights
from txopt.exporter.case_plan import plans
from txopt.exporter.checkpoint import Checkpoint
from txopt.exporter.frontend import check_images, collect, collect_files
from txopt.exporter.fusion.report import Report
from txopt.exporter.halves import HALVES, check_target, prove_stored
from txopt.exporter.lowering import LOWERINGS
from txopt.exporter.lowering.choice import described
from txopt.exporter.optimum_folder import is_folder
from txopt.exporter.precision import DTYPES, computed_in, islands, widen
from txopt.exporter.quantize import STAGES as QUANTIZE_STAGES
from txopt.exporter.quantize import Options, quantize_artifact
from txopt.exporter.report import check as check_page
from txopt.exporter.trace import Trace, trace
from txopt.runtime import cases as reference_cases
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import UsageError, explain
from txopt.runtime.graphs import format_needed
from txopt.runtime.manifest import QUANTIZED, Manifest
from txopt.runtime.options import UNSUPPORTED, GenerationOptions
from txopt.runtime.parity import ParityReport, replay
from txopt.runtime.writer import ArtifactWriter

logger = logging.getLogger(__name__)

STAGES = ("load", "record", "trace", "fuse", "lower", "write", "verify")
_VERSIONS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")

# What the manifest keeps of a generation configuration: what generate() acts on or refuses, and the speech front end's defaults.
_GENERATION = {field.name for field in fields(GenerationOptions)} | set(UNSUPPORTED) | {"language", "task"}

MOST_MOVED = 0.5  # logits; rounding moves them by less than that, in float16 too

Progress = Callable[[str], None]


def stages(precision: str, *, calibrated: bool = False) -> tuple[str, ...]:
    """The stages of an export, in order; ``calibrated``: with calibration data."""
    return (*STAGES, *QUANTIZE_STAGES) if precision in QUANTIZED or calibrated else STAGES


def export(
    source: Any,
    out: str | os.PathLike[str],
    *,
    target: str = "cpu",
    precision: str = "fp32",
    trust_remote_code: bool = False,
    calibration: Any = None,
    max_loss: float | None = None,
    metric: str | None = None,
    scheme: str | None = None,
    method: str | None = None,
    report: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    prove: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Traces ``source``, fuses, writes and verifies; the artifact is at ``out`` only if it says what PyTorch says.

    With a precision of integers, or with calibration data, the artifact of float32 is then quantized, and at ``out`` only if it lost
    no more than ``max_loss``.

    Args:
        source: a checkpoint's directory or hub id, "package.module:factory", a custom module itself, or a folder of Optimum's.
        out: the directory to make.
        target: what the graphs are for: "cpu", "cuda" or "tensorrt". Those of the last stay neutral; engines are built from them.
        precision: "fp32", "fp16" or "bf16"; "int8", "int4" or "fp8".
        trust_remote_code: run code that came with a checkpoint.
        calibration, max_loss, metric, scheme, method, report: for "int8", "int4" and "fp8", see ``quantize.Options``; with
            ``calibration``, the FP32 islands of "fp16" are found on it. Without, they are those that transformers keeps.
        overwrite: replace the artifact that is at ``out``.
        prove: replay every rewrite of the graphs alone, and leave out what does not hold.
        progress: called with the name of each of ``stages`` as it begins; while integers are made also with (stage, done, total).

    Raises:
        SourceError: the source cannot be read or is not supported. UsageError: an option is wrong.
        ParityError: the graphs deviate from PyTorch; nothing is left at ``out``. LossError: quantization lost too much; the same.
    """
    asked = {"calibration": calibration, "max_loss": max_loss, "metric": metric, "scheme": scheme, "method": method}
    asked = {name: value for name, value in asked.items() if value is not None}
    _check_options(target, precision, asked if report is None else {**asked, "report": report})
    if precision in HALVES:
        check_target(precision, target)
    if precision in QUANTIZED or "calibration" in asked:
        page = None if report is None else Path(report)
        options = Options(precision=precision, target=target, report=page, **asked)
        options.check()
        if page is not None:
            check_page(page, overwrite=overwrite)
        with tempfile.TemporaryDirectory(prefix="txopt-") as folder, ArtifactWriter(out, overwrite=overwrite):
            whole = Path(folder) / Path(out).name
            export(source, whole, trust_remote_code=trust_remote_code, prove=prove, progress=progress)
            return quantize_artifact(whole, out, options, overwrite=overwrite, progress=progress)
    advance = progress or (lambda stage: None)
    with ArtifactWriter(out, overwrite=overwrite) as writer:
        if is_folder(source):
            manifest, skipped = optimum.draft(
                Path(source), writer, target=target, precision=precision, progress=advance
            )
            return _verified(writer, _with_known_options(manifest), skipped, advance)
        advance("load")
        opened = checkpoint.load(source, DTYPES[precision], trust_remote_code=trust_remote_code)
        computed, wide = computed_in(precision, target), islands(opened.source)
        if computed != DTYPES[precision]:
            widen(opened.source)
        advance("record")
        cases = reference.record(opened.source)
        advance("trace")
        traced = trace(opened.source, computed)
        advance("fuse")
        feeds = proof_feeds.feeds(traced.specs, cases, opened.source.facts.limit) if prove else {}
        reports = {name: fusion.fuse(model, fusion.FUSIONS, feeds.get(name)) for name, model in traced.graphs.items()}
        advance("lower")
        for model in traced.graphs.values():
            LOWERINGS[target](model, precision)
        fused = {name: _fused(model, reports[name]) for name, model in traced.graphs.items()}
        specs = {name: described(spec, traced.graphs[name]) for name, spec in traced.specs.items()}
        traced = replace(traced, specs=specs)
        advance("write")
        weights.write(traced.graphs, writer.directory)
        reference_cases.save(cases, writer.directory)
        origin = {**opened.origin, "fp32_islands": wide if precision != "fp32" else []}
        manifest = _manifest(opened, traced, fused, writer.directory, origin=origin, target=target, precision=precision)
        manifest = _with_known_options(manifest)
        if precision == "fp16":
            advance("verify")
            prove_stored(writer.draft(manifest), traced.graphs)
        return _verified(writer, manifest, plans(opened.source.facts)[1], advance)


def record_and_replay(
    artifact: Artifact,
    source: Any,
    *,
    device: str = "cpu",
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> ParityReport:
    """Fresh reference cases from PyTorch, against an artifact that exists (``txopt verify --against``)."""
    if artifact.manifest.calibration is not None:
        raise UsageError(
            f"the artifact is {artifact.manifest.precision}: it says what its rounded weights say, not what {source} says; verify it "
            "without --against, or the fp32 artifact with it; what rounding cost is in its manifest (txopt inspect)"
        )
    if is_folder(source):
        kind, task, cases = optimum.record(Path(source))
        _check_same(artifact.manifest, kind, task)
        return replay(artifact, cases, device=device, threads=threads).require()
    opened = checkpoint.load(source, DTYPES[artifact.manifest.precision], trust_remote_code=trust_remote_code)
    _check_same(artifact.manifest, opened.source.facts.kind, opened.source.facts.task)
    return replay(artifact, reference.record(opened.source), device=device, threads=threads).require()


def _check_same(ours: Manifest, kind: str, task: str) -> None:
    if (ours.kind, ours.task) != (kind, task):
        raise UsageError(f"the artifact is of a {ours.kind} ({ours.task}), the source a {kind} ({task})")


def _check_options(target: str, precision: str, asked: Mapping[str, Any]) -> None:
    if precision in QUANTIZED or (precision in HALVES and "calibration" in asked):
        return  # quantize.Options checks these
    problems = []
    if target not in LOWERINGS:
        problems.append(f"target: expected one of {', '.join(LOWERINGS)}, got {target!r}")
    if precision not in DTYPES:
        problems.append(f"precision: expected one of {', '.join((*DTYPES, *QUANTIZED))}, got {precision!r}")
    for name in asked:
        if precision in HALVES and name not in ("scheme", "method", "report"):
            problems.append(f"{name}: needs calibration data at {precision}; give them, or leave it out")
        else:
            problems.append(f"{name}: is for {', '.join(QUANTIZED)}; leave it out at {precision}")
    if problems:
        raise UsageError(explain("this export cannot be made:", problems))


def _fused(model: Any, reports: Mapping[str, Report]) -> dict[str, Any]:
    """What the manifest says of one graph: its fusions, and its nodes as they are written."""
    return {
        "patterns": {operator: report.to_json() for operator, report in reports.items()},
        "nodes": graph.count(model),
    }


def _manifest(
    opened: Checkpoint,
    traced: Trace,
    fused: dict[str, Any],
    directory: Path,
    *,
    origin: dict[str, Any],
    target: str,
    precision: str,
) -> Manifest:
    facts = opened.source.facts
    return Manifest(
        format=format_needed(traced.specs),
        kind=facts.kind,
        task=facts.task,
        family=facts.family,
        precision=precision,
        target=target,
        source=origin,
        versions={"txopt": __version__, **{name: version(name) for name in _VERSIONS}},
        graphs=traced.specs,
        cache=traced.cache,
        generation=dict(facts.generation),
        frontend=_frontend(opened, directory),
        fusion=fused,
        calibration=None,
        parity={},
    )


def _frontend(opened: Checkpoint, directory: Path) -> dict[str, Any]:
    """How inputs are read, and what must hold of them whoever makes them."""
    facts = opened.source.facts
    found = _reader(opened, directory)
    if found["type"] == "image":
        height, width = next(item.axes[2:] for item in facts.inputs if item.name == "pixel_values")
        check_images(found, (height, width))
    if facts.labels is not None:
        found |= {"labels": dict(facts.labels), "scores": facts.scores}
    return found | facts.source_bounds


def _reader(opened: Checkpoint, directory: Path) -> dict[str, Any]:
    facts = opened.source.facts
    if opened.directory is not None:
        return collect(opened.directory, facts.task, facts.family, directory, source_limit=facts.source_limit)
    if "source" not in opened.tokenizers:
        return {"type": "arrays"}
    pad = int(facts.generation["pad_token_id"])
    source, target = opened.tokenizers["source"], opened.tokenizers.get("target")
    return collect_files(source, target, directory, pad_token_id=pad, source_limit=facts.source_limit)


def _with_known_options(manifest: Manifest) -> Manifest:
    return replace(
        manifest, generation={key: value for key, value in manifest.generation.items() if key in _GENERATION}
    )


def _verified(writer: ArtifactWriter, manifest: Manifest, skipped: Sequence[str], report: Progress) -> Artifact:
    """The artifact, if what the writer has says what the reference cases say."""
    report("verify")
    parity = replay(writer.draft(manifest), reference_cases.load(writer.directory), skipped=skipped).require()
    for what, moved in parity.invariance.items():
        if moved > MOST_MOVED:
            logger.warning(
                "what a row says depends on its %s, as in the source: logits or embeddings move by up to %.2g; a module that mixes "
                "the rows of a batch, or reads padding, answers differently in other company",
                what,
                moved,
            )
    return writer.commit(replace(manifest, parity=parity.certificate()))
