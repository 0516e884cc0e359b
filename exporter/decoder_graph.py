"""decode(tokens, memory, memory_mask) as a graph of PyTorch operators without side effects, and what each node depends on.

Owns the graph and its tidying: in-place operators become functional, checks of torch's own go, and targets are known to hold no
padding. Knows neither attention nor caches.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx, nn

from txopt.exporter import custom_inputs
from txopt.exporter.calls import calling, first_line, shapes
from txopt.exporter.custom import check_logits, in_a_tuple
from txopt.exporter.custom_facts import CustomFacts
from txopt.exporter.custom_steady import steady
from txopt.exporter.plain import plain_modules
from txopt.exporter.recurrent import none_in_decode
from txopt.exporter.source import Memory
from txopt.runtime.errors import SourceError

_aten = torch.ops.aten
SIZE = _aten.sym_size.int
_BY_SHAPE_ALONE = (
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
)
ASKS_FOR_PADDING = (
    "asks for padding"  # in a node's meta: where the comparison with the padding id was that it stands for
)
_VIEWS = (_aten.view.default, _aten._unsafe_view.default)
_PADDING = {_aten.eq.Scalar: False, _aten.ne.Scalar: True}  # what comparing a token with the padding id always gives


class Kind(Enum):
    """What a node's value depends on."""

    CONSTANT = "nothing that is given"
    LENGTH = "the target's length alone"
    PADDING = "the source's mask"
    SOURCE = "the source"
    TOKENS = "the target's tokens"

    @property
    def of_source(self) -> bool:
        return self in (Kind.PADDING, Kind.SOURCE)


@dataclass(frozen=True, kw_only=True)
class Read:
    """A memory as the graph takes it: its states [B,T,M], and its mask [B,T] where it has one."""

    named: Memory
    states: fx.Node
    mask: fx.Node | None


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the graph takes."""

    tokens: fx.Node
    memories: tuple[Read, ...]


class FullDecoder(nn.Module):
    """decode() of a module, as the one call that is made a graph; ``masks`` are those that are there."""

    def __init__(self, module: Any, memories: Sequence[Memory], several: bool) -> None:
        super().__init__()
        self.module, self._memories, self._several = module, memories, several

    def forward(self, tokens: Tensor, memories: tuple[Tensor, ...], masks: tuple[Tensor, ...]) -> Tensor:
        there = iter(masks)
        by_memory = tuple(None if memory.mask is None else next(there) for memory in self._memories)
        taken = (memories, by_memory) if self._several else (memories[0], by_memory[0])
        logits: Tensor = self.module.decode(tokens, *taken)
        return logits


def graph_of(module: Any, facts: CustomFacts) -> tuple[fx.GraphModule, Given]:
    """decode() as a graph over any batch, target and source length, and what it takes.

    Raises:
        SourceError: torch cannot make it a graph, or one of those sizes is fixed.
    """
    named = custom_inputs.memories_of(facts.inputs, facts.masks)
    ids = torch.ones(2, 5 if module.max_length > 5 else 2, dtype=torch.int64)
    dynamic = torch.export.Dim.DYNAMIC  # branches on which length is greater are taken once; parity tries other lengths
    with torch.no_grad(), plain_modules():
        dtype = next((value.dtype for value in module.parameters() if value.is_floating_point()), torch.float32)
        lengths = custom_inputs.example_lengths(facts.inputs, 7)
        inputs = custom_inputs.examples(facts.inputs, lengths, rows=2, dtype=dtype)
        with calling(f"encode() fails for {shapes(inputs)}", "it must take any number of rows, and any length"):
            returned = module.encode(*inputs.values())
        memories = custom_inputs.check_memories(returned, facts.masks, inputs)
        masks = tuple(inputs[mask] for mask in facts.masks if mask is not None)
        varying = [{0: dynamic, 1: dynamic} if isinstance(memory.axis, str) else {0: dynamic} for memory in named]
        masked = [shape for shape, memory in zip(varying, named, strict=True) if memory.mask is not None]
        decoder = FullDecoder(module.eval(), named, isinstance(returned, (tuple, list)))
        what = f"decode(tokens, memory, memory_mask) fails for {shapes({'tokens': ids})}{in_a_tuple(returned)}"
        with calling(what, "it must take any number of rows, and any length up to max_length"), none_in_decode(module):
            logits = steady("decode()", lambda: decoder(ids, memories, masks))
        check_logits(logits, *ids.shape)
        try:
            axes = ({0: dynamic, 1: dynamic}, tuple(varying), tuple(masked))
            program = torch.export.export(decoder, (ids, memories, masks), dynamic_shapes=axes)
            if any(_in_place(node) for node in program.graph.nodes):
                program = program.run_decompositions({})
        except SourceError:
            raise
        except Exception as err:  # torch raises a dozen kinds, with pages of text
            raise SourceError(
                f"decode(tokens, memory, memory_mask) cannot be made a graph: {_reason(err)}; control flow on the values of tensors "
                "and fixed lengths are the usual causes; the explicit protocol of docs/custom-models.md takes a cache instead"
            ) from err
    found: Any = program.module()
    _tidy(found.graph, module.special_ids)
    graph = fx.GraphModule(found, found.graph)  # a plain one: that of an exported program refuses eval()
    return graph, _given(graph.graph, named)


def _given(graph: fx.Graph, named: Sequence[Memory]) -> Given:
    tokens, *rest = [node for node in graph.nodes if node.op == "placeholder"]
    states, masks = rest[: len(named)], iter(rest[len(named) :])
    memories = [
        Read(named=memory, states=node, mask=None if memory.mask is None else next(masks))
        for memory, node in zip(named, states, strict=True)
    ]
    return Given(tokens=tokens, memories=tuple(memories))


def kinds_of(graph: fx.Graph, given: Given) -> dict[fx.Node, Kind]:
    """What every node depends on; get_attr nodes are constants."""
    kinds = {given.tokens: Kind.TOKENS}
    for memory in given.memories:
        kinds |= {memory.states: Kind.SOURCE} | ({} if memory.mask is None else {memory.mask: Kind.PADDING})
    for node in graph.nodes:
        if node in kinds:
            continue
        if node.target is SIZE:
            kinds[node] = Kind.LENGTH if node.args[0] is given.tokens else Kind.PADDING
            continue
        by_shape = getattr(node.target, "__name__", "").partition(".")[0] in _BY_SHAPE_ALONE
        found = {kinds[each] for each in node.all_input_nodes}
        if by_shape and Kind.TOKENS in found:
            found = found - {Kind.TOKENS} | {Kind.LENGTH}
        order = (Kind.TOKENS, Kind.SOURCE, Kind.PADDING, Kind.LENGTH)
        kinds[node] = next((kind for kind in order if kind in found), Kind.CONSTANT)
    return kinds


def memories_read(graph: fx.Graph, given: Given) -> dict[fx.Node, frozenset[int]]:
    """The memories that every node's value comes from, by their numbers; their lengths do not count."""
    read: dict[fx.Node, frozenset[int]] = {}
    for index, memory in enumerate(given.memories):
        read |= dict.fromkeys((node for node in (memory.states, memory.mask) if node is not None), frozenset({index}))
    for node in graph.nodes:
        before = [] if node.target is SIZE else [read[each] for each in node.all_input_nodes]
        read.setdefault(node, frozenset().union(*before))
    return read


def call(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """The node's value from those of its inputs."""
    arguments = fx.map_arg(node.args, values.__getitem__)
    named = fx.map_arg(node.kwargs, values.__getitem__)
    assert callable(node.target)
    return node.target(*arguments, **named)


def place(node: fx.Node) -> str:
    """Where a node comes from, as a person finds it: module path and operator."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]).removeprefix("L['self'].").removeprefix("module.") if stack else ""
    name = str(getattr(node.target, "__name__", node.target)).partition(".")[0]
    return f"node {node.name} ({name}{f' in {path}' if path else ''})"


def _reason(err: Exception) -> str:
    """torch's first line, or which size the module fixes, in words."""
    axes = {
        "tokens": ("rows", "target length"),
        "memories": ("rows", "source length"),
        "masks": ("rows", "source length"),
    }
    found = re.findall(
        r"L\['(\w+)'\](?:\[\d+\])?\.size\(\)\[([01])\] as dynamic but your code specialized it .* \((\d+)\)", str(err)
    )
    fixed = sorted({f"the {axes[name][int(axis)]} to {size}" for name, axis, size in found if name in axes})
    if not fixed:
        return first_line(err)
    return f"its code fixes {' and '.join(fixed)}, what the example has (int() of a size does that, and libraries that call it)"


def _in_place(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _tidy(graph: fx.Graph, special_ids: Mapping[str, int]) -> None:
    for node in list(graph.nodes):
        if node.op == "call_module" or str(node.target).startswith(("aten._assert", "aten.sym_constrain")):
            graph.erase_node(node)  # checks of lengths and types, which a step does not have
        elif node.target is _aten.dropout.default or node.target is _aten.alias.default:
            node.replace_all_uses_with(node.args[0])  # dropout is that of eval(), which does nothing
            graph.erase_node(node)
        elif node.target in _VIEWS:  # strides of a step's values are not those of the whole sequence's
            node.target = _aten.reshape.default
    pad, start = special_ids["pad_token_id"], special_ids["decoder_start_token_id"]
    tokens = next(node for node in graph.nodes if node.op == "placeholder")
    _count_rows_by_tokens(graph, tokens)
    for node in [node for node in graph.nodes if node.target in _PADDING and _same(node.args[0], tokens)]:
        if node.args[1] == pad != start:
            _replace_by_constant(graph, node, tokens)
    graph.eliminate_dead_code()


def _count_rows_by_tokens(graph: fx.Graph, tokens: fx.Node) -> None:
    """Reads the batch off the tokens: torch reads it off any input, and a step's memories are placeholders of one row."""
    rows = tokens.meta["val"].shape[0]
    sizes = [node for node in graph.nodes if node.target is SIZE and str(node.meta["val"]) == str(rows)]
    for node in sizes:
        if node.args[0] is not tokens:
            node.args = (tokens, 0)


def _same(node: Any, tokens: fx.Node) -> bool:
    """Whether ``node`` is the tokens, perhaps cast."""
    while isinstance(node, fx.Node) and node.target is _aten.to.dtype:
        node = node.args[0]
    return node is tokens


def _replace_by_constant(graph: fx.Graph, node: fx.Node, tokens: fx.Node) -> None:
    """A comparison with the padding id: a target has no padding, and what follows its end is nobody's business."""
    with graph.inserting_before(node):
        constant = graph.call_function(_aten.full_like.default, (tokens, _PADDING[node.target]), {"dtype": torch.bool})  # type: ignore[index]
    constant.meta = dict(node.meta) | {ASKS_FOR_PADDING: place(node)}
    node.replace_all_uses_with(constant)
