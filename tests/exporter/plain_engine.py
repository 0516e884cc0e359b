"""ONNX Runtime without any of its own fusions, which would do to a graph what a rule under test should do."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray


def run(model: ir.Model, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """All outputs of ``model``; feeds that it does not ask for are left out."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    asked = {item.name for item in session.get_inputs()}
    results: list[NDArray[Any]] = session.run(None, {name: value for name, value in feeds.items() if name in asked})
    return results


def scale_attention(graph: ir.Model, factor: float) -> None:
    for node in graph.graph:
        if node.op_type == "Attention":
            node.attributes["scale"] = ir.AttrFloat32("scale", node.attributes["scale"].as_float() * factor)
