"""What stands between scores and probabilities of a written-out attention, step by step: scales, masks, and the order of axes.

Each step either fits into one operator or is the reason of a refusal. Which way the steps go is attention_path.py's, what is made of
them attention_rewrite.py's.
"""

import math
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from txopt.exporter.fusion.attention_path import Step, changes_nothing, fill_of, least
from txopt.exporter.fusion.attention_rewrite import Factor, Term
from txopt.exporter.shapes import broadcasts, differ, length, number_of, order_of, rank_of

_DROWNING = -1e9  # no score is large enough to show beside it


class Refusal(Exception):
    """Why a Softmax between two MatMuls is left alone; attention.py reports it."""


@dataclass
class Chain:
    """What was met on the way from the scores to V; ``rank`` is that of the scores here, ``heads`` the shape that cut them.

    ``order`` says which of their axes each axis is (None: as they are), ``softmaxed`` along which one the Softmax is, from the end.
    """

    rank: int
    scale: float = 1.0
    factors: list[Factor] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    heads: ir.Value | None = None
    order: tuple[int, ...] | None = None
    softmaxed: int | None = None

    def take(self, node: ir.Node, index: int) -> None:
        """One step before the Softmax; ``index`` says which input the scores are."""
        if node.op_type in ("Mul", "Div"):
            self._scale_by(node, index)
        elif node.op_type in ("Add", "Sub"):
            if node.op_type == "Sub" and index == 1:
                raise Refusal(f"{node.name} subtracts the scores")
            self._mask_by(Term(input_of(node, 1 - index), self.rank, self.order, negative=node.op_type == "Sub"))
        elif node.op_type == "Where":
            fill = _fill(node, 3 - index)
            whole = fill <= least(node.outputs[0].dtype)
            self._mask_by(Term(input_of(node, 0), self.rank, self.order, fill=fill, keeps=index == 1, whole=whole))
        elif node.op_type == "Max" and len(node.inputs) == 2:
            _fill(node, 1 - index)
        elif node.op_type == "Reshape":
            self.cut(node)
        elif node.op_type == "Transpose":
            self.turn(node)
        elif node.op_type == "Concat":
            raise Refusal(
                f"{node.name} adds to the scores (a sink, or other keys), for which the operator has no input"
            )
        elif not changes_nothing(node):
            raise Refusal(f"{node.name} changes the scores")
        if rank_of(node.outputs[0]) not in (None, self.rank):
            raise Refusal(f"{node.name} adds axes to the scores")
        if node.op_type not in ("Reshape", "Transpose") and broadcasts(input_of(node, index), node.outputs[0]):
            raise Refusal(f"{node.name} broadcasts the scores")

    def turn(self, transpose: ir.Node) -> None:
        """Axes in another order, in which they may be scaled, and softmaxed along the keys', until they are turned back."""
        order = order_of(transpose)
        if order is None or len(order) != self.rank:
            raise Refusal(f"{transpose.name} transposes the scores, and their rank is not known")
        before = self.order or tuple(range(self.rank))
        now = tuple(before[axis] for axis in order)
        self.order = None if now == tuple(range(self.rank)) else now

    def softmax(self, axis: int) -> None:
        order = self.order or tuple(range(self.rank))
        self.softmaxed = order[axis] - self.rank if -self.rank <= axis < self.rank else None

    def cut(self, reshape: ir.Node) -> None:
        """[N,Q,K] to [B,H,Q,K] or back."""
        turned = self.order is not None
        if turned and self.order != _turned(self.rank):
            raise Refusal(f"{reshape.name} cuts scores that were transposed")
        x, shape, rank = input_of(reshape, 0), input_of(reshape, 1), rank_of(reshape.outputs[0])
        cuts, joins = (self.rank, rank) == (3, 4), (self.rank, rank) == (4, 3)
        if not cuts and not (joins and self.heads is not None):
            raise Refusal(f"{reshape.name} neither cuts scores into heads nor joins them again")
        if differ(x, reshape.outputs[0], -1) or differ(x, reshape.outputs[0], -2):
            raise Refusal(f"{reshape.name} changes queries or keys")
        if cuts and _may_copy_lengths(shape):
            raise Refusal(f"{reshape.name} has a shape that may copy lengths")
        self.rank, self.heads = (4, shape) if cuts else (3, self.heads)
        self.order = _turned(self.rank) if turned else None

    def zero(self, step: Step) -> None:
        """A mask that leaves zeros where a row masks everything: as with -inf, whatever it fills with."""
        mask, keeps = step.node.inputs[0], step.index == 1
        same = [
            term.value is mask and term.fill is not None and term.keeps == keeps and term.order == self.order
            for term in self.terms
        ]
        if not any(same):
            raise Refusal(f"{step.node.name} changes the probabilities by another mask than the scores'")
        self.terms = [
            replace(term, fill=-math.inf, whole=True) if also else term
            for term, also in zip(self.terms, same, strict=True)
        ]

    def _scale_by(self, node: ir.Node, index: int) -> None:
        value = input_of(node, 1 - index)
        number = number_of(value)
        divides = node.op_type == "Div"
        by_head = number is None and _is_one_for_each_head(value, self.order or tuple(range(self.rank)))
        if not (number or by_head) or (divides and index == 1):
            raise Refusal(f"{node.name} scales by what is no constant, and not one number for each head")
        if self.terms and number != 1:
            raise Refusal(f"{node.name} scales after the mask")
        if by_head:
            self.factors.append(Factor(value, self.rank, self.order, divides))
        elif number:
            self.scale *= 1 / number if divides else number

    def _mask_by(self, term: Term) -> None:
        if rank_of(term.value) is None:
            raise Refusal(f"the rank of the mask {term.value.name} is not known")
        self.terms.append(term)


def _turned(rank: int) -> tuple[int, ...]:
    """The order of axes in which the last two are exchanged."""
    return (*range(rank - 2), rank - 1, rank - 2)


def _is_one_for_each_head(value: ir.Value, order: tuple[int, ...]) -> bool:
    """Whether ``value`` is known to have no axis of queries or keys, beside scores in ``order``."""
    rank, count = rank_of(value), len(order)
    return rank is not None and all(
        order[axis] < count - 2 or length(value, axis) == 1 for axis in range(-min(rank, count), 0)
    )


def _fill(node: ir.Node, index: int) -> float:
    """The fill at an input of ``node``, beside which no score shows."""
    fill = fill_of(input_of(node, index))
    if fill is None:
        raise Refusal(f"{node.name} fills with what is no constant")
    if fill > max(_DROWNING, least(node.outputs[0].dtype)):
        raise Refusal(f"{node.name} fills with {fill:g}, beside which scores still show")
    return fill


def _may_copy_lengths(shape: ir.Value) -> bool:
    """Whether a Reshape's shape holds a zero; one that is put together of lengths does not."""
    node = shape.producer()
    parts = [shape] if shape.const_value is not None else list(node.inputs) if node is not None else [None]
    constants = [part.const_value.numpy() for part in parts if part is not None and part.const_value is not None]
    return any(0 in constant for constant in constants)


def input_of(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    if value is None:
        raise Refusal(f"{node.name} lacks an input")
    return value
