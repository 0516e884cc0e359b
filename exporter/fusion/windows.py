"""Attention within windows, written as products of overlapping chunks, to the operator ``Attention`` over blocks of tokens.

torch's old exporter writes the encoders of LED and Longformer so. With w for half a window, C blocks of w tokens, N rows and heads:

    chunks    Gather of a flattened tensor, [N,C-1,2w,D]: neighbours share w tokens
    scores    chunks of Q by chunks of K, and ones by chunks of the keys' mask
    moves     Pad, Reshape, Slice, ScatterND and others lay the diagonals of both in rows; they are added, softmaxed, and put back
    product   MatMul with V in blocks [N,C,3w,D]: each block of tokens with the one before and the one behind it

    becomes   Attention(q [N,C,w,D], k [N,C,3w,D], v, mask), blocks where heads stand, and in the mask the window, the ends of the
              sequence and the keys' mask

Memory grows with the length, as it did. Hundreds of nodes between chunks and product are not matched one by one; two things are
asked of them. Scores may only be moved, added and softmaxed, to places that follow from lengths and constants: so for given lengths
the result depends on nothing but which score stands where. And where they stand is seen by running it, on random numbers and
several lengths (windows_proof.py). Whether chunks hold the right tokens is not asked: an exporter that writes strides as numbers reads
other ones, and what a file says is kept.

Source: transformers, models/led/modeling_led.py, ``LEDEncoderSelfAttention``; ONNX operator Attention, opset 24. After lengths.py, which
tells lengths apart from what they are lengths of. Refused, with the node's name: scores that meet something else on the way (global
tokens), that have no mask or several, that something else reads, and those that do not stand where a window has them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import onnx_ir as ir

from txopt.exporter.bodies import bodies_of, paths, share_equal_nodes
from txopt.exporter.fusion.attention_path import changes_nothing, fill_of
from txopt.exporter.fusion.replace import replace as put
from txopt.exporter.fusion.report import NOTHING, Barred, Report
from txopt.exporter.fusion.windows_proof import proved
from txopt.exporter.fusion.windows_rewrite import Window, spelled
from txopt.exporter.shapes import lengths_of, order_of, rank_of

# Operators that move numbers, and the inputs that they take them from.
_MOVES: dict[str, tuple[int, ...]] = {
    "Add": (0, 1),
    "Expand": (0,),
    "Gather": (0,),
    "Pad": (0,),
    "Reshape": (0,),
    "ScatterND": (0, 2),
    "Slice": (0,),
    "Squeeze": (0,),
    "Transpose": (0,),
    "Unsqueeze": (0,),
    "Where": (1, 2),
}


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model``, which must be at opset 24, and reports."""
    report = Report("Attention.windows", barred, paths(model))
    initializers = set(model.graph.initializers)
    for last, scores in (found := _Found(model.graph)).products:
        assert scores.softmax is not None, "these are products of probabilities"
        window = found.window(last, scores)
        nodes = window if isinstance(window, str) else proved(model, window, spelled)
        if isinstance(nodes, str):
            report.refuse(scores.softmax, nodes)
        elif not report.bars(scores.softmax):
            report.took(scores.softmax, last.outputs[0])
            put(last, *nodes)
    for node, reason in found.lost:
        report.refuse(node, reason)
    for name in model.graph.initializers.keys() - initializers:  # of what was tried and refused
        if not model.graph.initializers[name].uses():
            del model.graph.initializers[name]
    if report.fused:
        share_equal_nodes(model)  # blocks of one encoder have one mask
    return report


@dataclass(frozen=True)
class _Scores:
    """What a value holds: the product of chunks of Q and K, that of ones and chunks of a mask, or the sum of both, moved; softmaxed by
    ``softmax``, and zeros for the tokens that ``hidden`` says."""

    scores: ir.Node | None = None
    mask: ir.Node | None = None
    softmax: ir.Node | None = None
    hidden: ir.Value | None = None

    def with_(self, other: "_Scores") -> "_Scores | None":
        """What holds both; None where they are not of one attention."""
        pairs = {key.name: (getattr(self, key.name), getattr(other, key.name)) for key in fields(self)}
        same_stage = self.softmax is other.softmax and self.hidden is other.hidden
        if not same_stage or any(None not in pair and pair[0] is not pair[1] for pair in pairs.values()):
            return None
        return _Scores(**{key: one if one is not None else another for key, (one, another) in pairs.items()})


class _Found:
    """One way through a graph: which values follow from lengths and constants alone, which hold scores of chunks, and where these end.

    ``products`` are those with V; ``lost`` says of other scores, by their Softmax or product, what was done to them.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._order = {node: index for index, node in enumerate(graph)}
        self._fixed: set[ir.Value] = set()
        self._held: dict[ir.Value, _Scores] = {}
        self._lost: dict[ir.Node, tuple[ir.Node, str]] = {}
        self.products: list[tuple[ir.Node, _Scores]] = []
        for node in self._order:
            self._take(node)

    @property
    def lost(self) -> list[tuple[ir.Node, str]]:
        ended = {scores.scores for _, scores in self.products}
        return [reason for product, reason in self._lost.items() if product not in ended]

    def window(self, last: ir.Node, scores: _Scores) -> Window | str:
        """The attention whose product with V is ``last``, or why it is left alone."""
        if scores.mask is None:
            return "no mask is cut into chunks as its scores are"
        assert scores.scores is not None and scores.softmax is not None, "this is how products are found"
        query, (key, mask), values = scores.scores.inputs[0], map(_transposed, (scores.scores, scores.mask)), last.inputs[1]
        assert query and key and mask and values, "this is how products are found"
        cuts = {query, key, mask, values, *({scores.hidden} if scores.hidden is not None else ())}
        places = tuple(_place(chunks) for chunks in (query, key, mask))
        nodes, lengths = self._between((last.outputs[0],), cuts)
        counting, other_lengths = self._between(places, set())
        lengths = tuple(dict.fromkeys(lengths + other_lengths))
        if unclear := [value for value in lengths if len(lengths_of(value) or ()) != 1]:
            return f"{unclear[0].name} holds several lengths"
        for value in (value for node in nodes if node is not last for value in node.outputs):
            of_queries = value in self._held and self._held[value].scores is not None
            if of_queries and (value.is_graph_output() or any(user not in nodes for user, _ in value.uses())):
                return f"{value.name} is read elsewhere too"
        wide = query.dtype != ir.DataType.FLOAT and scores.softmax.outputs[0].dtype == ir.DataType.FLOAT
        return Window(
            name=f"{scores.softmax.name}/Attention",
            query=query,
            key=key,
            mask=mask,
            values=values,
            hidden=scores.hidden,
            wide=wide,
            last=last,
            nodes=nodes,
            places=places,
            counting=counting,
            lengths=lengths,
        )

    def _take(self, node: ir.Node) -> None:
        held = {index: self._held[value] for index, value in enumerate(node.inputs) if value in self._held}
        if node.op_type == "Shape":
            self._fixed.add(node.outputs[0])
        elif node.op_type == "MatMul" and (product := self._product(node)) is not None:
            self._held[node.outputs[0]] = product
        elif not held and node.inputs and not any(True for _ in bodies_of(node)):
            if all(map(self._is_fixed, node.inputs)):
                self._fixed.update(node.outputs)
        elif held.keys() == {0} and held[0].softmax and held[0].scores and self._is_product_with_values(node):
            self.products.append((node, held[0]))
        elif held and (moved := self._moved(node, held)) is not None:
            self._held[node.outputs[0]] = moved
        else:
            for scores in held.values():
                if scores.scores is not None:
                    reason = f"{node.name} does more than move its {'probabilities' if scores.softmax else 'scores'}"
                    self._lost.setdefault(scores.scores, (scores.softmax or scores.scores, reason))

    def _is_fixed(self, value: ir.Value | None) -> bool:
        return value is None or value.const_value is not None or value in self._fixed

    def _is_product_with_values(self, node: ir.Node) -> bool:
        return node.op_type == "MatMul" and not self._is_fixed(node.inputs[1])

    def _product(self, node: ir.Node) -> _Scores | None:
        """The product of two sets of chunks, or of fixed numbers and chunks."""
        left, right = node.inputs[0], _transposed(node)
        if left is None or right is None or not self._is_chunks(right):
            return None
        if self._is_fixed(left):
            return _Scores(mask=node)
        return _Scores(scores=node) if self._is_chunks(left) else None

    def _is_chunks(self, value: ir.Value) -> bool:
        """Whether ``value`` is looked up by fixed places in a tensor that was made flat."""
        gather = value.producer()
        flat = gather.inputs[0].producer() if gather and gather.op_type == "Gather" and gather.inputs[0] else None
        if gather is None or flat is None or flat.op_type != "Reshape" or self._is_fixed(value):
            return False
        is_flat = lengths_of(flat.inputs[1]) == (-1,)
        return is_flat and self._is_fixed(gather.inputs[1]) and rank_of(value) == 4

    def _moved(self, node: ir.Node, held: dict[int, _Scores]) -> _Scores | None:
        """What ``node`` gives, if all that it does to scores is to move, add or softmax them."""
        scores: _Scores | None = next(iter(held.values()))
        for other in held.values():
            scores = scores and scores.with_(other)
        if scores is None or any(output in self._fixed for output in node.outputs) or len(node.outputs) > 1:
            return None
        if node.op_type == "Softmax":
            axis, rank = node.attributes["axis"].as_int() if "axis" in node.attributes else -1, rank_of(node.outputs[0])
            return None if scores.softmax or axis not in (-1, (rank or 0) - 1) else replace(scores, softmax=node)
        if node.op_type == "Where" and held.keys() == {2} and scores.softmax is node.inputs[2].producer():
            if not self._is_fixed(node.inputs[0]) and fill_of(node.inputs[1]) == 0:
                return replace(scores, hidden=node.inputs[0])
        taken = range(len(node.inputs)) if node.op_type == "Concat" else _MOVES.get(node.op_type, ())
        others = [value for index, value in enumerate(node.inputs) if index not in held]
        moves = held.keys() <= set(taken) and all(map(self._is_fixed, others))
        return scores if moves or changes_nothing(node) else None

    def _between(
        self, ends: Iterable[ir.Value], cuts: set[ir.Value]
    ) -> tuple[tuple[ir.Node, ...], tuple[ir.Value, ...]]:
        """The nodes that lead to ``ends``, in order, and the lengths of other values that they read; not beyond ``cuts``."""
        nodes: set[ir.Node] = set()
        lengths: dict[ir.Value, None] = {}
        waiting = list(ends)
        while waiting:
            value = waiting.pop()
            node = None if value in cuts else value.producer()
            if node is None or node in nodes:
                continue
            source = node.inputs[0] if node.op_type == "Shape" else None
            if source is not None and not self._is_fixed(source) and source not in self._held:
                lengths[value] = None
                continue
            nodes.add(node)
            waiting += [value for value in node.inputs if value is not None]
        return tuple(sorted(nodes, key=self._order.__getitem__)), tuple(lengths)


def _transposed(product: ir.Node) -> ir.Value | None:
    """What a MatMul has transposed for its second operand, by the last two of four axes."""
    transpose = product.inputs[1].producer() if product.inputs[1] is not None else None
    turned = transpose is not None and transpose.op_type == "Transpose" and order_of(transpose) == (0, 1, 3, 2)
    return transpose.inputs[0] if transpose is not None and turned else None


def _place(chunks: ir.Value) -> ir.Value:
    """Where ``chunks`` are looked up."""
    gather = chunks.producer()
    assert gather is not None and gather.inputs[1] is not None, "chunks are found by it"
    return gather.inputs[1]
