"""Proof of a lowering: every product with integers, and every lookup in them, alone in the engine, against rounded weights.

Shows that codes, scales and zero points lie where the operator looks for them, to float32's rounding, whatever the activations are
rounded to when the graph runs as a whole. It judges neither the rounding nor the graph around the products. Products in blocks
are computed with activations in float32 for it; those of whole columns with integers, as always (row_products.py). Where the graph
dequantizes weights itself, the products are of floats (dequantized_products.py).
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.blocks import Blocks, dequantize
from txopt.exporter import dequantized_products, row_products
from txopt.exporter.dequantized_products import dequantizer
from txopt.exporter.lowering import rows
from txopt.exporter.lowering.blocks import CONTRIB, weight_of
from txopt.runtime.backends.ort import Runner
from txopt.runtime.errors import ParityError, explain

# Of the sum of |x| |w| that an output is made of: float32 rounds once for each summand.
TOLERANCE = 1e-5
_ROWS = 3
_SEED = 20261123


@dataclass(frozen=True, kw_only=True)
class Products:
    """How many products and lookups there are, and the largest error of any, as a share of what its sum is made of."""

    count: int
    largest_error: float

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "largest_error": float(f"{self.largest_error:.2e}"), "tolerance": TOLERANCE}


def prove(models: Mapping[str, ir.Model], blocks: Mapping[str, Mapping[str, Blocks]]) -> Products:
    """Runs each product with integers of the lowered ``models`` on rows drawn at random, each lookup on all rows of its table.

    Args:
        models: by graph.
        blocks: the rounded weights [K,N] by graph and name.

    Raises:
        ParityError: a product is not that of its weight; it names all of them.
    """
    drawn = np.random.default_rng(_SEED)
    errors: dict[str, float] = {}
    for graph, model in models.items():
        for node in model.graph:
            made = dequantizer(node)
            if made is not None or node.op_type in _ERRORS:
                weight = dequantize(blocks[graph][weight_of(node if made is None else made)])
                error = dequantized_products.error if made is not None else _ERRORS[node.op_type]
                errors[f"{graph}: {node.name or node.outputs[0].name}"] = error(node, weight, drawn)
    wrong = [f"{name} is off by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]
    if wrong:
        title = f"integers do not stand for the weights that they were made of (allowed {TOLERANCE:.0e}); a defect of txopt:"
        raise ParityError(explain(title, wrong[:12]))
    return Products(count=len(errors), largest_error=max(errors.values(), default=0.0))


def _error(node: ir.Node, weight: NDArray[np.float32], drawn: np.random.Generator) -> float:
    given = drawn.standard_normal((_ROWS, len(weight))).astype(np.float32)
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    added = 0 if bias is None else _constant(bias)
    attributes = {**node.attributes, "accuracy_level": ir.AttrInt64("accuracy_level", 0)}
    got = _run(node, attributes, 0, given)
    exact = given.astype(np.float64) @ weight + added
    return float((np.abs(got - exact) / (np.abs(given) @ np.abs(weight) + np.abs(added) + 1e-30)).max())


def _error_of_rows(node: ir.Node, weight: NDArray[np.float32], drawn: np.random.Generator) -> float:
    """Of a lookup in the table [N,K] whose transpose ``weight`` is; a last block that is filled up reaches beyond K."""
    got = _run(node, node.attributes, 1, np.arange(weight.shape[1]))[:, : len(weight)]
    return float(np.abs(got - weight.T).max() / (np.abs(weight).max() + 1e-30))


_ERRORS: dict[str, Callable[[ir.Node, NDArray[np.float32], np.random.Generator], float]] = {
    "MatMulNBits": _error,
    "GatherBlockQuantized": _error_of_rows,
    rows.PRODUCT: row_products.error,
}


def _run(node: ir.Node, attributes: Mapping[str, ir.Attr], place: int, given: NDArray[Any]) -> NDArray[np.float32]:
    """What the engine makes of ``given``, the input at ``place``, by ``node``'s constants."""
    dtype = ir.DataType.from_numpy(given.dtype)
    source = ir.Value(name="x", shape=ir.Shape(given.shape), type=ir.TensorType(dtype))
    constants = [None if value is None or index == place else _copy(value) for index, value in enumerate(node.inputs)]
    inputs = [source if index == place else value for index, value in enumerate(constants)]
    product = ir.Node(CONTRIB, node.op_type, inputs, list(attributes.values()))
    product.outputs[0].name, product.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [source],
        [product.outputs[0]],
        nodes=[product],
        initializers=[value for value in constants if value is not None],
        opset_imports={"": 24, CONTRIB: 1},
    )
    with tempfile.TemporaryDirectory(prefix="txopt-") as folder:
        path = Path(folder) / "product.onnx"
        ir.save(ir.Model(graph, ir_version=11), path)
        runner = Runner(path)
        return runner.array(runner.run({"x": given})["y"])


def _copy(value: ir.Value) -> ir.Value:
    """A constant's value for a graph of its own."""
    copied = ir.Tensor(_constant(value), name=value.name)
    return ir.Value(name=value.name, shape=copied.shape, type=ir.TensorType(copied.dtype), const_value=copied)


def _constant(value: ir.Value) -> NDArray[Any]:
    """The numbers of an operand, in float32 where they are floats stored in two bytes with a Cast behind."""
    cast = value.producer()
    stored = value if cast is None else cast.inputs[0]
    assert stored is not None, "a Cast has an input"
    assert stored.const_value is not None, "operands of a lowered product are constants"
    array: NDArray[Any] = stored.const_value.numpy()
    return array.astype(np.float32) if array.dtype.kind == "f" else array
