"""What rounding does to each layer by itself: to its weight, and to what its product gives for inputs that it really sees.

Errors are relative: the root of the summed squares of differences over that of the exact numbers. Owns the measurement, in numpy and
in float64; what of it reaches what a model says is sensitivity.py's.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.blocks import Blocks, dequantize
from txopt.calibration.channels import per_channel
from txopt.calibration.formats import Format
from txopt.calibration.linears import Read, Role, reads
from txopt.calibration.pictures import Pictures
from txopt.calibration.recipe import Recipe, StaticRecipe

Rows = NDArray[np.float32]

_LARGEST = 127


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """What becomes of one weight: ``matrix`` [K,N], the numbers that are computed with, what they are stored as (None: as they
    were), and what becomes of rows [R,K] that they are multiplied with."""

    matrix: Rows
    form: str | None
    inputs: Callable[[Rows], Rows]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """The errors of one weight [rows,columns], and of its product; None for a table that tokens alone read, or without inputs."""

    graph: str
    name: str
    rows: int
    columns: int
    form: str | None
    weight: float
    output: float | None


def layers(models: Mapping[str, ir.Model], seen: Pictures, rounded: Callable[[str, Read], Rounded]) -> Iterator[Layer]:
    """Of every weight of ``models`` that can be rounded, in the order of the nodes.

    Args:
        seen: of the inputs of products.
        rounded: what becomes of a weight, by graph and one read of it.
    """
    for graph, model in models.items():
        mine: dict[str, list[Read]] = {}
        for read in reads(model.graph):
            mine.setdefault(read.name, []).append(read)
        for name, found in mine.items():
            products = [read for read in found if read.role is not Role.TABLE]
            first = (products or found)[0]
            exact, one = first.matrix(), rounded(graph, first)
            inputs = [seen[graph][str(read.activations.name)].rows for read in products if read.activations is not None]
            outputs = [_relative(rows @ exact, one.inputs(rows) @ one.matrix) for rows in inputs if len(rows)]
            yield Layer(
                graph=graph,
                name=name,
                rows=exact.shape[0],
                columns=exact.shape[1],
                form=one.form,
                weight=_relative(exact, one.matrix),
                output=max(outputs, default=None),
            )


def in_blocks(blocks: Mapping[str, Mapping[str, Blocks]], recipe: Recipe, graph: str, read: Read) -> Rounded:
    """What becomes of the weight of ``read`` in ``graph`` by ``blocks``, which ``recipe`` made."""
    form = recipe.form(read.name, graph=graph, role=read.role)
    scheme = recipe.scheme_of(read.name, graph=graph, role=read.role)
    if scheme is None:
        return Rounded(matrix=read.matrix(), form=None, inputs=_as_they_are)
    inputs = by_row_and_block(scheme.block) if recipe.rounds_activations else _as_they_are
    return Rounded(matrix=dequantize(blocks[graph][read.name]), form=form, inputs=inputs)


def in_channels(amax: Mapping[str, Mapping[str, float]], recipe: StaticRecipe, graph: str, read: Read) -> Rounded:
    """What becomes of the weight of ``read`` in ``graph`` in static products; ``amax`` says where activations are clipped."""
    form, matrix = recipe.form(read.name, graph=graph, role=read.role), read.matrix()
    if form is None:
        return Rounded(matrix=matrix, form=None, inputs=_as_they_are)
    inputs = (
        _as_they_are if read.activations is None else by_tensor(amax[graph][str(read.activations.name)], recipe.codes)
    )
    return Rounded(matrix=per_channel(matrix, recipe.codes, name=read.name).dequantize(), form=form, inputs=inputs)


def by_row_and_block(block: int | None) -> Callable[[Rows], Rows]:
    """int8 with a scale for every row and ``block`` columns (None: all): what the engine makes of the inputs of such weights."""

    def rounded(rows: Rows) -> Rows:
        made = rows.copy()
        width = block or rows.shape[1]
        for start in range(0, rows.shape[1], width):
            part = made[:, start : start + width]
            step = np.maximum(np.abs(part).max(axis=1, keepdims=True) / _LARGEST, np.finfo(np.float32).tiny)
            made[:, start : start + width] = np.rint(part / step) * step
        return made

    return rounded


def by_tensor(amax: float, codes: Format) -> Callable[[Rows], Rows]:
    """``codes`` with one scale, which reaches ``amax``."""
    step = codes.scale(amax)
    return lambda rows: codes.encode(rows / step).astype(np.float32) * step


def _as_they_are(rows: Rows) -> Rows:
    return rows


def _relative(exact: Rows, got: Rows) -> float:
    wide = exact.astype(np.float64)
    norm = float(np.linalg.norm(wide))
    return float(np.linalg.norm(got - wide)) / norm if norm else 0.0
