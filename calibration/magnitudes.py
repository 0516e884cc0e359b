"""How large the numbers inside a graph become over data: the largest magnitude of each value, and of what products sum on their way.

Taken inside the graphs, by nodes beside their own, so that nothing is kept but one number for each value. Unlike in other
calibration, padding counts: infinity in a masked place is NaN once it is weighted with 0. Infinities of the float32 graph itself are
fills of masks, and are left out. Knows no number format; which magnitudes are too large is islands.py's.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.collect import Steps, collect
from txopt.calibration.dtypes import floats_of, infer, is_float
from txopt.calibration.evaluate import Said
from txopt.calibration.gemms import split
from txopt.calibration.quantize import constant
from txopt.calibration.samples import Samples
from txopt.runtime.artifact import Artifact

PRODUCTS = ("MatMul", "Gemm", "Conv")
_PREFIX = "magnitude"


@dataclass(frozen=True, kw_only=True)
class Magnitudes:
    """Of one graph: the largest |x| of each float value by its name, and a bound on partial sums by the name of the node's output.

    What a MatMul, Gemm or Conv has summed so far is, in any order, at most the same node's result on magnitudes, |x| @ |w|; a score
    of Attention at most the product of the longest query's and the longest key's length (Cauchy-Schwarz).
    """

    values: Mapping[str, float]
    sums: Mapping[str, float] = field(default_factory=dict)


def magnitudes(
    artifact: Artifact,
    samples: Samples,
    *,
    said: Said | None = None,
    steps: Steps = Steps.LOOP,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Magnitudes]:
    """By graph; see ``collect`` for the arguments."""
    with tempfile.TemporaryDirectory(prefix="txopt-") as folder:
        watched: dict[str, _Watched] = {}
        for name, spec in artifact.manifest.graphs.items():
            model = ir.load(artifact.file(spec.file))
            split(model.graph)
            watched[name] = watch(model)
            ir.save(model, Path(folder) / spec.file)
            for part in _files(model) - {file.name for file in Path(folder).iterdir()}:
                shutil.copyfile(artifact.file(part), Path(folder) / part)
        observers = {name: {tap: _Largest(tap) for tap in mine.taps} for name, mine in watched.items()}
        beside = replace(artifact, path=Path(folder))
        collect(beside, samples, observers, said=said, steps=steps, progress=progress)
    return {
        name: mine.read({tap: observer.largest for tap, observer in observers[name].items()})
        for name, mine in watched.items()
    }


def _files(model: ir.Model) -> set[str]:
    """The names of the files that hold weights of ``model``."""
    weights = [value.const_value for value in model.graph.initializers.values()]
    return {str(tensor.location) for tensor in weights if isinstance(tensor, ir.ExternalTensor)}


@dataclass(frozen=True, kw_only=True)
class _Watched:
    """Names of values that hold magnitudes [1]: of float values, of products' sums, and of Attention's queries and keys."""

    values: Mapping[str, str]
    sums: Mapping[str, str]
    lengths: Mapping[str, tuple[str, str, float]]

    @property
    def taps(self) -> Iterator[str]:
        yield from (*self.values.values(), *self.sums.values())
        for query, key, _ in self.lengths.values():
            yield from (query, key)

    def read(self, seen: Mapping[str, float]) -> Magnitudes:
        scores = {name: seen[query] * seen[key] * scale for name, (query, key, scale) in self.lengths.items()}
        return Magnitudes(
            values={name: seen[tap] for name, tap in self.values.items()},
            sums={name: seen[tap] for name, tap in self.sums.items()} | scores,
        )


def watch(model: ir.Model) -> _Watched:
    """Adds the nodes that take magnitudes to ``model``, in place."""
    infer(model)
    graph, nodes = model.graph, list(model.graph)
    inputs = [value for value in graph.inputs if is_float(value)]
    made = [value for node in nodes for value in node.outputs if is_float(value)]
    finite = {value: _finite(graph, value) for value in (*inputs, *made)}
    values = {str(value.name): _largest(graph, magnitude, value) for value, magnitude in finite.items()}
    sums, lengths = {}, {}
    for node in nodes:
        name = str(node.outputs[0].name)
        if node.op_type in PRODUCTS and floats_of(node):
            sums[name] = _largest(graph, _on_magnitudes(graph, node, finite), node.outputs[0], "sum")
        elif node.op_type == "Attention":
            query, key = (_length(graph, value, finite) for value in node.inputs[:2])
            lengths[name] = query, key, _scale(node)
    return _Watched(values=values, sums=sums, lengths=lengths)


def _finite(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """|x|, and 0 where that is infinite."""
    zero = constant(graph, f"{_PREFIX}/zero", ir.tensor(np.zeros((), np.float32)))
    magnitude = _add(graph, "Abs", [value], f"{_PREFIX}/{value.name}/abs")
    infinite = _add(graph, "IsInf", [magnitude], f"{_PREFIX}/{value.name}/infinite", ir.DataType.BOOL)
    return _add(graph, "Where", [infinite, zero, magnitude], f"{_PREFIX}/{value.name}/finite")


def _largest(graph: ir.Graph, magnitude: ir.Value, of: ir.Value, what: str = "largest") -> str:
    one = constant(graph, f"{_PREFIX}/one", ir.tensor(np.ones(1, np.int64)))
    found = _add(graph, "ReduceMax", [magnitude], f"{_PREFIX}/{of.name}/{what}/number", keepdims=0)
    return str(_add(graph, "Reshape", [found, one], f"{_PREFIX}/{of.name}/{what}").name)


def _on_magnitudes(graph: ir.Graph, node: ir.Node, finite: Mapping[ir.Value, ir.Value]) -> ir.Value:
    """The product ``node`` of magnitudes, its bias included."""
    inputs = [value if value is None else finite.get(value) or _finite_constant(graph, value) for value in node.inputs]
    result = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()))
    graph.append(result)
    result.outputs[0].name = f"{_PREFIX}/{node.outputs[0].name}/product"
    result.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return result.outputs[0]


def _finite_constant(graph: ir.Graph, value: ir.Value) -> ir.Value:
    name = f"{_PREFIX}/{value.name}/abs"
    known = next((user.outputs[0] for user, _ in value.uses() if user.outputs[0].name == name), None)
    return known or _add(graph, "Abs", [value], name)


def _length(graph: ir.Graph, value: ir.Value | None, finite: Mapping[ir.Value, ir.Value]) -> str:
    """The largest Euclidean norm of a row of ``value``; over all heads at once where they are joined, which is no less."""
    assert value is not None, "Attention has queries and keys"
    name = f"{_PREFIX}/{value.name}/length"
    if not any(user.outputs[0].name == f"{name}/rows" for user, _ in finite[value].uses()):
        last = constant(graph, f"{_PREFIX}/last", ir.tensor(np.array([-1], np.int64)))
        rows = _add(graph, "ReduceL2", [finite[value], last], f"{name}/rows", keepdims=0)
        _largest(graph, rows, value, "length")
    return name


def _scale(attention: ir.Node) -> float:
    if "scale" in attention.attributes:
        return abs(attention.attributes["scale"].as_float())
    query = attention.inputs[0]
    assert query is not None, "Attention has queries"
    width = None if query.shape is None else query.shape[-1]
    if not isinstance(width, int):
        return 1.0  # the true one is smaller
    joined = len(query.shape or ()) == 3 and "q_num_heads" in attention.attributes
    heads = attention.attributes["q_num_heads"].as_int() if joined else 1
    return float((width / heads) ** -0.5)


def _add(
    graph: ir.Graph,
    operator: str,
    inputs: list[ir.Value],
    name: str,
    dtype: ir.DataType = ir.DataType.FLOAT,
    **attributes: Any,
) -> ir.Value:
    node = ir.node(operator, inputs, attributes=attributes)
    graph.append(node)
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(dtype)
    return node.outputs[0]


class _Largest:
    """The largest of the numbers that pass; an observer."""

    def __init__(self, name: str) -> None:
        self.name, self.largest = name, 0.0

    def update(self, values: NDArray[Any]) -> None:
        self.largest = max(self.largest, float(values.max(initial=0.0)))

    def merge(self, other: Self) -> None:
        self.largest = max(self.largest, other.largest)
