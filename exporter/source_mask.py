"""What a decoder without a cache makes of the source's mask: found out by asking with several masks.

Two answers matter. A value that is the same for every mask (x-transformers asks whether a row sees anything at all) is a constant,
because a source has at least one token. And a mask of cross-attention must be exactly the source's padding, which is what the
runtime masks. Knows nodes and their values, no attention and no cache.
"""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from txopt.exporter.decoder_graph import call

MASKED = -1e4  # an additive mask at or below this lets nothing through
_MASKS = ([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [1, 0, 0, 0, 0]], [[1, 1, 1], [0, 1, 0]])
_LENGTH = 3  # of the target


class Constant(nn.Module):
    """A number that a value always holds, broadcastable to it."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value, persistent=False)


def constant(graph: fx.GraphModule, node: fx.Node) -> Constant | None:
    """The number that ``node`` holds everywhere and for every mask; None where there is none."""
    found = [value for value, _ in _values(graph, node)]
    first = found[0].reshape(-1)[:1]
    if all(bool((value == first).all()) for value in found):
        return Constant(first.reshape((1,) * found[0].dim()).clone())
    return None


def is_padding(graph: fx.GraphModule, node: fx.Node | None) -> bool:
    """Whether a mask of attention [..,L or 1,T] lets through the source's tokens, all of them and nothing else."""
    if node is None:
        return False
    for value, mask in _values(graph, node):
        seen = value if value.dtype == torch.bool else value > MASKED
        wanted = mask.bool()[:, None, None, :]
        plain = value.dtype == torch.bool or not bool(value[seen].any())
        if value.dim() != 4 or not plain or not bool((seen == wanted).all()):
            return False
    return True


def _values(graph: fx.GraphModule, node: fx.Node) -> Iterator[tuple[Tensor, Tensor]]:
    """(value, mask [B,T]) for every mask."""
    tokens, memory, given = (each for each in graph.graph.nodes if each.op == "placeholder")
    width = int(memory.meta["val"].shape[2])
    for rows in _MASKS:
        mask = torch.tensor(rows)
        values: dict[fx.Node, Any] = {
            tokens: torch.zeros(len(mask), _LENGTH, dtype=torch.int64),
            memory: torch.zeros(*mask.shape, width),
            given: mask,
        }
        with torch.no_grad():
            yield _value(graph, node, values), mask


def _value(graph: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node not in values:
        if node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(graph)
        else:
            for each in node.all_input_nodes:
                _value(graph, each, values)
            values[node] = call(node, values)
    return values[node]
