"""Float32 constants kept in two bytes each, where nothing is lost by it, and widened when the file is loaded."""

import ml_dtypes
import numpy as np
import onnx_ir as ir

_NUMPY = {ir.DataType.BFLOAT16: ml_dtypes.bfloat16, ir.DataType.FLOAT16: np.float16}


def store(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Initializers float32 of which ``dtype`` (FLOAT16 or BFLOAT16) holds every number become of that type, with a Cast behind.

    Engines fold the Cast while they load. What would lose something by it was kept wide on purpose, or computed by a trace.
    """
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < 2 or value.is_graph_output():
            continue
        with np.errstate(over="ignore"):  # infinite, and so not equal
            narrow = tensor.numpy().astype(_NUMPY[dtype])
        if not np.array_equal(narrow.astype(np.float32), tensor.numpy(), equal_nan=True):
            continue
        value.const_value = ir.Tensor(narrow, dtype=dtype, name=value.name)
        uses, value.type = list(value.uses()), ir.TensorType(dtype)
        cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}, name=f"{value.name}/widened")
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(ir.DataType.FLOAT)
        graph.insert_before(next(iter(graph)), cast)
        for user, index in uses:
            user.replace_input_with(index, cast.outputs[0])
