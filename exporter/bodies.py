"""The bodies of If, Loop and Scan: which there are, where each is, and what passes over graphs must see to in them.

A path tells a body by its node and attribute, "If_0/then_branch", and what is in it by the path and its own name. Knows no fusion.
"""

from collections.abc import Iterator, Mapping

import onnx_ir as ir
from onnx_ir.passes import common as passes

Paths = Mapping[ir.Graph, str]
"""Graphs by where they are; the main graph is at ""."""

NOWHERE: Paths = {}

_LOOPS = ("Loop", "Scan")


def bodies_of(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """The bodies that ``node`` has, by attribute."""
    for name, attribute in node.attributes.items():
        if attribute.type == ir.AttributeType.GRAPH:
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from ((f"{name}_{index}", graph) for index, graph in enumerate(attribute.as_graphs()))


def paths(model: ir.Model) -> dict[ir.Graph, str]:
    """The main graph and every body, the outer before the inner ones."""
    found = {model.graph: ""}
    waiting = [model.graph]
    while waiting:
        graph = waiting.pop(0)
        for node in graph:
            for name, body in bodies_of(node):
                found[body] = f"{_within(found[graph], node.name)}/{name}"
                waiting.append(body)
    return found


def place_of(named: ir.Node | ir.Value, known: Paths) -> str:
    """The name of a node or value, behind the path of the body that it is in."""
    graph = named.graph
    return _within("" if graph is None else known.get(graph, ""), named.name)


def _within(path: str, name: str | None) -> str:
    return f"{path}/{name}" if path else str(name)


def share_equal_nodes(model: ir.Model) -> None:
    """Of equal nodes one is left, in the main graph and in each body."""
    for graph in paths(model):
        passes.CommonSubexpressionEliminationPass()(ir.Model(graph, ir_version=model.ir_version or 10))


def fix_names(model: ir.Model) -> None:
    """Names that nodes and values in bodies share with those outside become names of their own; a body must hide nothing.

    New values get names that are free in their graph, which may be taken around it. Graphs without bodies are left alone.
    """
    if len(paths(model)) > 1:
        passes.NameFixPass()(model)


def forget_lengths(model: ir.Model) -> None:
    """Takes the names of lengths off what bodies give, and off everything in those that run several times.

    A value that is carried from one turn to the next may grow, whatever name its length was given. Numbers are kept.
    """
    for node in list(model.graph.all_nodes()):
        for _, body in bodies_of(node):
            named: list[ir.Value] = list(body.outputs)
            if node.op_type in _LOOPS:
                named += [*body.inputs, *(value for inner in body.all_nodes() for value in inner.outputs)]
            for value in dict.fromkeys(named):
                if value.shape is not None and (value.graph is not model.graph):
                    value.shape = ir.Shape([dim if isinstance(dim, int) else None for dim in value.shape])
