"""What a value is of another one by Transpose, Reshape, Squeeze and Unsqueeze alone: its axes in another order, joined to longer ones,
with ones in between.

    Reshape(Transpose<0,2,1,3>(x), [B * H, Q, D])   is of x   ((0, 2), (1,), (3,))

Each axis is told by the axes of the other value that it is made of, in their order; one of length 1 may be made of none. Owns no rule
and no pattern. Source: Reshape keeps the order of elements (ONNX opset 24), so axes that are neighbours may be joined and cut again
wherever the lengths say so.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from txopt.exporter.origins import Origins
from txopt.exporter.shapes import Length, is_open, lengths_of, rank_of

Axes = tuple[tuple[int, ...], ...]
_Factors = tuple[int, Counter[Length]]  # a length as a product: its number, and what has none
_ONE: _Factors = (1, Counter())


@dataclass(frozen=True)
class Rearranged:
    """``source`` with its axes as ``axes`` says."""

    source: ir.Value
    axes: Axes


def rearranged(value: ir.Value, origins: Origins) -> Rearranged:
    """``value`` as the farthest value before it that it can be told by; by itself where nothing was rearranged."""
    way: list[ir.Node] = []
    source = value
    while (node := source.producer()) is not None and node.op_type in _REARRANGING and node.inputs[0] is not None:
        way.append(node)
        source = node.inputs[0]
    for start in range(len(way), -1, -1):  # a Reshape that cuts an axis of the source hides what is before it
        source = value if start == 0 else way[start - 1].inputs[0] or value
        rank = rank_of(source)
        axes: Axes | None = None if rank is None else tuple((axis,) for axis in range(rank))
        lengths = [origins.of((source, axis)) for axis in range(rank or 0)]
        for node in reversed(way[:start]):
            axes = None if axes is None else behind(node, axes, lengths, origins)
        if axes is not None:
            return Rearranged(source, axes)
    return Rearranged(value, ())


def behind(node: ir.Node, axes: Axes, lengths: Sequence[Length], origins: Origins) -> Axes | None:
    """The axes that ``node`` gives where it is given ``axes``, made of others of these ``lengths``; None where that is not known."""
    if node.op_type == "Transpose":
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(axes))[::-1]
        return tuple(axes[axis] for axis in order) if len(order) == len(axes) else None
    if node.op_type == "Reshape":
        found = (_regrouped(axes, wanted, lengths, origins) for wanted in _asked(node, axes, lengths))
        return next((one for one in found if one is not None), None)
    if node.op_type not in _REARRANGING or len(node.inputs) < 2:
        return None
    ones = lengths_of(node.inputs[1])
    if ones is None or not all(isinstance(one, int) for one in ones):
        return None
    rank = len(axes) + (len(ones) if node.op_type == "Unsqueeze" else 0)
    places = {int(one) % rank for one in ones if isinstance(one, int)}
    if node.op_type == "Squeeze":
        return tuple(group for place, group in enumerate(axes) if place not in places)
    rest = iter(axes)
    return tuple(() if place in places else next(rest) for place in range(rank))


_REARRANGING = ("Transpose", "Reshape", "Squeeze", "Unsqueeze")


def _asked(reshape: ir.Node, axes: Axes, lengths: Sequence[Length]) -> Iterator[list[list[Length]]]:
    """The lengths that a Reshape asks for, each as factors.

    Where one is the larger of two, as tf2onnx writes it for batches that may broadcast, either may be meant: if nothing is left
    open, the Reshape runs only where that one is the larger.
    """
    copies = "allowzero" not in reshape.attributes or not reshape.attributes["allowzero"].as_int()
    shape = reshape.inputs[1]
    node = None if shape is None else shape.producer()
    joined = node.inputs if node is not None and node.op_type == "Concat" else []
    if any(_larger(part) for part in joined):
        each = ([_part(part, which) for part in joined] for which in (0, 1))
        several = [tuple(one for part in parts for one in part or ()) for parts in each if None not in parts]
        several = [parts for parts in several if not any(map(is_open, parts))]
    else:
        several = [found] if (found := lengths_of(shape)) is not None else []
    for parts in several:
        if not copies or all(part != 0 for part in parts if isinstance(part, int)):
            yield [[part] for part in parts]
        elif len(parts) <= len(axes):
            yield [
                [lengths[axis] for axis in axes[place]] if isinstance(part, int) and part == 0 else [part]
                for place, part in enumerate(parts)
            ]


def _larger(part: ir.Value | None) -> ir.Node | None:
    """The node that says which of two is larger, if ``part`` is that."""
    node = None if part is None else part.producer()
    return node if node is not None and node.op_type == "Max" and len(node.inputs) == 2 else None


def _part(part: ir.Value | None, which: int) -> tuple[Length, ...] | None:
    """A part of a shape, of the larger of two the one."""
    if (larger := _larger(part)) is not None:
        return lengths_of(larger.inputs[which])
    alone = part is not None and part.shape is not None and part.shape == (1,)
    return lengths_of(part) or ((part,) if alone and part is not None else None)


def _regrouped(
    axes: Axes, wanted: Sequence[Sequence[Length]], lengths: Sequence[Length], origins: Origins
) -> Axes | None:
    """``axes``, one after the other, as axes of the lengths ``wanted``, of which one may be open."""
    left = deque(axis for group in axes for axis in group)
    opens = [place for place, parts in enumerate(wanted) if any(map(is_open, parts))]
    if len(opens) > 1:
        return None
    factors = {axis: _product([lengths[axis]], origins) for axis in left}
    first = opens[0] if opens else len(wanted)
    front, back = list[tuple[int, ...]](), list[tuple[int, ...]]()
    for place, parts in enumerate(wanted[:first]):
        group = _taken(left, _product(parts, origins), factors)
        if group is None:
            return None
        rest = wanted[place + 1] if place + 1 < len(wanted) else [-1]
        while left and factors[left[0]] == _ONE and _product(rest, origins) != _ONE:  # which nothing else asks for
            group = (*group, left.popleft())
        front.append(group)
    left.reverse()
    for parts in reversed(wanted[first + 1 :]):
        group = _taken(left, _product(parts, origins), factors)
        if group is None:
            return None
        back.append(group[::-1])
    left.reverse()
    if not opens and left:
        return None
    return (*front, *([tuple(left)] if opens else []), *reversed(back))


def _taken(left: deque[int], wanted: _Factors, factors: dict[int, _Factors]) -> tuple[int, ...] | None:
    """As many axes from the front of ``left``, and away from there, as make up the length ``wanted``."""
    group, found = list[int](), _ONE
    while found != wanted or (wanted == _ONE and not group and left and factors[left[0]] == _ONE):
        if not left:
            return None
        group.append(left.popleft())
        number, named = factors[group[-1]]
        found = found[0] * number, found[1] + named
    return tuple(group)


def _product(parts: Sequence[Length], origins: Origins) -> _Factors:
    factors = [factor for part in parts for factor in origins.factors(origins.of(part))]
    named: Counter[Length] = Counter(factor for factor in factors if not isinstance(factor, int))
    return prod(factor for factor in factors if isinstance(factor, int)), named
