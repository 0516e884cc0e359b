"""Static products: pairs of QuantizeLinear and DequantizeLinear around every product with a weight, standard ONNX for every engine.

MatMul(x, W) becomes MatMul(DQ(Q(x)), DQ(codes)): x in 8 bits (formats.py) with one scale, known beforehand, for the whole tensor; W
in 8 bits with one scale for each output. A tensor has one pair, which all products that read it share. A table [V,M] has a scale for
each row, which is an output of its head, and a token's. Zero points are 0: TensorRT takes no others. Products of attention stay in
float, as do convolutions.

TensorRT advises to quantize the inputs of weighted operations and not their outputs
(https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html, "Q/DQ
Layer-Placement Recommendations"). It also advises to quantize the residual input of a sum, where the sum is rounded afterwards, as
those of convolutional networks are: then the product's kernel writes the codes. A Transformer's sum goes to a norm, which is in float.

Owns the edit of the graph. Where activations are clipped is activations.py's.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from txopt.calibration.channels import per_channel
from txopt.calibration.formats import INT8, Format
from txopt.calibration.linears import Role, reads
from txopt.calibration.quantize import constant
from txopt.runtime.errors import InputError, explain

_ZERO = "static/zero"


@dataclass(frozen=True, kw_only=True)
class Placed:
    """How many tensors got a pair, how many weights codes, and the products that stay in float."""

    activations: int
    weights: int
    numbers: int
    floats: tuple[str, ...]


def activations(graph: ir.Graph, *, keep: Collection[str] = ()) -> list[str]:
    """The names of the tensors that ``place`` needs a range of."""
    return [str(value.name) for value in _multiplied(graph, keep)]


def place(graph: ir.Graph, amax: Mapping[str, float], codes: Format = INT8, *, keep: Collection[str] = ()) -> Placed:
    """Puts the pairs into ``graph``, and codes in the place of weights.

    Args:
        graph: changed in place; the float weights are gone from it afterwards.
        amax: the largest magnitude that codes hold, by tensor.
        codes: what they are.
        keep: names of weights whose products stay in float.

    Raises:
        InputError: a tensor has no range. SourceError: a weight is not finite.
    """
    multiplied = _multiplied(graph, keep)
    missing = [f"{value.name}" for value in multiplied if value.name not in amax]
    if missing:
        raise InputError(explain("these tensors have no range; calibrate again, on this graph:", missing))
    numbers = 0
    weights = {read.weight: read.role for read in reads(graph) if read.name not in keep}
    for weight, role in weights.items():
        assert weight.const_value is not None, "reads() gives no others"
        numbers += weight.const_value.size
        _dequantize(graph, weight, role, codes)
    for value, products in multiplied.items():
        _pair(graph, value, codes, amax[str(value.name)], products)
    floats = sorted({read.name for read in reads(graph) if read.role is not Role.TABLE})
    return Placed(activations=len(multiplied), weights=len(weights), numbers=numbers, floats=tuple(floats))


def _multiplied(graph: ir.Graph, keep: Collection[str]) -> dict[ir.Value, list[ir.Node]]:
    """The tensors that get a pair, each with the products that read it."""
    found: dict[ir.Value, list[ir.Node]] = {}
    for read in reads(graph):
        if read.activations is not None and read.name not in keep:
            found.setdefault(read.activations, []).append(read.node)
    return found


def _dequantize(graph: ir.Graph, weight: ir.Value, role: Role, codes: Format) -> None:
    assert weight.const_value is not None, "reads() gives no others"
    table = role is not Role.LINEAR
    matrix = weight.const_value.numpy()
    channels = per_channel(matrix.T if table else matrix, codes, name=str(weight.name))
    stored = np.ascontiguousarray(channels.codes.T) if table else channels.codes
    inputs = [
        constant(graph, f"{weight.name}/codes", ir.Tensor(stored)),
        constant(graph, f"{weight.name}/scales", ir.Tensor(channels.scales)),
    ]
    if codes is INT8:
        # Left out, they would mean the same; but then ONNX Runtime puts one in that all weights share, and cannot make these unsigned.
        zeros = np.full(channels.scales.shape, codes.zero())
        inputs.append(constant(graph, f"{weight.name}/zeros", ir.Tensor(zeros)))
    axis = 0 if table else 1
    node = ir.node("DequantizeLinear", inputs, attributes={"axis": axis}, name=f"{weight.name}/dequantize")
    node.outputs[0].name = f"{weight.name}/rounded"
    node.outputs[0].shape, node.outputs[0].type = weight.shape, weight.type
    graph.insert_before(next(iter(graph)), node)
    weight.replace_all_uses_with(node.outputs[0])
    del graph.initializers[str(weight.name)]


def _pair(graph: ir.Graph, value: ir.Value, codes: Format, amax: float, products: list[ir.Node]) -> None:
    scale = constant(graph, f"{value.name}/scale", ir.Tensor(np.array(codes.scale(amax))))
    zero = constant(graph, _ZERO, ir.Tensor(codes.zero()))
    quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{value.name}/quantize")
    coded = quantize.outputs[0]
    coded.name, coded.shape, coded.type = f"{value.name}/codes", value.shape, ir.TensorType(codes.dtype)
    dequantize = ir.node("DequantizeLinear", [coded, scale, zero], name=f"{value.name}/dequantize")
    rounded = dequantize.outputs[0]
    rounded.name, rounded.shape, rounded.type = f"{value.name}/rounded", value.shape, value.type
    producer = value.producer()
    if producer is None:
        graph.insert_before(next(iter(graph)), [quantize, dequantize])
    else:
        graph.insert_after(producer, [quantize, dequantize])
    for product in products:
        product.replace_input_with(0, rounded)
