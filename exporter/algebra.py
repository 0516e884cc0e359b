"""What a value is as a product, however its factors were written: constants and values through Mul, Div and Pow.

The rules for activations ask here, so that order, side and grouping of factors do not matter to them.
"""

import math
from dataclasses import dataclass

import onnx_ir as ir

# Half the distance between neighbours, relative: what a constant loses where a graph in that dtype rounds it.
_ROUNDING = {ir.DataType.FLOAT16: 2**-11, ir.DataType.BFLOAT16: 2**-9}


@dataclass(frozen=True)
class Product:
    """``constant`` times every value in ``factors``, powers written out; ``nodes`` are those that multiply."""

    constant: float
    factors: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]


def product(value: ir.Value | None) -> Product:
    """The product that ``value`` is; a value that nobody multiplies is the only factor of itself.

    A factor is taken apart only where nothing but the product reads it.
    """
    if value is None:
        return Product(1.0, (), ())
    if (number := scalar(value)) is not None:
        return Product(number, (), ())
    node = value.producer()
    if node is not None and node.op_type == "Mul":
        left, right = (_inner(factor) for factor in node.inputs)
        return Product(left.constant * right.constant, left.factors + right.factors, (node, *left.nodes, *right.nodes))
    divisor = scalar(node.inputs[1]) if node is not None and node.op_type in ("Div", "Pow") else None
    if node is not None and node.op_type == "Div" and divisor:
        inner = _inner(node.inputs[0])
        return Product(inner.constant / divisor, inner.factors, (node, *inner.nodes))
    if node is not None and node.op_type == "Pow" and divisor in (2.0, 3.0) and node.inputs[0] is not None:
        return Product(1.0, (node.inputs[0],) * int(divisor), (node,))
    return Product(1.0, (value,), ())


def _inner(value: ir.Value | None) -> Product:
    used_once = value is not None and len(value.uses()) == 1 and not value.is_graph_output()
    return product(value) if value is None or used_once or scalar(value) is not None else Product(1.0, (value,), ())


def scalar(value: ir.Value | None) -> float | None:
    """The number that ``value`` holds, None where it is no constant or has several."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(()))


def close(found: float, wanted: float, dtype: ir.DataType | None) -> bool:
    """Whether ``found`` is ``wanted`` up to what rounding to ``dtype`` costs; products of rounded constants may lose it twice."""
    rounding = _ROUNDING.get(dtype, 2**-22) if dtype is not None else 2**-22
    return math.isclose(found, wanted, rel_tol=2 * rounding)


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads ``value``, if it is an ``op_type`` and in the same graph: what a loop does is not done once."""
    users = [user for user, _ in value.uses()]
    alone = len(users) == 1 and users[0].graph is value.graph and not value.is_graph_output()
    return users[0] if alone and users[0].op_type == op_type else None
