"""Proof of static int8's products: each alone in the engine, with its pair and its codes, against integers in numpy.

The whole graph cannot be held to much: rounding activations magnifies the last bits of float32 from layer to layer until they are as
large as rounding itself. One product does not: its sums are of integers, and the engine's must be the same, also where activations
saturate and where sums of pairs would not fit into 16 bits (x86 without VNNI: the runner has the engine take other kernels there).
Of fp8 ONNX Runtime computes the products in float32, from the codes; they are proved by the same rows.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.formats import FP8
from txopt.exporter.products import TOLERANCE, Products
from txopt.runtime.backends.ort import Runner
from txopt.runtime.errors import ParityError, explain

_SEED = 20261124
_ROWS = 3


def prove_static(models: Mapping[str, ir.Model]) -> Products:
    """Runs each product with codes of the lowered ``models`` on rows drawn at random, and on one at the end of its range.

    Raises:
        ParityError: a product is not that of its integers; it names all of them.
    """
    drawn = np.random.default_rng(_SEED)
    errors = {
        f"{graph}: {node.name or node.outputs[0].name}": _error(node, drawn)
        for graph, model in models.items()
        for node in model.graph
        if node.op_type == "MatMul" and _weight(node) is not None and _made_by(node.inputs[0], "DequantizeLinear")
    }
    wrong = [f"{name} is off by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]
    if wrong:
        title = f"products are not those of their integers (allowed {TOLERANCE:.0e}); a defect of txopt, or of the engine here:"
        raise ParityError(explain(title, wrong[:12]))
    return Products(count=len(errors), largest_error=max(errors.values(), default=0.0))


def _error(product: ir.Node, drawn: np.random.Generator) -> float:
    weight, pair = _weight(product), _made_by(product.inputs[0], "DequantizeLinear")
    assert weight is not None, "prove_static() asked"
    assert pair is not None, "prove_static() asked"
    scale, zero = (_number(value) for value in pair.inputs[1:3])
    codes, steps = (_number(value) for value in weight.inputs[:2])
    table = weight.attributes["axis"].as_int() == 0
    matrix = codes.astype(np.float64) * (steps[:, None] if table else steps)
    matrix = matrix.T if table else matrix
    rows = (50 * scale * drawn.standard_normal((_ROWS, len(matrix)))).astype(np.float32)
    rows[0] = 1000 * scale
    rounded = _rounded(rows / scale, zero) * np.float64(scale)
    got = _run(scale, zero, weight, rows)
    return float((np.abs(got - rounded @ matrix) / (np.abs(rounded) @ np.abs(matrix) + 1e-30)).max())


def _rounded(rows: NDArray[np.float32], zero: NDArray[Any]) -> NDArray[np.float64]:
    """What QuantizeLinear makes of ``rows``, which are divided by their scale, its zero point taken off again."""
    if zero.dtype == FP8.dtype.numpy():
        return FP8.encode(rows).astype(np.float64)
    limits = np.iinfo(zero.dtype)
    return np.clip(np.rint(rows), int(limits.min) - int(zero), int(limits.max) - int(zero)).astype(np.float64)


def _run(
    scale: NDArray[np.float32], zero: NDArray[Any], weight: ir.Node, rows: NDArray[np.float32]
) -> NDArray[np.float32]:
    x = ir.Value(name="x", shape=ir.Shape(rows.shape), type=ir.TensorType(ir.DataType.FLOAT))
    constants = [
        _constant(name, array)
        for name, array in zip(
            ("scale", "zero", "codes", "steps"),
            (scale, zero, *(_number(value) for value in weight.inputs[:2])),
            strict=True,
        )
    ]
    axis = weight.attributes["axis"].as_int()
    quantize = ir.node("QuantizeLinear", [x, *constants[:2]])
    activations = ir.node("DequantizeLinear", [quantize.outputs[0], *constants[:2]])
    nodes = [quantize, activations, ir.node("DequantizeLinear", constants[2:], attributes={"axis": axis})]
    if axis == 0:
        nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], attributes={"perm": [1, 0]}))
    nodes.append(ir.node("MatMul", [activations.outputs[0], nodes[-1].outputs[0]]))
    y = nodes[-1].outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=nodes, initializers=constants, opset_imports={"": 24})
    with tempfile.TemporaryDirectory(prefix="txopt-") as folder:
        path = Path(folder) / "product.onnx"
        ir.save(ir.Model(graph, ir_version=11), path)
        runner = Runner(path)
        return runner.array(runner.run({"x": rows})["y"])


def _weight(product: ir.Node) -> ir.Node | None:
    """The node that dequantizes the weight of ``product``, straight or through a Transpose."""
    value = product.inputs[1]
    transpose = _made_by(value, "Transpose")
    found = _made_by(transpose.inputs[0] if transpose is not None else value, "DequantizeLinear")
    known = found is not None and found.inputs[0] is not None and found.inputs[0].const_value is not None
    return found if known else None


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == operator else None


def _number(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None, "the operator has this input"
    assert value.const_value is not None, "a constant"
    return value.const_value.numpy()


def _constant(name: str, array: NDArray[Any]) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
