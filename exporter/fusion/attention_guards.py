"""Guards around the probabilities of an attention, for rows that mask everything, as torch, Keras, ESPnet and nan_to_num have them.

Each puts zeros where the softmax of nothing but -inf gives NaN. ``Attention`` gives zeros there by itself, for -inf and for booleans,
so that a guard goes with what it guards: its specification in opset 25 asks for "a zero output row, not NaN", and ONNX Runtime's
kernel and the standard's reference implementation give it. This file finds guards; attention.py judges what else is on the way.
"""

import onnx_ir as ir

from txopt.exporter.algebra import scalar
from txopt.exporter.fusion.attention_chain import Refusal
from txopt.exporter.fusion.attention_path import Step, changes_nothing, fill_of, shapes_of_fills

# What asks nan_to_num's question, whether a probability is infinite, between the probabilities and its Where.
_ASKING = ("And", "Cast", "Greater", "IsInf", "Less")


def guards(softmax: ir.Node) -> set[ir.Node]:
    """The nodes that put zeros where rows mask everything: Where(asked, 0, p), those that ask, and what nan_to_num does beside.

    Asked is IsNaN(p), or the comparison of the scores with -inf whose answer must hold at every key. nan_to_num asks next whether the
    probabilities are infinite, which none is, so that whatever it puts there is never read.

    Raises:
        Refusal: NaN becomes another number than zero.
    """
    scores, probabilities = softmax.inputs[0], softmax.outputs[0]
    for where in (user for user, index in probabilities.uses() if user.op_type == "Where" and index == 2):
        asked, fill = where.inputs[0].producer() if where.inputs[0] is not None else None, fill_of(where.inputs[1])
        if asked is None:
            continue
        asks_for_nan = _behind_casts(asked)
        if asks_for_nan is not None and asks_for_nan.inputs[0] is probabilities:
            if fill is None:
                continue
            if fill != 0:
                raise Refusal(f"{where.name} fills rows that mask everything with {fill:g}, the operator with zeros")
            return {where, asks_for_nan, *shapes_of_fills(Step(where, 2)), *_infinities(where, probabilities)}
        if fill == 0 and (question := _all_masked(asked, scores)) is not None:
            return {where, question}
    return set()


def _behind_casts(node: ir.Node) -> ir.Node | None:
    """The IsNaN that ``node`` is or casts."""
    while node.op_type == "Cast" and node.inputs[0] is not None and (inner := node.inputs[0].producer()) is not None:
        node = inner
    return node if node.op_type == "IsNaN" else None


def _infinities(where: ir.Node, probabilities: ir.Value) -> set[ir.Node]:
    """The nodes behind ``where`` that ask whether a probability is infinite and put something there."""
    value, known, found = where.outputs[0], {probabilities, where.outputs[0]}, set[ir.Node]()
    while following := [user for user, index in value.uses() if user.op_type == "Where" and index == 2]:
        asked = following[0].inputs[0]
        if not _is_never(asked, known):
            break
        found |= {following[0], *_between(known, asked), *shapes_of_fills(Step(following[0], 2))}
        value = following[0].outputs[0]
        known.add(value)
    return found


def _is_never(condition: ir.Value | None, known: set[ir.Value]) -> bool:
    """Whether ``condition`` asks of ``known`` probabilities, among other things, whether they are infinite."""
    node = None if condition is None else condition.producer()
    if node is None or node.op_type not in ("And", "Cast", "IsInf"):
        return False
    if node.op_type != "IsInf":
        return any(_is_never(side, known) for side in node.inputs)
    asked = node.inputs[0]
    while asked is not None and asked not in known:
        cast = asked.producer()
        asked = cast.inputs[0] if cast is not None and changes_nothing(cast) else None
    return asked is not None


def _between(known: set[ir.Value], condition: ir.Value | None) -> set[ir.Node]:
    """The nodes that ask, from ``known`` probabilities to ``condition``."""
    found, waiting = set[ir.Node](), [condition]
    while waiting:
        value = waiting.pop()
        node = None if value is None or value in known else value.producer()
        if node is not None and node.op_type in _ASKING:
            found.add(node)
            waiting.extend(node.inputs)
    return found


def zeroes(step: Step) -> bool:
    """Whether ``step`` puts zeros where a mask hides, for rows that mask everything; attention.py judges the mask.

    That is Where(mask, p, 0) in Keras, Where(mask, 0, p) in ESPnet.
    """
    return step.node.op_type == "Where" and step.index > 0 and fill_of(step.node.inputs[3 - step.index]) == 0


def _all_masked(node: ir.Node, scores: ir.Value | None) -> ir.Node | None:
    """The node that compares ``scores`` with -inf, if ``node`` says for which rows that holds at every key."""
    node, negated = _without_not(node)
    if node.op_type not in ("ReduceMin", "ReduceMax") or node.inputs[0] is None or not _over_keys(node):
        return None
    compared = node.inputs[0].producer()
    compared, negated_inside = (None, False) if compared is None else _without_not(compared)
    if compared is None or scores not in compared.inputs or {negated, negated_inside} != {node.op_type == "ReduceMax"}:
        return None
    if compared.op_type == "Equal":
        (bound,) = [scalar(value) for value in compared.inputs if value is not scores] or [None]
        return compared if bound == -float("inf") else None
    return compared if compared.op_type == "IsInf" else None


def _without_not(node: ir.Node) -> tuple[ir.Node, bool]:
    negated = False
    while node.op_type in ("Not", "Cast") and node.inputs[0] is not None:
        inner = node.inputs[0].producer()
        if inner is None:
            break
        node, negated = inner, negated != (node.op_type == "Not")
    return node, negated


def _over_keys(reduce: ir.Node) -> bool:
    axes = scalar(reduce.inputs[1]) if len(reduce.inputs) > 1 else None
    shape = reduce.inputs[0].shape if reduce.inputs[0] is not None else None
    kept = "keepdims" not in reduce.attributes or reduce.attributes["keepdims"].as_int() == 1
    return kept and (axes == -1 or (shape is not None and axes == len(shape) - 1))
