"""What a graph says of its shapes: ranks, lengths, and what a computed shape holds.

Owns no rule and no pattern. A length is a number, a name that equal lengths share, or unknown.
"""

from math import prod

import onnx_ir as ir

from txopt.exporter.algebra import scalar

_SHAPE_ARITHMETIC = ("Shape", "Concat", "Squeeze", "Unsqueeze", "Identity", "Cast", "Gather", "Slice")
_MOST_AXES = 64
Length = int | tuple[ir.Value, int] | ir.Value  # a number, the length of a value's axis, or whatever a value holds


def order_of(transpose: ir.Node) -> tuple[int, ...] | None:
    """The axes of a Transpose's input in their new order; None where it reverses them and their number is not known."""
    if "perm" in transpose.attributes:
        return tuple(transpose.attributes["perm"].as_ints())
    rank = None if transpose.inputs[0] is None else rank_of(transpose.inputs[0])
    return None if rank is None else tuple(range(rank))[::-1]


def rank_of(value: ir.Value) -> int | None:
    """How many axes ``value`` has, None where neither its shape nor its producer says."""
    if value.shape is not None:
        return len(value.shape)
    node = value.producer()
    if node is not None and node.op_type == "Transpose" and "perm" in node.attributes:
        return len(node.attributes["perm"].as_ints())
    if node is not None and node.op_type == "Reshape":
        parts = lengths_of(node.inputs[1])
        return None if parts is None else len(parts)
    if node is not None and node.op_type == "Attention" and value is node.outputs[0] and node.inputs[0] is not None:
        return rank_of(node.inputs[0])
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


def lengths_of(shape: ir.Value | None) -> tuple[Length, ...] | None:
    """What a shape holds, one by one; None where not even its parts are known."""
    if shape is None or shape.dtype not in (None, ir.DataType.INT64, ir.DataType.INT32):
        return None
    if shape.const_value is not None:
        return _numbers(shape.const_value)
    node = shape.producer()
    if node is None or node.op_type not in _SHAPE_ARITHMETIC or node.inputs[0] is None:
        return None
    start, end = (node.attributes[key].as_int() if key in node.attributes else None for key in ("start", "end"))
    if node.op_type == "Shape":
        rank = rank_of(node.inputs[0])
        return None if rank is None else tuple((node.inputs[0], axis) for axis in range(rank))[start:end]
    parts = [lengths_of(value) for value in (node.inputs if node.op_type == "Concat" else node.inputs[:1])]
    if node.op_type == "Concat":
        single = [_alone(value) if part is None else part for value, part in zip(node.inputs, parts, strict=True)]
        return None if None in single else tuple(one for part in single for one in part or ())
    if node.op_type in ("Identity", "Cast"):
        return parts[0]
    if node.op_type in ("Squeeze", "Unsqueeze") and parts[0] is not None and len(parts[0]) == 1:
        return parts[0]
    if node.op_type == "Gather" and parts[0] is not None and node.inputs[1] is not None:
        chosen = None if node.inputs[1].const_value is None else _numbers(node.inputs[1].const_value)
        inside = chosen is not None and all(-len(parts[0]) <= index < len(parts[0]) for index in chosen)
        return tuple(parts[0][index] for index in chosen or ()) if inside else None
    if node.op_type == "Slice" and parts[0] is not None and len(node.inputs) < 5:
        first, last = scalar(node.inputs[1]), scalar(node.inputs[2])
        return None if first is None or last is None else parts[0][int(first) : int(last)]
    return None


def _numbers(constant: ir.TensorProtocol) -> tuple[int, ...] | None:
    """What a constant holds, where it can be a shape: a table of weights cannot."""
    if (
        constant.dtype not in (ir.DataType.INT64, ir.DataType.INT32)
        or len(constant.shape) > 1
        or constant.size > _MOST_AXES
    ):
        return None
    return tuple(int(number) for number in constant.numpy().reshape(-1))


def _alone(part: ir.Value | None) -> tuple[Length, ...] | None:
    """A part of a shape that is one number, computed somehow."""
    return None if part is None or part.shape is None or part.shape != (1,) else (part,)


def multiplied_lengths(node: ir.Node) -> tuple[Length, ...] | None:
    """What a ReduceProd makes one number of; None where it is none, or that is not known."""
    all_of_them = len(node.inputs) > 1 or not node.attributes.get_int("noop_with_empty_axes", 0)
    return lengths_of(node.inputs[0]) if node.op_type == "ReduceProd" and all_of_them else None


def is_open(part: Length) -> bool:
    """Whether a part of a shape is -1, what is left. Values of torch's exporter make an operator of ``!=``, so they are not asked."""
    return isinstance(part, int) and part == -1


def number_of(value: ir.Value | None) -> float | None:
    """The number that ``value`` holds: a constant, or computed from a known length, as TorchScript writes 1 / sqrt(head size)."""
    number = scalar(value)
    node = value.producer() if value is not None else None
    if number is not None or node is None:
        return number
    if node.op_type in ("Shape", "Slice", "Gather"):
        found = lengths_of(value)
        return _known(found[0]) if found is not None and len(found) == 1 else None
    if node.op_type == "ReduceProd":
        known = [_known(one) for one in multiplied_lengths(node) or ()]
        return None if None in known or not known else prod(one for one in known if one is not None)
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
