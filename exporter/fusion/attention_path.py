"""The way from scores to probabilities and on to V in a foreign graph, and small questions about what stands on it.

This file knows which operators may be walked through, not whether what they do there is right: attention.py judges that.
"""

from dataclasses import dataclass

import ml_dtypes
import onnx_ir as ir

from txopt.exporter.fusion.algebra import scalar
from txopt.exporter.graph import FOLD_LIMIT

_BEFORE = ("Add", "Sub", "Mul", "Div", "Where", "Max", "Cast", "Identity", "Reshape", "Tanh", "Clip")
_AFTER = ("Add", "Mul", "Div", "Where", "Cast", "Identity", "Dropout", "Reshape")
_FARTHEST = 12  # nodes; a path is rarely longer than six
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


Length = int | tuple[ir.Value, int] | ir.Value  # a number, the length of a value's axis, or whatever a value holds


@dataclass(frozen=True)
class Step:
    """A node on the way, and which of its inputs comes from the step before."""

    node: ir.Node
    index: int = 0


def before(softmax: ir.Node) -> list[Step]:
    """From the MatMul of two computed values to ``softmax``, without it; empty where there is none."""
    return _climb(softmax.inputs[0], _FARTHEST, set())


def _climb(value: ir.Value | None, left: int, seen: set[ir.Node]) -> list[Step]:
    node = None if value is None else value.producer()
    if node is None or node in seen or not left:
        return []
    seen.add(node)
    if node.op_type == "MatMul":
        return [] if any(_is_weight(factor) for factor in node.inputs) else [Step(node)]
    if node.op_type not in _BEFORE:
        return []
    first = 1 if node.op_type == "Where" else 0
    last = 1 if node.op_type in ("Cast", "Identity", "Reshape", "Clip") else len(node.inputs)
    for index in range(first, last):
        if steps := _climb(node.inputs[index], left - 1, seen):
            return [*steps, Step(node, index)]
    return []


def after(softmax: ir.Node) -> list[Step]:
    """From ``softmax``, without it, to the MatMul with V; empty where there is none."""
    return _descend(softmax.outputs[0], _FARTHEST)


def _descend(value: ir.Value, left: int) -> list[Step]:
    for user, index in value.uses():
        if user.op_type == "MatMul" and index == 0 and not _is_weight(user.inputs[1]):
            return [Step(user)]
    for user, index in value.uses():
        if left and user.op_type in _AFTER and (steps := _descend(user.outputs[0], left - 1)):
            return [Step(user, index), *steps]
    return []


def _is_weight(value: ir.Value | None) -> bool:
    """Whether a MatMul with ``value`` is a projection."""
    return value is None or (value.const_value is not None and len(value.const_value.shape) < 3)


def guards(softmax: ir.Node) -> set[ir.Node]:
    """torch's zeros for rows that mask everything: the Where(asked, 0, p), and the node that asks.

    That is IsNaN(p), or the comparison of the scores with -inf whose answer must hold at every key.
    """
    scores, probabilities = softmax.inputs[0], softmax.outputs[0]
    for where in (user for user, index in probabilities.uses() if user.op_type == "Where" and index == 2):
        asked = where.inputs[0].producer() if where.inputs[0] is not None else None
        if asked is None or fill_of(where.inputs[1]) != 0:
            continue
        if asked.op_type == "IsNaN" and asked.inputs[0] is probabilities:
            return {where, asked}
        if (question := _all_masked(asked, scores)) is not None:
            return {where, question}
    return set()


def _all_masked(node: ir.Node, scores: ir.Value | None) -> ir.Node | None:
    """The node that compares ``scores`` with -inf, if ``node`` says for which rows that holds at every key."""
    node, negated = _without_not(node)
    if node.op_type not in ("ReduceMin", "ReduceMax") or node.inputs[0] is None or not _over_keys(node):
        return None
    compared = node.inputs[0].producer()
    compared, negated_inside = (None, False) if compared is None else _without_not(compared)
    if compared is None or scores not in compared.inputs or {negated, negated_inside} != {node.op_type == "ReduceMax"}:
        return None
    if compared.op_type == "Equal":
        (bound,) = [scalar(value) for value in compared.inputs if value is not scores] or [None]
        return compared if bound == -float("inf") else None
    return compared if compared.op_type == "IsInf" else None


def _without_not(node: ir.Node) -> tuple[ir.Node, bool]:
    negated = False
    while node.op_type in ("Not", "Cast") and node.inputs[0] is not None:
        inner = node.inputs[0].producer()
        if inner is None:
            break
        node, negated = inner, negated != (node.op_type == "Not")
    return node, negated


def _over_keys(reduce: ir.Node) -> bool:
    axes = scalar(reduce.inputs[1]) if len(reduce.inputs) > 1 else None
    shape = reduce.inputs[0].shape if reduce.inputs[0] is not None else None
    kept = "keepdims" not in reduce.attributes or reduce.attributes["keepdims"].as_int() == 1
    return kept and (axes == -1 or (shape is not None and axes == len(shape) - 1))


def changes_nothing(node: ir.Node) -> bool:
    """Identity, Dropout out of training, and Cast between floats."""
    if node.op_type == "Cast":
        return node.attributes["to"].as_int() in _FLOATS
    training = node.inputs[2] if node.op_type == "Dropout" and len(node.inputs) > 2 else None
    return node.op_type in ("Identity", "Dropout") and (training is None or scalar(training) == 0)


def fill_of(value: ir.Value | None) -> float | None:
    """The one number that a tensor is filled with: a constant, or one that is expanded, or was when constants were folded."""
    number = scalar(value)
    if value is not None and value.const_value is not None and 1 < value.const_value.size <= FOLD_LIMIT:
        numbers = {float(one) for one in value.const_value.numpy().reshape(-1)}
        return numbers.pop() if len(numbers) == 1 else None
    node = value.producer() if value is not None else None
    if number is not None or node is None:
        return number
    if node.op_type == "Expand":
        return scalar(node.inputs[0])
    if node.op_type == "ConstantOfShape":
        tensor = node.attributes["value"].as_tensor() if "value" in node.attributes else None
        return 0.0 if tensor is None else float(tensor.numpy().reshape(()))
    return None


def shapes_of_fills(step: Step) -> list[ir.Node]:
    """The Shape that a fill is expanded to, where it serves that fill alone: it goes with the fill."""
    fill = step.node.inputs[3 - step.index] if step.node.op_type == "Where" else None
    expand = fill.producer() if fill is not None and len(fill.uses()) == 1 and not fill.is_graph_output() else None
    shape = None if expand is None or expand.op_type not in ("Expand", "ConstantOfShape") else expand.inputs[-1]
    node = shape.producer() if shape is not None and len(shape.uses()) == 1 else None
    return [] if node is None or node.op_type != "Shape" else [node]


def least(dtype: ir.DataType | None) -> float:
    """The dtype's least finite number; float32's where it is not known."""
    known = dtype if dtype is not None and dtype in _FLOATS else ir.DataType.FLOAT
    return float(ml_dtypes.finfo(known.numpy()).min)  # type: ignore[no-untyped-call]


def rank_of(value: ir.Value) -> int | None:
    """How many axes ``value`` has, None where neither its shape nor its producer says."""
    if value.shape is not None:
        return len(value.shape)
    node = value.producer()
    if node is not None and node.op_type == "Transpose" and "perm" in node.attributes:
        return len(node.attributes["perm"].as_ints())
    return None


def differ(left: ir.Value, right: ir.Value, axis: int) -> bool:
    """Whether two lengths must be unequal, or one is 1 and the other is not known to be."""
    first, second = length(left, axis), length(right, axis)
    return first != second and (1 in (first, second) or (isinstance(first, int) and isinstance(second, int)))


def broadcasts(value: ir.Value, result: ir.Value) -> bool:
    """Whether ``result``, of the same rank as far as that is known, is longer than ``value``; what has no name is taken to fit."""
    if value.shape is None or result.shape is None or len(value.shape) != len(result.shape):
        return False
    return any(
        differ(value, result, axis) and length(result, axis) is not None and length(value, axis) is not None
        for axis in range(len(value.shape))
    )


def length(value: ir.Value, axis: int) -> int | str | None:
    """The number or name of a length; None where it has neither."""
    dim = None if value.shape is None else value.shape[axis]
    return dim.value if isinstance(dim, ir.SymbolicDim) else dim


def untransposed(kt: ir.Value, rank: int) -> tuple[ir.Value, tuple[int, ...] | None]:
    """The value that K is a Transpose of, and by which permutation; None where it is K."""
    if (k := _behind_three_axes(kt)) is not None:
        return k, None
    node, order = kt.producer(), list(range(rank))
    x = None
    if node is not None and node.op_type == "Transpose":
        x, order = node.inputs[0], list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else order[::-1]
    order[-2:] = reversed(order[-2:])
    return kt if x is None else x, None if order == list(range(rank)) else tuple(order)


def _behind_three_axes(kt: ir.Value) -> ir.Value | None:
    """K, where torch's exporter transposes it as [B*H,K,D]: Reshape, Transpose(0,2,1), Reshape."""
    split = kt.producer()
    transpose = _producer(split, "Reshape")
    join = _producer(transpose, "Transpose")
    k = join.inputs[0] if join is not None and join.op_type == "Reshape" else None
    if split is None or transpose is None or join is None or k is None or k.shape is None or len(k.shape) != 4:
        return None
    permutation = transpose.attributes.get("perm")
    joined, cut = lengths_of(join.inputs[1]), lengths_of(split.inputs[1])
    if permutation is None or tuple(permutation.as_ints()) != (0, 2, 1) or joined is None or cut is None:
        return None
    wanted = [((k, axis), length(k, axis)) for axis in range(4)]
    found = [*zip(joined[1:], wanted[2:], strict=False), *zip(cut, (wanted[i] for i in (0, 1, 3, 2)), strict=False)]
    return k if (len(joined), len(cut)) == (3, 4) and all(one in several for one, several in found) else None


def _producer(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """What gives the first input of ``node``, if ``node`` is an ``op_type``."""
    value = node.inputs[0] if node is not None and node.op_type == op_type else None
    return None if value is None else value.producer()


def lengths_of(shape: ir.Value | None) -> tuple[Length, ...] | None:
    """What a shape holds, one by one; None where not even its parts are known."""
    if shape is None:
        return None
    if shape.const_value is not None:
        return tuple(int(number) for number in shape.const_value.numpy().reshape(-1))
    node = shape.producer()
    if node is None or node.inputs[0] is None:
        return None
    start, end = (node.attributes[key].as_int() if key in node.attributes else None for key in ("start", "end"))
    if node.op_type == "Shape":
        rank = rank_of(node.inputs[0])
        return None if rank is None else tuple((node.inputs[0], axis) for axis in range(rank))[start:end]
    parts = [lengths_of(value) for value in (node.inputs if node.op_type == "Concat" else node.inputs[:1])]
    if node.op_type == "Concat":
        single = [_alone(value) if part is None else part for value, part in zip(node.inputs, parts, strict=True)]
        return None if None in single else tuple(one for part in single for one in part or ())
    if node.op_type in ("Squeeze", "Unsqueeze", "Identity") and parts[0] is not None and len(parts[0]) == 1:
        return parts[0]
    if node.op_type == "Gather" and parts[0] is not None and (index := scalar(node.inputs[1])) is not None:
        return parts[0][int(index) :][:1]
    if node.op_type == "Slice" and parts[0] is not None and len(node.inputs) < 5:
        first, last = scalar(node.inputs[1]), scalar(node.inputs[2])
        return None if first is None or last is None else parts[0][int(first) : int(last)]
    return None


def _alone(part: ir.Value | None) -> tuple[Length, ...] | None:
    """A part of a shape that is one number, computed somehow."""
    return None if part is None or part.shape is None or part.shape != (1,) else (part,)


def number_of(value: ir.Value | None) -> float | None:
    """The number that ``value`` holds: a constant, or computed from a known length, as TorchScript writes 1 / sqrt(head size)."""
    number = scalar(value)
    node = value.producer() if value is not None else None
    if number is not None or node is None:
        return number
    if node.op_type in ("Shape", "Slice", "Gather"):
        found = lengths_of(value)
        return _known(found[0]) if found is not None and len(found) == 1 else None
    if node.op_type not in _ARITHMETIC or any(operand is None for operand in node.inputs[: _ARITHMETIC[node.op_type]]):
        return None
    operands = [number_of(operand) for operand in node.inputs[: _ARITHMETIC[node.op_type]]]
    if any(operand is None or operand <= 0 for operand in operands):
        return None
    first, second = operands[0] or 1.0, operands[-1] or 1.0
    results = {
        "Sqrt": first**0.5,
        "Reciprocal": 1 / first,
        "Mul": first * second,
        "Div": first / second,
        "Pow": first**second,
    }
    return results.get(node.op_type, first)


_ARITHMETIC = {
    "Cast": 1,
    "Identity": 1,
    "Squeeze": 1,
    "Unsqueeze": 1,
    "Sqrt": 1,
    "Reciprocal": 1,
    "Mul": 2,
    "Div": 2,
    "Pow": 2,
}


def _known(found: Length) -> float | None:
    """A length from ``_lengths`` as a number, also where only the Reshape before says it."""
    if isinstance(found, int):
        return float(found)
    if isinstance(found, ir.Value):
        return number_of(found)
    value, axis = found
    size = length(value, axis)
    node = value.producer()
    if isinstance(size, int) or node is None:
        return float(size) if isinstance(size, int) else None
    if node.op_type == "Transpose" and node.inputs[0] is not None and "perm" in node.attributes:
        return _known((node.inputs[0], node.attributes["perm"].as_ints()[axis]))
    cut = lengths_of(node.inputs[1]) if node.op_type == "Reshape" else None
    known = cut[axis] if cut is not None else None
    return float(known) if isinstance(known, int) and known > 0 else None
