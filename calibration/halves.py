"""A float32 graph made one of float16 or bfloat16, but for its islands; and what such a graph means, spelled out in float32.

Weights are stored in the half, also those that islands read, if it holds them; graph inputs and outputs are of it but for the logits,
for what stays float32 by choice (``wide``), and for integers. Casts stand where half and float32 meet, one for each value.

ONNX Runtime's converter (onnxruntime.transformers.float16) is not used: it casts between any two nodes that are kept in float32, so
that an island overflows within; it clamps weights that are too large and lifts those that are too small, and says nothing; what its
type inference does not know, it leaves as it is.

Owns both edits. Which nodes are islands is islands.py's.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.dtypes import SHAPES, is_float
from txopt.calibration.islands import LARGEST, holds
from txopt.calibration.linears import LEAST_SIZE

LOGITS = "logits"  # float32 in every artifact
_WHOLE = ir.DataType.FLOAT
_LARGEST = {ir.DataType.FLOAT16: LARGEST, ir.DataType.BFLOAT16: (2 - 2.0**-7) * 2.0**127}
_SUFFIX = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16", _WHOLE: "float32"}


def halve(
    model: ir.Model,
    keep: Collection[ir.Node],
    *,
    wide: Collection[str] = (),
    to: ir.DataType = ir.DataType.FLOAT16,
) -> None:
    """Makes ``model``, whose values have types (dtypes.infer), one of ``to`` (FLOAT16 or BFLOAT16), in place.

    Args:
        model: in float32.
        keep: its nodes that compute in float32.
        wide: names of inputs and outputs that stay float32.
    """
    graph = model.graph
    floats = [node for node in graph if _touches(node)]
    for value in graph.inputs:
        if is_float(value) and value.name not in wide:
            value.type = ir.TensorType(to)
    for weight in graph.initializers.values():
        if is_float(weight) and _stored_in_half(weight, keep, to):
            _narrow(weight, to)
    for node in floats:
        if node in keep:
            continue
        for value in node.outputs:
            if is_float(value):
                value.type = ir.TensorType(to)
        if node.op_type == "Cast" and node.attributes["to"].as_int() == _WHOLE:
            node.attributes["to"] = ir.AttrInt64("to", to)
        if node.op_type == "ConstantOfShape" and node.outputs[0].dtype == to and "value" in node.attributes:
            number = rounded(node.attributes["value"].as_tensor().numpy(), to)
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(number))
    casts: dict[ir.Value, ir.Value] = {}
    for node in floats:
        wanted = _WHOLE if node in keep else to
        for index, read in enumerate(node.inputs):
            if read is not None and read.dtype in _SUFFIX and read.dtype != wanted and node.op_type not in SHAPES:
                node.replace_input_with(index, _cast(graph, read, wanted, casts, _SUFFIX[wanted]))
    for index, output in enumerate(graph.outputs):
        wanted = _WHOLE if output.name in (LOGITS, *wide) else to
        if output.dtype in _SUFFIX and output.dtype != wanted:
            graph.outputs[index] = _renamed(graph, output, wanted)


def spell_out(model: ir.Model, dtype: ir.DataType = ir.DataType.FLOAT16) -> None:
    """Every node of ``model`` in ``dtype`` (FLOAT16 or BFLOAT16) in float32 between Casts of its own: summed in float32, stored in it.

    That is what GPUs do. ONNX Runtime's CPU provider runs float16 so too, but takes away the Casts between neighbours, so that a value
    that overflows on a GPU does not there; Casts that are written in the graph stay. bfloat16 it does not run but for Casts.
    """
    graph = model.graph
    casts: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type in ("Cast", *SHAPES):
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == dtype:
                node.replace_input_with(index, _cast(graph, value, _WHOLE, casts, "read"))
        for value in [value for value in node.outputs if value.dtype == dtype]:
            _store(graph, node, value, dtype)


def rounded(array: NDArray[np.float32], to: ir.DataType = ir.DataType.FLOAT16) -> NDArray[Any]:
    """The nearest numbers of ``to`` (FLOAT16 or BFLOAT16); what is finite stays finite (the fills of masks)."""
    dtype = to.numpy()
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    lost = np.isinf(narrow.astype(np.float32)) & np.isfinite(array)
    return np.where(lost, np.copysign(np.float32(_LARGEST[to]), array).astype(dtype), narrow)


def _touches(node: ir.Node) -> bool:
    return any(is_float(value) for value in (*node.inputs, *node.outputs))


def _stored_in_half(value: ir.Value, keep: Collection[ir.Node], to: ir.DataType) -> bool:
    """Whether a node outside of islands reads the constant, or it is a weight that ``to`` holds."""
    tensor = value.const_value
    if tensor is None or value.is_graph_output():
        return False
    if any(user not in keep and user.op_type not in SHAPES for user, _ in value.uses()):
        return True
    return tensor.size >= LEAST_SIZE and (to == ir.DataType.BFLOAT16 or holds(tensor.numpy()))


def _narrow(value: ir.Value, to: ir.DataType) -> None:
    whole = value.const_value
    assert whole is not None, "a constant"
    name = str(value.name)
    value.const_value = ir.LazyTensor(
        lambda: ir.Tensor(rounded(whole.numpy(), to), dtype=to, name=name),
        dtype=to,
        shape=ir.Shape(whole.shape.numpy()),
        name=name,
        cache=False,
    )
    value.type = ir.TensorType(to)


def _cast(graph: ir.Graph, value: ir.Value, to: ir.DataType, casts: dict[ir.Value, ir.Value], label: str) -> ir.Value:
    """``value`` in the other type, cast once, right behind whatever makes it."""
    if value not in casts:
        name = f"{value.name}/{label}"
        node = ir.node("Cast", [value], attributes={"to": to}, name=name)
        cast = node.outputs[0]
        cast.name, cast.shape, cast.type = name, value.shape, ir.TensorType(to)
        producer = value.producer()
        if producer is None:
            graph.insert_before(next(iter(graph)), node)
        else:
            graph.insert_after(producer, node)
        casts[value] = cast
    return casts[value]


def _renamed(graph: ir.Graph, value: ir.Value, to: ir.DataType) -> ir.Value:
    """The graph's output of ``value``'s name, in the other type; ``value`` itself gets another name."""
    name = str(value.name)
    value.name = f"{name}/computed"
    node = ir.node("Cast", [value], attributes={"to": to}, name=f"{name}/output")
    output = node.outputs[0]
    output.name, output.shape, output.type = name, value.shape, ir.TensorType(to)
    graph.append(node)
    return output


def _store(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> None:
    """``node`` gives float32, and ``value``'s name and readers go to what a Cast to ``dtype`` makes of it."""
    name = value.name
    cast = ir.node("Cast", [value], attributes={"to": dtype}, name=f"{name}/stored")
    stored = cast.outputs[0]
    stored.shape, stored.type = value.shape, value.type
    value.replace_all_uses_with(stored, replace_graph_outputs=True)
    cast.replace_input_with(0, value)
    value.name, value.type, stored.name = f"{name}/computed", ir.TensorType(_WHOLE), name
    graph.insert_after(node, cast)
