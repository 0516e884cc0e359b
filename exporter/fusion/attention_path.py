"""The way from scores to probabilities and on to V in a foreign graph, and small questions about what stands on it.

This file knows which operators may be walked through, not whether what they do there is right: attention.py judges that.
"""

from dataclasses import dataclass

import ml_dtypes
import onnx_ir as ir

from txopt.exporter.algebra import scalar
from txopt.exporter.graph import FOLD_LIMIT
from txopt.exporter.origins import origin
from txopt.exporter.shapes import lengths_of

# What follows on the way is their first input; the last ones change scores, which a reason of refusal is for.
_UNARY = ("Cast", "Identity", "Reshape", "Clip", "Transpose", "Neg", "Abs", "Relu", "Sigmoid", "Exp", "Pow")
_BEFORE = (*_UNARY, "Add", "Sub", "Mul", "Div", "Where", "Max", "Tanh", "Concat")
_AFTER = ("Add", "Mul", "Div", "Where", "Cast", "Identity", "Dropout", "Reshape", "Transpose", "Slice")
_FARTHEST = 12  # nodes; a path is rarely longer than six
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


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
    last = 1 if node.op_type in _UNARY else len(node.inputs)
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
    wanted = [origin((k, axis)) for axis in range(4)]
    found = [*zip(joined[1:], wanted[2:], strict=False), *zip(cut, (wanted[i] for i in (0, 1, 3, 2)), strict=False)]
    return k if (len(joined), len(cut)) == (3, 4) and all(origin(one) == length for one, length in found) else None


def _producer(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """What gives the first input of ``node``, if ``node`` is an ``op_type``."""
    value = node.inputs[0] if node is not None and node.op_type == op_type else None
    return None if value is None else value.producer()
