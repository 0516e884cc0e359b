"""A graph by the layers of its model: which operators each layer holds, in order, and how many bytes of weights.

Owns what belongs to which layer where names do not tell; what a name tells is ``layers``' business. It reads models of onnx and of
onnx_ir, and changes none. Numbers that a foreign file claims are bounded here, names are cut: both go to people who did not ask.
"""

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import onnx
import onnx_ir as ir

from txopt.exporter.layers import OUTSIDE, layer_of, part_of, stack_of
from txopt.exporter.onnx_file import elements, external, operator, stored_bytes

# Rows for what is in no layer.
BEFORE, BETWEEN, AFTER = "before the layers", "between the layers", "after the layers"
ALL = "the whole graph"

_NOTHING: Mapping[str, str] = MappingProxyType({})
_SCOPES = "pkg.torch.onnx.name_scopes"
_BOOKKEEPING = ("Constant", "Identity")  # exporters put them first, whatever layer they serve
_MOST_BYTES = 2**63 - 1
_LONGEST_NAME = 200
_MOST_OPERATORS = 1000  # of a row; more are counted only
_MOST_LAYERS = 400
_MOST_WEIGHTS = 20


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One initializer; ``place`` is where it is in another file, the same for two that are one tensor there, or empty."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parameters: int
    bytes: int
    place: tuple[object, ...]

    @property
    def tells(self) -> bool:
        """Whether a node that reads it is likely where it is: shapes and indices are shared by all layers."""
        return bool(self.shape) and self.dtype not in ("int32", "int64")


@dataclass(frozen=True, kw_only=True)
class Node:
    """``names``: all that may tell where it is, the likeliest first."""

    operator: str
    names: tuple[str, ...]
    inputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Nodes in the file's order, those inside branches and loops behind the node that holds them."""

    nodes: tuple[Node, ...]
    weights: dict[str, Weight]


@dataclass(kw_only=True)
class Layer:
    """``name``: None for all that is in no layer. ``weights`` are (weight, the name that tells its part)."""

    name: str | None
    nodes: int = 0
    weights: list[tuple[Weight, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        parameters = sum(weight.parameters for weight, _ in self.weights)
        return {"name": self.name, "nodes": self.nodes, "parameters": parameters, "bytes": _bytes(self.weights)}


def of_proto(proto: onnx.ModelProto) -> Graph:
    nodes: list[Node] = []
    weights: dict[str, Weight] = {}
    for graph, node in _nodes(proto.graph):
        if node is None:
            weights |= {tensor.name: _weight(tensor) for tensor in graph.initializer}
            continue
        scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
        names = (node.name, _scope(scopes), *node.output)
        nodes.append(Node(operator=operator(node), names=names, inputs=tuple(node.input)))
    return Graph(nodes=tuple(nodes), weights=weights)


def of_model(model: ir.Model) -> Graph:
    """Of a model that was read from a file; no weight is loaded for it."""
    nodes = []
    for node in model.graph.all_nodes():
        outputs = (str(value.name or "") for value in node.outputs)
        name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        names = (node.name or "", _scope(node.metadata_props.get(_SCOPES, "")), *outputs)
        inputs = tuple(str(value.name) for value in node.inputs if value is not None)
        nodes.append(Node(operator=name, names=names, inputs=inputs))
    weights: dict[str, Weight] = {}
    for name, value in model.graph.initializers.items():
        if (tensor := value.const_value) is not None:
            shape, dtype = tuple(tensor.shape.numpy()), tensor.dtype.name.lower()
            size = {"parameters": tensor.size, "bytes": tensor.nbytes}
            weights[name] = Weight(name=name, dtype=dtype, shape=shape, place=(), **size)
    return Graph(nodes=tuple(nodes), weights=weights)


def places(graph: Graph) -> dict[str, str]:
    """The layer of each node, by the node's name."""
    return {node.names[0]: place for node, place in zip(graph.nodes, _where(graph), strict=True) if node.names[0]}


def rows(graph: Graph, known: Mapping[str, str] = _NOTHING) -> list[dict[str, Any]]:
    """The picture of one graph: for each layer its name, its number of nodes, and [operator, name] of the first of them.

    ``known`` are the ``places`` of the graph that this one was fused from.
    """
    where = _where(graph, known)
    found: dict[str, list[Node]] = {}
    for node, name in zip(graph.nodes, _with_the_rest(graph, where), strict=True):
        found.setdefault(name, []).append(node)
    order = _in_order(where, graph)
    if order:
        last_of_first = [index for index, name in enumerate(order) if stack_of(name)[0] == stack_of(order[0])[0]][-1]
        order = [BEFORE, *order[: last_of_first + 1], BETWEEN, *order[last_of_first + 1 :], AFTER]
    names = [name for name in (order or [ALL]) if name in found]
    shown = [
        {
            "layer": name[:_LONGEST_NAME],
            "nodes": len(found[name]),
            "operators": [_shown(node) for node in found[name][:_MOST_OPERATORS]],
        }
        for name in names[:_MOST_LAYERS]
    ]
    if rest := names[_MOST_LAYERS:]:
        shown.append(
            {"layer": f"{len(rest)} more rows", "nodes": sum(len(found[name]) for name in rest), "operators": []}
        )
    return shown


def layers(graphs: Iterable[Graph]) -> list[Layer]:
    """The layers of all ``graphs``, in order, and last what is in none; a weight that two of them share counts once."""
    found: dict[str, Layer] = {}
    rest, seen = Layer(name=None), set()
    for index, graph in enumerate(graphs):
        where = _where(graph)
        owners = _owners(graph, where)
        found |= {name: Layer(name=name) for name in _in_order(where, graph) if name not in found}
        for name in where:
            found.get(name, rest).nodes += 1
        for weight in graph.weights.values():
            place = weight.place or (index, weight.name)
            if place not in seen:
                seen.add(place)
                layer, told_by = owners[weight.name]
                if layer != OUTSIDE and layer not in found:
                    found[layer] = Layer(name=layer)
                found.get(layer, rest).weights.append((weight, told_by))
    return [*found.values(), *([rest] if rest.nodes or rest.weights else [])]


def weights(found: Sequence[Layer]) -> dict[str, Any]:
    """{"groups", "largest"}: bytes by the part of a layer, over all layers of a stack, and the largest weights; largest first."""
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for layer in found:
        stack = f"{stack_of(layer.name)[0]}.*" if layer.name else ""
        for weight, told_by in layer.weights:
            group = ".".join(filter(None, (stack, part_of(told_by))))[:_LONGEST_NAME]
            sizes[group] += weight.bytes
            counts[group] += 1
    every = sorted((weight for layer in found for weight, _ in layer.weights), key=lambda weight: -weight.bytes)
    return {
        "groups": [
            {"name": name, "weights": counts[name], "bytes": size} for name, size in sizes.most_common(_MOST_WEIGHTS)
        ],
        "all": len(every),
        "largest": [
            {
                "name": weight.name[:_LONGEST_NAME],
                "dtype": weight.dtype,
                "shape": list(weight.shape[:16]),
                "bytes": weight.bytes,
            }
            for weight in every[:_MOST_WEIGHTS]
        ],
    }


def _where(graph: Graph, known: Mapping[str, str] = _NOTHING) -> list[str]:
    """The layer of each node, or OUTSIDE: by its names, else the weights it reads, else it is where the node before it is.

    What a fusion made is named after a node that it replaced, and is where that was.
    """
    found, current = [], OUTSIDE
    for node in graph.nodes:
        name = node.names[0]
        read = (graph.weights[name] for name in node.inputs if name in graph.weights)
        told = (layer_of(name) for name in (*node.names, *(weight.name for weight in read if weight.tells)))
        before = (known.get(name), known.get(name.rpartition("/")[0]))
        current = next((place for place in (*before, *told) if place is not None), current)
        found.append(current)
    return found


def _owners(graph: Graph, where: Sequence[str]) -> dict[str, tuple[str, str]]:
    """For each weight its layer and the name that tells it: its own, or that of the first node to read it."""
    readers: dict[str, tuple[str, str]] = {}
    for node, layer in zip(graph.nodes, where, strict=True):
        told = next((name for name in node.names if layer_of(name) == layer), None)
        for name in node.inputs:
            readers.setdefault(name, (layer, told or name))
    own = {name: layer_of(name) for name in graph.weights}
    return {
        name: (layer, name) if layer is not None else readers.get(name, (OUTSIDE, name)) for name, layer in own.items()
    }


def _with_the_rest(graph: Graph, where: Sequence[str]) -> Iterator[str]:
    """``where``, with OUTSIDE told apart by its place among the layers."""
    inside = [index for index, name in _real(where, graph) if name != OUTSIDE]
    for index, name in enumerate(where):
        if name != OUTSIDE:
            yield name
        elif not inside:
            yield ALL
        else:
            yield BEFORE if index < inside[0] else AFTER if index > inside[-1] else BETWEEN


def _in_order(where: Sequence[str], graph: Graph) -> list[str]:
    """All layers: stacks as they come in the graph, the layers of each by number."""
    stacks = dict.fromkeys(stack_of(name)[0] for _, name in _real(where, graph) if name != OUTSIDE)
    order = {stack: index for index, stack in enumerate(stacks)}
    return sorted({name for name in where if name != OUTSIDE}, key=lambda name: _position(name, order))


def _position(layer: str, order: dict[str, int]) -> tuple[int, int]:
    stack, number = stack_of(layer)
    return order.get(stack, len(order)), number


def _real(where: Sequence[str], graph: Graph) -> Iterator[tuple[int, str]]:
    for index, (node, name) in enumerate(zip(graph.nodes, where, strict=True)):
        if node.operator not in _BOOKKEEPING:
            yield index, name


def _nodes(graph: onnx.GraphProto) -> Iterator[tuple[onnx.GraphProto, onnx.NodeProto | None]]:
    """(graph, None) as each graph begins, then (graph, node) for its nodes."""
    yield graph, None
    for node in graph.node:
        yield graph, node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nodes(inner)


def _weight(tensor: onnx.TensorProto) -> Weight:
    try:
        size = min(stored_bytes(tensor), _MOST_BYTES)
        dtype = ir.DataType(tensor.data_type).name.lower()
    except (AttributeError, KeyError, TypeError, ValueError):  # strings, unknown types, impossible shapes
        size, dtype = 0, str(tensor.data_type)
    entries = external(tensor)
    place = ("external", *(entries.get(key, "") for key in ("location", "offset", "length"))) if entries else ()
    return Weight(
        name=tensor.name,
        dtype=dtype,
        shape=tuple(tensor.dims),
        parameters=min(max(elements(tensor), 0), _MOST_BYTES),
        bytes=size,
        place=place,
    )


def _bytes(weights: Iterable[tuple[Weight, str]]) -> int:
    return min(sum(weight.bytes for weight, _ in weights), _MOST_BYTES)


def _scope(scopes: str) -> str:
    """ "['', 'bert', 'bert.encoder.layer.1', 'linear_11']", which torch's exporter writes, to "bert.encoder.layer.1/linear_11"."""
    try:
        parts = [part for part in ast.literal_eval(scopes) if isinstance(part, str)] if scopes.startswith("['") else []
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return ""
    return "/".join(parts[-2:])


def _shown(node: Node) -> list[str]:
    return [node.operator[:_LONGEST_NAME], node.names[0][:_LONGEST_NAME]]
