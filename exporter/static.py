"""The attempt at static products (int8, fp8): smoothed, calibrated, written, proved, and measured.

What is proved is that the engine, with the target's lowering and its own fusions, says what the pairs of QuantizeLinear and
DequantizeLinear say where every node is computed as it is written: rounding activations is part of what these graphs mean. That is a
coarse test of a deep model, so every product is proved alone too (static_products.py). What they lost is measured, as of every
attempt. For TensorRT the graphs stay as they were placed, and ONNX Runtime proves and measures these too.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from txopt.calibration import activations, evaluate, static
from txopt.calibration.collect import Steps
from txopt.calibration.evaluate import Said
from txopt.calibration.folding import fold
from txopt.calibration.formats import INT8
from txopt.calibration.recipe import StaticRecipe
from txopt.calibration.samples import Samples
from txopt.calibration.smooth import observed
from txopt.calibration.static import Placed
from txopt.exporter.attempt import Ground, Progress, clear, finish, graphs_of, twin, write_answers
from txopt.exporter.lowering.static import lower_static
from txopt.exporter.static_products import prove_static
from txopt.runtime.artifact import Artifact
from txopt.runtime.manifest import Manifest
from txopt.runtime.writer import ArtifactWriter


def static_attempt(
    ground: Ground, recipe: StaticRecipe, writer: ArtifactWriter, report: Progress, steps: Steps
) -> Manifest:
    """Writes the artifact of ``recipe`` into the writer's directory; its manifest is complete but for its files.

    Raises:
        ParityError: the engine does not compute what the graphs say. LossError: more was lost than is allowed.
    """
    artifact, samples = ground.artifact, ground.calibrated
    clear(writer.directory)
    progress = partial(report, "calibrate")
    said = _continued(ground, progress)
    with tempfile.TemporaryDirectory(prefix="txopt-") as folder:
        smoothed, folded = artifact, dict[str, Mapping[str, Any]]()
        if recipe.codes is INT8:  # steps of fp8 shrink with the numbers, so that small channels have steps of their own
            smoothed, folded = _smoothed(artifact, samples, said, steps, Path(folder))
        models = graphs_of(smoothed)
        names = {
            name: static.activations(model.graph, keep=recipe.keep, sums=recipe.sums) for name, model in models.items()
        }
        found = activations.ranges(smoothed, names, samples, recipe.clipping, said=said, steps=steps, progress=progress)
        report("quantize")
        placed = {
            name: static.place(
                model.graph, activations.amax_of(found, name), recipe.codes, keep=recipe.keep, sums=recipe.sums
            )
            for name, model in models.items()
        }
        report("pack")
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
            "sums": str(recipe.sums),
            "smoothed": {name: len(mine) for name, mine in folded.items()},
        },
        "weights": {name: _counted(mine) for name, mine in placed.items()},
        "data": ground.calibrated.to_json(),
        "products": proved.to_json(),
        "loss": verdict.require().certificate(),
    }
    return replace(manifest, calibration=calibration)


def _continued(ground: Ground, progress: Any) -> Said | None:
    """What the model itself says to the samples it is calibrated on, where some have no reference."""
    if all(entry.labels is not None for entry in ground.calibrated.entries):
        return None
    return evaluate.said(ground.baseline, ground.calibrated, progress=progress)


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
