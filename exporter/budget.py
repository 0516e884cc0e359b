"""Room that is left under a limit of size, spent on the weights that lose most: they get the next finer scheme.

Owns how many fit. What rounding one weight does is sensitivity.py's measurement, on samples that codes were fitted to and not on
those that judge the result.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from txopt.calibration import evaluate
from txopt.calibration.blocks import Blocks
from txopt.calibration.linears import Role, roles
from txopt.calibration.quantize import put
from txopt.calibration.recipe import Recipe
from txopt.calibration.sensitivity import Sensitivity, alone_in_blocks, sensitivities
from txopt.exporter import weights
from txopt.exporter.attempt import Ground, Progress, graphs_of, lower

SAMPLES = 8  # that sensitivities are measured on
SCALES = {"cpu": 16, "tensorrt": 32}  # bits of one, in the file


def within(ground: Ground, recipe: Recipe, report: Progress) -> tuple[Recipe, Sequence[Sensitivity]]:
    """``recipe`` with as many finer weights as its ``size`` allows, and what rounding each weight does; nothing where none fits."""
    if recipe.size is None:
        return recipe, ()
    artifact = ground.artifact
    limit = recipe.size * artifact.manifest.files[weights.FILE].size
    report("quantize")
    models = graphs_of(artifact)
    blocks, read_as = (
        ground.rounder.blocks(models, recipe),
        {name: roles(model.graph) for name, model in models.items()},
    )
    room = limit - _written(ground, recipe)
    costs = {
        name: _cost(each, recipe, graph, name, read_as[graph][name])
        for graph, mine in blocks.items()
        for name, each in mine.items()
    }
    if not any(cost <= room for cost in costs.values()):
        return recipe, ()
    report("sensitivity")
    few = ground.calibrated.part(0, min(SAMPLES, len(ground.calibrated)))
    found = sensitivities(
        artifact,
        alone_in_blocks(artifact, blocks, read_as),
        few,
        said=evaluate.continued(ground.baseline, few),
        most=SAMPLES,
        progress=partial(report, "sensitivity"),
    )
    while True:
        finer = replace(recipe, finer=recipe.finer | chosen(found, costs, room))
        over = _written(ground, finer) - limit
        if over <= 0 or finer == recipe:
            return finer, found
        room -= over  # tensors begin at pages, which costs do not count


def chosen(found: Sequence[Sensitivity], costs: Mapping[str, float], room: float) -> frozenset[str]:
    """Names of weights whose ``costs`` in bytes fit into ``room`` together: of ``found``, what comes first goes first."""
    names: set[str] = set()
    for each in found:
        if each.name not in names and costs[each.name] <= room:
            names.add(each.name)
            room -= costs[each.name]
    return frozenset(names)


def _written(ground: Ground, recipe: Recipe) -> int:
    """Bytes of the file of weights."""
    models = graphs_of(ground.artifact)
    blocks = ground.rounder.blocks(models, recipe)
    for name, model in models.items():
        put(model.graph, blocks[name])
    lower(models, ground)
    with tempfile.TemporaryDirectory(prefix="txopt-") as folder:
        weights.write(models, Path(folder))
        return (Path(folder) / weights.FILE).stat().st_size


def _cost(blocks: Blocks, recipe: Recipe, graph: str, name: str, role: Role) -> float:
    """Bytes that a finer scheme of a weight adds; infinite where that is float32, which no size is kept with."""
    finer = replace(recipe, finer=recipe.finer | {name}).scheme_of(name, graph=graph, role=role)
    if finer is None:
        return float("inf")
    rows, columns = blocks.codes.shape
    bits = finer.bits * rows + (SCALES[recipe.target] + (0 if finer.symmetric else finer.bits)) * finer.count(rows)
    scheme = blocks.scheme
    bits -= scheme.bits * rows + (SCALES[recipe.target] + (0 if scheme.symmetric else scheme.bits)) * scheme.count(rows)
    return bits * columns / 8
