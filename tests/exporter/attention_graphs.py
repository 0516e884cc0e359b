"""Small graphs around one attention, in the text form of ONNX, with whatever inputs and constants their nodes name."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.exporter.graph import count

Array = NDArray[Any]

# By head, as torch's modules lay them out, and with batch and heads in one axis.
INPUTS = {
    "q": "float[B,2,Q,4]",
    "k": "float[B,2,K,4]",
    "v": "float[B,2,K,4]",
    "k_by_token": "float[B,K,2,4]",
    "k_single": "float[1,2,K,4]",
    "k_one": "float[B,1,K,4]",
    "v_one": "float[B,1,K,4]",
    "q3": "float[N,Q,4]",
    "k3": "float[N,K,4]",
    "v3": "float[N,K,4]",
    "q5": "float[B,3,2,Q,4]",
    "k5": "float[B,3,2,K,4]",
    "v5": "float[B,3,2,K,4]",
    "k5_one": "float[B,3,1,K,4]",
    "v5_one": "float[B,3,1,K,4]",
    "bias5": "float[B,1,2,Q,K]",
    "bias": "float[B,1,Q,K]",
    "position": "float[1,2,Q,K]",
    "row": "float[B,1,1,K]",
    "plane": "float[Q,K]",
    "bias3": "float[N,Q,K]",
    "keep": "bool[B,1,Q,K]",
    "hide": "bool[B,1,1,K]",
    "rows": "int64[1]",
    "scale_by_row": "float[B,2,1,1]",
    "row_scale": "float[Q,1]",
    "scale3": "float[N,1,1]",
    "scale5": "float[B,3,1,1,1]",
    "turned": "float[B,1,K,Q]",
    "turned3": "float[N,K,Q]",
    "turned_keep": "bool[B,1,K,Q]",
    "hide_column": "bool[B,1,K,1]",
    "queries": "float[Q]",
    "sinks": "float[B,2,Q,1]",
}
SIZES = {"B": 2, "N": 4, "Q": 3, "K": 5}

CONSTANTS: dict[str, Array] = {
    "half": np.array(0.5, np.float32),
    "root_half": np.array([0.5**0.5], np.float32),
    "two": np.array(2, np.float32),
    "one": np.array(1, np.float32),
    "logit_scale": np.array([0.5, -1.5], np.float32).reshape(2, 1, 1),
    "scale_by_head": np.array([2, 0.25], np.float32).reshape(1, 2, 1, 1),
    "last_heads": np.array([2, 0.25], np.float32),
    "scale32": np.array([2, 0.25], np.float32).reshape(2, 1, 1),
    "minus": np.array(-0.5, np.float32),
    "zero": np.array(0, np.float32),
    "lowest": np.array(np.finfo(np.float32).min, np.float32),
    "most": np.array(np.finfo(np.float32).max, np.float32),
    "infinite": np.array(-np.inf, np.float32),
    "billion": np.array(-1e9, np.float32),
    "thousands": np.array(-1e4, np.float32),
    "no": np.array(False),
    "yes": np.array(True),
    "ratio": np.array(0.1, np.float32),
    "keys": np.array([-1], np.int64),
    "by_head": np.array([-1, 2, 3, 5], np.int64),
    "by_known": np.array([2, 2, -1, 5], np.int64),
    "joined": np.array([-1, 3, 5], np.int64),
    "wrongly": np.array([-1, 2, 5, 3], np.int64),
    "shape_k3": np.array([-1, 5, 4], np.int64),
    "shape_kt": np.array([2, 2, 4, 5], np.int64),
    "turned_heads": np.array([-1, 2, 5, 3], np.int64),
    "turned_joined": np.array([-1, 5, 3], np.int64),
    "first": np.array([0], np.int64),
    "last_one": np.array([-1], np.int64),
    "rows_axis": np.array([2], np.int64),
    "weight": np.linspace(-1, 1, 20, dtype=np.float32).reshape(4, 5),
    "values": np.linspace(-1, 1, 20, dtype=np.float32).reshape(5, 4),
    "head_mask": np.array([1, 0.5], np.float32).reshape(1, 2, 1, 1),
}


def model(nodes: str, dtype: str = "float") -> ir.Model:
    words = set(nodes.replace("(", " ").replace(")", " ").replace(",", " ").split())
    inputs = {name: kind.replace("float", dtype) for name, kind in INPUTS.items() if name in words}
    if "any" in words:
        inputs["any"] = "int64[M]"
    header = ", ".join(f"{kind} {name}" for name, kind in inputs.items())
    axes = "a,b,c" if "v3" in words else "a,b,c,d,e" if {"v5", "v5_one"} & words else "a,b,c,d"
    text = f'<ir_version: 10, opset_import: ["" : 24]> attention ({header}) => ({dtype}[{axes}] y) {{ {nodes} }}'
    proto = onnx.parser.parse_model(text)
    for index, node in enumerate(proto.graph.node):
        node.name = f"block/{node.op_type}_{index}"
    for name in sorted(words & CONSTANTS.keys()):
        value = CONSTANTS[name]
        if value.dtype == np.float32 and dtype == "float16" and name not in ("ratio", "lowest", "most", "scale32"):
            value = value.astype(np.float16)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def feeds(graph: ir.Model) -> dict[str, Array]:
    """Random inputs; every query keeps its first key, but for query 1, which keeps none where a guard looks after it."""
    source = np.random.default_rng(0)
    zero = graph.graph.initializers.get("zero")
    again = zero is not None and any(node.op_type == "Where" for node, _ in zero.uses())
    guarded = again or {"IsNaN", "ReduceMin", "ReduceMax"} & count(graph).keys()
    arrays: dict[str, Array] = {}
    for value in graph.graph.inputs:
        name, kind = str(value.name), INPUTS[str(value.name)]
        shape = [SIZES.get(axis) or int(axis) for axis in kind.partition("[")[2].rstrip("]").split(",")]
        if kind.startswith("bool"):
            arrays[name] = source.random(shape) < 0.6
            arrays[name][..., 0] = name == "keep"
            if name == "turned_keep":
                arrays[name][..., 0, :] = True
            if name == "hide_column":
                arrays[name][..., 0, :] = False
            if guarded and name == "keep":
                arrays[name][:, :, 1] = False
        else:
            arrays[name] = source.normal(size=shape).astype(value.dtype.numpy() if value.dtype else np.float32)
            if name == "rows":
                arrays[name] += 2
    return arrays
