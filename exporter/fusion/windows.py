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

Source: transformers, models/led/modeling_led.py, ``LEDEncoderSelfAttention``; ONNX operator Attention, opset 24. After lengths.py,
which tells lengths apart from what they are lengths of. Refused, with the node's name: scores that meet something else on the way
(global tokens), that have no mask or several, that something else reads, and those that do not stand where a window has them.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace

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
_SAME_NUMBERS = ("Expand", "Gather", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def fuse(model: ir.Model, barred: Barred = NOTHING) -> Report:
    """Rewrites ``model``, which must be at opset 24, and reports."""
    report = Report("Attention.windows", barred, paths(model))
    found, initializers = _Found(model.graph), set(model.graph.initializers)
    for last, scores in found.ends:
        softmax, window = scores.softmax, found.window(last, scores)
        assert softmax is not None, "these are products of probabilities"
        if report.bars(softmax):
            continue
        nodes = window if isinstance(window, str) else proved(model, window, spelled)
        if isinstance(nodes, str):
            report.refuse(softmax, nodes)
        else:
            report.took(softmax, last.outputs[0])
            put(last, *nodes)
    for node, reason in found.lost:
        report.refuse(node, reason)
    for name in model.graph.initializers.keys() - initializers:  # of what was tried and refused
        if not model.graph.initializers[name].uses():
            del model.graph.initializers[name]
    if report.fused:
        share_equal_nodes(model)  # the layers of an encoder have one mask
    return report


@dataclass(frozen=True)
class _Product:
    """The MatMul of ``left`` and ``right``, the latter transposed."""

    node: ir.Node
    left: ir.Value
    right: ir.Value


@dataclass(frozen=True)
class _Scores:
    """What a value holds: scores of chunks of Q by chunks of K, those of ones by chunks of a mask, or the sum of both, moved about;
    softmaxed by ``softmax``, and zero for the tokens that ``hidden`` says."""

    scores: _Product | None = None
    mask: _Product | None = None
    softmax: ir.Node | None = None
    hidden: ir.Value | None = None

    def and_(self, other: "_Scores") -> "_Scores | None":
        """What holds both; None where they are not of one attention, or one of them has come further."""
        further = self.softmax is not other.softmax or self.hidden is not other.hidden
        others = any(None not in pair and pair[0] != pair[1] for pair in self._beside(other))
        if further or others:
            return None
        scores, mask = (one or another for one, another in self._beside(other))
        return _Scores(scores, mask, self.softmax, self.hidden)

    def _beside(self, other: "_Scores") -> tuple[tuple[_Product | None, _Product | None], ...]:
        return (self.scores, other.scores), (self.mask, other.mask)


class _Found:
    """One way through a graph: which values follow from lengths and constants alone, and which hold scores of chunks.

    ``ends`` are the products of probabilities with V; ``lost`` says of other scores, by their Softmax or product, where they went.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._order = {node: index for index, node in enumerate(graph)}
        self._fixed: set[ir.Value] = set()
        self._held: dict[ir.Value, _Scores] = {}
        self._lost: dict[_Product, tuple[ir.Node, str]] = {}
        self.ends: list[tuple[ir.Node, _Scores]] = []
        for node in self._order:
            self._take(node)

    @property
    def lost(self) -> list[tuple[ir.Node, str]]:
        ended = {scores.scores for _, scores in self.ends}
        return [reason for product, reason in self._lost.items() if product not in ended]

    def window(self, last: ir.Node, scores: _Scores) -> Window | str:
        """The attention whose product with V is ``last``, or why it is left alone."""
        product, mask, softmax, values = scores.scores, scores.mask, scores.softmax, last.inputs[1]
        assert product is not None, "ends have scores"
        assert softmax is not None, "ends have probabilities"
        assert values is not None, "ends are products"
        if mask is None:
            return "no mask is cut into chunks as its scores are"
        if not _are_ones(mask.left):
            return f"{mask.node.name} multiplies its mask by what are no ones"
        chunks = product.left, product.right, mask.right
        hidden = () if scores.hidden is None else (scores.hidden,)
        nodes, lengths = self._between([last.outputs[0]], {*chunks, mask.left, values, *hidden})
        places = tuple(place for each in chunks if (place := _place(each)) is not None)
        counting, other_lengths = self._between(places, set())
        lengths = tuple(dict.fromkeys(lengths + other_lengths))
        if several := [value.name for value in lengths if len(lengths_of(value) or ()) != 1]:
            return f"{several[0]} holds several lengths"
        for value in (output for node in nodes if node is not last for output in node.outputs):
            read = value.is_graph_output() or any(user not in nodes for user, _ in value.uses())
            if read and value in self._held and self._held[value].scores is not None:
                return f"{value.name} is read elsewhere too"
        wide = values.dtype != ir.DataType.FLOAT and softmax.outputs[0].dtype == ir.DataType.FLOAT
        return Window(
            name=f"{softmax.name}/Attention",
            query=product.left,
            key=product.right,
            mask=mask.right,
            ones=mask.left,
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
        elif (product := self._product(node)) is not None:
            self._held[node.outputs[0]] = product
        elif not held:
            if node.inputs and all(map(self._is_fixed, node.inputs)) and not any(True for _ in bodies_of(node)):
                self._fixed.update(node.outputs)
        elif held.keys() == {0} and self._ends(node, held[0]):
            self.ends.append((node, held[0]))
        elif (moved := self._moved(node, held)) is not None:
            self._held[node.outputs[0]] = moved
        else:
            for each in held.values():
                if each.scores is not None:
                    reason = f"{node.name} does more than move its {'probabilities' if each.softmax else 'scores'}"
                    self._lost.setdefault(each.scores, (each.softmax or each.scores.node, reason))

    def _is_fixed(self, value: ir.Value | None) -> bool:
        return value is None or value.const_value is not None or value in self._fixed

    def _product(self, node: ir.Node) -> _Scores | None:
        """The product of two sets of chunks, or of fixed numbers and chunks."""
        left, right = (node.inputs[0], _untransposed(node.inputs[1])) if node.op_type == "MatMul" else (None, None)
        if left is None or right is None or not self._is_chunks(right):
            return None
        product = _Product(node, left, right)
        if self._is_fixed(left):
            return _Scores(mask=product)
        return _Scores(scores=product) if self._is_chunks(left) else None

    def _is_chunks(self, value: ir.Value) -> bool:
        """Whether ``value`` is looked up at fixed places of a tensor that was made flat."""
        gather, place = value.producer(), _place(value)
        flat = None if gather is None or place is None or gather.inputs[0] is None else gather.inputs[0].producer()
        if flat is None or flat.op_type != "Reshape" or rank_of(value) != 4:
            return False
        return lengths_of(flat.inputs[1]) == (-1,) and self._is_fixed(place) and not self._is_fixed(value)

    def _ends(self, node: ir.Node, scores: _Scores) -> bool:
        """Whether ``node`` is the product of probabilities and V."""
        whole = scores.scores is not None and scores.softmax is not None
        return whole and node.op_type == "MatMul" and not self._is_fixed(node.inputs[1])

    def _moved(self, node: ir.Node, held: Mapping[int, _Scores]) -> _Scores | None:
        """What ``node`` gives, if all that it does to scores is to move, add or softmax them."""
        scores: _Scores | None = next(iter(held.values()))
        for other in held.values():
            scores = scores and scores.and_(other)
        if scores is None:
            return None
        if node.op_type == "Softmax":
            axis, rank = node.attributes["axis"].as_int() if "axis" in node.attributes else -1, rank_of(node.outputs[0])
            is_last = axis == -1 or axis + 1 == rank
            return replace(scores, softmax=node) if is_last and scores.softmax is None else None
        if (hidden := _hidden(node, scores)) is not None and not self._is_fixed(hidden):
            return replace(scores, hidden=hidden)
        taken = range(len(node.inputs)) if node.op_type == "Concat" else _MOVES.get(node.op_type, ())
        others = [value for index, value in enumerate(node.inputs) if index not in held]
        kept = "reduction" not in node.attributes or node.attributes["reduction"].as_string() in ("none", "add")
        moves = kept and held.keys() <= set(taken) and all(map(self._is_fixed, others))
        return scores if moves or changes_nothing(node) else None

    def _between(
        self, ends: Iterable[ir.Value], cuts: Container[ir.Value]
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
            asked = node.inputs[0] if node.op_type == "Shape" else None
            if asked is not None and asked not in self._held and not self._is_fixed(asked):
                lengths[value] = None
                continue
            nodes.add(node)
            waiting += [each for each in node.inputs if each is not None]
        return tuple(sorted(nodes, key=self._order.__getitem__)), tuple(lengths)


def _untransposed(value: ir.Value | None) -> ir.Value | None:
    """What ``value`` is with the last two of its four axes exchanged."""
    node = None if value is None else value.producer()
    turned = node is not None and node.op_type == "Transpose" and order_of(node) == (0, 1, 3, 2)
    return node.inputs[0] if node is not None and turned else None


def _are_ones(value: ir.Value) -> bool:
    """Whether ``value`` is a one at every place, whatever it is looked up in or given the shape of."""
    while (node := value.producer()) is not None and node.op_type in _SAME_NUMBERS and node.inputs[0] is not None:
        value = node.inputs[0]
    return fill_of(value) == 1


def _place(chunks: ir.Value) -> ir.Value | None:
    """Where ``chunks`` are looked up in the first axis of something."""
    gather = chunks.producer()
    if (
        gather is None
        or gather.op_type != "Gather"
        or ("axis" in gather.attributes and gather.attributes["axis"].as_int())
    ):
        return None
    return gather.inputs[1]


def _hidden(node: ir.Node, scores: _Scores) -> ir.Value | None:
    """What ``node`` asks, if it gives zeros where that holds, and elsewhere probabilities as they come from their Softmax."""
    softmax = None if scores.softmax is None else scores.softmax.outputs[0]
    if node.op_type != "Where" or softmax is None or node.inputs[2] is not softmax or fill_of(node.inputs[1]) != 0:
        return None
    return node.inputs[0]
