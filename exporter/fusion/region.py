"""What a rewrite put in: from the values it gives back to those that are computed as they were before.

Between two graphs a value is kept if it has the same name and comes from the same operator over kept values. What a rewrite gives
counts as kept for everything that reads it, so that an error is found where it arises and nowhere below. Values in the bodies of
branches and loops are told by the paths of these (bodies.py); a region in one may begin outside of it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from txopt.exporter.bodies import Paths, bodies_of, paths, place_of
from txopt.exporter.fusion.report import Place


@dataclass(frozen=True)
class Region:
    """A rewrite as a graph of its own: ``inputs`` are the names of kept values in it, by where they are in the model."""

    place: Place
    graph: ir.Graph
    inputs: dict[str, str]
    results: dict[str, str]

    @property
    def read(self) -> tuple[str, ...]:
        """Where all values are that a replay needs."""
        return (*self.inputs, *self.results)


def regions(before: ir.Model, after: ir.Model, places: Iterable[Place]) -> dict[Place, Region | str]:
    """For each place its region in ``after``, or why there is none."""
    places, known = list(places), paths(after)
    given = {name for place in places for name in place.values}
    kept = _kept(before, after, known, given)
    values = {place_of(value, known): value for node in after.graph.all_nodes() for value in node.outputs}
    order = {node: index for index, node in enumerate(after.graph.all_nodes())}
    return {place: _region(place, values, kept, known, order) for place in places}


def _kept(before: ir.Model, after: ir.Model, known: Paths, given: set[str]) -> set[str]:
    paths_before = paths(before)
    old = {place_of(value, paths_before): node for node in before.graph.all_nodes() for value in node.outputs}
    kept = {place_of(value, known) for graph in known for value in graph.inputs} | (given & old.keys())
    fixed = after.graph.initializers.keys() & before.graph.initializers.keys()
    for node in after.graph.all_nodes():
        same = old.get(place_of(node.outputs[0], known)) if node.outputs else None
        read = {place_of(value, known) for value in node.inputs if value is not None}
        if same is not None and read <= kept | fixed and _equal(node, same, known, paths_before):
            kept |= {place_of(value, known) for value in node.outputs}
    return kept


def _equal(node: ir.Node, other: ir.Node, known: Paths, known_before: Paths) -> bool:
    """Whether two nodes do the same with values of the same names."""
    first, second = (
        [None if value is None else place_of(value, paths) for value in one.inputs]
        for one, paths in ((node, known), (other, known_before))
    )
    same = first == second and node.op_identifier() == other.op_identifier()
    return same and {key: _plain(value) for key, value in node.attributes.items()} == {
        key: _plain(value) for key, value in other.attributes.items()
    }


def _plain(attribute: ir.Attr) -> object:
    """What can be compared: numbers and texts as they are, tensors and graphs only by their kind, for no pass changes one."""
    composed = (ir.AttributeType.TENSOR, ir.AttributeType.GRAPH, ir.AttributeType.TENSORS, ir.AttributeType.GRAPHS)
    return attribute.type if attribute.type in composed else attribute.value


def _region(
    place: Place, values: dict[str, ir.Value], kept: set[str], known: Paths, order: dict[ir.Node, int]
) -> Region | str:
    missing = [name for name in place.values if name not in values or name not in kept]
    if missing:
        return f"{missing[0]} is not in the graph both before and after"
    given = [values[name] for name in place.values]
    inputs: dict[ir.Value, None] = {}
    constants: dict[ir.Value, None] = {}
    inside: set[ir.Node] = set()
    waiting = [value.producer() for value in given]
    while waiting:
        node = waiting.pop()
        if node is None or node in inside:
            continue
        inside.add(node)
        if any(True for _ in bodies_of(node)):
            return f"{node.name} has a branch or loop inside"
        for value in node.inputs:
            if value is None:
                continue
            if value.is_initializer():
                constants[value] = None
            elif place_of(value, known) in kept:
                inputs[value] = None
            else:
                waiting.append(value.producer())
    graph = alone(list(inputs), given, sorted(inside, key=lambda node: order[node]), list(constants))
    names = ({place_of(value, known): str(value.name) for value in group} for group in (inputs, given))
    return Region(place, graph, *names)


def alone(inputs: list[ir.Value], outputs: list[ir.Value], nodes: list[ir.Node], constants: list[ir.Value]) -> ir.Graph:
    """A copy of ``nodes`` as a graph of its own."""
    view = ir.GraphView(inputs, outputs, nodes=nodes, initializers=tuple(constants), opset_imports={}, name="alone")
    return view.clone()
