"""What tools fuse in one .onnx file: ``python -m txopt.benchmarks.fusers TOOL FILE HEADS WIDTH``, a line of JSON.

A process each: tools crash, and change what they imported. Counted are operators of attention and of norms in what a tool gives.
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

ATTENTION = ("Attention", "MultiHeadAttention", "GroupQueryAttention", "DecoderMaskedMultiHeadAttention")
NORMS = (
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
)


def txopt(file: Path, heads: int, width: int) -> Counter[str]:
    from txopt.exporter.foreign import optimize

    with tempfile.TemporaryDirectory() as folder:
        return Counter(optimize(file, Path(folder) / "out").operators)


def onnxruntime(file: Path, heads: int, width: int) -> Counter[str]:
    """onnxruntime.transformers.optimizer, the best of its model types."""
    from onnxruntime.transformers.optimizer import optimize_model

    found, problem = [], Exception()
    for model_type in ("bart", "t5", "bert"):
        try:
            model = optimize_model(str(file), model_type=model_type, num_heads=heads, hidden_size=width, opt_level=0)
            found.append(_count(model.model))
        except Exception as err:  # of a type that it does not expect
            problem = err
    if not found:
        raise problem
    return max(found, key=attention)


def onnxscript(file: Path, heads: int, width: int) -> Counter[str]:
    """onnxscript.rewriter.ort_fusions.optimize_for_ort."""
    import onnx_ir as ir
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    model = ir.load(file)
    result = optimize_for_ort(model)
    return _count(ir.to_proto(result[0] if isinstance(result, tuple) else result))


def onnxslim(file: Path, heads: int, width: int) -> Counter[str]:
    import onnx

    return _count(import_module("onnxslim").slim(onnx.load(file)))


TOOLS: dict[str, Callable[[Path, int, int], Counter[str]]] = {
    "txopt": txopt,
    "onnxruntime": onnxruntime,
    "onnxscript": onnxscript,
    "onnxslim": onnxslim,
}


def attention(operators: Counter[str]) -> int:
    return sum(operators[name] for name in ATTENTION)


def norms(operators: Counter[str]) -> int:
    return sum(operators[name] for name in NORMS)


def _count(proto: Any) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


def main() -> None:
    tool, file, heads, width = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr
    found = TOOLS[tool](Path(file), int(heads), int(width))
    answers.write(json.dumps({"attention": attention(found), "norms": norms(found), "nodes": found.total()}) + "\n")


if __name__ == "__main__":
    main()
