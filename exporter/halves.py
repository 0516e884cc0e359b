"""The attempt at half precision: weights rounded, FP32 islands found on data, written, proved, and measured.

float16: the reference is the float32 graph with the rounded weights. ONNX Runtime's CPU provider keeps float32 between neighbours that
it has no float16 kernels for, so that it cannot show an overflow. Therefore a twin whose nodes store float16 as a GPU does
(halves.spell_out) must say what the reference says, must give no NaN and no infinity in any output over the data (the canary), and is
what the loss is measured of; the artifact itself must hold on the engine here as well.

bfloat16 has float32's range and needs no islands. On the CPU, whose engine has no bfloat16 kernels, weights are stored in it and
computed with in float32, as in an export; there is no engine here that could run more.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration import evaluate
from txopt.calibration.collect import Steps, collect
from txopt.calibration.dtypes import infer
from txopt.calibration.evaluate import Said
from txopt.calibration.halves import halve, rounded, spell_out
from txopt.calibration.islands import LARGEST, MARGIN, Islands, choose
from txopt.calibration.linears import reads
from txopt.calibration.magnitudes import Magnitudes, magnitudes
from txopt.exporter.attempt import Ground, Progress, clear, finish, graphs_of, twin, write_answers
from txopt.exporter.lowering import LOWERINGS
from txopt.runtime import cases
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import ParityError, UsageError, explain
from txopt.runtime.graphs import GraphSpec
from txopt.runtime.manifest import Manifest
from txopt.runtime.parity import replay
from txopt.runtime.writer import ArtifactWriter

HALVES = ("fp16", "bf16")
_NAMES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16"}


@dataclass(frozen=True, kw_only=True)
class HalfRecipe:
    """Half precision, "fp16" or "bf16"; islands are found, not chosen."""

    precision: str

    @property
    def looks_at_data(self) -> bool:
        """Whether something is fitted to it: islands; bfloat16 has none."""
        return self.precision == "fp16"

    @classmethod
    def of(cls, precision: str, target: str, *, scheme: str, method: str | None, block: int | None) -> Self:
        """The recipe, with nothing that a user could say otherwise.

        Raises:
            UsageError: a choice that integers have, or a target that no engine here could prove an artifact for.
        """
        given = {"scheme": None if scheme == "weights" else scheme, "method": method, "block": block}
        problems = [f"{name}: expected none, got {value}" for name, value in given.items() if value is not None]
        if problems:
            raise UsageError(
                explain(f"{precision} rounds to the nearest number; leave out what integers have:", problems)
            )
        check_target(precision, target)
        return cls(precision=precision)


def check_target(precision: str, target: str) -> None:
    """UsageError where no engine here could prove an artifact in half precision for ``target``."""
    if target not in LOWERINGS:
        raise UsageError(f"target: expected one of {', '.join(LOWERINGS)} for {precision}, got {target!r}")
    if (precision, target) == ("bf16", "cuda"):
        raise UsageError(
            "bf16 for the cuda target cannot be proved: ONNX Runtime's CPU provider, which replays the reference cases, has no "
            "bfloat16 kernels; take fp16, or the cpu or tensorrt target"
        )


def half_attempt(
    ground: Ground, recipe: HalfRecipe, writer: ArtifactWriter, report: Progress, steps: Steps
) -> Manifest:
    """Writes the artifact of ``recipe`` into the writer's directory; its manifest is complete but for its files.

    Raises:
        ParityError: float16 overflows, or the engine does not compute what the graphs say. LossError: more was lost than is allowed.
        UsageError: caches would hold more than float16 does.
    """
    clear(writer.directory)
    if recipe.precision == "bf16":
        return _stored_in_bfloat16(ground, writer, report)
    return _computed_in_float16(ground, writer, report, steps)


def _computed_in_float16(ground: Ground, writer: ArtifactWriter, report: Progress, steps: Steps) -> Manifest:
    artifact, samples = ground.artifact, ground.calibrated
    said = evaluate.continued(ground.baseline, samples, progress=partial(report, "calibrate"))
    seen = magnitudes(artifact, samples, said=said, steps=steps, progress=partial(report, "calibrate"))
    report("quantize")
    models = graphs_of(artifact)
    found: dict[str, Islands] = {}
    wide = _wide(artifact, seen)
    for name, model in models.items():
        infer(model)
        found[name] = choose(model, seen[name])
    islands = {name: mine.to_json() for name, mine in found.items()}
    for name, model in models.items():
        halve(model, found[name].nodes, wide=wide)
    report("pack")
    write_answers(
        artifact, {name: _reference(artifact, name, model) for name, model in models.items()}, writer.directory
    )
    described = _described(artifact.manifest, models)
    with tempfile.TemporaryDirectory(prefix="txopt-") as folder:
        stored = replace(spelled_out(artifact, models, Path(folder)), manifest=described)
        report("check")
        around = proved(stored, writer.directory)
        canary = _canary(stored, ground, said, steps, report)
        manifest, verdict = finish(ground, models, writer, report, described=described, measured=stored)
    calibration = {
        "scheme": {"bits": 16, "format": "float16", "activations": "float16 between nodes, float32 in islands"},
        "weights": {name: _counted(model) for name, model in models.items()},
        "islands": islands,
        "limit": {"largest": LARGEST, "margin": MARGIN},
        "data": samples.to_json(),
        "canary": canary,
        "graphs": around,
        "loss": verdict.require().certificate(),
    }
    return replace(manifest, calibration=calibration)


def _stored_in_bfloat16(ground: Ground, writer: ArtifactWriter, report: Progress) -> Manifest:
    report("quantize")
    models = graphs_of(ground.artifact)
    counted: dict[str, dict[str, int]] = {}
    for name, model in models.items():
        weights = {read.name: read.weight for read in reads(model.graph)}
        for weight in weights.values():
            _replace(weight, _nearest_bfloat16)
        counted[name] = {"rounded": len(weights), "numbers": sum(map(_size, weights.values()))}
    report("pack")
    write_answers(ground.artifact, {name: model.clone() for name, model in models.items()}, writer.directory)
    for model in models.values():
        LOWERINGS[ground.target](model, "bf16")
    manifest, verdict = finish(ground, models, writer, report)
    calibration = {
        "scheme": {"bits": 16, "format": "bfloat16", "activations": "float32"},
        "weights": counted,
        "data": ground.measured.to_json(),
        "loss": verdict.require().certificate(),
    }
    return replace(manifest, calibration=calibration)


def _wide(artifact: Artifact, seen: Mapping[str, Magnitudes]) -> set[str]:
    """Inputs and outputs of graphs that float16 does not hold; UsageError where one is a cache, whose layers have one dtype."""
    names = {
        item.name
        for graph, spec in artifact.manifest.graphs.items()
        for item in (*spec.inputs, *spec.outputs)
        if seen[graph].values.get(item.name, 0.0) * MARGIN > LARGEST and item.name != "logits"
    }
    caches = sorted(name for name in names if name.startswith(("self_", "present_")))
    if caches:
        raise UsageError(
            f"the decoder's cache holds numbers that float16 does not, or hardly ({', '.join(caches[:4])}): keep the artifact in "
            "fp32, or take bf16"
        )
    return names


def _reference(artifact: Artifact, name: str, halved: ir.Model) -> ir.Model:
    """The float32 graph with the numbers that ``halved`` stores."""
    model = graphs_of(artifact)[name]
    for key, value in model.graph.initializers.items():
        if halved.graph.initializers[key].dtype == ir.DataType.FLOAT16:
            _replace(value, rounded)
    return model


def _described(manifest: Manifest, models: Mapping[str, ir.Model]) -> Manifest:
    """``manifest`` with the dtypes that the graphs have now."""

    def changed(spec: GraphSpec, model: ir.Model) -> GraphSpec:
        floats = {
            value.name: _NAMES[value.dtype]
            for value in (*model.graph.inputs, *model.graph.outputs)
            if value.dtype is not None and value.dtype in _NAMES
        }
        items = [
            tuple(replace(item, dtype=floats.get(item.name, item.dtype)) for item in side)
            for side in (spec.inputs, spec.outputs)
        ]
        return replace(spec, inputs=items[0], outputs=items[1])

    graphs = {name: changed(spec, models[name]) for name, spec in manifest.graphs.items()}
    cache = None if manifest.cache is None else replace(manifest.cache, dtype="float16")
    return replace(manifest, precision="fp16", graphs=graphs, cache=cache, calibration={})


def prove_stored(artifact: Artifact, models: Mapping[str, ir.Model]) -> None:
    """That the graphs of an export in float16 say what their reference says where float16 is stored between nodes, too.

    Raises:
        ParityError: they do not; the CPU's engine might not have shown it.
    """
    with tempfile.TemporaryDirectory(prefix="txopt-") as folder:
        proved(spelled_out(artifact, models, Path(folder)), artifact.path)


def spelled_out(artifact: Artifact, models: Mapping[str, ir.Model], directory: Path) -> Artifact:
    """``artifact`` with the float16 graphs ``models`` spelled out, in ``directory``: what an engine says that stores float16."""
    spelled = {name: model.clone() for name, model in models.items()}
    for model in spelled.values():
        infer(model)
        spell_out(model)
    return twin(artifact, spelled, directory)


def proved(stored: Artifact, directory: Path) -> dict[str, float]:
    """That ``stored`` gives the answers that are in ``directory``."""
    report = replay(stored, cases.load(directory)).require()
    return {"largest_error": float(f"{report.largest_error:.2e}"), "tolerance": report.tolerance}


def _canary(stored: Artifact, ground: Ground, said: Said | None, steps: Steps, report: Progress) -> dict[str, int]:
    """That no output of the graphs holds NaN or infinity, over all of the data; how much was looked at."""
    fed = [(ground.calibrated, said)]
    if ground.measured is not ground.calibrated:
        fed.append((ground.measured, ground.said))
    outputs = {
        name: {item.name: _Finite(item.name) for item in spec.outputs if item.dtype in _NAMES.values()}
        for name, spec in stored.manifest.graphs.items()
    }
    for samples, own in fed:
        collect(stored, samples, outputs, said=own, steps=steps, progress=partial(report, "check"))
    wrong = {f"{graph}: {name}": each for graph, mine in outputs.items() for name, each in mine.items() if each.wrong}
    if wrong:
        title = "float16 overflows in this model, outside of its FP32 islands; give data with larger inputs, or take bf16 or fp32:"
        raise ParityError(
            explain(
                title,
                [f"{name}: {each.wrong} of {each.numbers} numbers are NaN or infinite" for name, each in wrong.items()][
                    :12
                ],
            )
        )
    return {
        "samples": sum(len(samples) for samples, _ in fed),
        "outputs": sum(map(len, outputs.values())),
        "numbers": sum(each.numbers for mine in outputs.values() for each in mine.values()),
    }


class _Finite:
    """Counts numbers, and those that are NaN or infinite; an observer."""

    def __init__(self, name: str) -> None:
        self.name, self.numbers, self.wrong = name, 0, 0

    def update(self, values: NDArray[Any]) -> None:
        self.numbers += values.size
        self.wrong += int(values.size - np.count_nonzero(np.isfinite(values)))

    def merge(self, other: Self) -> None:
        self.numbers += other.numbers
        self.wrong += other.wrong


def _counted(model: ir.Model) -> dict[str, int]:
    narrow = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT16]
    return {"rounded": len(narrow), "numbers": sum(map(_size, narrow))}


def _size(constant: ir.Value) -> int:
    assert constant.const_value is not None, "a constant"
    return int(constant.const_value.size)


def _replace(value: ir.Value, by: Any) -> None:
    """Float32 numbers that ``by`` rounds, computed when they are written."""
    whole = value.const_value
    assert whole is not None, "a constant"
    value.const_value = ir.LazyTensor(
        lambda: ir.Tensor(by(whole.numpy()).astype(np.float32), name=value.name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(whole.shape.numpy()),
        name=value.name,
        cache=False,
    )


def _nearest_bfloat16(array: NDArray[np.float32]) -> NDArray[Any]:
    return array.astype(ml_dtypes.bfloat16)
