"""Proof of products whose activations are rounded row by row: each alone in the engine, against integers in numpy.

One of the rows that are tried is at the end of its range everywhere, where sums of pairs would not fit into 16 bits (x86 without
VNNI: the runner has the engine take other kernels there), and one is 0.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.quantize import constant
from txopt.exporter.lowering.rows import LARGEST, LEAST, MIDDLE, lower_rows
from txopt.runtime.backends.ort import Runner

_ROWS = 4


def error(product: ir.Node, weight: NDArray[np.float32], drawn: np.random.Generator) -> float:
    """The largest error of ``product``, a node of ``lower_rows``, as a share of what its sum is made of; ``weight`` [K,N] rounded."""
    given = drawn.standard_normal((_ROWS, len(weight))).astype(np.float32)
    given[0], given[1] = 1000, 0
    rounded = round_rows(given)
    exact = rounded @ weight
    got = _run(_numbers(product.inputs[1]), _numbers(product.inputs[3]), given)
    return float((np.abs(got - exact) / (np.abs(rounded) @ np.abs(weight) + 1e-30)).max())


def round_rows(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """What the codes of ``x`` [..,K] stand for; the arithmetic of ``lower_rows``, each step rounded to float32."""
    largest = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(LEAST))
    codes = np.trunc(x * (np.float32(LARGEST) / largest) + np.float32(MIDDLE + 0.5))
    return (codes.astype(np.float64) - MIDDLE) * (largest.astype(np.float64) / LARGEST)


def _run(codes: NDArray[Any], scales: NDArray[Any], given: NDArray[np.float32]) -> NDArray[np.float32]:
    x = ir.Value(name="x", shape=ir.Shape(given.shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 24})
    constants = [constant(graph, "codes", ir.Tensor(codes)), constant(graph, "scales", ir.Tensor(scales))]
    weight = ir.node("DequantizeLinear", constants, attributes={"axis": 1})
    product = ir.node("MatMul", [x, weight.outputs[0]])
    y = product.outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph.extend([weight, product])
    graph.outputs.append(y)
    model = ir.Model(graph, ir_version=11)
    lower_rows(model)
    with tempfile.TemporaryDirectory(prefix="txopt-") as folder:
        path = Path(folder) / "product.onnx"
        ir.save(model, path)
        runner = Runner(path)
        return runner.array(runner.run({"x": given})["y"])


def _numbers(value: ir.Value | None) -> NDArray[Any]:
    """The numbers of an operand: codes turned for a head, floats stored in two bytes."""
    assert value is not None, "lower_rows made it"
    node = value.producer()
    if node is None:
        assert value.const_value is not None, "operands of a lowered product are constants"
        array: NDArray[Any] = value.const_value.numpy()
        return array.astype(np.float32) if array.dtype.kind == "f" else array
    inner = _numbers(node.inputs[0])
    return np.ascontiguousarray(inner.T) if node.op_type == "Transpose" else inner
