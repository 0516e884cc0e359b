"""The graphs of tiny artifacts in every precision, made of fp32 ones by the edits that exports and quantization make; and inputs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
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

FAMILIES = ("t5", "bart", "marian", "m2m_100", "whisper", "trocr")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")
SIZES = {"B": 2, "R": 4, "Q": 3, "S": 24, "T": 7}
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


def feeds(model: ir.Model, sizes: Mapping[str, int] = SIZES) -> dict[str, NDArray[Any]]:
    """Seeded inputs of ``model``: tokens, positions that leave room in the buffers, masks that hide something, normal numbers."""
    random = np.random.default_rng(0)
    given: dict[str, NDArray[Any]] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        shape = [dim if isinstance(dim, int) else sizes[str(dim.value)] for dim in value.shape]
        name = str(value.name)
        if name.endswith("attention_mask"):
            given[name] = np.ones(shape, np.int64)
            given[name][0, -2:] = 0
        elif name == "position":
            given[name] = random.integers(0, sizes["S"] - sizes["Q"], shape)
        elif value.dtype == ir.DataType.INT64:
            given[name] = random.integers(4, 96, shape)
        else:
            given[name] = random.standard_normal(shape).astype(value.dtype.numpy())
    return given
