"""Decoders that were written without a cache, made incremental: ``decode(tokens, memory, memory_mask)`` as the custom protocol.

The full-sequence decoder becomes a graph of PyTorch operators once, and is then run node by node on the new tokens alone:

1. What depends on the target's length alone (positions, causal masks, relative biases) is computed once for the greatest length,
   checked to be a prefix at a shorter one, and read by position.
2. Self-attention over the tokens writes K and V into the cache and reads those of all earlier tokens.
3. Cross-attention takes the source's K and V from the cache; what makes them runs only where they are asked for.
4. Everything else must act on each position alone; incremental_check.py names the first node that does not.

Knows PyTorch operators, no model and no ONNX. The proof of the whole is parity with the full sequence, as for every source.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from txopt.exporter import written_attention
from txopt.exporter.custom import DecodeCache, as_memories
from txopt.exporter.custom_facts import CustomFacts
from txopt.exporter.decoder_graph import ASKS_FOR_PADDING, SIZE, Kind, call, graph_of, kinds_of, memories_read, place
from txopt.exporter.source_mask import MASKED, Constant, constant, is_padding
from txopt.runtime.errors import SourceError

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


class Incremental(nn.Module):
    """``module`` with the custom protocol's decode(); see the module's docstring.

    Args:
        module: encode(...) and decode(tokens, memory, memory_mask), with tuples in place of the last two where there are several.
        facts: what ``module`` says of itself.

    Raises:
        SourceError: decode() cannot be made a graph, looks at later tokens, or has masks that depend on the tokens.
    """

    def __init__(self, module: Any, facts: CustomFacts) -> None:
        super().__init__()
        if facts.limit is None:
            raise SourceError("decode() without a cache needs max_length, the longest target, as a number; got None")
        self.module, self.special_ids, self.max_length = module, module.special_ids, facts.limit
        for name in ("tokenizers", "source_vocabulary", "max_source_length", "inputs", "memory_masks"):
            if hasattr(module, name):
                setattr(self, name, getattr(module, name))
        self.graph, self.given = graph_of(module, facts)
        self.tokens = self.given.tokens
        asked = (node.meta.get(ASKS_FOR_PADDING) for node in self.graph.graph.nodes)
        self.asks_for_padding: str | None = next(filter(None, asked), None)
        kinds = kinds_of(self.graph.graph, self.given)
        self._unknown = written_attention.fuse(self.graph.graph, lambda node: kinds[node] is Kind.TOKENS)
        self.nodes = [node for node in self.graph.graph.nodes if node.op in ("get_attr", "call_function", "output")]
        self.kinds = kinds_of(self.graph.graph, self.given)
        self.read = memories_read(self.graph.graph, self.given)
        self.tables = self._tables()
        self.constants = self._constants()
        self._padding: dict[tuple[fx.Node | None, int], bool] = {}
        self.registered = nn.ModuleList([*self.tables.values(), *self.constants.values()])

    def encode(self, *inputs: Tensor) -> Any:
        return self.module.encode(*inputs)

    def decode(self, tokens: Tensor, memory: Any, cache: DecodeCache) -> Tensor:
        return Step(self, tokens, as_memories(memory), cache).run()

    def _tables(self) -> dict[fx.Node, "Table"]:
        """A table for every value that depends on the length alone and meets the tokens."""
        longest, shorter = (self._by_length(length) for length in (self.max_length, self.max_length - 1))
        met = [node for node in longest if any(self.kinds[user] is Kind.TOKENS for user in node.users)]
        tables = {node: Table(node, longest[node], shorter[node]) for node in met}
        for node, table in tables.items():
            for user in node.users:
                if self.kinds[user] is Kind.TOKENS and user.target is not ATTENTION:
                    self._check_not_related(table, user)
                    table.prepare(*_rank_and_rows(user, self.tokens))
        return tables

    def _check_not_related(self, table: "Table", user: fx.Node) -> None:
        """Raises SourceError where tokens meet a table of pairs of positions, and attention does not: a mask, most often."""
        if len(table.axes) < 2:
            return
        softmax = written_attention.softmax_of(user, self._unknown)
        obstacle = None if softmax is None else self._unknown[softmax]
        advice = (
            "" if obstacle is None else f"; its softmax is no attention that is known, because of {place(obstacle)}"
        )
        raise SourceError(
            f"{place(user)} relates positions to each other outside of an attention, by {place(table.node)}{advice}"
        )

    def _constants(self) -> dict[fx.Node, Constant]:
        """The number behind every value of the source that meets the tokens outside of an attention."""
        found = {}
        for node in self.nodes:
            met = [user for user in node.users if self.kinds[user] is Kind.TOKENS and user.target is not ATTENTION]
            if not met or node.op == "get_attr" or not self.kinds[node].of_source or not _is_tensor(node):
                continue
            number = constant(self.graph, self.given, node) if self.kinds[node] is Kind.PADDING else None
            if number is None:
                raise SourceError(
                    f"{place(met[0])} joins the source and the target outside of an attention; a decoder may look at the source "
                    "by attention alone"
                )
            found[node] = number
        return found

    def _by_length(self, length: int) -> dict[fx.Node, Tensor]:
        """The tensors that depend on the length alone, for one row of this length."""
        values: dict[fx.Node, Any] = {self.tokens: torch.zeros(1, length, dtype=torch.int64)}
        with torch.no_grad():
            for node in self.nodes:
                if node.op == "get_attr":
                    values[node] = self.parameter(node)
                elif (
                    node.op == "call_function"
                    and self._computable(node)
                    and all(each in values for each in node.all_input_nodes)
                ):
                    values[node] = call(node, values)
        return {n: v for n, v in values.items() if self.kinds[n] is Kind.LENGTH and isinstance(v, Tensor)}

    def masks_padding(self, mask: fx.Node | None, memory: int) -> bool:
        """Whether a mask of cross-attention is the padding of what it reads; asked once for each."""
        if (mask, memory) not in self._padding:
            known = mask is None or self.kinds[mask] in (Kind.PADDING, Kind.LENGTH, Kind.CONSTANT)
            self._padding[mask, memory] = known and is_padding(self.graph, self.given, mask, memory)
        return self._padding[mask, memory]

    def parameter(self, node: fx.Node) -> Any:
        """What a get_attr node names."""
        return operator.attrgetter(str(node.target))(self.graph)

    def _computable(self, node: fx.Node) -> bool:
        return self.kinds[node] in (Kind.LENGTH, Kind.CONSTANT)


class Table(nn.Module):
    """A value of the target's length, for the greatest length: read by position where the tokens meet it."""

    value: Tensor

    def __init__(self, node: fx.Node, longest: Tensor, shorter: Tensor) -> None:
        super().__init__()
        self.node, self._orders = node, dict[tuple[int, int], list[int]]()
        self.register_buffer("value", longest, persistent=False)
        self.axes = [axis for axis, (a, b) in enumerate(zip(longest.shape, shorter.shape, strict=True)) if a != b]
        prefix = longest
        for axis in self.axes:
            prefix = prefix.narrow(axis, 0, shorter.shape[axis])
        if not torch.equal(prefix, shorter):
            raise SourceError(
                f"{place(node)} is something else for every length of the target: one more token changes what was"
            )
        visible = longest if longest.dtype == torch.bool else longest > MASKED
        relates = self.axes == [longest.dim() - 2, longest.dim() - 1]
        self.sees_later = not relates or bool(visible.triu(1).any())
        plain = longest.dtype == torch.bool or not bool(longest[visible].any())
        self.is_causal_mask = relates and plain and torch.equal(visible, torch.ones_like(visible).tril())

    def prepare(self, rank: int, batch: int) -> None:
        """Makes ``rows`` possible for values of ``rank`` axes of which ``batch`` is the rows': positions first, once and for all."""
        if not self.axes or (rank, batch) in self._orders:
            return
        wide = self.value.reshape((1,) * (rank - self.value.dim()) + tuple(self.value.shape))
        axis = self.axes[0] + rank - self.value.dim()
        if axis == batch or wide.shape[batch] != 1:
            raise SourceError(f"{place(self.node)}: the rows of the batch cannot be told from its other axes")
        by_position = wide.movedim((axis, batch), (0, 1)).squeeze(1)  # [L, the other axes]
        self.register_buffer(f"rows_{rank}_{batch}", by_position.contiguous(), persistent=False)
        others = [each for each in range(rank) if each not in (axis, batch)]
        self._orders[rank, batch] = [[batch, axis, *others].index(each) for each in range(rank)]

    def rows(self, positions: Tensor, rank: int, batch: int) -> Tensor:
        """The value at ``positions`` [R,Q], broadcastable to ``rank`` axes of which ``batch`` is the rows'."""
        if not self.axes:
            return self.value
        found: Tensor = getattr(self, f"rows_{rank}_{batch}")[positions]  # [R,Q, the other axes]
        order = self._orders[rank, batch]
        return found if order == sorted(order) else found.permute(*order)


class Step:
    """One call of decode(): new tokens [R,Q] through the graph."""

    def __init__(self, decoder: Incremental, tokens: Tensor, memories: Sequence[Tensor], cache: DecodeCache) -> None:
        self._decoder, self._cache = decoder, cache
        self._states = {read.mask: read.states for read in decoder.given.memories}
        self.values: dict[fx.Node, Any] = {decoder.tokens: tokens}
        self.values |= {read.states: states for read, states in zip(decoder.given.memories, memories, strict=True)}
        self._layers = {"self": 0, "cross": 0}

    def run(self) -> Tensor:
        kinds = self._decoder.kinds
        for node in self._decoder.nodes:
            if node.op == "output":
                logits: Tensor = self.values[node.args[0][0]]
                return logits
            if node.op == "get_attr":
                self.values[node] = self._decoder.parameter(node)
            elif kinds[node] is Kind.TOKENS:
                self.values[node] = self._attend(node) if node.target is ATTENTION else self._compute(node)
        raise AssertionError("a graph ends with its output")

    def _compute(self, node: fx.Node) -> Any:
        try:
            return call(node, _Arguments(self, node))
        except RuntimeError as err:
            reason = str(err).strip().split("\n")[0]
            raise SourceError(f"{place(node)} cannot run on the new tokens alone: {reason}") from err

    def value(self, node: fx.Node) -> Any:
        """A node's value, computed where it is not there yet: constants, sizes, and what the source gives."""
        if node in self._states:
            raise SourceError(
                "K and V of cross-attention depend on the source's mask, which is not there where they are made: use it in encode(), "
                "and in decode() for attention alone"
            )
        if node not in self.values:
            self.values[node] = self._size(node) if node.target is SIZE else call(node, _Arguments(self, node))
        return self.values[node]

    def _size(self, node: fx.Node) -> int:
        of, axis = cast(tuple[fx.Node, int], node.args)
        of = self._states.get(of, of)  # a mask is [B,T], as the first two axes of its memory
        size: int = self.value(of).shape[axis]
        return size

    def met(self, node: fx.Node, user: fx.Node) -> Any:
        """``node`` as ``user`` takes it: a table gives the rows of these positions."""
        table = self._decoder.tables.get(node)
        if self._decoder.kinds[user] is not Kind.TOKENS:
            return self.value(node)
        if node in self._decoder.constants:
            return self._decoder.constants[node].value
        if table is None:
            return self.value(node)
        rank, batch = _rank_and_rows(user, self._decoder.tokens)
        return table.rows(self._cache.positions, rank, batch)

    def _attend(self, node: fx.Node) -> Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
        kinds = self._decoder.kinds
        query: Tensor = self.value(given["query"])
        scale = given.get("scale")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        key, value, mask = given["key"], given["value"], given.get("attn_mask")
        if kinds[key] is Kind.SOURCE and kinds[value] is Kind.SOURCE:
            memory = self._memory_of(node, key, value)
            if not self._decoder.masks_padding(mask, memory):
                raise SourceError(
                    f"{place(node)}: expected cross-attention to mask the source's padding and nothing else; what it masks here "
                    "is not that, and the runtime could not know it"
                )
            return self._cache.cross_attention(
                self._next("cross"), query, lambda: (self.value(key), self.value(value)), memory=memory, scale=scale
            )
        if kinds[key] is not Kind.TOKENS or kinds[value] is not Kind.TOKENS:
            raise SourceError(f"{place(node)}: expected K and V of the tokens or of the source, found neither")
        table = None
        if mask is not None:
            table = self._decoder.tables.get(mask)
            if table is None:
                raise SourceError(
                    f"{place(node)}: its mask depends on {kinds[mask].value}; a cached decoder's may depend on the length alone "
                    "(targets need no padding mask: they are not padded)"
                )
            if table.sees_later:
                raise SourceError(
                    f"{place(table.node)}: this mask lets tokens see later ones; a decoder must be causal"
                )
        elif not given.get("is_causal", False):
            raise SourceError(
                f"{place(node)}: self-attention without a mask sees later tokens; a decoder must be causal"
            )
        bias = None if table is None or table.is_causal_mask else table.value
        return self._cache.self_attention(
            self._next("self"), query, self.value(key), self.value(value), bias=bias, scale=scale
        )

    def _memory_of(self, node: fx.Node, key: fx.Node, value: fx.Node) -> int:
        """The one memory that K and V come from."""
        read = self._decoder.read[key] | self._decoder.read[value]
        if len(read) != 1:
            raise SourceError(
                f"{place(node)}: expected K and V of one memory, found them made of memories {' and '.join(map(str, sorted(read)))}; "
                "attend to each by itself, or join them in encode()"
            )
        return min(read)

    def _next(self, kind: str) -> int:
        self._layers[kind] += 1
        return self._layers[kind] - 1


class _Arguments(Mapping[fx.Node, Any]):
    """The values of a node's inputs, as that node takes them."""

    def __init__(self, step: Step, user: fx.Node) -> None:
        self._step, self._user = step, user

    def __getitem__(self, node: fx.Node) -> Any:
        return self._step.met(node, self._user)

    def __iter__(self) -> Any:
        return iter(self._user.all_input_nodes)

    def __len__(self) -> int:
        return len(self._user.all_input_nodes)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _rank_and_rows(user: fx.Node, tokens: fx.Node) -> tuple[int, int]:
    """Rank of what ``user`` makes, and its axis of rows: the one whose length is the tokens' batch."""
    made = user.meta["val"]
    shape = (made[0] if isinstance(made, (list, tuple)) else made).shape
    rows = tokens.meta["val"].shape[0]
    axes = [axis for axis, size in enumerate(shape) if str(size) == str(rows)]
    if len(axes) != 1:
        raise SourceError(f"{place(user)}: the rows of the batch cannot be told from its other axes")
    return len(shape), axes[0]
