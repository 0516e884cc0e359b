"""Proof of every rewrite: the graph runs before it, what the rewrite put in runs on what was recorded there, both must agree.

Each rewrite is replayed alone, so an error is told by node, and what does not hold is left as it was while the rest is fused. Runs
on ONNX Runtime's CPU, or on the standard's own reference implementation where that has no kernel. It knows no fusion and no model.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from txopt.exporter import weights
from txopt.exporter.difference import difference
from txopt.exporter.fusion.region import Region, regions
from txopt.exporter.fusion.report import Barred, Place, Proof, Report
from txopt.exporter.lowering.ort import lower
from txopt.runtime.backends.ort import Runner
from txopt.runtime.parity import TOLERANCE

Array = NDArray[Any]
Feeds = Mapping[str, Array]
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


def prove(fusion: Fusion, model: ir.Model, feeds: Sequence[Feeds]) -> Report:
    """Runs ``fusion`` on ``model``, but leaves out what does not hold on ``feeds``; the report says which, and what was proved.

    Args:
        fusion: a pass; it must do the same to equal graphs.
        model: changed in place.
        feeds: inputs by name, one set for each run.
    """
    barred: dict[str, str] = {}
    while True:
        trial = model.clone()
        verdicts = _verdicts(model, trial, fusion(trial, barred).places, feeds)
        broken = {place.node: verdict for place, verdict in verdicts.items() if not verdict.holds}
        assert not broken.keys() & barred.keys(), "a pass leaves out what it is told to"
        if not broken:
            report = fusion(model, barred)
            report.proof = _proof(verdicts)
            return report
        barred |= {
            node: f"fused, but it does not hold: {found.value}, error {found.error:.3g} (allowed {found.allowed:.0e})"
            for node, found in broken.items()
        }


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
    recorded: list[Feeds] | str
    names = {
        name for region in found.values() if isinstance(region, Region) for name in (*region.inputs, *region.outputs)
    }
    recorded = _recorded(before, names, feeds)
    verdicts = {}
    for place, region in found.items():
        if isinstance(region, str) or isinstance(recorded, str):
            reason = region if isinstance(region, str) else str(recorded)
            verdicts[place] = _Verdict(reason=f"not proved: {reason}")
        else:
            verdicts[place] = _judged(region, after, recorded)
    return verdicts


def _recorded(model: ir.Model, names: Iterable[str], feeds: Sequence[Feeds]) -> list[Feeds] | str:
    """The values ``names`` of ``model`` for each of ``feeds``, or why there are none."""
    inputs = {str(value.name) for value in model.graph.inputs}
    copy = model.clone()
    values = {str(value.name): value for node in copy.graph for value in node.outputs}
    copy.graph.outputs[:] = [values[name] for name in sorted(set(names) - inputs)]
    answers = _run(copy, [{name: array for name, array in one.items() if name in inputs} for one in feeds])
    return (
        answers if isinstance(answers, str) else [{**one, **answer} for one, answer in zip(feeds, answers, strict=True)]
    )


def _judged(region: Region, model: ir.Model, recorded: Sequence[Feeds]) -> _Verdict:
    alone = ir.Model(region.graph, ir_version=model.ir_version)
    alone.graph.opset_imports.update(model.opset_imports)
    answers = _run(alone, [{name: one[name] for name in region.inputs} for one in recorded])
    if isinstance(answers, str):
        return _Verdict(reason=f"not proved: {answers}")
    worst = _Verdict()
    for one, answer in zip(recorded, answers, strict=True):
        dtypes = {one[name].dtype for name in (*region.inputs, *region.outputs)}
        allowed = max(TOLERANCE[_PRECISION.get(dtype.name, "fp32")] for dtype in dtypes)
        for name in region.outputs:
            error = difference(one[name], answer[name], _least(one[name].dtype))
            if not error <= worst.error or not worst.value:  # NaN is the worst there is
                worst = _Verdict(name, error, allowed)
    return worst


def _least(dtype: np.dtype[Any]) -> float:
    """Below this numbers lose digits. Small values are judged by their own size: one that is wrong must not pass for being small."""
    return float(ml_dtypes.finfo(dtype).smallest_normal) if dtype.kind in "fV" else 1.0  # type: ignore[no-untyped-call]


def _run(model: ir.Model, feeds: Sequence[Feeds]) -> list[dict[str, Array]] | str:
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
