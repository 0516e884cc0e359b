"""The last step of every rewrite: new nodes take over a value, and what nobody reads any more goes."""

import onnx_ir as ir


def replace(last: ir.Node, *nodes: ir.Node) -> None:
    """Puts ``nodes`` where ``last`` is, in its graph; the last of them gives what ``last`` gave, under its name.

    Nodes that only led to ``last`` are removed with it, also those around the body that it is in.
    """
    graph = last.graph
    assert graph is not None, "it was found in one"
    old, new = last.outputs[0], nodes[-1].outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    graph.insert_after(last, nodes)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    _remove(last)


def _remove(node: ir.Node) -> None:
    """``node`` if nobody reads it, then those that led to it."""
    if node.graph is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    before = [value.producer() for value in node.inputs if value is not None]
    node.graph.remove(node, safe=True)
    for inner in dict.fromkeys(before):
        if inner is not None:
            _remove(inner)
