"""Inputs of products divided by a factor per channel, and their weights multiplied by it: the same numbers, easier to round.

MatMul(v, W) = MatMul(v / s, diag(s) W). Nothing is added to the graph: the division goes into what makes v, a normalization's weight
and bias or the columns (and bias) of a linear layer, through a Relu, which keeps positive factors. Owns where that is possible and
the edit. Where factors come from is smooth.py's and awq.py's; attention and activations that bend (Gelu, SiLU) stand in the way.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.linears import Read, Role, reads
from txopt.runtime.errors import InputError, UsageError, explain

_NORMS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True, kw_only=True)
class Fold:
    """A value [..,K] that can be divided: the products that read it, and the constants [K] or [J,K] of what makes it."""

    value: ir.Value
    products: tuple[Read, ...]
    makers: tuple[tuple[ir.Node, int], ...]  # (node, which of its inputs)

    @property
    def weights(self) -> list[NDArray[np.float32]]:
        """[K,N] of every product."""
        return [_numbers(read.weight) for read in self.products]


def folds(graph: ir.Graph) -> tuple[dict[str, Fold], dict[str, str]]:
    """What can be divided, by the name of the value, and why the other inputs of products cannot."""
    found: dict[str, Fold] = {}
    refused: dict[str, str] = {}
    inputs: dict[ir.Value, list[Read]] = {}
    for read in reads(graph):
        if read.activations is not None:
            inputs.setdefault(read.activations, []).append(read)
    for value, products in inputs.items():
        made = _makers(value)
        reason = _unread(value, products) or (made if isinstance(made, str) else None)
        if reason is not None:
            refused[str(value.name)] = reason
        elif not isinstance(made, str):
            found[str(value.name)] = Fold(value=value, products=tuple(products), makers=made)
    return found, refused


def fold(graph: ir.Graph, scales: Mapping[str, NDArray[Any]]) -> None:
    """Divides the values of ``scales`` by their factors [K], and multiplies the rows of the weights that read them.

    Args:
        graph: changed in place. A constant that others read too keeps its numbers for them.
        scales: by the name of a value; all positive.

    Raises:
        UsageError: a value cannot be divided without a node of its own; it says why.
        InputError: factors that are no K positive numbers.
    """
    possible, refused = folds(graph)
    problems = [
        f"{name}: {refused.get(name, 'no product reads a value of this name')}"
        for name in scales
        if name not in possible
    ]
    if problems:
        raise UsageError(explain("these values cannot be divided by factors; leave them as they are:", problems))
    for name, factors in scales.items():
        _apply(graph, possible[name], _checked(name, factors, possible[name].products[0].size))


def _apply(graph: ir.Graph, one: Fold, factors: NDArray[np.float64]) -> None:
    for node, index in one.makers:
        _change(graph, [(node, index)], lambda numbers: numbers / factors)
    for read in one.products:
        _change(graph, list(read.weight.uses()), lambda numbers: factors[:, None] * numbers)


def _change(
    graph: ir.Graph, uses: Iterable[tuple[ir.Node, int]], change: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> None:
    """Gives ``uses``, all of one constant, other numbers; the constant goes with its last reader."""
    uses = list(uses)
    old = uses[0][0].inputs[uses[0][1]]
    assert old is not None, "a use has a value"
    rest = [use for use in old.uses() if use not in uses]
    numbers = change(_numbers(old).astype(np.float64)).astype(np.float32)
    name = str(old.name)
    if rest:
        name = f"{old.name}/of/{uses[0][0].outputs[0].name}"
    else:
        del graph.initializers[name]
    tensor = ir.Tensor(numbers, name=name)
    new = ir.Value(name=name, shape=old.shape, type=old.type, const_value=tensor)
    graph.initializers[name] = new
    for node, index in uses:
        node.replace_input_with(index, new)


def _unread(value: ir.Value, products: list[Read]) -> str | None:
    """Why the readers of ``value`` cannot make up for a division; None where all of them can."""
    if value.is_graph_output():
        return "it is an output of the graph"
    nodes = {read.node for read in products}
    others = [user.op_type for user, _ in value.uses() if user not in nodes]
    if others:
        return f"{', '.join(sorted(set(others)))} reads it too"
    tables = [read.name for read in products if read.role is not Role.LINEAR]
    if tables:
        return f"{tables[0]} is a table [V,M], whose rows are what tokens look up"
    shared = [read.name for read in products if len(list(read.weight.uses())) > 1]
    return f"{shared[0]} is multiplied with something else too" if shared else None


def _makers(value: ir.Value) -> tuple[tuple[ir.Node, int], ...] | str:
    """The constants that a division of ``value`` goes into, or why there are none."""
    node = value.producer()
    if node is None:
        return "it is an input of the graph"
    if node.op_type == "Relu":
        made = node.inputs[0]
        assert made is not None, "Relu has an input"
        return _makers(made) if _alone(made) else f"{made.name} is read by others than its Relu"
    if node.op_type in _NORMS:
        wanted = range(1, len(node.inputs))
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        if axis != -1 and axis != len(value.shape or ()) - 1:
            return f"{node.op_type} normalizes more than the last axis"
    elif node.op_type == "MatMul":
        wanted = range(1, 2)
    elif node.op_type == "Add":
        return _biased(node)
    else:
        return f"{node.op_type} makes it"
    places = tuple((node, index) for index in wanted if node.inputs[index] is not None)
    if not all(_known(node.inputs[index]) for _, index in places):
        return f"a weight of the {node.op_type} that makes it is no constant"
    return places


def _biased(add: ir.Node) -> tuple[tuple[ir.Node, int], ...] | str:
    """Of the sum of a product and a bias [K]."""
    for index, value in enumerate(add.inputs):
        other = add.inputs[1 - index]
        product = None if other is None else other.producer()
        if value is not None and _known(value, rank=1) and product is not None and product.op_type == "MatMul":
            assert other is not None, "it has a producer"
            made = _makers(other)
            if isinstance(made, str) or not _alone(other):
                return made if isinstance(made, str) else f"{other.name} is read by others than its bias"
            return *made, (add, index)
    return "a sum makes it"


def _alone(value: ir.Value) -> bool:
    return len(list(value.uses())) == 1 and not value.is_graph_output()


def _known(value: ir.Value | None, rank: int | None = None) -> bool:
    tensor = None if value is None else value.const_value
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return False
    return rank is None or len(tensor.shape) == rank


def _numbers(value: ir.Value) -> NDArray[np.float32]:
    assert value.const_value is not None, "a constant"
    return value.const_value.numpy()


def _checked(name: str, factors: NDArray[Any], size: int) -> NDArray[np.float64]:
    wide = np.asarray(factors, np.float64)
    if wide.shape != (size,) or not (np.isfinite(wide) & (wide > 0)).all():
        raise InputError(f"{name}: expected {size} positive factors, got {list(wide.shape)} with some that are not")
    return wide
