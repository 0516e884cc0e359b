"""Proof of products with weights that the graph itself dequantizes, and of lookups in such: each alone in the engine.

What is run is the DequantizeLinear together with its reader, for the engine may make one kernel of both.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.quantize import is_weight
from txopt.runtime.backends.ort import Runner

_ROWS = 3
_PLACES = {"MatMul": 1, "Gather": 0}  # where the readers have a weight

Array = NDArray[np.float32]


def dequantizer(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear whose blocks ``node``, a MatMul or a Gather, reads, straight or turned; None for all others."""
    place = _PLACES.get(node.op_type)
    if place is None:
        return None
    value = node.inputs[place]
    made = None if value is None else value.producer()
    if made is not None and made.op_type == "Transpose":
        turned = made.inputs[0]
        made = None if turned is None else turned.producer()
    return made if made is not None and is_weight(made) else None


def error(node: ir.Node, weight: Array, drawn: np.random.Generator) -> float:
    """The largest error of ``node``, as a share of what its sum is made of, or of the largest number that is looked up.

    Args:
        node: has a ``dequantizer``.
        weight: [K,N], rounded; where ``node`` is a Gather, of the table [N,K].
    """
    if node.op_type == "Gather":
        got = _run(node, np.arange(weight.shape[1]))
        rows = got.T if "axis" in node.attributes and node.attributes["axis"].as_int() == 1 else got
        return float(np.abs(rows - weight.T).max() / (np.abs(weight).max() + 1e-30))
    given = drawn.standard_normal((_ROWS, len(weight))).astype(np.float32)
    exact = given.astype(np.float64) @ weight
    return float((np.abs(_run(node, given) - exact) / (np.abs(given) @ np.abs(weight) + 1e-30)).max())


def _run(node: ir.Node, given: Array | NDArray[np.int64]) -> Array:
    """What the engine makes of ``given``, the input of ``node`` that is no weight, by ``node`` and all before its weight."""
    place = _PLACES[node.op_type]
    dtype = ir.DataType.from_numpy(given.dtype)
    x = ir.Value(name="x", shape=ir.Shape(given.shape), type=ir.TensorType(dtype))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 24})
    inputs = [_copied(graph, value) if index == place else x for index, value in enumerate(node.inputs)]
    last = ir.Node("", node.op_type, inputs, list(node.attributes.values()))
    y = last.outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph.append(last)
    graph.outputs.append(y)
    with tempfile.TemporaryDirectory(prefix="txopt-") as folder:
        path = Path(folder) / "product.onnx"
        ir.save(ir.Model(graph, ir_version=11), path)
        runner = Runner(path)
        return runner.array(runner.run({"x": given})["y"])


def _copied(graph: ir.Graph, value: ir.Value | None) -> ir.Value:
    """``value``, a constant or made of constants, in ``graph``."""
    assert value is not None, "dequantizer() asked"
    node = value.producer()
    if node is None:
        assert value.const_value is not None, "dequantizer() asked"
        tensor = value.const_value
        copied = ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=tensor)
        graph.initializers[str(value.name)] = copied
        return copied
    inputs = [_copied(graph, each) for each in node.inputs]
    made = ir.Node("", node.op_type, inputs, list(node.attributes.values()))
    graph.append(made)
    return made.outputs[0]
