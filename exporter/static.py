"""The attempt at static products (int8, fp8): smoothed, calibrated, written, proved, and measured.

What is proved is that the engine, with the target's lowering and its own fusions, says what the pairs of QuantizeLinear and
DequantizeLinear say where every node is computed as it is written: rounding activations is part of what these graphs mean. That is a
coarse test of a deep model, so every product is proved alone too (static_products.py). What they lost is measured, as of every
attempt. For TensorRT the graphs stay as they were placed, and ONNX Runtime proves and measures these too.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from txopt.calibration import activations, evaluate, static
from txopt.calibration.collect import Steps
from txopt.calibration.evaluate import Said
from txopt.calibration.folding import fold
from txopt.calibration.formats import INT8
from txopt.calibration.ranges import Ranges
from txopt.calibration.recipe import StaticRecipe
from txopt.calibration.samples import Samples
from txopt.calibration.sensitivity import Sensitivity
from txopt.calibration.smooth import observed
from txopt.calibration.static import Placed
from txopt.exporter.attempt import Attempt, Ground, Progress, clear, finer, finish, graphs_of, twin, write_answers
from txopt.exporter.lowering.static import lower_static
from txopt.exporter.static_products import prove_static
from txopt.runtime.artifact import Artifact
from txopt.runtime.writer import ArtifactWriter


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What all attempts share: a smoothed twin in float32, its factors by graph and activation, and the ranges of its activations."""

    artifact: Artifact
    folded: Mapping[str, Mapping[str, Any]]
    ranges: Ranges


@contextmanager
def prepared(
    ground: Ground, recipe: StaticRecipe, report: Progress, steps: Steps, *, file: Path | None = None
) -> Iterator[Prepared]:
    """The artifact, smoothed and calibrated; the twin's files are temporary.

    Args:
        file: where ranges are read from, or written to; see ``activations.ranges``.

    Raises:
        StaleError: ``file`` holds ranges of something else.
    """
    artifact, samples, progress = ground.artifact, ground.calibrated, partial(report, "calibrate")
    names = {name: static.activations(model.graph) for name, model in graphs_of(artifact).items()}
    key = activations.key_of(artifact, names, samples, recipe.clipping, steps, smoothed=recipe.codes is INT8)
    if file is not None and os.path.lexists(file):
        Ranges.load(file, key=key)  # what does not fit is said before anything is run
    said = evaluate.continued(ground.baseline, samples, progress=progress)
    with tempfile.TemporaryDirectory(prefix="txopt-") as folder:
        smoothed, folded = artifact, dict[str, Mapping[str, Any]]()
        if recipe.codes is INT8:  # steps of fp8 shrink with the numbers, so that small channels have steps of their own
            smoothed, folded = _smoothed(artifact, samples, said, steps, Path(folder))
        found = activations.ranges(
            smoothed, names, samples, recipe.clipping, said=said, steps=steps, key=key, file=file, progress=progress
        )
        yield Prepared(artifact=smoothed, folded=folded, ranges=found)


def static_attempt(
    ground: Ground,
    given: Prepared,
    recipe: StaticRecipe,
    writer: ArtifactWriter,
    report: Progress,
    found: Sequence[Sensitivity] = (),
) -> Attempt:
    """Writes the artifact of ``recipe`` into the writer's directory, over what an attempt before left there.

    Args:
        found: what made products stay in float, for the certificate.

    Raises:
        ParityError: the engine does not compute what the graphs say.
    """
    clear(writer.directory)
    report("quantize")
    models = graphs_of(given.artifact)
    placed = {
        name: static.place(model.graph, activations.amax_of(given.ranges, name), recipe.codes, keep=recipe.keep)
        for name, model in models.items()
    }
    report("pack")
    artifact = ground.artifact
    asked = replace(artifact, manifest=replace(artifact.manifest, precision=ground.precision))
    write_answers(asked, {name: model.clone() for name, model in models.items()}, writer.directory, as_written=True)
    if ground.target == "cpu":
        for model in models.values():
            lower_static(model)
    proved = prove_static(models)
    manifest, verdict = finish(ground, models, writer, report)
    calibration = {
        "scheme": {
            "bits": 8,
            "symmetric": True,
            "method": recipe.clipping.name,
            "activations": f"static {recipe.codes.title}, one scale for each tensor",
            "weights": f"{recipe.codes.title}, one scale for each output",
            "smoothed": {name: len(mine) for name, mine in given.folded.items()},
        },
        "weights": {name: _counted(mine) for name, mine in placed.items()},
        "finer": finer(found, recipe),
        "data": ground.calibrated.to_json(),
        "products": proved.to_json(),
        "loss": verdict.certificate(),
    }
    return Attempt(manifest=replace(manifest, calibration=calibration), verdict=verdict)


def _smoothed(
    artifact: Artifact, samples: Samples, said: Said | None, steps: Steps, folder: Path
) -> tuple[Artifact, dict[str, Mapping[str, Any]]]:
    """A twin of ``artifact`` in ``folder`` whose activations are easier to round, and the factors by graph and activation."""
    models = graphs_of(artifact)
    factors = observed(artifact, models, samples, said=said, steps=steps)
    for name, model in models.items():
        fold(model.graph, factors[name])
    return twin(artifact, models, folder), dict(factors)


def _counted(placed: Placed) -> dict[str, Any]:
    return {
        "rounded": placed.weights,
        "numbers": placed.numbers,
        "activations": placed.activations,
        "float": list(placed.floats),
    }
