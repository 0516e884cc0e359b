"""The way from a mean of squares to a norm's result, which layer norms and root-mean-square norms share.

This file knows the spellings of one over a root, of weights and of the casts between; which norm it is, the rules judge.
"""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from txopt.exporter.algebra import Product, only_user, product, scalar
from txopt.exporter.graph import reshaped

IsValue = Callable[[ir.Value], bool]  # whether a value is the one whose norm is taken


@dataclass(frozen=True)
class LayerNorm:
    """What LayerNormalization of ``x`` from ``axis`` on takes, and the node ``last`` that gives it."""

    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    epsilon: float
    axis: int
    last: ir.Node


@dataclass(frozen=True)
class Scaled:
    """What a value over its root and a weight are multiplied to: ``last`` gives it, ``narrow`` is the Cast on the way."""

    weight: ir.Value
    last: ir.Node
    narrow: ir.Node | None


def axes_of(mean: ir.Node, rank: int | None) -> list[int] | None:
    """The axes of a ReduceMean, counted from the end where the rank is known; None where they are no constant."""
    value = mean.inputs[1] if len(mean.inputs) > 1 else None
    if value is None or value.const_value is None:
        return None
    axes = [int(axis) for axis in value.const_value.numpy().reshape(-1)]
    return sorted(axis - rank if axis >= 0 and rank is not None else axis for axis in axes)


def drops_axes(mean: ir.Node) -> bool:
    return "keepdims" in mean.attributes and not mean.attributes["keepdims"].as_int()


def multiplied(value: ir.Value) -> tuple[ir.Value, float]:
    """What numbers make of ``value`` by Mul and Div, one after the other, and their product."""
    factor = 1.0
    while (node := only_user(value, "Mul") or only_user(value, "Div")) is not None:
        number = scalar(node.inputs[1 if node.inputs[0] is value else 0])
        if not number or (node.op_type == "Div" and node.inputs[0] is not value):
            break
        value, factor = node.outputs[0], factor / number if node.op_type == "Div" else factor * number
    return value, factor


def power(shifted: ir.Node) -> tuple[ir.Node | None, float]:
    """The root of a sum, and its exponent."""
    if (root := only_user(shifted.outputs[0], "Sqrt")) is not None:
        return root, 0.5
    root = only_user(shifted.outputs[0], "Pow")
    exponent = scalar(root.inputs[1]) if root is not None and root.inputs[0] is shifted.outputs[0] else None
    return (root, exponent) if exponent is not None and abs(exponent) == 0.5 else (None, 0.0)


def inverse(root: ir.Node, exponent: float, is_value: IsValue) -> tuple[ir.Node | None, tuple[ir.Value, ...] | None]:
    """The node that divides and what it divides; nothing where it only gives one over the root."""
    if exponent < 0:
        return root, None
    if (reciprocal := only_user(root.outputs[0], "Reciprocal")) is not None:
        return reciprocal, None
    division = only_user(root.outputs[0], "Div")
    if division is None or division.inputs[1] is not root.outputs[0]:
        return None, None
    divided = _product(division.inputs[0], is_value)
    if divided.constant != 1:
        return None, None
    return division, divided.factors or None


def scaled(top: ir.Node, others: tuple[ir.Value, ...], is_value: IsValue) -> Scaled | str:
    """From ``top``, which gives ``others`` over the root, to the product with the value and a weight; or what is wrong with it."""
    narrow: ir.Node | None = None
    factors = list(others)
    while len(factors) < 2:
        cast = only_user(top.outputs[0], "Cast") if narrow is None else None
        times = only_user(top.outputs[0], "Mul")
        if cast is not None and factors:
            top = narrow = cast
            continue
        if times is None:
            break
        (other,) = [value for value in times.inputs if value is not top.outputs[0]] or [None]
        inner = _product(other, is_value)
        if inner.constant != 1:
            return "something else is multiplied in between"
        factors, top = [*factors, *inner.factors], times
    weights = [value for value in factors if tensor_of(value) is not None]
    if factors and not any(map(is_value, factors)):
        return "the value that is squared is not the one that is divided or scaled"
    if len(factors) != 2 or len(weights) != 1:
        return "no constant weight vector is multiplied at the end"
    return Scaled(weights[0], top, narrow)


def _product(value: ir.Value | None, is_value: IsValue) -> Product:
    """The product that ``value`` is; what a norm is of stays whole, though it may be a product itself (Gemma's scaled embedding)."""
    return product(value) if value is None or not is_value(value) else Product(1.0, (value,), ())


def tensor_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant with axes that a weight is, or is computed from by Cast and by adding a number (1 + weight)."""
    if value is None or value.const_value is not None:
        tensor = None if value is None else value.const_value
        return tensor if tensor is not None and len(tensor.shape) > 0 else None
    node = value.producer()
    if node is None or node.op_type not in ("Cast", "Add"):
        return None
    numbers = [number for number in node.inputs if scalar(number) is not None and len(_shape(number)) < 2]
    tensors = [tensor_of(inner) for inner in node.inputs if inner not in numbers]
    return tensors[0] if len(tensors) == 1 and len(numbers) == len(node.inputs) - 1 else None


def is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and len(value.const_value.shape) > 0


def added_bias(weighted: ir.Node) -> tuple[ir.Value | None, ir.Node]:
    """The bias that is added to ``weighted``, and the last node."""
    added = only_user(weighted.outputs[0], "Add")
    bias = next(filter(is_weight, added.inputs), None) if added is not None else None
    return (bias, added) if added is not None and bias is not None else (None, weighted)


def before_widening(x: ir.Value, narrow: ir.Node) -> ir.Value | None:
    """x itself or what was widened to it, whichever is of the type that the result is narrowed to."""
    cast = x.producer()
    source = cast.inputs[0] if cast is not None and cast.op_type == "Cast" else None
    narrowed = narrow.attributes["to"].as_int()
    return next((v for v in (x, source) if v is not None and v.dtype is not None and v.dtype == narrowed), None)


def shape_problem(x: ir.Value, axis: int, *weights: ir.Value | None) -> str | None:
    """What speaks against these weights over the axes from ``axis`` on."""
    lengths = list(x.shape)[axis:] if x.shape is not None else [None] * -axis
    for value in weights:
        if value is None or tensor_of(value) is None:
            continue
        found = _without_ones(value, -axis)
        if len(found) != -axis or any(isinstance(n, int) and n != m for n, m in zip(lengths, found, strict=True)):
            return f"{value.name} has shape {found}, not that of the axes of the mean"
    return None


def _without_ones(weight: ir.Value, count: int) -> list[int]:
    """The shape of ``weight``; less the ones before its last ``count`` axes where it is a constant, as TensorFlow stores it."""
    tensor = tensor_of(weight)
    shape = [] if tensor is None else list(tensor.shape.numpy())
    ones = weight.const_value is not None and all(size == 1 for size in shape[:-count])
    return shape[-count:] if ones else shape


def flat(weight: ir.Value, count: int) -> ir.Value:
    """``weight``, less the ones before its last ``count`` axes."""
    tensor = weight.const_value
    return weight if tensor is None or len(tensor.shape) <= count else reshaped(weight, _without_ones(weight, count))


def dtype_problem(x: ir.Value, *weights: ir.Value | None) -> str | None:
    narrow = [
        value
        for value in weights
        if value is not None and None not in (x.dtype, value.dtype) and value.dtype != x.dtype
    ]
    return f"{narrow[0].name} is {narrow[0].dtype}, x is {x.dtype}" if narrow else None


def more_axes(x: ir.Value, *others: ir.Value | None) -> str | None:
    """A constant of one element may still add axes to what it meets."""
    rank = len(x.shape) if x.shape is not None else 1
    wide = next((other for other in others if len(_shape(other)) > rank), None)
    return None if wide is None else f"{wide.name} adds axes"


def read_elsewhere(last: ir.Node, *sources: ir.Value) -> str | None:
    """What speaks against taking out all from ``sources`` to ``last``: another reader, for whom it would be computed twice."""
    inside, waiting = {last}, [last]
    while waiting:
        for value in waiting.pop().inputs:
            stop = value is None or value in sources or value.const_value is not None
            node = None if stop or value is None else value.producer()
            if node is not None and node not in inside:
                inside.add(node)
                waiting.append(node)
    if any(node.graph is not last.graph for node in inside):
        return "a part of it is in another graph, around or inside a branch or loop"
    for value in (output for node in inside if node is not last for output in node.outputs):
        if value.is_graph_output() or any(user not in inside for user, _ in value.uses()):
            return f"something else reads {value.name}"
    return None


def name_of(last: ir.Node, operator: str, taken: set[str]) -> str:
    """The name of the ``operator`` that gives what ``last`` gave: in its scope, or behind its own name where that is taken.

    There may be no scope, as in decoders that were given a cache, and a module may run twice. The name is added to ``taken``.
    """
    own = last.name or ""
    name = f"{own.rpartition('/')[0] or own}/{operator}".lstrip("/")
    name = f"{own}/{operator}" if name in taken else name
    taken.add(name)
    return name


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    return () if value is None or value.const_value is None else tuple(value.const_value.shape.numpy())
