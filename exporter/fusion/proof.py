"""Proof of every rewrite: the graph runs before it, what the rewrite put in runs on what was recorded there, both must agree.

Each rewrite is replayed alone, so an error is told by node, and what does not hold is left as it was while the rest is fused. Runs
on ONNX Runtime's CPU, or on the standard's own reference implementation where that has no kernel. It knows no fusion and no model.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from txopt.exporter import weights
from txopt.exporter.bodies import fix_names
from txopt.exporter.difference import difference
from txopt.exporter.fusion.recording import Array, Feeds, Recording
from txopt.exporter.fusion.region import Region, regions
from txopt.exporter.fusion.report import Barred, Place, Proof, Report
from txopt.exporter.lowering.ort import lower
from txopt.runtime.backends.ort import Runner
from txopt.runtime.parity import TOLERANCE

Fusion = Callable[[ir.Model, Barred], Report]

_PRECISION = {"float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class _Verdict:
    """The largest error of one place over all feeds, at ``value``; ``reason`` says why there is none."""

    value: str = ""
    error: float = 0.0
    allowed: float = 0.0
    reason: str | None = None

    @property
    def holds(self) -> bool:
        return self.reason is not None or self.error <= self.allowed  # false for NaN, as it must be


def apply(fusion: Fusion, model: ir.Model, barred: Barred) -> Report:
    """Runs ``fusion`` on ``model``, which is valid again afterwards."""
    report = fusion(model, barred)
    fix_names(model)
    return report


def prove(fusion: Fusion, model: ir.Model, feeds: Sequence[Feeds]) -> Report:
    """Runs ``fusion`` on ``model``, but leaves out what does not hold on ``feeds``; the report says which, and what was proved.

    In the body of a branch or loop also what cannot be replayed is left out: no run of the whole graph need come there.

    Args:
        fusion: a pass; it must do the same to equal graphs.
        model: changed in place.
        feeds: inputs by name, one set for each run.
    """
    barred: dict[str, str] = {}
    while True:
        trial = model.clone()
        verdicts = _verdicts(model, trial, apply(fusion, trial, barred).places, feeds)
        broken = {place.node: problem for place, verdict in verdicts.items() if (problem := _problem(place, verdict))}
        assert not broken.keys() & barred.keys(), "a pass leaves out what it is told to"
        if not broken:
            report = apply(fusion, model, barred)
            report.proof = _proof(verdicts)
            return report
        barred |= broken


def _problem(place: Place, verdict: _Verdict) -> str | None:
    """Why a fusion is left out, if it is."""
    if not verdict.holds:
        return (
            f"fused, but it does not hold: {verdict.value}, error {verdict.error:.3g} (allowed {verdict.allowed:.0e})"
        )
    return f"left as it is in a branch or loop: {verdict.reason}" if verdict.reason and place.inside else None


def _proof(verdicts: Mapping[Place, _Verdict]) -> Proof:
    judged = {place.node: verdict.error for place, verdict in verdicts.items() if verdict.reason is None}
    worst = max(judged, key=lambda node: judged[node], default=None)
    unproved = (f"{place.node}: {verdict.reason}" for place, verdict in verdicts.items() if verdict.reason is not None)
    error = judged[worst] if worst is not None else 0.0
    return Proof(len(judged), error, worst if error else None, tuple(unproved))


def _verdicts(
    before: ir.Model, after: ir.Model, places: Sequence[Place], feeds: Sequence[Feeds]
) -> dict[Place, _Verdict]:
    if not places:
        return {}
    if not feeds:
        return dict.fromkeys(places, _Verdict(reason="not proved: there are no inputs to run it on"))
    found = regions(before, after, places)
    read = {name for region in found.values() if isinstance(region, Region) for name in region.read}
    recording, verdicts = Recording(before, read, feeds, run), {}
    for place, region in found.items():
        recorded = region if isinstance(region, str) else recording.of(region.read)
        if isinstance(region, str) or isinstance(recorded, str):
            verdicts[place] = _Verdict(reason=f"not proved: {recorded}")
        else:
            verdicts[place] = _judged(region, after, recorded)
    return verdicts


def _judged(region: Region, model: ir.Model, recorded: Sequence[Feeds]) -> _Verdict:
    alone = ir.Model(region.graph, ir_version=model.ir_version)
    alone.graph.opset_imports.update(model.opset_imports)
    answers = run(alone, [{name: one[place] for place, name in region.inputs.items()} for one in recorded])
    if isinstance(answers, str):
        return _Verdict(reason=f"not proved: {answers}")
    worst = _Verdict()
    for one, answer in zip(recorded, answers, strict=True):
        allowed = max(TOLERANCE[_PRECISION.get(array.dtype.name, "fp32")] for array in one.values())
        for place, name in region.results.items():
            error = difference(one[place], answer[name], _least(one[place].dtype))
            if not error <= worst.error or not worst.value:  # NaN is the worst there is
                worst = _Verdict(place, error, allowed)
    return worst


def _least(dtype: np.dtype[Any]) -> float:
    """Below this numbers lose digits. Small values are judged by their own size: one that is wrong must not pass for being small."""
    return float(ml_dtypes.finfo(dtype).smallest_normal) if dtype.kind in "fV" else 1.0  # type: ignore[no-untyped-call]


def run(model: ir.Model, feeds: Sequence[Feeds]) -> list[dict[str, Array]] | str:
    """The outputs of ``model``, which is lowered for it, for each of ``feeds``; or why it does not run."""
    lower(model, "")
    with tempfile.TemporaryDirectory(prefix="txopt-proof-") as folder:
        weights.write({"graph": model}, Path(folder))
        file, reasons = Path(folder) / "graph.onnx", []
        for engine in (_in_onnxruntime, _in_reference):
            try:
                return engine(file, feeds)
            except Exception as err:  # both raise whatever they like, and neither is the judge here
                reasons.append(str(err).strip().split("\n")[0][:200])
    return f"no kernel runs it: {reasons[0]}; nor does the reference implementation: {reasons[1]}"


def _in_onnxruntime(file: Path, feeds: Sequence[Feeds]) -> list[dict[str, Array]]:
    runner = Runner(file, as_written=True)  # its own fusions would do to the graph before what is to be proved
    return [{name: runner.array(value) for name, value in runner.run(one).items()} for one in feeds]


def _in_reference(file: Path, feeds: Sequence[Feeds]) -> list[dict[str, Array]]:
    evaluator = ReferenceEvaluator(str(file))
    answers = (evaluator.run(None, dict(one)) for one in feeds)
    return [
        {name: np.asarray(array) for name, array in zip(evaluator.output_names, answer, strict=True)}
        for answer in answers
    ]
