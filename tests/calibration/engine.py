"""One operator over packed blocks, run by ONNX Runtime and by onnx's reference evaluator."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from txopt.calibration.packing import Packed


def model(operator: str, packed: Packed, **inputs: NDArray[Any]) -> onnx.ModelProto:
    """A graph of one node: MatMulNBits reads x before the weight, GatherBlockQuantized the indices behind its codes."""
    names = ["codes", "scales", "zeros"][: len(packed.inputs)]
    initializers = []
    for name, tensor in zip(names, packed.inputs, strict=True):
        proto = ir.to_proto(tensor)
        proto.name = name
        initializers.append(proto)
    names[{"MatMulNBits": 0, "GatherBlockQuantized": 1}.get(operator, 0) : 0] = inputs
    domain = "" if operator == "DequantizeLinear" else "com.microsoft"
    node = onnx.helper.make_node(operator, names, ["y"], domain=domain, **packed.attributes)
    graph = onnx.helper.make_graph(
        [node],
        operator,
        [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in inputs.items()
        ],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        initializers,
    )
    opsets = [onnx.helper.make_opsetid("", 24), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=11)


def onnx_runtime(operator: str, packed: Packed, **inputs: NDArray[Any]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    graph = model(operator, packed, **inputs).SerializeToString()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def reference(operator: str, packed: Packed, **inputs: NDArray[Any]) -> NDArray[np.float32]:
    return ReferenceEvaluator(model(operator, packed, **inputs)).run(None, inputs)[0]
