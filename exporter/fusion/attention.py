"""Written-out attention of foreign graphs to the operator ``Attention``, its first output only, with mask and scale explicit.

    softmax(scale Q K^T + mask) V

Found from its Softmax, by meaning rather than by one spelling:

    scores   MatMul of Q and K^T, 4D [B,H,Q,D], 5D [B,G,H,Q,D] or 3D [N,Q,D]; 3D scores may be cut into [B,H,Q,K] for the mask and
             joined again. Or of K and Q^T, softmaxed over its rows, and transposed before V
    K^T      any Transpose, which then goes with its last two axes swapped; K^T as it is, which is transposed anew; so Q^T
    scale    constants by Mul or Div, on Q, on K, on the scores or on several of them; on the scores also one number for each head
             (Swin's logit_scale), computed or not, which moves to Q
    mask     Add and Sub; Where(mask, scores, fill) and Where(mask, fill, scores); Max with a fill; any number of them
    around   Cast between floats, Identity, Dropout out of training, guards for rows that mask everything (attention_guards.py);
             Transpose, undone before V, with scales, masks and the Softmax along the keys in between; masks are transposed with
             the scores

Source: ONNX operators Attention (opset 23 and 24) and Softmax (opset 13). The model must be at opset 24 and its constants folded
into initializers; a scale may also be computed from a known length. A fill of -inf or the dtype's least number becomes a boolean
mask; one that drowns every score (-1e9) is added. Rows that mask everything are the engine's affair: ONNX Runtime gives zeros for
-inf, least numbers and booleans. Lengths that are not known are taken to be those that the operator asks for.
Keys and values that are repeated for groups of heads stay repeated: groups.py sees to them.

Refused, with the node's name: another axis, a factor that is neither a positive constant nor a number for each head, or comes after
the mask, a mask that makes the scores longer, columns joined to the scores (a sink) or cut from the probabilities, a guard that puts
another number than zero, other operators in between, results inside that something else reads, batches or heads that broadcast,
ranks that are not known. A Softmax without a MatMul of two computed values before it, or without one after it, is no attention and
no refusal.
"""

import math

import onnx_ir as ir

from txopt.exporter.algebra import product
from txopt.exporter.bodies import paths
from txopt.exporter.fusion.attention_chain import Chain, Refusal, input_of
from txopt.exporter.fusion.attention_guards import guards, zeroes
from txopt.exporter.fusion.attention_path import Step, after, before, changes_nothing, shapes_of_fills, untransposed
from txopt.exporter.fusion.attention_rewrite import Block, rewrite
from txopt.exporter.fusion.report import NOTHING, Barred, Report
from txopt.exporter.shapes import differ, length, number_of, rank_of


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model``, which must be at opset 24, and reports."""
    report = Report("Attention", barred, paths(model))
    masks: dict[object, ir.Value] = {}
    place = {node: index for index, node in enumerate(model.graph.all_nodes())}
    found = [(node, before(node), after(node)) for node in place if node.op_type == "Softmax"]
    candidates = [(softmax, above, below) for softmax, above, below in found if above and below]
    # By the place that the new nodes get: a mask that several blocks share must come before the first of them.
    for softmax, above, below in sorted(candidates, key=lambda candidate: place[candidate[2][-1].node]):
        try:
            block = _block(softmax, above, below)
        except Refusal as refusal:
            report.refuse(softmax, str(refusal))
            continue
        if not report.bars(softmax):
            report.took(softmax, block.last.outputs[0])
            rewrite(model.graph, block, masks)
    return report


def _block(softmax: ir.Node, above: list[Step], below: list[Step]) -> Block:
    scores, last = above[0].node, below[-1].node
    rows, columns, v = input_of(scores, 0), input_of(scores, 1), input_of(last, 1)
    ranks = rank_of(rows), rank_of(columns), rank_of(v)
    if ranks[0] is None or None in ranks:
        raise Refusal("the ranks of Q, K and V are not known")
    if ranks[0] not in (3, 4, 5) or ranks[0] != ranks[1]:
        raise Refusal(f"Q and K have {ranks[0]} and {ranks[1]} axes")
    chain = _followed(softmax, above, below, ranks[0])
    if chain.rank != ranks[2]:
        raise Refusal(f"the probabilities have {chain.rank} axes and V {ranks[2]}")
    turned = chain.order is not None
    _check_batches(*((columns, rows) if turned else (rows, columns)), v)
    row, scale_rows = _factor(rows)
    scaled, scale_columns = _factor(columns)
    column, permutation = untransposed(scaled, ranks[0])
    column, scale_column = _factor(column)
    row, column = _narrow(row, v), _narrow(column, v)
    dtypes = {value.dtype for value in (row, column, v)} - {None}
    if len(dtypes) > 1:
        raise Refusal(f"Q, K and V are of several dtypes: {', '.join(sorted(map(str, dtypes)))}")
    scale = chain.scale * scale_rows * scale_columns * scale_column
    if scale <= 0:
        raise Refusal(f"the scale {scale:g} is not positive")
    other = next((each.value for each in chain.factors if each.value.dtype != row.dtype), None)
    if other is not None:
        raise Refusal(f"the scores are scaled by {other.name}, which is {other.dtype}, and Q is {row.dtype}")
    wide = input_of(softmax, 0).dtype == ir.DataType.FLOAT and dtypes.isdisjoint({ir.DataType.FLOAT})
    return Block(
        name=f"{softmax.name}/Attention",
        rows=row,
        columns=column,
        v=v,
        permutation=permutation,
        turned=turned,
        scale=scale,
        factors=tuple(chain.factors),
        terms=tuple(chain.terms),
        lengths=(length(rows, -2), length(columns, -1)),
        ranks=(ranks[0], chain.rank),
        heads=chain.heads,
        wide=wide and bool(dtypes),
        last=last,
    )


def _followed(softmax: ir.Node, above: list[Step], below: list[Step], rank: int) -> Chain:
    """All steps from the scores to V, each of which nothing but the next one reads."""
    guard, chain = guards(softmax), Chain(rank)
    beside = guard | {shape for step in above for shape in shapes_of_fills(step)}
    following = [*(step.node for step in above[1:]), softmax, *(step.node for step in below)]
    outside = next((node for node in (above[0].node, *following) if node.graph is not softmax.graph), None)
    if outside is not None:
        raise Refusal(f"{outside.name} is in another graph, around or inside a branch or loop")
    for step, reader in zip(above, following, strict=False):
        if step.node is not above[0].node:
            chain.take(step.node, step.index)
        _check_alone(step.node, reader, beside)
    if below[0].node not in guard and zeroes(below[0]):
        chain.zero(below[0])
        guard.add(below[0].node)
    axis = softmax.attributes["axis"].as_int() if "axis" in softmax.attributes else -1
    chain.softmax(axis)
    if guard and axis not in (-1, chain.rank - 1):
        raise Refusal("it is guarded, and its scores were transposed")
    _check_alone(softmax, below[0].node, guard)
    for step, reader in zip(below[:-1], following[len(above) + 1 :], strict=True):
        if step.node.op_type == "Reshape":
            chain.cut(step.node)
        elif step.node.op_type == "Transpose":
            chain.turn(step.node)
        elif step.node.op_type == "Slice":
            raise Refusal(f"{step.node.name} cuts the probabilities, which then no longer sum to one")
        elif step.node not in guard and not changes_nothing(step.node):
            raise Refusal(f"{step.node.name} changes the probabilities")
        _check_alone(step.node, reader, guard)
    axes = tuple(range(chain.rank))
    if chain.order not in (None, (*axes[:-2], axes[-1], axes[-2])):
        raise Refusal("V meets the probabilities transposed")
    if chain.softmaxed != (-1 if chain.order is None else -2):
        raise Refusal(f"its axis is {axis}, not that of the keys")
    return chain


def _check_alone(node: ir.Node, reader: ir.Node, beside: set[ir.Node]) -> None:
    """What ``node`` gives must be read by ``reader``, once, and by nothing else but what is ``beside`` it and goes with it."""
    value = node.outputs[0]
    if value.is_graph_output():
        raise Refusal(f"{value.name} is an output of the graph")
    readers = [user for user, _ in value.uses() if user not in beside or user is reader]
    if readers != [reader]:
        other = next((user for user in readers if user is not reader), reader)
        raise Refusal(f"{value.name} is read elsewhere too, by {other.name}")


def _check_batches(q: ir.Value, kt: ir.Value, v: ir.Value) -> None:
    """The operator broadcasts no batches, and heads only where K and V both have one, for all or for each group."""
    same_rank = rank_of(q) == rank_of(v)
    if differ(q, kt, 0) or (same_rank and differ(kt, v, 0)):
        raise Refusal("the batches of Q, K and V are not the same")
    if rank_of(q) == 4 and (differ(kt, v, 1) or (differ(q, kt, 1) and length(kt, 1) != 1)):
        raise Refusal("the heads of Q, K and V are not the same")
    if rank_of(q) == 5 and (
        differ(q, kt, 1) or differ(q, v, 1) or differ(kt, v, 2) or (differ(q, kt, 2) and length(kt, 2) != 1)
    ):
        raise Refusal("the groups of Q, K and V are not the same")


def _factor(value: ir.Value) -> tuple[ir.Value, float]:
    """What constants multiply, and their product."""
    found = product(value)
    numbers = [number for factor in found.factors if (number := number_of(factor)) is not None]
    values = [factor for factor in found.factors if number_of(factor) is None]
    if len(values) != 1 or rank_of(values[0]) != rank_of(value):
        return value, 1.0
    return values[0], math.prod([found.constant, *numbers])


def _narrow(value: ir.Value, like: ir.Value) -> ir.Value:
    """``value`` before it was widened for the scores, if V is of that dtype."""
    node = value.producer()
    inner = node.inputs[0] if node is not None and node.op_type == "Cast" and value.dtype != like.dtype else None
    return inner if inner is not None and inner.dtype == like.dtype else value
