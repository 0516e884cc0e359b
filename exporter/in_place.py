"""Pasts that grow by Concat, as buffers of fixed length that are updated in place: for graphs of other exporters, where asked for.

    present = Concat(past, new)   becomes   present = TensorScatter(past, new, cache_position of each row)

    past, present   [B,H,P,D] and [B,H,P+L,D] become [B,H,S,D], of one length S for all, under their old names
    Shape(past)     P is the new input ``cache_position`` [1]: how many places are filled, in every row
    Shape(present)  P+L is cache_position + L
    masks           are padded to S with what masks; where there is none, one hides the places from P+L on
    is_causal       becomes a mask: outside of the operator's own cache it counts keys from the first place on, before as after

Attention must be fused first: only it and Shape may read a present, and only the Concat and Shape a past; keys and values that were
repeated for groups of heads are read as the few heads that they are (fusion/groups.py). Pasts that are only read, as cross-attention
has them, stay as they are. Sources: ONNX operators Attention and TensorScatter (opset 24). Every mask is explicit, and
``nonpad_kv_seqlen`` is not used: TensorRT leaves that input out and takes no mask beside ``is_causal``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from txopt.exporter import onnx_file
from txopt.exporter.fusion.replace import replace
from txopt.exporter.graph import integers
from txopt.exporter.origins import origin
from txopt.runtime.errors import SourceError, explain

POSITION, LENGTH = "cache_position", "cache_length"
_PLACES = 2  # the axis of [B,H,P,D] along which a past grows
_MERGED_BY = "use_cache_branch"  # the input by which Optimum's merged decoders choose
_FORM = "expected Concat(past, new) along axis 2 of [batch, heads, length, size], its result an output"


@dataclass(frozen=True)
class Pair:
    """An input ``past`` [B,H,P,D] and the Concat that makes an output of it and ``new`` [B,H,L,D]."""

    past: ir.Value
    new: ir.Value
    concat: ir.Node

    @property
    def present(self) -> ir.Value:
        return self.concat.outputs[0]


@dataclass(frozen=True, kw_only=True)
class Cache:
    """The buffers, outputs by their inputs' names; ``position`` is the input that says where to write, ``length`` names S."""

    buffers: dict[str, str]
    position: str
    length: str

    def to_json(self) -> dict[str, object]:
        return vars(self).copy()


def pairs(model: ir.Model, path: Path) -> tuple[Pair, ...]:
    """Every past of ``model``, which came from ``path``, that grows by Concat.

    Raises:
        SourceError: there is none; or an output is made of a past in another way.
    """
    found, wrong, others = list[Pair](), list[str](), list[str]()
    for node in model.graph:
        past = next((value for value in node.inputs if _may_be_past(value)), None) if node.op_type == "Concat" else None
        if past is None:
            continue
        problem = _problem(node, past)
        if problem is None and node.inputs[1] is not None:
            found.append(Pair(past, node.inputs[1], node))
        else:
            (wrong if node.outputs[0].is_graph_output() else others).append(f"{node.name} {problem}")
    if wrong:
        raise SourceError(explain(f"{path}: its pasts cannot become buffers; {_FORM}:", wrong))
    if not found and (branched := _in_branches(model, path)):
        raise SourceError(branched)
    if not found:
        title = f"{path}: nothing to turn into a buffer; {_FORM}, found none in the main graph"
        raise SourceError(explain(f"{title}:", others) if others else title)
    return tuple(found)


def _in_branches(model: ir.Model, path: Path) -> str:
    """What to say where pasts grow inside an If alone, as in Optimum's merged decoders; nothing where none does."""
    for node in model.graph:
        if node.op_type != "If" or node.inputs[0] is None:
            continue
        branches = [attribute.as_graph() for attribute in node.attributes.values()]
        inside = [each for branch in branches for each in branch if each.op_type == "Concat"]
        count = sum(any(_may_be_past(value) for value in each.inputs) for each in inside)
        if not count:
            continue
        asked = str(node.inputs[0].name)
        where = f"{count} pasts grow inside the branches of {node.name} (If on {asked}), and buffers are made in the main graph alone"
        if asked != _MERGED_BY:
            return f"{path}: {where}; export the decoder that takes a past as a file of its own"
        return (
            f"{path}: is a merged decoder, one with a past and one without it in one file: {where}; give the "
            "decoder_with_past_model.onnx of the same export (optimum-cli export onnx --no-post-process writes it), or make one "
            f"decoder of an encoder-decoder's whole folder: txopt export {path.parent} OUT"
        )
    return ""


def _may_be_past(value: ir.Value | None) -> bool:
    """Inputs of floats with three axes or more."""
    if value is None or not value.is_graph_input() or value.shape is None or value.dtype is None:
        return False
    return value.dtype.is_floating_point() and len(value.shape) > 2


def _problem(concat: ir.Node, past: ir.Value) -> str | None:
    """Why ``concat`` is no growing past; None where it is one."""
    assert past.shape is not None, "_may_be_past() asked"
    rank, axis = len(past.shape), concat.attributes["axis"].as_int()
    if len(concat.inputs) != 2:
        return f"joins {len(concat.inputs)} values"
    if concat.inputs[0] is not past or concat.inputs[1] is past:
        return f"puts what is new before {past.name}"
    if rank != 4:
        return f"joins {past.name}, which has {rank} axes"
    if axis % rank != _PLACES:
        return f"joins along axis {axis % rank}"
    if isinstance(past.shape[_PLACES], int):
        return f"joins {past.name}, whose length is always {past.shape[_PLACES]}; export it with one that varies"
    if not concat.outputs[0].is_graph_output():
        return f"gives {concat.outputs[0].name}, which is no output"
    return None


def rewrite(model: ir.Model, path: Path, refused: Sequence[str] = ()) -> Cache:
    """Changes ``model``, whose attention is fused, in place.

    Args:
        model: at opset 24.
        path: where it came from, for messages.
        refused: why attention was not fused, where it was not.

    Raises:
        SourceError: something reads a past or a present that must not; or as ``pairs``.
    """
    found = pairs(model, path)
    attentions = _attentions(found)
    problems = [*_misreadings(found), *(line for node in attentions for line in _misfits(node, found))]
    if problems:
        title = f"{path}: its pasts cannot become buffers, for something but Attention depends on their length:"
        raise SourceError(explain(title, [*problems, *(f"not fused: {line}" for line in refused)]))
    names = {str(value.name) for node in model.graph for value in node.outputs}
    names |= {str(value.name) for value in model.graph.inputs}
    cache = Cache(
        buffers={str(pair.past.name): str(pair.present.name) for pair in found},
        position=_free(POSITION, names),
        length=_free(LENGTH, {str(dim) for value in model.graph.inputs for dim in value.shape or ()}),
    )
    _type_masks(model, attentions)
    _Rewriter(model.graph, found, cache).run(attentions)
    passes.TopologicalSortPass()(model)
    onnx_file.fold(model)
    return cache


def _attentions(found: Sequence[Pair]) -> list[ir.Node]:
    nodes = (user for pair in found for user, _ in pair.present.uses() if user.op_type == "Attention")
    return list(dict.fromkeys(nodes))


def _misreadings(found: Sequence[Pair]) -> Iterator[str]:
    for pair in found:
        for value, readers in ((pair.past, ("Shape",)), (pair.present, ("Shape", "Attention"))):
            for user, _ in value.uses():
                if user is pair.concat:
                    continue
                if user.op_type not in readers:
                    yield f"{user.name} ({user.op_type}) reads {value.name}"
                elif user.op_type == "Shape" and user.outputs[0].is_graph_output():
                    yield f"{user.name} gives the shape of {value.name} as an output"
        if pair.past.is_graph_output():
            yield f"{pair.past.name} is an output too"


def _misfits(attention: ir.Node, found: Sequence[Pair]) -> Iterator[str]:
    """Why an Attention that reads a present would not say the same of a buffer."""
    presents = {pair.present for pair in found}
    if [index for index, value in enumerate(attention.inputs) if value in presents] != [1, 2]:
        yield f"{attention.name} reads {_names(attention, presents)} alone; expected its K and its V"
    if any(attention.graph is not pair.concat.graph for pair in found):
        yield f"{attention.name} is in a branch or loop"
    if any(value is not None for value in attention.inputs[4:]):
        yield f"{attention.name} has a cache of its own beside {_names(attention, presents)}"
    if any(output.uses() or output.is_graph_output() for output in attention.outputs[1:]):
        yield f"{attention.name} gives more than what it attends to"


def _names(node: ir.Node, values: set[ir.Value]) -> str:
    return ", ".join(str(value.name) for value in node.inputs if value in values)


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _type_masks(model: ir.Model, attentions: Sequence[ir.Node]) -> None:
    """Masks that fusions made have no dtype yet. Only that is taken over: files may state wrong shapes, which would spread."""
    masks = [node.inputs[3] for node in attentions if len(node.inputs) > 3]
    if all(mask is None or mask.type is not None for mask in masks):
        return
    inferred = model.clone()
    passes.ShapeInferencePass()(inferred)
    types = {value.name: value.type for node in inferred.graph for value in node.outputs}
    for mask in masks:
        if mask is not None and mask.type is None:
            mask.type = types[mask.name]


class _Rewriter:
    """One graph, whose nodes are in no order until all is done. Lengths are int64 [1]."""

    def __init__(self, graph: ir.Graph, found: Sequence[Pair], cache: Cache) -> None:
        self.graph, self.pairs, self.cache = graph, found, cache
        self.position = ir.Value(name=cache.position, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
        self.growing = {(value, _PLACES) for pair in found for value in (pair.past, pair.present)}
        self.made: dict[object, ir.Value] = {}

    def run(self, attentions: Sequence[ir.Node]) -> None:
        new = self.length_of(self.pairs[0].new, _PLACES)
        self.filled = self.add("Add", self.position, new)
        for pair in self.pairs:
            self.read(pair.past, pair.past, self.position)
            self.read(pair.present, pair.past, self.filled)
        for pair in self.pairs:
            self.scatter(pair)
        self.places = self.add("Shape", self.pairs[0].past, start=_PLACES, end=_PLACES + 1)
        for node in attentions:
            mask = self.mask(node)
            node.resize_inputs(max(4, len(node.inputs)))
            node.replace_input_with(3, mask)
            node.attributes.pop("is_causal", None)
        self.graph.inputs.append(self.position)

    def add(self, op_type: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        """The result of a node, one for all that ask for the same."""
        key = op_type, inputs, tuple(attributes.items())
        if key not in self.made:
            name = f"in_place/{op_type}_{len(self.made)}"
            node = ir.node(op_type, inputs, attributes=attributes, name=name)
            node.outputs[0].name = f"{name}:0"
            self.graph.append(node)
            self.made[key] = node.outputs[0]
        return self.made[key]

    def length_of(self, value: ir.Value, axis: int) -> ir.Value:
        """A length, read where it first appears: there it is one for all layers."""
        first = origin((value, axis))
        if isinstance(first, tuple) and first not in self.growing:
            value, axis = first
        return self.add("Shape", value, start=axis, end=axis + 1)

    def read(self, value: ir.Value, past: ir.Value, length: ir.Value) -> None:
        """Whoever asks for the shape of ``value`` hears of ``length`` places."""
        for node in [user for user, _ in value.uses() if user.op_type == "Shape"]:
            start, end = (node.attributes[key].as_int() if key in node.attributes else None for key in ("start", "end"))
            axes = range(4)[slice(start, end)]
            if _PLACES not in axes:
                node.replace_input_with(0, past)
                continue
            parts = [self.add("Shape", past, start=axes[0], end=_PLACES)] if axes[0] < _PLACES else []
            parts += [length, *([self.add("Shape", past, start=3, end=4)] if 3 in axes else [])]
            told = self.add("Concat", *parts, axis=0) if len(parts) > 1 else length
            node.outputs[0].replace_all_uses_with(told)
            owner = node.graph or self.graph  # a branch may ask, too
            owner.remove(node, safe=True)

    def scatter(self, pair: Pair) -> None:
        assert pair.past.shape is not None, "pairs() asked"
        inputs = [pair.past, pair.new, self.add("Expand", self.position, self.length_of(pair.past, 0))]
        node = ir.node("TensorScatter", inputs, attributes={"axis": _PLACES}, name=f"{pair.concat.name}/TensorScatter")
        pair.past.shape = ir.Shape([*pair.past.shape[:_PLACES], self.cache.length, pair.past.shape[3]])
        replace(pair.concat, node)
        node.outputs[0].shape, node.outputs[0].type = pair.past.shape, pair.past.type

    def mask(self, attention: ir.Node) -> ir.Value:
        """[..,L,S]: what ``attention`` masked, and whatever is not filled."""
        given = attention.inputs[3] if len(attention.inputs) > 3 else None
        mask = self.visible(attention) if given is None else self.padded(given)
        if "is_causal" not in attention.attributes or not attention.attributes["is_causal"].as_int():
            return mask
        causal = self.causal(attention)
        if given is None or given.dtype == ir.DataType.BOOL:
            return self.add("And", causal, mask)
        return self.add("Where", causal, mask, self.scalar(-np.inf, given.dtype or ir.DataType.FLOAT))

    def visible(self, attention: ir.Node) -> ir.Value:
        """bool [L,S]: the places that are filled, for every query; ONNX Runtime wants a row for each."""
        shape = self.add("Concat", self.queries(attention), self.places, axis=0)
        return self.add("Expand", self.add("Less", self.range(self.places), self.filled), shape)

    def causal(self, attention: ir.Node) -> ir.Value:
        """bool [L,S]: the first place for the first query, and one more for each that follows."""
        rows = self.add("Unsqueeze", self.range(self.queries(attention)), integers(self.graph, [1]))
        return self.add("LessOrEqual", self.range(self.places), rows)

    def queries(self, attention: ir.Node) -> ir.Value:
        query = attention.inputs[0]
        assert query is not None, "Attention has Q"
        return self.length_of(query, 2)

    def range(self, length: ir.Value) -> ir.Value:
        """int64 [length]: 0, 1, 2, .."""
        zero, one = self.scalar(0, ir.DataType.INT64), self.scalar(1, ir.DataType.INT64)
        return self.add("Range", zero, self.add("Squeeze", length), one)

    def padded(self, mask: ir.Value) -> ir.Value:
        """``mask`` [..,P+L] or shorter, longer by what masks: [..,S]. The standard pads shorter masks so, too."""
        last = integers(self.graph, [-1])
        size = self.add("Gather", self.add("Shape", mask), last)
        amounts = self.add("Concat", integers(self.graph, [0]), self.add("Sub", self.places, size), axis=0)
        boolean = mask.dtype == ir.DataType.BOOL
        fill = self.scalar(0 if boolean else -np.inf, mask.dtype or ir.DataType.FLOAT)
        padded = self.add("Pad", mask, amounts, fill, last)
        padded.type = mask.type
        padded.shape = None if mask.shape is None else ir.Shape([*mask.shape[:-1], self.cache.length])
        return padded

    def scalar(self, number: float, dtype: ir.DataType) -> ir.Value:
        """A constant without axes, made once."""
        name = f"in_place/{dtype.name.lower()}_{number:g}"
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.array(number).astype(dtype.numpy()), name=name)
            self.graph.initializers[name] = ir.Value(
                name=name, shape=ir.Shape([]), type=ir.TensorType(dtype), const_value=tensor
            )
        return self.graph.initializers[name]
