"""A whole-sequence decoder of another exporter, as a graph over buffers: one graph for prefill and steps.

    self-attention    K and V of the new tokens go into buffers (TensorScatter at ``position``), which Attention then reads
    cross-attention   K and V depend on the source alone: the encoder graph makes them (``cross_part``), here they are inputs;
                      beams fold into queries
    positions, masks  of the length alone: tables (target_tables.py), read at ``position``

The written-out attention must be ``Attention`` nodes already, and lengths plain (measured.py). Names and axes are those of
docs/format.md. Knows no model family.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from txopt.exporter import target_tables
from txopt.exporter.graph import integers
from txopt.exporter.measured import Kind, Reading, kinds
from txopt.runtime.errors import SourceError, explain
from txopt.runtime.graphs import Axes

TOKENS, MEMORY, MASK, LOGITS = "input_ids", "encoder_hidden_states", "encoder_attention_mask", "logits"

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The attentions of a decoder, in the order of its layers."""

    own: tuple[ir.Node, ...]
    cross: tuple[ir.Node, ...]


def blocks(graph: ir.Graph, reading: Reading) -> Blocks:
    """Which Attention nodes read the tokens' K and V and which the source's.

    Raises:
        SourceError: there are not as many of one as of the other, or one reads neither.
    """
    found = kinds(graph, reading.roles)
    own, cross, problems = [], [], []
    for node in graph:
        if node.op_type != "Attention":
            continue
        kind = {found[value] for value in node.inputs[1:3] if value is not None}
        if kind == {Kind.TOKENS}:
            own.append(node)
        elif kind == {Kind.SOURCE}:
            cross.append(node)
        else:
            problems.append(f"{node.name}: expected K and V of the tokens or of the source, found neither")
    if not own or len(own) != len(cross):
        problems.append(f"expected self- and cross-attention in turn, found {len(own)} and {len(cross)}")
    for node in graph:
        if node.op_type == "Softmax":
            problems.append(f"{node.name}: this softmax is part of no attention that was recognised")
        elif node.op_type == "CumSum" and found[node.outputs[0]] is Kind.TOKENS:
            problems.append(
                f"{node.name} counts positions from all tokens so far (M2M100 and NLLB do), which a step does not see; "
                "export the checkpoint itself"
            )
    if problems:
        raise SourceError(explain("the decoder's attention cannot be given a cache:", problems))
    return Blocks(own=tuple(own), cross=tuple(cross))


def cross_part(graph: ir.Graph, found: Blocks) -> ir.Graph:
    """From MEMORY alone to K and V of every cross-attention, [B,H,T,D] each, as a graph of its own."""
    values = [value for node in found.cross for value in node.inputs[1:3]]
    part = ir.convenience.extract(graph, [MEMORY], [str(value.name) for value in values if value is not None])
    outputs = {str(value.name): value for value in part.outputs}
    part.outputs[:] = [outputs[str(value.name)] for value in values if value is not None]
    return part


def rewrite(model: ir.Model, found: Blocks, reading: Reading, *, limit: int | None, heads: int, size: int) -> None:
    """Changes ``model`` in place: the decoder of docs/format.md.

    Raises:
        SourceError: positions or masks that are not what a causal decoder's are; a source that is needed for more than K and V.
    """
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    tables = _tables(graph, reading, limit)
    masks = _self_masks(graph, found, reading, limit)
    _check_source_masks(graph, found, reading)
    new = _Inputs(graph, inputs, len(found.own), heads, size)
    first = next(iter(graph))
    ops = ir.tape.Tape()
    positions = _positions(ops, graph, new)
    for number, (value, table) in enumerate(tables):
        _read_at(ops, graph, value, table, positions, f"positions/{number}")
    seen = {key: _mask(ops, graph, new, positions, mask) for key, mask in masks.items()}
    fold = _Fold(ops, graph, new, heads, size)
    graph.insert_before(first, list(ops.nodes))
    presents = []
    for layer, node in enumerate(found.own):
        presents += _self_attention(graph, node, new.own[layer], new.position, seen[node.inputs[3]])
    for layer, node in enumerate(found.cross):
        _cross_attention(graph, node, new.cross[layer], fold)
    for index, value in enumerate(presents):
        value.name = f"present_{('key', 'value')[index % 2]}.{index // 2}"
    graph.outputs[:] = [next(value for value in graph.outputs if value.name == LOGITS), *presents]
    graph.inputs[:] = new.all
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    _check_closed(graph, inputs)


class _Inputs:
    """The decoder's inputs in the order of docs/format.md; those that were there keep their values."""

    def __init__(self, graph: ir.Graph, old: dict[str, ir.Value], layers: int, heads: int, size: int) -> None:
        self.tokens, self.mask = old[TOKENS], old.get(MASK)
        self.position = _value("position", ir.DataType.INT64, ("R",))
        pairs = ("key", "value")
        own: Axes = ("R", heads, "S", size)
        cross: Axes = ("B", heads, "T", size)
        self.own = [[_value(f"self_{kind}.{i}", ir.DataType.FLOAT, own) for kind in pairs] for i in range(layers)]
        self.cross = [[_value(f"cross_{kind}.{i}", ir.DataType.FLOAT, cross) for kind in pairs] for i in range(layers)]
        self.all = [self.tokens, self.position, *([] if self.mask is None else [self.mask])]
        self.all += [value for pair in (*self.own, *self.cross) for value in pair]


def _value(name: str, dtype: ir.DataType, axes: Axes) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(axes), type=ir.TensorType(dtype))


def _tables(graph: ir.Graph, reading: Reading, limit: int | None) -> list[tuple[ir.Value, Array]]:
    """What depends on the length alone, is no small number, and meets the tokens outside of an attention's mask."""
    found = kinds(graph, reading.roles)
    met = [
        value
        for value, kind in found.items()
        if kind is Kind.LENGTH
        and (value.dtype is None or value.dtype.is_floating_point())
        and any(found[user.outputs[0]] is Kind.TOKENS and user.op_type != "Attention" for user, _ in value.uses())
    ]
    return [(value, target_tables.rows(graph, value, reading, limit)) for value in met]


def _self_masks(
    graph: ir.Graph, found: Blocks, reading: Reading, limit: int | None
) -> dict[ir.Value | None, target_tables.SelfMask]:
    kind = kinds(graph, reading.roles)
    masks: dict[ir.Value | None, target_tables.SelfMask] = {}
    for node in found.own:
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is None or kind[mask] is not Kind.LENGTH:
            what = "no mask" if mask is None else f"one that depends on {kind[mask].value}"
            raise SourceError(f"{node.name}: expected a causal mask of the length alone, found {what}")
        if mask not in masks:
            masks[mask] = target_tables.self_mask(graph, mask, reading, limit)
    return masks


def _check_source_masks(graph: ir.Graph, found: Blocks, reading: Reading) -> None:
    masks = {node.inputs[3] for node in found.cross if len(node.inputs) > 3}
    for mask in masks - {None}:
        assert mask is not None
        target_tables.check_source_mask(graph, mask, reading, MASK)
    if MASK in reading.roles and any(len(node.inputs) < 4 for node in found.cross):
        raise SourceError(
            "expected every cross-attention to be masked where the source is padded, found one that is not"
        )


def _positions(ops: ir.tape.Tape, graph: ir.Graph, new: _Inputs) -> ir.Value:
    """int64 [R,Q], where each new token stands."""
    count = ops.op("Squeeze", [ops.op("Shape", [new.tokens], {"start": 1})])
    steps = ops.op("Range", [_scalar(graph, 0), count, _scalar(graph, 1)])
    found = ops.op("Add", [ops.op("Unsqueeze", [new.position, integers(graph, [1])]), steps])
    found.shape, found.type = ir.Shape(["R", "Q"]), ir.TensorType(ir.DataType.INT64)
    return found


def _read_at(ops: ir.tape.Tape, graph: ir.Graph, value: ir.Value, table: Array, positions: ir.Value, name: str) -> None:
    stored = _initializer(graph, name, table)
    found = ops.op("Gather", [stored, positions])
    found.shape = ir.Shape(["R", "Q", *table.shape[1:]])
    found.type = ir.TensorType(ir.DataType(stored.dtype or ir.DataType.FLOAT))
    value.replace_all_uses_with(found)


def _mask(
    ops: ir.tape.Tape, graph: ir.Graph, new: _Inputs, positions: ir.Value, mask: target_tables.SelfMask
) -> ir.Value:
    """[R,1 or H,Q,S]: boolean, or additive where there is a bias."""
    length = ops.op("Squeeze", [ops.op("Shape", [new.own[0][0]], {"start": 2, "end": 3})])
    keys = ops.op("Range", [_scalar(graph, 0), length, _scalar(graph, 1)])
    rows = ops.op("Unsqueeze", [positions, integers(graph, [1, 3])])
    causal = ops.op("LessOrEqual", [keys, rows])
    causal.shape, causal.type = ir.Shape(["R", 1, "Q", "S"]), ir.TensorType(ir.DataType.BOOL)
    if mask.bias is None:
        return causal
    distances = ops.op("Sub", [ops.op("Unsqueeze", [positions, integers(graph, [2])]), keys])
    near = ops.op("Clip", [distances, _scalar(graph, 0), _scalar(graph, mask.reach)])
    table = _initializer(graph, f"bias/{len(graph.initializers)}", mask.bias)
    bias = ops.op("Transpose", [ops.op("Gather", [table, near])], {"perm": [0, 3, 1, 2]})
    least = _initializer(graph, "bias/masked", np.array(np.finfo(np.float32).min, np.float32))
    found = ops.op("Where", [causal, bias, least])
    found.shape = ir.Shape(["R", mask.bias.shape[1], "Q", "S"])
    found.type = ir.TensorType(ir.DataType.FLOAT)
    return found


class _Fold:
    """How beams become queries, the same for every layer: [R,Q,H,D] is cut as [B,K*Q,H,D] and joined again; the mask [B,1,K*Q,T]."""

    def __init__(self, ops: ir.tape.Tape, graph: ir.Graph, new: _Inputs, heads: int, size: int) -> None:
        batch = ops.op("Shape", [new.cross[0][0]], {"start": 0, "end": 1})
        both = ops.op("Shape", [new.tokens])
        self.cut = ops.op("Concat", [batch, integers(graph, [-1, heads, size])], {"axis": 0})
        self.joined = ops.op("Concat", [both, integers(graph, [heads, size])], {"axis": 0})
        self.mask = None
        if new.mask is None:
            return
        queries = ops.op("Div", [ops.op("Reshape", [ops.op("Size", [new.tokens]), integers(graph, [1])]), batch])
        length = ops.op("Shape", [new.mask], {"start": 1})
        shape = ops.op("Concat", [batch, integers(graph, [1]), queries, length], {"axis": 0})
        visible = ops.op("Unsqueeze", [ops.op("Cast", [new.mask], {"to": ir.DataType.BOOL}), integers(graph, [1, 2])])
        self.mask = ops.op("Expand", [visible, shape])
        self.mask.shape, self.mask.type = ir.Shape(["B", 1, None, "T"]), ir.TensorType(ir.DataType.BOOL)


def _self_attention(
    graph: ir.Graph, node: ir.Node, buffers: Sequence[ir.Value], position: ir.Value, mask: ir.Value
) -> list[ir.Value]:
    written = []
    for index, buffer in enumerate(buffers, start=1):
        scatter = ir.node("TensorScatter", [buffer, node.inputs[index], position], attributes={"axis": 2})
        scatter.name = f"{node.name}/TensorScatter_{index}"
        output = scatter.outputs[0]
        output.shape, output.type = buffer.shape, buffer.type
        graph.insert_before(node, scatter)
        node.replace_input_with(index, output)
        written.append(output)
    node.replace_input_with(3, mask)
    return written


def _cross_attention(graph: ir.Graph, node: ir.Node, pair: Sequence[ir.Value], fold: _Fold) -> None:
    """K and V from outside; rows of one source, which lie side by side, become its queries: [B*K,H,Q,D] as [B,H,K*Q,D]."""
    ops, by_head = ir.tape.Tape(), {"perm": [0, 2, 1, 3]}
    rows = ops.op("Reshape", [ops.op("Transpose", [node.inputs[0]], by_head), fold.cut])
    inputs = [ops.op("Transpose", [rows], by_head), *pair, *([] if fold.mask is None else [fold.mask])]
    attended = ops.op("Attention", inputs, dict(node.attributes), name=node.name)
    joined = ops.op("Reshape", [ops.op("Transpose", [attended], by_head), fold.joined])
    back = ops.op("Transpose", [joined], by_head)
    back.shape, back.type = node.outputs[0].shape, node.outputs[0].type
    graph.insert_before(node, list(ops.nodes))
    node.outputs[0].replace_all_uses_with(back)
    graph.remove(node, safe=True)


def _scalar(graph: ir.Graph, number: int) -> ir.Value:
    return _initializer(graph, f"integer/{number}", np.array(number, np.int64))


def _initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.initializers[name] = value
    return graph.initializers[name]


def _check_closed(graph: ir.Graph, old: dict[str, ir.Value]) -> None:
    left = [name for name, value in old.items() if name not in (TOKENS, MASK) and value.uses()]
    if left:
        user = next(iter(old[left[0]].uses()))[0]
        raise SourceError(
            f"node {user.name} ({user.op_type}) reads the source ({left[0]}); only cross-attention may, through its K and V"
        )
