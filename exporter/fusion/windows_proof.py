"""Whether scores stand where a window has them: both ways are run on random chunks, for several batches and lengths.

All between the chunks and the product with V is run, and nothing before it: no weights are read, and lengths need not be such
that the whole graph takes them. Nothing but lengths decides where scores go (windows.py saw to it), so that numbers drawn at
random show each of them that stands wrong. It knows no model.
"""

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import onnx_ir as ir

from txopt.exporter.difference import difference
from txopt.exporter.fusion.attention_path import least
from txopt.exporter.fusion.proof import run
from txopt.exporter.fusion.recording import Array, Feeds
from txopt.exporter.fusion.region import alone
from txopt.exporter.fusion.windows_rewrite import Window
from txopt.runtime.parity import TOLERANCE

_SIZES = ((2, 1), (1, 2), (1, 3))  # (batch, windows): blocks at both ends, then two and four between them
_LONG = 1 << 12  # tokens, more than any window has
_ALLOWED = {ir.DataType.FLOAT: 1e-5, ir.DataType.FLOAT16: TOLERANCE["fp16"], ir.DataType.BFLOAT16: TOLERANCE["bf16"]}
_MASKED = 0.25  # of the keys
_SEED = 7

Spelling = Callable[[ir.Graph, Window, int], list[ir.Node]]


def proved(model: ir.Model, window: Window, spelling: Spelling) -> list[ir.Node] | str:
    """Nodes by ``spelling`` for ``window`` of ``model``, in no graph yet, if they say what its own do; or why they do not."""
    trial = _Trial(model, window)
    half = trial.half()
    if half is None:
        return "its chunks do not overlap by half"
    nodes = spelling(model.graph, window, half)
    problem = trial.problem(half, nodes)
    if problem is None:
        return nodes
    for node in nodes:  # what is in no graph must not be seen to read what is in one
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)
    return problem


class _Trial:
    """Runs parts of ``model``; the lengths that they read are tried as batches and as numbers of tokens, until ``half`` fits."""

    def __init__(self, model: ir.Model, window: Window) -> None:
        self._model, self._window = model, window
        self._of_tokens: tuple[bool, ...] = ()

    def half(self) -> int | None:
        """How many tokens two neighbours among the chunks share; None where they share no half of theirs."""
        for of_tokens in product((False, True), repeat=len(self._window.lengths)):
            self._of_tokens = of_tokens
            if (places := self._places(1, _LONG)) is not None:
                return int(places[0].shape[2]) // 2
        return None

    def problem(self, half: int, nodes: Sequence[ir.Node]) -> str | None:
        """Why ``nodes`` may not stand for the window's, None where they may."""
        random = np.random.default_rng(_SEED)
        allowed = _ALLOWED.get(self._window.query.dtype or ir.DataType.FLOAT, 0.0)
        for batch, windows in _SIZES if self._window.lengths else _SIZES[:1]:
            tokens = 2 * half * windows
            places = self._places(batch, tokens)
            whole = places is not None and (places[2].shape[0], *places[0].shape[1:3]) == (
                batch,
                2 * windows - 1,
                2 * half,
            )
            if places is None or (self._window.lengths and not whole):
                return f"its chunks are none of windows at {batch} x {tokens} tokens"
            feeds = self._drawn(places, half, random) | self._lengths(batch, tokens)
            answers = []
            for each in (self._window.nodes, nodes):
                answer = self._run(each, [each[-1].outputs[0]], feeds)
                if isinstance(answer, str):
                    return f"not proved: {answer}"
                answers += answer
            expected, found = answers
            error = difference(expected, found)
            if not error <= allowed:
                where = f"{batch} x {tokens} tokens, error {error:.3g} (allowed {allowed:.0e})"
                return f"its scores do not stand where a window has them: {where}"
        return None

    def _places(self, batch: int, tokens: int) -> list[Array] | None:
        """Where chunks of Q, K and the mask are looked up; None where that cannot be run, or neighbours do not share a half."""
        constants = [value.const_value for value in self._window.places]
        computed = [value for value in self._window.places if value.const_value is None]
        answers = self._run(self._window.counting, computed, self._lengths(batch, tokens)) if computed else []
        if isinstance(answers, str):
            return None
        rest = iter(answers)
        places = [next(rest) if constant is None else constant.numpy() for constant in constants]
        count, length = places[0].shape[1:3]
        same = places[0].shape == places[1].shape and places[2].shape[1:3] == (count, length)
        if not same or not count or not length or length % 2:
            return None
        shared = all(np.array_equal(each[:, :-1, length // 2 :], each[:, 1:, : length // 2]) for each in places)
        return places if shared else None

    def _lengths(self, batch: int, tokens: int) -> dict[str, Array]:
        pairs = zip(self._window.lengths, self._of_tokens, strict=True)
        return {str(value.name): np.array([tokens if of_tokens else batch]) for value, of_tokens in pairs}

    def _drawn(self, places: Sequence[Array], half: int, random: np.random.Generator) -> dict[str, Array]:
        """Chunks that overlap, blocks of V, and which tokens are hidden; some keys are masked, the others' masks are numbers too."""
        window, (rows, count, _, size), sources = self._window, places[0].shape, len(places[2])
        blocks, dtype = count + 1, window.query.dtype or ir.DataType.FLOAT
        query, key = random.normal(size=(2, rows, blocks * half, size)) / size**0.25
        mask = random.normal(size=(sources, blocks * half, places[2].shape[3]))
        mask[random.random(mask.shape) < _MASKED] = least(dtype)
        drawn = {
            window.query: _chunks(query, half),
            window.key: _chunks(key, half),
            window.mask: _chunks(mask, half),
            window.ones: _chunks(np.ones_like(mask), half),
            window.values: random.normal(size=(rows, blocks, 3 * half, size)),
        }
        feeds = {str(value.name): array.astype(dtype.numpy()) for value, array in drawn.items()}
        if window.hidden is not None:
            feeds[str(window.hidden.name)] = random.random((sources, blocks * half, 1, 1)) < 0.5
        return feeds

    def _run(self, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value], feeds: Feeds) -> list[Array] | str:
        """What ``nodes`` alone give on ``feeds``, or why they do not run."""
        read = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
        inputs = [value for value in read if str(value.name) in feeds]
        graph = alone(inputs, list(outputs), list(nodes), [value for value in read if value.is_initializer()])
        model = ir.Model(graph, ir_version=self._model.ir_version)
        model.graph.opset_imports.update(self._model.opset_imports)
        answers = run(model, [feeds])
        return answers if isinstance(answers, str) else [answers[0][str(value.name)] for value in outputs]


def _chunks(tokens: Array, half: int) -> Array:
    """[N,T,D] to [N,C-1,2w,D], of which neighbours share ``half`` tokens."""
    starts = range(0, tokens.shape[1] - half, half)
    return np.stack([tokens[:, start : start + 2 * half] for start in starts], axis=1)
