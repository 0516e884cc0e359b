"""Attention that a decoder writes out, in a graph of PyTorch operators, as the one operator for it.

    q -> [Mul/Div number] -> matmul(k^T) -> {Mul/Div number, masked_fill, where, + bias} -> softmax -> matmul(v)

becomes scaled_dot_product_attention, with the numbers as its scale and everything masked or added as its mask. Either product may
be an einsum. Left as it is: a softmax over another axis, a number that multiplies
masks too, inner results that something else reads.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from txopt.exporter import einsum
from txopt.exporter.einsum import made

_aten = torch.ops.aten
_SOFTMAX = (_aten.softmax.int, _aten._softmax.default)
_MATMUL = (_aten.matmul.default, _aten.bmm.default)
_MULTIPLY = {_aten.mul.Tensor: 1, _aten.mul.Scalar: 1, _aten.div.Tensor: -1, _aten.div.Scalar: -1}
_FILL = (_aten.masked_fill.Scalar, _aten.masked_fill_.Scalar)
_SAME_VALUE = (_aten.to.dtype, _aten.type_as.default, _aten.contiguous.default, _aten.clone.default)
_MASKED = -1e4


@dataclass
class _Scores:
    """What was found above a softmax; each mask with whether True (or 0) lets a key through."""

    scale: float = 1.0
    hidden: list[fx.Node] = field(default_factory=list)  # boolean, True where nothing is seen
    visible: list[fx.Node] = field(default_factory=list)  # boolean, True where something is seen
    added: list[fx.Node] = field(default_factory=list)


def fuse(graph: fx.Graph, of_tokens: Callable[[fx.Node], bool]) -> dict[fx.Node, fx.Node]:
    """Rewrites ``graph``; ``of_tokens`` says what depends on the tokens. Gives each softmax that is left, and what was in its way."""
    einsum.as_matmul(graph)
    left = {}
    for softmax in [node for node in graph.nodes if node.target in _SOFTMAX]:
        axis, rank = softmax.args[1], len(softmax.meta["val"].shape)
        last = _product(softmax)
        match = _scores(softmax.args[0], of_tokens)
        if axis not in (-1, rank - 1) or rank != 4 or last is None or isinstance(match, fx.Node):
            left[softmax] = match if isinstance(match, fx.Node) else softmax
            continue
        q, k, scores = match
        with graph.inserting_before(last):
            mask = _mask(graph, scores)
            arguments = (q, k, last.args[1], mask, 0.0, False)
            attention = graph.call_function(
                _aten.scaled_dot_product_attention.default, arguments, {"scale": scores.scale}
            )
        attention.meta = dict(last.meta)
        last.replace_all_uses_with(attention)
    graph.eliminate_dead_code()
    return left


def softmax_of(scores: fx.Node, among: Collection[fx.Node]) -> fx.Node | None:
    """The nearest of the softmaxes ``among`` that takes ``scores``, whatever is done to them before, but for a product."""
    waiting, seen = [scores], {scores}
    while waiting:
        users = [user for user in waiting.pop(0).users if user not in seen and user.target not in _MATMUL]
        if (found := next((user for user in users if user in among), None)) is not None:
            return found
        seen.update(users)
        waiting.extend(users)
    return None


def _product(softmax: fx.Node) -> fx.Node | None:
    """The matmul with V that the probabilities go to, and nowhere else."""
    node = softmax
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in _MATMUL and user.args[0] is node:
            return user
        if user.target not in _SAME_VALUE:
            return None
        node = user
    return None


def _scores(node: fx.Node, of_tokens: Callable[[fx.Node], bool]) -> tuple[fx.Node, fx.Node, _Scores] | fx.Node:
    """(Q, K, the rest) of the scores ``node``, or the node on the way to them that does something else."""
    found = _Scores()
    scaled = False
    while len(node.users) == 1:
        if node.target in _MATMUL:
            k = _transposed(node.args[1])
            q, factor = _unscaled(node.args[0])
            found.scale *= factor
            return node if k is None or not isinstance(q, fx.Node) else (q, k, found)
        if node.target in _MULTIPLY and _number(node.args[1]):
            found.scale *= float(node.args[1]) ** _MULTIPLY[node.target]  # type: ignore[arg-type]
            before, scaled = node.args[0], True
        elif node.target in _SAME_VALUE:
            before = node.args[0]
        elif scaled:  # the number multiplies this mask, too
            return node
        else:
            before = _unmasked(node, found, of_tokens)
        if not isinstance(before, fx.Node):
            return node
        node = before
    return node


def _unmasked(node: fx.Node, found: _Scores, of_tokens: Callable[[fx.Node], bool]) -> Any:
    """The scores that ``node`` masks, the mask noted; None where it does something else."""
    if node.target in _FILL and _hides(node.args[2]):
        found.hidden.append(node.args[1])  # type: ignore[arg-type]
        return node.args[0]
    if node.target is _aten.where.ScalarOther and _hides(node.args[2]):
        found.visible.append(node.args[0])  # type: ignore[arg-type]
        return node.args[1]
    if node.target is _aten.add.Tensor:
        sides = [each for each in node.args if isinstance(each, fx.Node)]
        others = [each for each in sides if not of_tokens(each)]
        if len(sides) == 2 and len(others) == 1:
            found.added.append(others[0])
            return next(each for each in sides if each is not others[0])
    return None


def _mask(graph: fx.Graph, scores: _Scores) -> fx.Node | None:
    """One mask of all that were found: boolean, or additive where something is added."""
    seen = [made(graph, _aten.logical_not.default, node) for node in scores.hidden] + scores.visible
    visible = _joined(graph, _aten.logical_and.default, seen)
    added = _joined(graph, _aten.add.Tensor, scores.added)
    if visible is None or added is None:
        return added if visible is None else visible
    return made(graph, _aten.where.ScalarOther, visible, added, -math.inf)


def _joined(graph: fx.Graph, operator: Any, parts: list[fx.Node]) -> fx.Node | None:
    mask = parts[0] if parts else None
    for part in parts[1:]:
        mask = made(graph, operator, mask, part)
    return mask


def _transposed(node: Any) -> fx.Node | None:
    if not isinstance(node, fx.Node) or node.target is not _aten.transpose.int:
        return None
    rank = len(node.meta["val"].shape)
    axes = {axis % rank for axis in node.args[1:3]}  # type: ignore[operator]
    return node.args[0] if axes == {rank - 2, rank - 1} else None  # type: ignore[return-value]


def _unscaled(node: Any) -> tuple[Any, float]:
    if isinstance(node, fx.Node) and node.target in _MULTIPLY and _number(node.args[1]) and len(node.users) == 1:
        return node.args[0], float(node.args[1]) ** _MULTIPLY[node.target]  # type: ignore[arg-type]
    return node, 1.0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0


def _hides(value: Any) -> bool:
    return isinstance(value, (int, float)) and value <= _MASKED
