"""Inputs for the graphs that are lowered for engines, and the sizes that they are run at."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

FAMILIES = ("t5", "bart", "marian", "m2m_100", "whisper", "trocr")
SIZES = {"B": 2, "R": 4, "Q": 3, "S": 24, "T": 7}


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
