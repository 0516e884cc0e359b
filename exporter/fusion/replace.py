"""The last step of every rewrite: new nodes take over a value, and what nobody reads any more goes."""

import onnx_ir as ir


def replace(graph: ir.Graph, last: ir.Node, *nodes: ir.Node) -> None:
    """Puts ``nodes`` where ``last`` is; the last of them gives what ``last`` gave, under its name.

    Nodes that only led to ``last`` are removed with it.
    """
    old, new = last.outputs[0], nodes[-1].outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    graph.insert_after(last, nodes)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    _remove(graph, last)


def _remove(graph: ir.Graph, node: ir.Node) -> None:
    """``node`` if nobody reads it, then those that led to it."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    before = [value.producer() for value in node.inputs if value is not None]
    graph.remove(node, safe=True)
    for inner in dict.fromkeys(before):
        if inner is not None and inner.graph is graph:
            _remove(graph, inner)
