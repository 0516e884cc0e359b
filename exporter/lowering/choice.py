"""What a search reads of a decoder's logits, computed where the logits are: a few numbers a row leave the device, not V of them.

Of the last new token of every row, out of logits float32 [R,Q,V]:

    next        int64 [R]      the likeliest token, all that greedy search needs
    top_values  float32 [R,K]  the K largest logits, falling; K is MOST, or V where that is smaller
    top_ids     int64 [R,K]    their tokens; of equal logits any may come first
    log_sum     float32 [R]    log sum exp of all V logits: top_values - log_sum are log-probabilities

The logits stay an output. Whoever needs another place than the last (rows of a prefill that end earlier), or processes logits,
reads those.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from txopt.calibration.quantize import constant
from txopt.exporter.graph import integers
from txopt.runtime.graphs import CHOICE, GraphSpec, TensorSpec

LOGITS = "logits"
# Covers 2 * beams of every width in use and top_k's default of 50; TensorRT takes up to 3840.
MOST = 128


def choice_specs(logits: TensorSpec) -> tuple[TensorSpec, ...]:
    """The outputs that ``add_choice`` adds to a decoder that gives ``logits``."""
    vocabulary = logits.axes[-1]
    assert isinstance(vocabulary, int), "a manifest's logits have a known vocabulary"
    most = min(MOST, vocabulary)
    return tuple(
        TensorSpec(name=name, dtype=dtype, axes=("R",) if numbers == 1 else ("R", most))
        for name, (dtype, numbers) in CHOICE.items()
    )


def described(spec: GraphSpec, model: ir.Model) -> GraphSpec:
    """``spec`` with the outputs that ``add_choice`` gave its graph, ``model``, where it did."""
    logits = [item for item in spec.outputs if item.name == LOGITS]
    if not logits or not chooses(model) or "next" in {item.name for item in spec.outputs}:
        return spec
    return replace(spec, outputs=(*spec.outputs, *choice_specs(logits[0])))


def chooses(model: ir.Model) -> bool:
    """Whether it has these outputs already."""
    return "next" in {value.name for value in model.graph.outputs}


# The nodes that make log_sum [R] of logits [R,V] and of the K largest [R,K] and their tokens [R,K]; the last one's output is it.
LogSum = Callable[[ir.Graph, ir.Value, ir.Value, ir.Value], list[ir.Node]]


def _reduced(graph: ir.Graph, logits: ir.Value, values: ir.Value, tokens: ir.Value) -> list[ir.Node]:
    return [
        ir.node("ReduceLogSumExp", [logits, integers(graph, [1])], attributes={"keepdims": 0}, name="choice/log_sum")
    ]


def add_choice(model: ir.Model, log_sum: LogSum = _reduced) -> None:
    """Changes ``model``, a decoder, in place; its other outputs stay as they are."""
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == LOGITS)
    assert logits.shape is not None, "an artifact's outputs have shapes"
    rows, vocabulary = logits.shape[0], logits.shape[2]
    assert isinstance(vocabulary, int), "an artifact's logits have a known vocabulary"
    most = min(MOST, vocabulary)
    place = constant(graph, "choice/last", ir.Tensor(np.array(-1, np.int64)))
    last = ir.node("Gather", [logits, place], attributes={"axis": 1}, name="choice/last_token")
    found = last.outputs[0]
    found.name, found.shape, found.type = "choice/logits", ir.Shape([rows, vocabulary]), logits.type
    first = ir.node("ArgMax", [found], attributes={"axis": 1, "keepdims": 0}, name="choice/next")
    top = ir.node("TopK", [found, integers(graph, [most])], attributes={"axis": 1}, num_outputs=2, name="choice/top")
    total = log_sum(graph, found, *top.outputs)
    graph.extend([last, first, top, *total])
    for value, name, shape, dtype in (
        (first.outputs[0], "next", [rows], ir.DataType.INT64),
        (top.outputs[0], "top_values", [rows, most], ir.DataType.FLOAT),
        (top.outputs[1], "top_ids", [rows, most], ir.DataType.INT64),
        (total[-1].outputs[0], "log_sum", [rows], ir.DataType.FLOAT),
    ):
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
        graph.outputs.append(value)
