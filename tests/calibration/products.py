"""Small graphs around products with weights, run by ONNX Runtime and by onnx's reference evaluator."""

from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = NDArray[Any]


def graph(
    *nodes: onnx.NodeProto,
    constants: Mapping[str, Array],
    inputs: Mapping[str, tuple[int, list[Any]]],
    outputs: tuple[str, ...] = ("y",),
) -> ir.Model:
    """A model of opset 24; ``inputs`` are (TensorProto type, shape) by name, outputs are float32."""
    made = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, *described) for name, described in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None, None]) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def rows(width: int) -> dict[str, tuple[int, list[Any]]]:
    """The input x float32 [B,T,width]."""
    return {"x": (TensorProto.FLOAT, ["B", "T", width])}


def node(operator: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    """``inputs`` separated by spaces."""
    return helper.make_node(operator, inputs.split(), [output], **attributes)


def linear(x: str, name: str, output: str) -> tuple[onnx.NodeProto, ...]:
    """MatMul with the constant NAME.weight and Add of NAME.bias."""
    product = f"{output}/product"
    return node("MatMul", f"{x} {name}.weight", product), node("Add", f"{product} {name}.bias", output)


def engine(model: ir.Model, *, as_written: bool = False, **feeds: Array) -> list[Array]:
    return opened(model, as_written=as_written).run(None, feeds)


def opened(model: ir.Model, *, as_written: bool = False, optimized: str | None = None) -> onnxruntime.InferenceSession:
    """On one thread; what the engine makes of the graph goes to the file ``optimized``."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized:
        options.optimized_model_filepath = optimized
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def reference(model: ir.Model, **feeds: Array) -> list[Array]:
    return ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)


def operators(model: ir.Model) -> list[str]:
    return [each.op_type for each in model.graph]
