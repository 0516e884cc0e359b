"""Writes graphs to a directory with every weight once: one data file, shared by all graphs, tensors told apart by content and
dtype.

A tied embedding, or a weight that encoder and decoder share, has one place in the file. Small constants stay in the graphs, where
shape inference finds them. Large tensors begin at a page, so that engines can map them alone; between small ones that would be
mostly empty space.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

FILE = "weights.data"
INLINE_BYTES = 256
ALIGNMENT = 4096
LARGE = 1 << 16  # bytes of a tensor
_SMALL_ALIGNMENT = 64


def write(graphs: Mapping[str, ir.Model], directory: Path) -> int:
    """Writes NAME.onnx for each graph and ``weights.data``; gives the bytes of weights written.

    The models are changed: their large initializers now refer to the file.
    """
    places: dict[tuple[bytes, ir.DataType], tuple[int, int]] = {}
    with (directory / FILE).open("wb") as file:
        for graph in graphs.values():
            for value in graph.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < INLINE_BYTES:
                    continue
                data = tensor.tobytes()
                # Zeros of two dtypes are the same bytes and not the same tensor; TensorRT refuses to read one as the other.
                key = hashlib.sha256(data).digest(), tensor.dtype
                if key not in places:
                    step = ALIGNMENT if len(data) >= LARGE else _SMALL_ALIGNMENT
                    file.write(b"\0" * (-file.tell() % step))
                    places[key] = file.tell(), len(data)
                    file.write(data)
                offset, length = places[key]
                value.const_value = ir.ExternalTensor(
                    FILE,
                    offset,
                    length,
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=str(value.name),
                    base_dir=directory,
                )
    for name, graph in graphs.items():
        (directory / f"{name}.onnx").write_bytes(ir.to_proto(graph).SerializeToString(deterministic=True))
    return sum(length for _, length in places.values())
