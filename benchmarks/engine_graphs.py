"""The graphs of an artifact in every precision, made of the fp32 ones by the edits that exports and quantization make.

Nothing is calibrated or measured: for what only depends on operators, types and shapes, such as what TensorRT builds.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import external_data

from txopt.calibration import static
from txopt.calibration.blocks import BlockScheme
from txopt.calibration.dtypes import infer
from txopt.calibration.formats import FP8, INT8
from txopt.calibration.halves import halve, rounded
from txopt.calibration.islands import counted_nodes, masks_of
from txopt.calibration.linears import Role, reads
from txopt.calibration.quantize import put
from txopt.calibration.rounding import round_to_nearest
from txopt.exporter.attempt import graphs_of
from txopt.exporter.lowering.storage import store
from txopt.runtime.artifact import Artifact

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")
_INT4 = BlockScheme(bits=4, block=32)
_RANGE = 8.0  # of every activation


def graphs(artifact: Artifact, precision: str) -> dict[str, ir.Model]:
    """The graphs of the fp32 ``artifact`` as one of ``precision`` for TensorRT has them; nothing is measured."""
    models = graphs_of(artifact)
    for model in models.values():
        external_data.load_to_model(model)  # so that it can be run from memory
        _MAKERS[precision](model)
    return models


def _fp16(model: ir.Model) -> None:
    infer(model)
    halve(model, counted_nodes(model.graph, masks_of(model.graph)))


def _bf16(model: ir.Model) -> None:
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None and value.const_value.size > 1:
            numbers = rounded(value.const_value.numpy(), ir.DataType.BFLOAT16).astype(np.float32)
            value.const_value = ir.Tensor(numbers, name=value.name)
    store(model.graph, ir.DataType.BFLOAT16)


def _static(codes: Any) -> Any:
    def place(model: ir.Model) -> None:
        names = static.activations(model.graph)
        static.place(model.graph, dict.fromkeys(names, _RANGE), codes)

    return place


def _int4(model: ir.Model) -> None:
    found = {}
    for read in reads(model.graph):
        matrix = read.matrix()
        if read.role is Role.LINEAR:
            found[read.name] = round_to_nearest(matrix, _INT4)
    put(model.graph, found)


_MAKERS = {
    "fp32": lambda model: None,
    "fp16": _fp16,
    "bf16": _bf16,
    "int8": _static(INT8),
    "fp8": _static(FP8),
    "int4": _int4,
}
