"""What the values of a graph are on given inputs, those inside of branches and loops included.

A body runs as a graph of its own: on the values that it reads from around it and, in a Loop or Scan, on those of its first turn. So
both branches of an If are recorded, also the one that these inputs do not take; of a loop the first turn is. Knows no fusion.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.exporter.bodies import bodies_of, paths, place_of
from txopt.exporter.fusion.region import alone

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Run = Callable[[ir.Model, Sequence[Feeds]], list[dict[str, Array]] | str]


class Recording:
    """The values ``wanted`` of ``model``, by where they are (bodies.py), for each of ``feeds``, as far as ``run`` can run them."""

    def __init__(self, model: ir.Model, wanted: Iterable[str], feeds: Sequence[Feeds], run: Run) -> None:
        self._model, self._feeds, self._run = model, feeds, run
        self._paths = paths(model)
        self._owners = {body: node for node in model.graph.all_nodes() for _, body in bodies_of(node)}
        self._known: list[dict[str, Array]] = [dict(one) for one in feeds]
        self._reasons: dict[str, str] = {}
        self._record(set(wanted))

    def of(self, places: Iterable[str]) -> list[dict[str, Array]] | str:
        """The values at ``places``, for each of the feeds, or why one of them is not known."""
        places = list(places)
        missing = [place for place in places for one in self._known if place not in one]
        reasons = [self._reasons[place] for place in missing if place in self._reasons]
        reasons += [f"{place} is not given" for place in missing]
        return reasons[0] if reasons else [{place: one[place] for place in places} for one in self._known]

    def _record(self, places: set[str]) -> None:
        by_graph: dict[ir.Graph, dict[ir.Value, None]] = {graph: {} for graph in self._paths}
        for graph in self._paths:
            for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
                if place_of(value, self._paths) in places:
                    by_graph[graph][value] = None
        for body in reversed(by_graph):  # what a body reads is wanted around it
            if by_graph[body] and body in self._owners:
                for value in (*self._read(body), *(each for each in self._owners[body].inputs if each is not None)):
                    if value.graph in by_graph and not value.is_initializer():
                        by_graph[value.graph][value] = None
        for graph, values in by_graph.items():
            if values:
                self._run_one(graph, [value for value in values if not value.is_graph_input()])

    def _read(self, body: ir.Graph) -> list[ir.Value]:
        """The values from around ``body`` that it reads."""
        own = {body, *body.subgraphs()}
        nodes = list(body.all_nodes())
        return list(dict.fromkeys(v for node in nodes for v in node.inputs if v is not None and v.graph not in own))

    def _run_one(self, graph: ir.Graph, values: list[ir.Value]) -> None:
        node = self._owners.get(graph)
        read = [] if node is None else self._read(graph)
        captured = [value for value in read if not value.is_initializer()]
        constants = [*graph.initializers.values(), *(value for value in read if value.is_initializer())]
        feeds = self._entered(graph, node, captured)
        answers: list[dict[str, Array]] | str = feeds
        if values and not isinstance(feeds, str):
            copy = alone([*graph.inputs, *captured], values, list(graph), constants)
            made = ir.Model(copy, ir_version=self._model.ir_version)
            made.graph.opset_imports.update(self._model.opset_imports)
            answers = self._run(made, feeds)
        if isinstance(answers, str) or isinstance(feeds, str):
            self._reasons.update(dict.fromkeys((place_of(value, self._paths) for value in values), str(answers)))
            return
        for known, one, answer in zip(self._known, feeds, answers, strict=True):
            given = {**one, **answer}
            own = (value for value in (*graph.inputs, *values) if value.name in given)
            known |= {place_of(value, self._paths): given[str(value.name)] for value in own}

    def _entered(self, graph: ir.Graph, node: ir.Node | None, captured: list[ir.Value]) -> list[dict[str, Array]] | str:
        """What ``graph`` is given, by name; in a loop, in its first turn."""
        if node is None:
            names = [str(value.name) for value in graph.inputs]
            return [{name: one[name] for name in names if name in one} for one in self._feeds]
        found = self.of(place_of(value, self._paths) for value in captured)
        if isinstance(found, str):
            return found
        feeds = [{str(v.name): one[place_of(v, self._paths)] for v in captured} for one in found]
        if node.op_type not in _FIRST:
            return f"{node.name} is a {node.op_type}, whose body is not run alone"
        given = [value for value in node.inputs if value is not None and not value.is_initializer()]
        outside = self.of(place_of(value, self._paths) for value in given)
        if isinstance(outside, str):
            return outside
        for one, around in zip(feeds, outside, strict=True):
            arrays = [_array(value, around, self._paths) for value in node.inputs]
            one |= zip(
                (str(value.name) for value in graph.inputs), _FIRST[node.op_type](node, graph, arrays), strict=True
            )
        return feeds


def _array(value: ir.Value | None, known: Mapping[str, Array], places: Mapping[ir.Graph, str]) -> Array:
    if value is None:
        return np.array(0)
    return known[place_of(value, places)] if value.const_value is None else value.const_value.numpy()


def _of_if(node: ir.Node, body: ir.Graph, arrays: list[Array]) -> list[Array]:
    return []


def _of_loop(node: ir.Node, body: ir.Graph, arrays: list[Array]) -> list[Array]:
    """The turn, whether to go on, and what is carried; the first two may be declared with one axis."""
    ranks = [len(value.shape) if value.shape is not None else 0 for value in body.inputs[:2]]
    return [np.zeros((1,) * ranks[0], np.int64), np.ones((1,) * ranks[1], np.bool_), *arrays[2:]]


def _of_scan(node: ir.Node, body: ir.Graph, arrays: list[Array]) -> list[Array]:
    """What is carried, and the first slice of what is scanned."""
    count = node.attributes["num_scan_inputs"].as_int()
    axes, directions = (
        list(node.attributes[name].as_ints()) if name in node.attributes else [0] * count
        for name in ("scan_input_axes", "scan_input_directions")
    )
    carried, scanned = arrays[:-count], arrays[-count:]
    slices = zip(scanned, axes, directions, strict=True)
    return [*carried, *(np.take(array, -1 if backward else 0, axis) for array, axis, backward in slices)]


_FIRST = {"If": _of_if, "Loop": _of_loop, "Scan": _of_scan}
