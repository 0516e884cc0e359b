"""Small graphs with weights, written as text, and ONNX Runtime to run them: what put, unfold and the lowerings are tried on."""

from collections.abc import Mapping
from typing import Any

import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from txopt.calibration.blocks import Blocks, BlockScheme
from txopt.calibration.linears import Role, reads
from txopt.calibration.quantize import put
from txopt.calibration.rounding import round_to_nearest

INT8, INT4 = BlockScheme(bits=8, block=64), BlockScheme(bits=4, block=32)
SCHEMES = [
    BlockScheme(bits=s.bits, block=s.block, symmetric=symmetric) for s in (INT8, INT4) for symmetric in (True, False)
]

_HEADER = '<ir_version: 11, opset_import: ["": 24]> '


def graph(text: str, **weights: NDArray[Any]) -> ir.Model:
    """``text``: "(inputs) => (outputs) { nodes }"; ``weights`` by the names that the nodes read."""
    proto = onnx.parser.parse_model(f"{_HEADER}tiny {text}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
    return ir.from_proto(proto)


def rounded(model: ir.Model, scheme: BlockScheme) -> dict[str, Blocks]:
    """Puts every weight that can be quantized into blocks; gives them by name."""
    found: dict[str, Blocks] = {}
    for read in reads(model.graph):
        assert read.weight.const_value is not None
        matrix = read.weight.const_value.numpy()
        found[read.name] = round_to_nearest(matrix if read.role is Role.LINEAR else matrix.T, scheme)
    put(model.graph, found)
    return found


def run(model: ir.Model, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs: list[NDArray[Any]] = session.run(None, dict(feeds))
    return outputs


def operators(model: ir.Model) -> list[str]:
    """Sorted, one entry a node."""
    return sorted(node.op_type for node in model.graph)
