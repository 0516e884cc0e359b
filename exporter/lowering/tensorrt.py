"""From an artifact's graphs to those that TensorRT 10.16, 11 and TensorRT-RTX build: typed, standard operators, one cache length.

1. What TensorRT does not take is refused: ONNX Runtime's own operators, codes with zero points, and of Attention what the parser drops
   or its builder ends the process at (``check``).
2. Where weights lie in bfloat16 and are widened, which is all that a CPU can do with them, the graph computes in bfloat16.
3. The self-attention buffers get their length: TensorRT updates a cache in place only where it is known.
4. A decoder also gives what a search reads of the last token's logits (choice.py).
5. Inputs that the graph does not read (an encoder's mask that is the decoder's) are given back as they came, or the parser drops them.

The rest TensorRT takes as it is: Attention on [B,L,H*D] and by head, explicit masks, norms that sum in float32, pairs of
QuantizeLinear and DequantizeLinear, float32 islands between Casts. Where it has no kernel for Attention (float32, odd head sizes), the
builder lets it take Attention apart; that is no edit of the graph.
"""

from collections.abc import Iterator

import onnx_ir as ir

from txopt.calibration.dtypes import infer
from txopt.calibration.halves import halve
from txopt.calibration.islands import counted_nodes, masks_of
from txopt.exporter.lowering.choice import add_choice, chooses
from txopt.runtime.errors import UsageError, explain

_UNTYPED = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv")
_SIGNED = (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN)
_MOST_PROBLEMS = 8
UNREAD = "unread/"  # before the name of an output that is an input which nothing reads


def lower(model: ir.Model, *, cache_length: int | None = None) -> ir.Model:
    """A lowered copy of an artifact's graph.

    Args:
        model: left alone; its weights may lie in their file.
        cache_length: S, of a decoder; None: there are no buffers.

    Raises:
        UsageError: the graph was lowered for another engine.
    """
    check(model)
    lowered = model.clone()
    if widen(lowered):
        infer(lowered)
        graph = lowered.graph
        halve(lowered, counted_nodes(graph, masks_of(graph)), to=ir.DataType.BFLOAT16)
    if cache_length is not None:
        fix_length(lowered, "S", cache_length)
        if not chooses(lowered):  # an artifact for cuda does already
            add_choice(lowered)
    _read_all(lowered.graph)
    return lowered


def _read_all(graph: ir.Graph) -> None:
    for value in graph.inputs:
        if not value.uses():
            node = ir.node("Identity", [value], name=f"{UNREAD}{value.name}")
            output = node.outputs[0]
            output.name, output.shape, output.type = f"{UNREAD}{value.name}", value.shape, value.type
            graph.append(node)
            graph.outputs.append(output)


def check(model: ir.Model) -> None:
    """UsageError, naming nodes, where the graph holds what TensorRT does not take."""
    problems = [problem for node in model.graph.all_nodes() for problem in _problems(node)]
    if problems:
        more = [f"and {len(problems) - _MOST_PROBLEMS} more such nodes"] if len(problems) > _MOST_PROBLEMS else []
        raise UsageError(
            explain(
                "this graph is not for TensorRT; take an artifact that was exported in fp32, fp16 or bf16, or quantized with --target "
                "tensorrt (others are lowered for ONNX Runtime):",
                [*problems[:_MOST_PROBLEMS], *more],
            )
        )


def _problems(node: ir.Node) -> Iterator[str]:
    if node.domain:
        yield f"{node.name}: {node.domain} {node.op_type} is no standard operator"
    elif node.op_type == "Attention":
        yield from (f"{node.name}: Attention with {what}; TensorRT does not take it" for what in _refused(node))
    elif node.op_type in _UNTYPED:
        yield f"{node.name}: {node.op_type} rounds activations as they come; TensorRT takes scales that are known"
    elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
        kind = zero.dtype if zero is not None else codes.dtype if codes is not None else None
        if kind is not None and kind not in _SIGNED:
            yield f"{node.name}: codes of {kind.name.lower()}; TensorRT takes signed ones"
        elif zero is not None and (zero.const_value is None or zero.const_value.numpy().astype("float32").any()):
            yield f"{node.name}: a zero point other than 0"


def _refused(attention: ir.Node) -> Iterator[str]:
    """What of a node TensorRT-RTX 1.7 drops, refuses, or ends the process at."""
    given = {key: attribute.value for key, attribute in attention.attributes.items()}
    inputs = [value is not None for value in (*attention.inputs, *[None] * 7)]
    if any(inputs[4:6]) or len(attention.outputs) > 1:
        yield "a cache of its own"
    if inputs[6]:
        yield "lengths of keys instead of a mask"
    if inputs[3] and given.get("is_causal"):
        yield "a mask and is_causal"
    if given.get("softcap"):
        yield "softcap"
    if "softmax_precision" in given:
        yield "softmax_precision"


def widen(model: ir.Model) -> bool:
    """Reads constants of bfloat16 as float32 without the Casts behind them (storage.py), in place; whether there were any."""
    graph, found = model.graph, False
    for node in [node for node in graph if node.op_type == "Cast" and node.outputs[0].dtype == ir.DataType.FLOAT]:
        stored = node.inputs[0]
        if stored is None or stored.const_value is None or stored.dtype != ir.DataType.BFLOAT16:
            continue
        found = True
        narrow, wide = stored.const_value, node.outputs[0]
        value = ir.Value(
            name=f"{stored.name}/whole",
            shape=ir.Shape(narrow.shape.numpy()),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=_widened(narrow, f"{stored.name}/whole"),
        )
        graph.initializers[str(value.name)] = value
        wide.replace_all_uses_with(value)
        graph.remove(node, safe=True)
        if not stored.uses():
            del graph.initializers[str(stored.name)]
    return found


def _widened(narrow: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: ir.Tensor(narrow.numpy().astype("float32"), name=name),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(narrow.shape.numpy()),
        name=name,
        cache=False,
    )


def fix_length(model: ir.Model, axis: str, length: int) -> None:
    """Gives the axis of this name its length wherever it is written, in place; what was computed from it is left to the engine."""
    values = [*model.graph.inputs, *model.graph.outputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_fixed(dim, axis, length) for dim in value.shape])


def _fixed(dim: int | ir.SymbolicDim, axis: str, length: int) -> int | str | None:
    if isinstance(dim, int):
        return dim
    return length if dim.value == axis else dim.value
