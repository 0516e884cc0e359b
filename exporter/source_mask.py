"""What a decoder without a cache makes of the masks of what it reads: found out by asking with several.

Two answers matter. A value that is the same for every mask (x-transformers asks whether a row sees anything at all) is a constant,
because a source has at least one token. And a mask of cross-attention must be exactly the source's padding, which is what the
runtime masks. Knows nodes and their values, no attention and no cache.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from txopt.exporter.decoder_graph import Given, call
from txopt.runtime.graphs import SOURCE_AXES

MASKED = -1e4  # an additive mask at or below this lets nothing through
_MASKS = ([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [1, 0, 0, 0, 0]], [[1, 1, 1], [0, 1, 0]])
_LENGTH = 3  # of the target


class Constant(nn.Module):
    """A number that a value always holds, broadcastable to it."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)


def constant(graph: fx.GraphModule, given: Given, node: fx.Node) -> Constant | None:
    """The number that ``node`` holds everywhere and for every mask; None where there is none."""
    found = [value for value, _ in _values(graph, given, node)]
    first = found[0].reshape(-1)[:1]
    if all(bool((value == first).all()) for value in found):
        return Constant(first.reshape((1,) * found[0].dim()).clone())
    return None


def is_padding(graph: fx.GraphModule, given: Given, node: fx.Node | None, memory: int) -> bool:
    """Whether a mask of attention [..,L or 1,T] lets through the memory's tokens, all of them and nothing else."""
    if node is None:
        return given.memories[memory].mask is None
    for value, masks in _values(graph, given, node):
        seen = value if value.dtype == torch.bool else value > MASKED
        wanted = masks[memory].bool()[:, None, None, :]
        plain = value.dtype == torch.bool or not bool(value[seen].any())
        if value.dim() != 4 or not plain or not bool((seen == wanted).all()):
            return False
    return True


def _values(graph: fx.GraphModule, given: Given, node: fx.Node) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """(value, by memory what of it is no padding [B,T]) for several masks; no two masks are alike, as no two lengths are."""
    for rows in _MASKS:
        values: dict[fx.Node, Any] = {given.tokens: torch.zeros(len(rows), _LENGTH, dtype=torch.int64)}
        named = list(dict.fromkeys(memory.named.mask for memory in given.memories))
        masks = []
        for memory in given.memories:
            _, length, width = memory.states.meta["val"].shape
            axis, turn = memory.named.axis, named.index(memory.named.mask)
            size = len(rows[0]) + SOURCE_AXES.index(axis) if isinstance(axis, str) else int(length)
            masks.append(
                torch.ones(len(rows), size, dtype=torch.int64) if memory.mask is None else _turned(rows, turn, size)
            )
            values[memory.states] = torch.zeros(len(rows), size, int(width))
            if memory.mask is not None:
                values[memory.mask] = masks[-1]
        with torch.no_grad():
            yield _value(graph, node, values), masks


def _turned(rows: Sequence[Sequence[int]], turn: int, size: int) -> Tensor:
    """``rows`` in another order and cut or repeated to ``size`` places, each with a token."""
    found = torch.tensor([[*row] * size for row in (*rows[turn % len(rows) :], *rows[: turn % len(rows)])])[:, :size]
    found[:, 0] |= (found == 0).all(1)
    return found


def _value(graph: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node not in values:
        if node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(graph)
        else:
            for each in node.all_input_nodes:
                _value(graph, each, values)
            values[node] = call(node, values)
    return values[node]
