"""What ONNX Runtime's CUDA provider runs best: what every provider of it needs (ort.py), and a decoder that chooses on the GPU.

No node that waits for numbers goes to the CPU then, so that the steps of a decoder can be recorded as CUDA graphs
(``python -m txopt.benchmarks.cuda`` counts them). Its ReduceLogSumExp is cuDNN's alone, which it does without otherwise, so the sum
comes from LogSoftmax.
"""

import onnx_ir as ir

from txopt.exporter.graph import integers
from txopt.exporter.lowering import ort
from txopt.exporter.lowering.choice import LOGITS, add_choice, chooses


def lower(model: ir.Model, precision: str) -> None:
    """Changes ``model`` in place."""
    ort.lower(model, precision)
    if any(value.name == LOGITS for value in model.graph.outputs) and _has_cache(model) and not chooses(model):
        add_choice(model, _log_sum)


def _has_cache(model: ir.Model) -> bool:
    return any(str(value.name).startswith("self_") for value in model.graph.inputs)


def _log_sum(graph: ir.Graph, logits: ir.Value, values: ir.Value, tokens: ir.Value) -> list[ir.Node]:
    """Of the likeliest token: logit - (logit - log sum exp)."""
    one = integers(graph, [1])
    normal = ir.node("LogSoftmax", [logits], attributes={"axis": 1}, name="choice/log_softmax")
    token, value = (
        ir.node("Slice", [rows, integers(graph, [0]), one, one], name=f"choice/likeliest_{name}")
        for name, rows in (("token", tokens), ("value", values))
    )
    score = ir.node(
        "GatherElements", [normal.outputs[0], token.outputs[0]], attributes={"axis": 1}, name="choice/score"
    )
    total = ir.node("Sub", [value.outputs[0], score.outputs[0]], name="choice/total")
    return [normal, token, value, score, total, ir.node("Squeeze", [total.outputs[0], one], name="choice/log_sum")]
