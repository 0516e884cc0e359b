"""Which values of a graph are float32: files say it of most values, fusions leave some out."""

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass


def infer(model: ir.Model) -> None:
    """Gives every value of ``model`` that has no type the one that ONNX's inference finds; changed in place."""
    if all(value.type is not None for node in model.graph for value in node.outputs):
        return
    inferred = ShapeInferencePass()(model.clone()).model
    types = {value.name: value.type for node in inferred.graph for value in node.outputs}
    for node in model.graph:
        for value in node.outputs:
            value.type = value.type or types.get(value.name)


def is_float(value: ir.Value | None) -> bool:
    """Whether it holds float32."""
    return value is not None and value.dtype == ir.DataType.FLOAT


def floats_of(node: ir.Node) -> list[ir.Value]:
    """The float32 values that ``node`` reads; for what looks at shapes alone, none."""
    return [value for value in node.inputs if value is not None and is_float(value) and node.op_type not in SHAPES]


SHAPES = ("Shape", "Size")
