"""Small graphs, and the two that run them: ONNX Runtime, and onnx's reference evaluator.

Written as text (``parsed``), out of nodes (``graph``), or as one operator over packed blocks (``single``).
"""

from collections.abc import Mapping
from typing import Any

import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from txopt.calibration.blocks import Blocks, BlockScheme
from txopt.calibration.linears import Role, reads
from txopt.calibration.packing import Packed
from txopt.calibration.quantize import put
from txopt.calibration.rounding import round_to_nearest
from txopt.runtime.backends import ort_session

Array = NDArray[Any]

INT8, INT4 = BlockScheme(bits=8, block=64), BlockScheme(bits=4, block=32)
SCHEMES = [
    BlockScheme(bits=s.bits, block=s.block, symmetric=symmetric) for s in (INT8, INT4) for symmetric in (True, False)
]

_OPSETS = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
_HEADER = '<ir_version: 11, opset_import: ["": 24]> '


def parsed(text: str, **weights: Array) -> ir.Model:
    """``text``: "(inputs) => (outputs) { nodes }"; ``weights`` by the names that the nodes read."""
    proto = onnx.parser.parse_model(f"{_HEADER}tiny {text}")
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return ir.from_proto(proto)


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
    proto = helper.make_model(made, opset_imports=_OPSETS[:1], ir_version=11)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def single(operator: str, packed: Packed, **inputs: Array) -> ir.Model:
    """One node: MatMulNBits reads x before the weight, GatherBlockQuantized the indices behind its codes."""
    names = ["codes", "scales", "zeros"][: len(packed.inputs)]
    initializers = []
    for name, tensor in zip(names, packed.inputs, strict=True):
        proto = ir.to_proto(tensor)
        proto.name = name
        initializers.append(proto)
    names[{"MatMulNBits": 0, "GatherBlockQuantized": 1}.get(operator, 0) : 0] = inputs
    domain = "" if operator == "DequantizeLinear" else "com.microsoft"
    made = helper.make_graph(
        [helper.make_node(operator, names, ["y"], domain=domain, **packed.attributes)],
        operator,
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in inputs.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    return ir.from_proto(helper.make_model(made, opset_imports=_OPSETS, ir_version=11))


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


def rounded(model: ir.Model, scheme: BlockScheme) -> dict[str, Blocks]:
    """Puts every weight that can be quantized into blocks; gives them by name."""
    found: dict[str, Blocks] = {}
    for read in reads(model.graph):
        assert read.weight.const_value is not None
        matrix = read.weight.const_value.numpy()
        found[read.name] = round_to_nearest(matrix if read.role is Role.LINEAR else matrix.T, scheme)
    put(model.graph, found)
    return found


def engine(model: ir.Model, *, as_written: bool = False, **feeds: Array) -> list[Array]:
    """What ONNX Runtime gives."""
    return opened(model, as_written=as_written).run(None, feeds)


def opened(model: ir.Model, *, as_written: bool = False, optimized: str | None = None) -> onnxruntime.InferenceSession:
    """On one thread; what the engine makes of the graph goes to the file ``optimized``."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    for key, value in ort_session.CONFIGURATION.items():  # as the runner opens it
        options.add_session_config_entry(key, value)
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if optimized:
        options.optimized_model_filepath = optimized
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=ort_session.DISABLED,
    )


def reference(model: ir.Model, **feeds: Array) -> list[Array]:
    """What onnx's own evaluator gives."""
    return ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)


def operators(model: ir.Model) -> list[str]:
    """One entry a node, in their order."""
    return [each.op_type for each in model.graph]
