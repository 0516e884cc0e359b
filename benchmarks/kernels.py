"""Where ONNX Runtime spends its time in a file: seconds by operator, from the engine's own profile."""

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Products of matrices under all their names; the engine makes the last three of MatMul, Add and Transpose.
PRODUCTS = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "TransposeMatMul")
RUNS = 10


def seconds_by_operator(file: Path, feeds: Mapping[str, Any]) -> Counter[str]:
    """Kernel time of RUNS runs of the .onnx ``file`` on the CPU, after one that does not count."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for _ in range(RUNS + 1):
            session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    spent: Counter[str] = Counter()
    for event in kernels[len(kernels) // (RUNS + 1) :]:
        spent[event["args"]["op_name"]] += event["dur"] / 1e6
    return spent


def share_of_products(spent: Mapping[str, float]) -> float:
    """The part of all kernel time that goes into products of matrices."""
    return sum(spent.get(name, 0.0) for name in PRODUCTS) / sum(spent.values())
