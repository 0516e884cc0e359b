"""Whether everything but attention acts on each position alone: the whole sequence against one token at a time, node by node.

And on each row of the batch: against the same with another row beside it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from txopt.exporter.cache import DecodeState
from txopt.exporter.decoder_graph import Kind, call, place
from txopt.exporter.difference import difference
from txopt.exporter.incremental import Incremental, Step
from txopt.exporter.source import Forward
from txopt.runtime.errors import SourceError

LENGTH = 6
TOLERANCE = 1e-3  # of a value's largest magnitude; rounding is far below, another answer far above


def check(decoder: Incremental, vocabulary: int, found: Forward, masks: Sequence[Tensor | None]) -> None:
    """Raises SourceError with the first node whose value at a position is not the one that a step computes, or depends on other rows.

    Args:
        decoder: derived.
        vocabulary: ids to draw from.
        found: of the source to ask about and any target: its memories [B,T,M], their K and V, and K and V of the target by layer,
            for their heads and sizes.
        masks: of the memories, [B,T] each; None for one without padding.
    """
    memory = found.memories[0]
    length = min(LENGTH, decoder.max_length)
    tokens = torch.randint(0, vocabulary, (len(memory), length), generator=torch.Generator().manual_seed(0))
    whole = _whole(decoder, tokens, found.memories, masks)
    if any(value.is_floating_point() and bool(value.isnan().any()) for value in whole.values()):
        return  # which masks do not keep from other positions; that there is one, the recording tells
    shapes = [(len(memory), k.shape[1], length, k.shape[3]) for k, _ in found.self_kv]
    buffers = [(torch.zeros(shape, dtype=memory.dtype), torch.zeros(shape, dtype=memory.dtype)) for shape in shapes]
    others = torch.cat([tokens[:1], (tokens[1:] + 1) % vocabulary])
    _check_rows(decoder, whole, _whole(decoder, others, found.memories, masks))
    order = {node: index for index, node in enumerate(decoder.nodes)}
    wrong: set[fx.Node] = set()
    for position in range(length):
        now = tokens[:, position : position + 1]
        state = DecodeState(now, torch.full((len(memory),), position), buffers, found.cross_kv, masks)
        step = Step(decoder, now, found.memories, state)
        step.run()
        wrong |= {
            node
            for node, value in step.values.items()
            if node in whole and _differs(node, value, whole[node], position)
        }
    if wrong:
        node = min(wrong, key=order.__getitem__)
        raise SourceError(
            f"{place(node)} mixes positions: a token's result depends on others beside it, and only attention may do that in a "
            f"decoder that generates step by step{_advice(node)}"
        )


def _advice(node: fx.Node) -> str:
    counted = node.target is torch.ops.aten.cumsum.default and not node.meta["val"].is_floating_point()
    return (
        "; positions that are counted follow from what the row's earlier tokens are: take torch.arange(tokens.shape[1]), or count "
        "tokens != PAD, PAD the padding id as a number, which no target begins with"
        if counted
        else ""
    )


def _check_rows(decoder: Incremental, whole: dict[fx.Node, Tensor], other: dict[fx.Node, Tensor]) -> None:
    """Raises SourceError where the first row's logits change with what the other rows hold, with the first node where they do."""
    (logits,) = decoder.nodes[-1].args[0][:1]
    rows = len(whole[logits])

    def changes(node: fx.Node) -> bool:
        value = whole[node]
        mine = value.dim() and value.shape[0] == rows
        return bool(mine) and difference(_numbers(value[:1]), _numbers(other[node][:1])) > TOLERANCE

    if changes(logits):
        node = next(node for node in decoder.nodes if node in whole and changes(node))
        raise SourceError(
            f"{place(node)} mixes rows: what a row of the batch says depends on the others, which beams and batches are made of"
        )


def _whole(
    decoder: Incremental, tokens: Tensor, memories: Sequence[Tensor], masks: Sequence[Tensor | None]
) -> dict[fx.Node, Tensor]:
    """What every node that depends on the tokens gives for the whole sequence."""
    values: dict[fx.Node, Any] = {decoder.tokens: tokens}
    for read, states, mask in zip(decoder.given.memories, memories, masks, strict=True):
        values |= {read.states: states} | ({} if read.mask is None else {read.mask: mask})
    for node in decoder.nodes:
        if node.op != "output":
            values[node] = decoder.parameter(node) if node.op == "get_attr" else call(node, values)
    return {
        n: v
        for n, v in values.items()
        if n in decoder.kinds and decoder.kinds[n] is Kind.TOKENS and isinstance(v, Tensor)
    }


def _differs(node: fx.Node, step: Tensor, whole: Tensor, position: int) -> bool:
    axes = [axis for axis, (a, b) in enumerate(zip(step.shape, whole.shape, strict=False)) if a != b]
    if step.dim() != whole.dim() or len(axes) > 1 or (axes and step.shape[axes[0]] != 1):
        return False  # positions and something else in one axis: what is made of it is compared
    there = whole.narrow(axes[0], position, 1) if axes else whole
    return difference(_numbers(there), _numbers(step)) > TOLERANCE


def _numbers(value: Tensor) -> Any:
    """NumPy has no bfloat16."""
    return (value.float() if value.is_floating_point() else value).numpy()
