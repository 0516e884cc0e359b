"""Random inputs of a graph that nobody described: sizes by the names of its axes, indices that stay inside their tables.

It knows nothing of the graph but its inputs, and which of them are indices, which it must not draw too large.
"""

import ast
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.runtime.errors import SourceError

Array = NDArray[Any]
Sizes = dict[str, int]  # lengths by the name of their axis, or input/axis where it has none

# (first axes, all others in turn): the first sets that the foreign graph itself accepts are taken. Lengths that differ find most;
# some graphs want equal ones, a batch of one, whole windows, or images that can be halved often.
_SIZES: tuple[tuple[int, tuple[int, ...]], ...] = (
    (2, (5, 7, 6)),
    (3, (9, 4, 8)),
    (2, (6,)),
    (3, (9,)),
    (1, (5,)),
    (1, (8,)),
    (2, (16,)),
    (2, (32,)),
    (1, (64,)),
    (2, (96,)),
    (1, (224,)),
)
_PASSED_ON = ("Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Expand", "Transpose", "Slice", "Flatten")


def draw(model: ir.Model, sizes: Sizes, seed: int) -> dict[str, Array]:
    """Every input of ``model`` at ``sizes``, by its name.

    Raises:
        SourceError: an input has no shape, or is neither of floats, integers nor booleans.
    """
    random = np.random.default_rng(seed)
    return {
        str(value.name): np.full([1] * len(axes(value)), seed % 2 == 0)
        if _is_flag(value)
        else _draw(value, [_length(name, sizes) for name in axes(value)], index_bound(value), random)
        for value in model.graph.inputs
    }


def _is_flag(value: ir.Value) -> bool:
    """Whether an input is one boolean, which may choose a branch: it is true and false in turn."""
    return value.dtype == ir.DataType.BOOL and all(length == 1 for length in axes(value))


def candidates(model: ir.Model, apart: Collection[str] = ()) -> Iterator[Sizes]:
    """Sizes to try, those that would find most first; many when nothing says what the graph takes.

    First axes are batches, of one length, but for those ``apart``.
    """
    first: dict[str, None] = {}
    others: dict[str, None] = {}
    for value in model.graph.inputs:
        for axis, name in enumerate(axes(value)):
            for symbol in symbols(name):
                (first if axis == 0 and symbol not in apart else others).setdefault(symbol)
    names = [name for name in others if name not in first]
    if not first and not names:
        yield from ({}, {})
    for batch, lengths in _SIZES if first or names else ():
        rest = {name: lengths[index % len(lengths)] for index, name in enumerate(names)}
        yield {**dict.fromkeys(first, batch), **rest}


def axes(value: ir.Value) -> list[int | str]:
    """The lengths of an input, numbers or names.

    Raises:
        SourceError: it has no shape.
    """
    if value.shape is None:
        raise SourceError(f"{value.name}: expected an input with a shape, found none, so no input can be drawn")
    return [
        dim if isinstance(dim, int) else dim.value or f"{value.name}/{axis}" for axis, dim in enumerate(value.shape)
    ]


def symbols(name: int | str | None) -> list[str]:
    """The names in a length like "past_length + 1"; what is no sum of names and numbers is one name itself."""
    if not isinstance(name, str):
        return []
    try:
        tree = ast.parse(name, mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return [name]
    allowed = (ast.Expression, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Name, ast.Load, ast.Constant)
    nodes = list(ast.walk(tree))
    numbers = all(type(node.value) is int for node in nodes if isinstance(node, ast.Constant))
    found = [node.id for node in nodes if isinstance(node, ast.Name)]
    dashed = "-" in name and " - " not in name  # "batch-size"
    return found if found and numbers and not dashed and all(isinstance(node, allowed) for node in nodes) else [name]


def _length(name: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(name, int):
        return name
    if name in sizes:
        return sizes[name]

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            return (
                left + right
                if isinstance(node.op, ast.Add)
                else left - right
                if isinstance(node.op, ast.Sub)
                else left * right
            )
        return sizes[node.id] if isinstance(node, ast.Name) else int(getattr(node, "value", 1))

    return max(1, value(ast.parse(name, mode="eval").body))


def _draw(value: ir.Value, shape: list[int], bound: int | None, random: np.random.Generator) -> Array:
    """Normal floats, indices below their bound; other integers are masks: ones, and zeros at the end of each row."""
    if value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE):
        return random.normal(size=shape).astype(value.dtype.numpy())
    if value.dtype is None or not (value.dtype.is_integer() or value.dtype == ir.DataType.BOOL):
        kind = value.dtype.name.lower() if value.dtype is not None else "no tensor"
        raise SourceError(f"{value.name}: expected an input of floats, integers or booleans, found {kind}")
    if bound is not None:
        return random.integers(0, bound, shape).astype(value.dtype.numpy())
    mask = np.ones(shape, value.dtype.numpy())
    if shape and shape[-1] > 1:
        kept = random.integers(1, shape[-1] + 1, (*shape[:-1], 1))
        mask[np.arange(shape[-1]) >= kept] = 0
    return mask


def index_bound(value: ir.Value) -> int | None:
    """The length of the shortest table that the numbers of ``value`` index; None where they index none."""
    bounds, seen, waiting = [], {value}, [value]
    while waiting:
        for user, index in waiting.pop().uses():
            if user.op_type in ("Gather", "GatherElements", "GatherND") and index == 1:
                table, axis = user.inputs[0], user.attributes["axis"].as_int() if "axis" in user.attributes else 0
                length = table.shape[axis] if table is not None and table.shape is not None else None
                bounds.append(length if isinstance(length, int) else 1)
            elif user.op_type in _PASSED_ON and index == 0 and user.outputs[0] not in seen:
                seen.add(user.outputs[0])
                waiting.append(user.outputs[0])
    return min(bounds, default=None)


def text(sizes: Mapping[str, int]) -> str:
    """ "batch=2, source=5"."""
    return ", ".join(f"{name}={length}" for name, length in sizes.items()) or "fixed sizes"
