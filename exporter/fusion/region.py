"""What a rewrite put in: from the values it gives back to those that are computed as they were before.

Between two graphs a value is kept if it has the same name and comes from the same operator over kept values. What a rewrite gives
counts as kept for everything that reads it, so that an error is found where it arises and nowhere below.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from txopt.exporter.fusion.report import Place


@dataclass(frozen=True)
class Region:
    """A rewrite as a graph of its own: ``inputs`` are names of kept values, ``outputs`` those that the place gives."""

    place: Place
    graph: ir.Graph
    inputs: tuple[str, ...]

    @property
    def outputs(self) -> tuple[str, ...]:
        return self.place.values


def regions(before: ir.Model, after: ir.Model, places: Iterable[Place]) -> dict[Place, Region | str]:
    """For each place its region in ``after``, or why there is none."""
    places = list(places)
    given = {name for place in places for name in place.values}
    kept = _kept(before.graph, after.graph, given)
    values = {str(value.name): value for node in after.graph for value in node.outputs}
    return {place: _region(after.graph, place, values, kept) for place in places}


def _kept(before: ir.Graph, after: ir.Graph, given: set[str]) -> set[str]:
    old = {str(value.name): node for node in before for value in node.outputs}
    kept = {str(value.name) for value in after.inputs} | (given & old.keys())
    fixed = after.initializers.keys() & before.initializers.keys()
    for node in after:
        same = old.get(str(node.outputs[0].name)) if node.outputs else None
        read = {str(value.name) for value in node.inputs if value is not None}
        if same is not None and read <= kept | fixed and _equal(node, same):
            kept |= {str(value.name) for value in node.outputs}
    return kept


def _equal(node: ir.Node, other: ir.Node) -> bool:
    """Whether two nodes do the same with values of the same names."""
    first, second = ([None if value is None else value.name for value in one.inputs] for one in (node, other))
    same = first == second and node.op_identifier() == other.op_identifier()
    return same and {key: _plain(value) for key, value in node.attributes.items()} == {
        key: _plain(value) for key, value in other.attributes.items()
    }


def _plain(attribute: ir.Attr) -> object:
    """What can be compared: numbers and texts as they are, tensors and graphs only by their kind, for no pass changes one."""
    composed = (ir.AttributeType.TENSOR, ir.AttributeType.GRAPH, ir.AttributeType.TENSORS, ir.AttributeType.GRAPHS)
    return attribute.type if attribute.type in composed else attribute.value


def _region(graph: ir.Graph, place: Place, values: dict[str, ir.Value], kept: set[str]) -> Region | str:
    missing = [name for name in place.values if name not in values or name not in kept]
    if missing:
        return f"{missing[0]} is not in the graph both before and after"
    given = [values[name] for name in place.values]
    inputs: dict[ir.Value, None] = {}
    inside: set[ir.Node] = set()
    waiting = [value.producer() for value in given]
    while waiting:
        node = waiting.pop()
        if node is None or node in inside:
            continue
        inside.add(node)
        if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            return f"{node.name} has a branch or loop inside"
        for value in node.inputs:
            if value is None or value.is_initializer():
                continue
            if value.name in kept:
                inputs[value] = None
            else:
                waiting.append(value.producer())
    region = ir.convenience.extract(graph, list(inputs), given)
    return Region(place, region, tuple(str(value.name) for value in inputs))
