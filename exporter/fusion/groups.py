"""Keys and values that are repeated for groups of heads, as the few heads that they are: Attention repeats them itself.

    K [B,G,S,D] -> Unsqueeze(2) -> Expand or Tile [B,G,n,S,D] -> Reshape [B,G*n,S,D] -> Attention    becomes    K -> Attention

Source: ONNX operator Attention (opset 23 and 24): heads of Q are a multiple of those of K and V, each of which serves n heads of Q
that lie side by side. Lengths that are not known are taken to be those that are asked for, as everywhere in attention. Refused, with
the node's name: K and V of which one alone is repeated, or that are repeated by different numbers, and heads that are repeated as a
whole, one after the other. Keys and values that nothing repeats are no candidates.
"""

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common as passes

from txopt.exporter.algebra import scalar
from txopt.exporter.bodies import paths
from txopt.exporter.fusion.report import NOTHING, Barred, Report
from txopt.exporter.origins import origin
from txopt.exporter.shapes import Length, length, lengths_of, number_of, rank_of

_APART = 2  # the axis of [B,G,n,S,D] along which heads are repeated
_KEPT = {0: 0, 1: 1, 3: 2, 4: 3}  # the other axes, and where K [B,G,S,D] has them


@dataclass(frozen=True)
class _Repeated:
    """``many`` [B,G*n,S,D], cut from ``apart`` [B,G,n,S,D]: every head of ``few`` [B,G,S,D], ``count`` times."""

    many: ir.Value
    apart: ir.Value
    few: ir.Value
    count: int

    def replace(self, attention: ir.Node, index: int) -> None:
        """Gives ``few`` to ``attention``, and to whoever reads another length than those of heads, as masks do."""
        attention.replace_input_with(index, self.few)
        for value, heads, further in ((self.many, 1, 0), (self.apart, _APART, 1)):
            for node in [user for user, _ in value.uses() if user.op_type == "Shape"]:
                start, end = (
                    node.attributes[key].as_int() if key in node.attributes else None for key in ("start", "end")
                )
                axes = range(4 + further)[slice(start, end)]
                if axes and heads not in axes:
                    first = axes[0] - (further if axes[0] > heads else 0)
                    node.replace_input_with(0, self.few)
                    node.attributes["start"] = ir.AttrInt64("start", first)
                    node.attributes["end"] = ir.AttrInt64("end", first + len(axes))


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model`` and reports."""
    report = Report("Attention.groups", barred, paths(model))
    for attention in [node for node in model.graph.all_nodes() if node.op_type == "Attention"]:
        found = [_repeated(value) for value in attention.inputs[1:3]]
        reason = next((one for one in found if isinstance(one, str)), None)
        counts = [one.count for one in found if isinstance(one, _Repeated)]
        if reason is None and not counts:
            continue
        if reason is not None or len(counts) != 2 or len(set(counts)) != 1:
            report.refuse(attention, reason or _unlike(found))
        elif not report.bars(attention):
            report.took(attention, attention.outputs[0])
            for index, one in enumerate(found, start=1):
                assert isinstance(one, _Repeated), "both are"
                one.replace(attention, index)
    passes.RemoveUnusedNodesPass()(model)
    return report


def _unlike(found: list[_Repeated | str | None]) -> str:
    k, v = (one.count if isinstance(one, _Repeated) else 1 for one in found)
    return f"heads of K are repeated {k} times, those of V {v} times"


def _repeated(value: ir.Value | None) -> _Repeated | str | None:
    """What ``value`` repeats, a reason of refusal, or None where it repeats nothing."""
    reshape = _producer(value)
    if value is None or reshape is None or rank_of(value) != 4:
        return None
    if reshape.op_type == "Tile":
        times = lengths_of(reshape.inputs[1])
        in_turn = times is not None and len(times) == 4 and isinstance(times[1], int) and times[1] > 1
        return f"{reshape.name} repeats all heads one after the other, the operator each by itself" if in_turn else None
    inner = _producer(reshape.inputs[0]) if reshape.op_type == "Reshape" else None
    repeats = inner is not None and inner.op_type in ("Expand", "Tile")
    apart = _producer(inner.inputs[0]) if inner is not None and repeats else inner
    if inner is None or apart is None or apart.op_type != "Unsqueeze" or scalar(apart.inputs[1]) not in (_APART, -3):
        return None
    few = apart.inputs[0]
    if few is None or rank_of(few) != 4:
        return None
    count = _count(inner, few) if repeats else 1  # a product of five axes repeats them itself
    if count is None or not _joins_heads(reshape, few, count):
        return None
    return _Repeated(value, inner.outputs[0], few, count)


def _count(repeat: ir.Node, few: ir.Value) -> int | None:
    """How often each head of ``few`` is there; None where this is not known, or something else is repeated."""
    expands = repeat.op_type == "Expand"  # which asks for lengths, a Tile for how many times
    parts = _kept(repeat.inputs[1]) if expands else lengths_of(repeat.inputs[1])
    if parts is None or len(parts) != 5 or not (expands or all(isinstance(part, int) for part in parts)):
        return None
    for axis, place in _KEPT.items():
        part, own = parts[axis], length(few, place) if expands else 1
        if isinstance(part, int) and isinstance(own, int) and part not in (1, own):
            return None
    count = parts[_APART]
    return count if isinstance(count, int) and count > 0 else None


def _kept(shape: ir.Value | None) -> tuple[Length, ...] | None:
    """What an Expand is asked for. torch's old exporter puts a 1 where expand() was given -1, which keeps a length."""
    where = _producer(shape)
    if where is None or where.op_type != "Where":
        return lengths_of(shape)
    asked, ones, given = where.inputs
    equal, parts = _producer(asked), lengths_of(given)
    if equal is None or equal.op_type != "Equal" or given not in equal.inputs or parts is None:
        return None
    (bound,) = [value for value in equal.inputs if value is not given] or [None]
    minus = _producer(bound)
    negated = minus is not None and minus.op_type == "Mul" and ones in minus.inputs and -1 in map(scalar, minus.inputs)
    return tuple(1 if isinstance(part, int) and part == -1 else part for part in parts) if negated else None


def _joins_heads(reshape: ir.Node, few: ir.Value, count: int) -> bool:
    """Whether [B,G,n,S,D] becomes [B,G*n,S,D]: where D and two of the others are right, the last one is."""
    parts, y, whole = lengths_of(reshape.inputs[1]), reshape.outputs[0], reshape.inputs[0]
    heads, size = length(few, 1), length(few, 3)
    if parts is None or len(parts) != 4 or whole is None or not isinstance(heads, int) or not isinstance(size, int):
        return False
    joined = number_of(parts[1]) if isinstance(parts[1], ir.Value) else parts[1]
    right = [joined == heads * count]
    for axis, place in ((0, 0), (2, 3)):
        named = length(y, axis) is not None and length(y, axis) == length(few, axis)
        right.append(named or origin((y, axis)) in (origin((few, axis)), origin((whole, place))))
    return _is(parts[3], size) and sum(right) >= 2


def _is(part: Length, number: int) -> bool:
    found = origin(part)
    return isinstance(found, int) and found == number


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()
