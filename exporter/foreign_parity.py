"""Whether an optimized graph says what the foreign one said: both run on the same random feeds of two sets of sizes.

It knows nothing of the graphs but their inputs and outputs, and which inputs are indices, which it must not draw too large.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - numpy learns the names of narrow types
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.exporter.difference import difference
from txopt.exporter.onnx_file import OPSET
from txopt.runtime.backends.ort import Runner
from txopt.runtime.errors import InputError, ParityError, SourceError, TxoptError, explain
from txopt.runtime.parity import TOLERANCE

Array = NDArray[Any]

_SETS = 2
# (first axes, all others in turn): the first sets that the foreign graph itself accepts are taken. Lengths that differ find most;
# some graphs want equal ones, a batch of one, or images that can be halved often.
_SIZES: tuple[tuple[int, tuple[int, ...]], ...] = (
    (2, (5, 7, 6)),
    (3, (9, 4, 8)),
    (2, (6,)),
    (3, (9,)),
    (1, (5,)),
    (1, (8,)),
    (1, (64,)),
    (2, (96,)),
    (1, (224,)),
)
_PASSED_ON = ("Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Expand", "Transpose", "Slice", "Flatten")
_MOST_PROBLEMS = 5


def precision(model: ir.Model) -> str:
    """fp16 where any tensor of the graph's surface or weights is float16, else fp32."""
    values = (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values())
    return "fp16" if any(value.dtype == ir.DataType.FLOAT16 for value in values) else "fp32"


def prove(original: Path, optimized: Path, model: ir.Model) -> dict[str, Any]:
    """Runs both files; ``model`` is the optimized graph.

    Returns the certificate: precision, tolerance, largest error, the sizes that were run and those that told nothing, because
    the original refused them or answered without one finite number. Errors are relative to the largest expected number
    where that is above one.

    Raises:
        ParityError: they differ by more than the tolerance, in shape, in integers, or in which numbers are finite.
        SourceError: ONNX Runtime runs the original on none of the sizes tried.
    """
    asked = _asked(original, model)
    if not asked.answers:
        title = f"{original}: expected a graph that runs on random inputs, found none that it takes, so nothing can be proved:"
        raise SourceError(explain(title, asked.refusals[-2:]))
    kind, largest, runs, problems = precision(model), 0.0, [], []
    after = _opened(optimized, f"{original}: expected operators that ONNX Runtime knows in opset {OPSET} too")
    for sizes, drawn, expected in asked.answers:
        try:
            found = {name: after.array(value) for name, value in after.run(drawn).items()}
        except TxoptError as err:
            raise ParityError(
                f"the optimized graph does not run where {original} does ({_text(sizes)}): {err}"
            ) from err
        errors = {name: difference(expected[name], found[name]) for name in expected}
        for name, error in errors.items():
            if not error <= TOLERANCE[kind]:
                problems.append(f"{name} deviates by {error:.3g}, allowed {TOLERANCE[kind]:.3g} ({_text(sizes)})")
        worst = max(errors.values(), default=0.0)
        largest = max(largest, worst)
        runs.append({"sizes": sizes, "error": worst})
    if problems:
        title = f"the optimized graph does not say what {original} says; nothing was written:"
        raise ParityError(explain(title, problems[:_MOST_PROBLEMS]))
    certificate = {"precision": kind, "tolerance": TOLERANCE[kind], "largest_error": largest}
    return {**certificate, "runs": runs, "not_run": asked.not_run}


def feeds(original: Path, model: ir.Model) -> list[dict[str, Array]]:
    """The inputs that ``prove`` will ask: the first sets that the file ``original`` answers; ``model`` is its graph.

    Raises:
        SourceError: ONNX Runtime does not open the file, or it has inputs that cannot be drawn.
    """
    return [drawn for _, drawn, _ in _asked(original, model).answers]


@dataclass
class _Asked:
    """(sizes, feeds, answers) of the sets that the original answers; the sizes of those that it does not, and what it said."""

    answers: list[tuple[dict[str, int], dict[str, Array], dict[str, Array]]] = field(default_factory=list)
    not_run: list[dict[str, int]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


def _asked(original: Path, model: ir.Model) -> _Asked:
    """What the original says; it is closed again before anything else is opened, for each holds all its weights."""
    runner, asked = _opened(original, f"{original}: expected a graph that ONNX Runtime opens"), _Asked()
    for sizes, drawn in _drawn(model):
        try:
            asked.answers.append((sizes, drawn, _answer(runner, drawn)))
        except TxoptError as err:
            asked.refusals.append(f"{_text(sizes)}: {err}")
            asked.not_run.append(sizes)
        if len(asked.answers) == _SETS:
            break
    return asked


def _answer(runner: Runner, feeds: Mapping[str, Array]) -> dict[str, Array]:
    answers = {name: np.array(runner.array(value)) for name, value in runner.run(feeds).items()}  # they outlive it
    _check_finite(answers)
    return answers


def _opened(path: Path, expected: str) -> Runner:
    try:
        return Runner(path)
    except TxoptError as err:
        raise SourceError(f"{expected}, found: {err}") from err


def _check_finite(answers: Mapping[str, Array]) -> None:
    """Raises InputError where a float output holds nothing that could be compared."""
    for name, array in answers.items():
        if array.dtype.kind == "f" and array.size and not np.isfinite(array).any():
            raise InputError(f"{name} has no finite number")


def _drawn(model: ir.Model) -> Iterator[tuple[dict[str, int], dict[str, Array]]]:
    """Sizes, and feeds of these sizes."""
    bounds = {str(value.name): _bound(value) for value in model.graph.inputs}
    for seed, sizes in enumerate(_candidates(model)):
        yield sizes, _feeds(model, sizes, bounds, np.random.default_rng(seed))


def _candidates(model: ir.Model) -> Iterator[dict[str, int]]:
    """Lengths by the name of their axis, or input/axis where it has none."""
    first: dict[str, None] = {}
    others: dict[str, None] = {}
    for value in model.graph.inputs:
        for axis, name in enumerate(_axes(value)):
            for symbol in [] if isinstance(name, int) else _symbols(name):
                (first if axis == 0 else others).setdefault(symbol)
    names = [name for name in others if name not in first]
    if not first and not names:
        yield from ({} for _ in range(_SETS))
    for batch, lengths in _SIZES if first or names else ():
        rest = {name: lengths[index % len(lengths)] for index, name in enumerate(names)}
        yield {**dict.fromkeys(first, batch), **rest}


def _axes(value: ir.Value) -> list[int | str]:
    if value.shape is None:
        raise SourceError(f"{value.name}: expected an input with a shape, found none, so no input can be drawn")
    return [
        dim if isinstance(dim, int) else dim.value or f"{value.name}/{axis}" for axis, dim in enumerate(value.shape)
    ]


def _symbols(name: str) -> list[str]:
    """The names in a length like "past_length + 1"; what is no sum of names and numbers is one name itself."""
    try:
        tree = ast.parse(name, mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return [name]
    allowed = (ast.Expression, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Name, ast.Load, ast.Constant)
    if not all(isinstance(node, allowed) for node in ast.walk(tree)):
        return [name]
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]


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


def _feeds(
    model: ir.Model, sizes: Mapping[str, int], bounds: Mapping[str, int | None], random: np.random.Generator
) -> dict[str, Array]:
    return {
        str(value.name): _draw(value, [_length(name, sizes) for name in _axes(value)], bounds[str(value.name)], random)
        for value in model.graph.inputs
    }


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


def _bound(value: ir.Value) -> int | None:
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


def _text(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={length}" for name, length in sizes.items()) or "fixed sizes"
