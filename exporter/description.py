"""What is in .onnx files, as a document for those who look at them: no conversion, and no complaint."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from txopt.exporter import structure
from txopt.exporter.onnx_file import elements, external, nodes, operator, opset, tensors


def of_file(proto: onnx.ModelProto, path: Path) -> dict[str, Any]:
    """What is in the file, as it is."""
    graph = proto.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    files = {place for tensor in tensors(proto) if (place := external(tensor).get("location"))}
    files.discard(path.name)  # its own weights, which were left where they are
    beside = [path.parent / file for file in sorted(files) if (path.parent / file).is_file()]
    return {
        "bytes": path.stat().st_size + sum(file.stat().st_size for file in beside),
        "external_data": sorted(files),
        "ir_version": proto.ir_version,
        "opset": opset(proto),
        "producer": f"{proto.producer_name} {proto.producer_version}".strip(),
        "inputs": [_value(value) for value in graph.input if value.name not in weights],
        "outputs": [_value(value) for value in graph.output],
        "nodes": sum(1 for _ in nodes(graph)),
        "operators": dict(sorted(Counter(map(operator, nodes(graph))).items())),
        "parameters": sum(elements(tensor) for tensor in weights.values()),
        "layers": [layer.to_json() for layer in structure.layers([structure.of_proto(proto)])],
    }


def picture(before: onnx.ModelProto, after: ir.Model | None) -> dict[str, Any]:
    """One graph by layers, before and after its fusions (None: that cannot be told), and its weights as they were before.

    Returns {"graphs": {"": {"before": rows, "after": rows or None}}, "layers", "weights"}; see ``structure``.
    """
    graph = structure.of_proto(before)
    after_rows = None if after is None else structure.rows(structure.of_model(after), structure.places(graph))
    return {"graphs": {"": {"before": structure.rows(graph), "after": after_rows}}, **_weights([graph])}


def stored(protos: Mapping[str, onnx.ModelProto]) -> dict[str, Any]:
    """Several graphs of one model, as ``picture`` gives them, that share weights; what they were before is not known."""
    graphs = {name: structure.of_proto(proto) for name, proto in protos.items()}
    rows = {name: {"before": None, "after": structure.rows(graph)} for name, graph in graphs.items()}
    return {"graphs": rows, **_weights([*graphs.values()])}


def _weights(graphs: list[structure.Graph]) -> dict[str, Any]:
    layers = structure.layers(graphs)
    return {"layers": [layer.to_json() for layer in layers], "weights": structure.weights(layers)}


def _value(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return {"name": value.name, "dtype": kind, "shape": None}
    tensor = value.type.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim]
    known = tensor.elem_type in ir.DataType.__members__.values()
    dtype = ir.DataType(tensor.elem_type).name.lower() if known else str(tensor.elem_type)
    return {"name": value.name, "dtype": dtype, "shape": dims if tensor.HasField("shape") else None}
