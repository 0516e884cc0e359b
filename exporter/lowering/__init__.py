"""From neutral graphs to what one engine runs best: the last step, a function of graph and precision for every target."""

from collections.abc import Callable

import onnx_ir as ir

from txopt.exporter.lowering import ort, ort_cuda

LOWERINGS: dict[str, Callable[[ir.Model, str], None]] = {
    "cpu": ort.lower_for_cpu,
    "cuda": ort_cuda.lower,
    "tensorrt": ort.lower_for_proof,  # what an engine is built from is lowered when it is built (tensorrt.py)
}
