"""The nodes that take the place of a written-out attention; attention.py says where one is, this file what it becomes.

Masks are joined into one and widened to [..,Q,K] where they do not show that they are: the operator reads a short key axis as cut
off, and ONNX Runtime wants every query's row. Blocks that are masked by the same values share the joined mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from txopt.calibration.quantize import constant
from txopt.exporter.fusion.attention_path import least
from txopt.exporter.fusion.replace import replace as replace_by
from txopt.exporter.graph import integers
from txopt.exporter.origins import origin
from txopt.exporter.shapes import length, lengths_of, rank_of


@dataclass(frozen=True)
class Term:
    """What masks scores of ``rank`` axes, which are in ``order`` then (None: as they were computed): ``value`` is added, or
    subtracted if ``negative``; with a ``fill`` it is a boolean that ``keeps`` scores or fills them. ``whole``: the fill is -inf or
    the dtype's least number."""

    value: ir.Value
    rank: int
    order: tuple[int, ...] | None = None
    negative: bool = False
    fill: float | None = None
    keeps: bool = True
    whole: bool = False


@dataclass(frozen=True)
class Factor:
    """What multiplies, or ``divides``, all scores of a head alike, which have ``rank`` axes in ``order`` then, as for a Term."""

    value: ir.Value
    rank: int
    order: tuple[int, ...] | None
    divides: bool


@dataclass(frozen=True, kw_only=True)
class Block:
    """One attention, of the product of ``rows`` and of ``columns``, transposed: by ``permutation``, or as they are where it is None.

    These are Q and K, or K and Q if the product is ``turned``; ``lengths`` are theirs, as far as they are known. ``ranks`` are those
    of the product and of V, ``heads`` the shape [B,H,Q,K] if 3D scores were cut; ``wide``: the Softmax is computed in float32 for
    narrower Q. Queries take the ``factors`` of the scores. ``last`` is the MatMul with V.
    """

    name: str
    rows: ir.Value
    columns: ir.Value
    v: ir.Value
    permutation: tuple[int, ...] | None
    turned: bool
    scale: float
    factors: tuple[Factor, ...]
    terms: tuple[Term, ...]
    lengths: tuple[int | str | None, int | str | None]
    ranks: tuple[int, int]
    heads: ir.Value | None
    wide: bool
    last: ir.Node

    @property
    def queries(self) -> ir.Value:
        """Q, maybe transposed."""
        return self.columns if self.turned else self.rows


def rewrite(graph: ir.Graph, block: Block, masks: dict[object, ir.Value]) -> None:
    """Replaces ``block`` in ``graph``; ``masks`` holds the joined masks of earlier blocks, and takes this one's."""
    new = Nodes(graph, block.name)
    columns = block.columns
    if block.permutation is not None:
        columns = new.add("Transpose", [columns], perm=list(block.permutation))
    rows = block.rows
    q, k = (columns, rows) if block.turned else (rows, columns)
    inputs = [
        _by_head(new, value, rank, block.heads)
        for value, rank in (
            (_scaled(new, block, q, block.ranks[0], masks), block.ranks[0]),
            (k, block.ranks[0]),
            (block.v, block.ranks[1]),
        )
    ]
    if block.ranks[0] != 4:
        inputs[0] = _scaled(new, block, inputs[0], 4, masks)
    if block.terms:
        terms = tuple(_turned(new, block, term, masks) for term in block.terms)
        inputs.append(_widened(new, block, terms, (q, k), _joined(new, block, terms, masks)))
    precision = {"softmax_precision": int(ir.DataType.FLOAT)} if block.wide else {}
    y = new.add("Attention", inputs, scale=block.scale, **precision)
    if block.ranks[1] == 3 and block.heads is None:
        new.add("Squeeze", [y, integers(graph, [1])])
    elif block.ranks[1] != 4:  # the axes before queries as V has them, but for groups that share one head of it
        sizes = [
            new.add("Shape", [q if block.ranks[1] == 5 else block.v], start=0, end=-2),
            new.add("Shape", [y], start=2),
        ]
        new.add("Reshape", [y, new.add("Concat", sizes, axis=0)])
    replace_by(block.last, *new.nodes)


class Nodes:
    """New nodes in order, named after the block."""

    def __init__(self, graph: ir.Graph, name: str) -> None:
        self.graph, self.name, self.nodes = graph, name, list[ir.Node]()

    def add(self, op_type: str, inputs: Sequence[ir.Value], **attributes: float | int | Sequence[int]) -> ir.Value:
        name = self.name if op_type == "Attention" else f"{self.name}/{op_type}_{len(self.nodes)}"
        self.nodes.append(ir.node(op_type, inputs, attributes=attributes, name=name))
        output = self.nodes[-1].outputs[0]
        output.name = f"{name}:0"
        return output

    def length(self, value: ir.Value, axis: int) -> ir.Value:
        """One length, read where it first appears, so that nothing else reads ``value``."""
        first = origin((value, axis))
        if isinstance(first, int):
            return integers(self.graph, [first])
        found, place = first if isinstance(first, tuple) else (value, axis)
        start = place if place >= 0 else place + (rank_of(found) or 0)
        return self.add("Shape", [found], start=start, end=start + 1)

    def number(self, number: float, dtype: ir.DataType) -> ir.Value:
        """A scalar initializer, made once."""
        tensor = ir.tensor(np.array(number, np.float64).astype(dtype.numpy()))
        return constant(self.graph, f"attention/{dtype.name.lower()}_{number:g}", tensor)


def _scaled(new: Nodes, block: Block, q: ir.Value, rank: int, turned: dict[object, ir.Value]) -> ir.Value:
    """Queries of ``rank`` axes times the factors of scores of as many: (f Q) K^T is f (Q K^T) where f is one for all of a head."""
    for factor in (factor for factor in block.factors if factor.rank == rank):
        value = factor.value
        if factor.order not in (
            None,
            (*range(rank - 2), rank - 1, rank - 2),
        ):  # queries and keys have 1 there, either way round
            value = _turned(new, block, Term(value, rank, factor.order), turned).value
        made = new.add("Div" if factor.divides else "Mul", [q, value])
        made.type, made.shape = q.type, q.shape
        q = made
    return q


def _by_head(new: Nodes, value: ir.Value, rank: int, heads: ir.Value | None) -> ir.Value:
    """[N,.,D] to one head [N,1,.,D], or to [B,H,.,D] as the scores were cut; [B,G,H,.,D] to [B,G*H,.,D]."""
    if rank == 4:
        return value
    if rank == 5:
        sizes = [new.length(value, 0), integers(new.graph, [-1]), new.length(value, 3), new.length(value, 4)]
        return new.add("Reshape", [value, new.add("Concat", sizes, axis=0)])
    if heads is None:
        return new.add("Unsqueeze", [value, integers(new.graph, [1])])
    cut = new.add("Slice", [heads, integers(new.graph, [0]), integers(new.graph, [2])])
    size, known = origin((value, 2)), lengths_of(heads)
    if isinstance(size, int) and known is not None and -1 not in known[:2]:
        rest = integers(new.graph, [-1, size])  # so that nothing else reads the value
    else:
        rest = new.add("Shape", [value], start=1)
    return new.add("Reshape", [value, new.add("Concat", [cut, rest], axis=0)])


def _turned(new: Nodes, block: Block, term: Term, masks: dict[object, ir.Value]) -> Term:
    """``term`` for scores [..,Q,K], whatever order they were in when it masked them."""
    computed = list(range(term.rank))
    wanted = [*computed[:-2], computed[-1], computed[-2]] if block.turned else computed
    order = [(term.order or computed).index(axis) for axis in wanted]
    value, rank = term.value, rank_of(term.value)
    if order == computed or not rank:
        return replace(term, order=None)
    key = (block.last.graph, value, tuple(order))
    if key not in masks:
        lengths = [1] * (term.rank - rank) + [
            None if value.shape is None else value.shape[axis] for axis in range(rank)
        ]
        wide = (
            value if rank == term.rank else new.add("Unsqueeze", [value, integers(new.graph, range(term.rank - rank))])
        )
        masks[key] = new.add("Transpose", [wide], perm=order)
        masks[key].type, masks[key].shape = value.type, ir.Shape([lengths[axis] for axis in order])
    return replace(term, value=masks[key], order=None)


def _joined(new: Nodes, block: Block, terms: Sequence[Term], masks: dict[object, ir.Value]) -> ir.Value:
    """One mask of all terms: boolean if all are and nothing of the masked scores is left, else added, in Q's dtype."""
    dtype = block.queries.dtype or ir.DataType.FLOAT
    scope = block.last.graph  # a mask that is made in one body is not there in another
    key = (scope, *terms, dtype, block.heads, block.queries if block.ranks[0] == 5 else block.ranks[0] == 3)
    if key not in masks:
        beside = [(term, _in_four_axes(new, block, term)) for term in terms]
        boolean = all(term.fill is not None and term.whole for term in terms)
        masks[key] = _boolean(new, beside) if boolean else _added(new, beside, dtype)
    return masks[key]


def _in_four_axes(new: Nodes, block: Block, term: Term) -> ir.Value:
    """A mask beside the scores that it was for, which are [B,H,Q,K] now; numpy's rules align it from the right."""
    value, rank = term.value, rank_of(term.value)
    if term.rank == 5 and rank is not None and rank > 2:
        whole = [new.add("Shape", [block.queries], start=0, end=3), new.add("Shape", [value], start=-2)]
        return _by_head(new, new.add("Expand", [value, new.add("Concat", whole, axis=0)]), 5, None)
    if term.rank == 3 and rank == 3 and length(value, 0) != 1:
        return _by_head(new, value, 3, block.heads)
    return value


def _boolean(new: Nodes, terms: Sequence[tuple[Term, ir.Value]]) -> ir.Value:
    kept = [value if term.keeps else new.add("Not", [value]) for term, value in terms]
    mask = kept[0]
    for value in kept[1:]:
        mask = new.add("And", [mask, value])
    return mask


def _added(new: Nodes, terms: Sequence[tuple[Term, ir.Value]], dtype: ir.DataType) -> ir.Value:
    mask: ir.Value | None = None
    for term, value in terms:
        if term.fill is not None:
            fill = new.number(term.fill if np.isinf(term.fill) else max(term.fill, least(dtype)), dtype)
            kept = mask if mask is not None else new.number(0, dtype)
            mask = new.add("Where", [value, kept, fill] if term.keeps else [value, fill, kept])
            continue
        if value.dtype is not None and value.dtype != dtype:
            value = new.add("Cast", [value], to=int(dtype))
        if mask is None:
            mask = new.add("Neg", [value]) if term.negative else value
        else:
            mask = new.add("Sub" if term.negative else "Add", [mask, value])
    assert mask is not None, "there are terms"
    return mask


def _widened(
    new: Nodes, block: Block, terms: Sequence[Term], operands: tuple[ir.Value, ir.Value], mask: ir.Value
) -> ir.Value:
    """``mask`` of ``terms`` with a row for each query and a column for each key of the ``operands`` Q and K."""
    ends = [(length(term.value, -2), length(term.value, -1)) for term in terms if (rank_of(term.value) or 0) >= 2]
    queries, keys = reversed(block.lengths) if block.turned else block.lengths
    if (
        queries is not None
        and keys is not None
        and queries in {end[0] for end in ends}
        and keys in {end[1] for end in ends}
    ):
        return mask
    sizes = [new.length(operand, -2) for operand in operands]
    return new.add("Expand", [mask, new.add("Concat", sizes, axis=0)])
