"""What a foreign graph itself says: its answers on random inputs, and which of its axis names it does not hold to.

Files often give one name to lengths that differ ("sequence" for source and target). Whoever believes that reads the length of the
source where the target's is meant, and no feed of equal lengths shows it: so the original is asked for unequal ones.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import onnx_ir as ir

from txopt.exporter.difference import difference
from txopt.exporter.foreign_feeds import Array, Sizes, axes, candidates, draw, symbols, text
from txopt.runtime.backends.ort import Runner
from txopt.runtime.errors import InputError, SourceError, TxoptError, explain

SETS = 2
_NOT_IN_NUMPY = ("bfloat16", "float8", "float4")
_SEEDS = (0, 1)  # which draw an input that may choose a branch as true, and as false
_MOST_TRIALS = 40  # of one name; files with a hundred caches share theirs rightly
_CHANGES = (
    2,
    -2,
)  # both must run: masks may often be longer than what they mask, but not shorter. One more could be a cache's length.

Place = tuple[str, int]  # an input, and one of its axes
Trials = Callable[[ir.Model, Collection[str]], Iterator[Sizes]]  # as foreign_feeds.candidates


@dataclass(frozen=True)
class Answer:
    """One set of inputs and what the original says to it."""

    sizes: Sizes
    feeds: dict[str, Array]
    outputs: dict[str, Array]

    def errors(self, found: Mapping[str, Array]) -> dict[str, float]:
        """How far outputs ``found`` of another graph are from these."""
        return {name: difference(expected, found[name]) for name, expected in self.outputs.items()}


@dataclass(frozen=True)
class Original:
    """``answers`` on the first sizes that it takes; ``not_run``: those that it does not, and what it ``said`` to them.

    ``renamed``: new names of axes that shared one with axes of another length.
    """

    path: Path
    answers: list[Answer] = field(default_factory=list)
    not_run: list[Sizes] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    renamed: dict[Place, str] = field(default_factory=dict)


def ask(path: Path, model: ir.Model, trials: Trials = candidates, sets: int = SETS) -> Original:
    """Opens the file once; ``model`` is its graph, whose inputs have their new names afterwards.

    ``sets`` of the sizes that ``trials`` gives are answered, the first that the file takes.

    Raises:
        SourceError: ONNX Runtime does not open the file, or it has inputs that cannot be drawn or outputs that cannot be compared.
    """
    try:
        runner = Runner(path, as_written=True)
    except TxoptError as err:
        raise SourceError(f"{path}: expected a graph that ONNX Runtime opens, found: {err}") from err
    _check_ends(path, runner)
    first = _answers(Original(path), runner, model, trials, sets=1)
    if not first.answers:
        return first
    renamed = _untrue(runner, model, _base(runner, model, first.answers[0].sizes))
    return _answers(Original(path, renamed=renamed), runner, model, trials, sets=sets)


def _check_ends(path: Path, runner: Runner) -> None:
    """Raises SourceError where an input cannot be drawn or an output compared, because numpy has no such numbers."""
    opened = runner.opened()
    ends = {**opened.inputs, **opened.outputs}
    problems = [
        f"{name}: expected float16, float32, float64, integers or booleans, which numpy has to draw and compare, found {dtype}; "
        "export it with float32 or float16 there"
        for name, (dtype, _) in ends.items()
        if dtype.startswith(_NOT_IN_NUMPY)
    ]
    if problems:
        raise SourceError(explain(f"{path}: its inputs and outputs cannot be proved:", problems))


def _answers(original: Original, runner: Runner, model: ir.Model, trials: Trials, *, sets: int) -> Original:
    for seed, sizes in enumerate(trials(model, set(original.renamed.values()))):
        feeds = draw(model, sizes, seed)
        try:
            original.answers.append(Answer(sizes, feeds, _answer(runner, feeds)))
        except TxoptError as err:
            original.said.append(f"{text(sizes)}: {err}")
            original.not_run.append(sizes)
        if len(original.answers) == sets:
            break
    return original


def _answer(runner: Runner, feeds: Mapping[str, Array]) -> dict[str, Array]:
    outputs = {name: np.array(runner.array(value)) for name, value in runner.run(feeds).items()}  # they outlive it
    for name, array in outputs.items():
        if array.dtype.kind == "f" and array.size and not np.isfinite(array).any():
            raise InputError(f"{name} has no finite number")
    return outputs


def _untrue(runner: Runner, model: ir.Model, sizes: Sizes) -> dict[Place, str]:
    """Renames axes whose length may differ from that of others of their name, the fewest that go together first."""
    read = {str(value.name) for value in model.graph.inputs if value.uses()}
    renamed: dict[Place, str] = {}
    lengths = dict(sizes)
    seeds = [seed for seed in _SEEDS if _runs(runner, model, sizes, [seed])]  # each branch that runs must run with them
    for name in [name for name, length in sizes.items() if length + min(_CHANGES) > 1]:  # one would broadcast
        rest = [place for place, found in _names(model).items() if found == name and place[0] in read]
        trials = (places for count in range(1, len(rest) // 2 + 1) for places in combinations(rest, count))
        for places in islice(trials, _MOST_TRIALS):
            if not set(places) < set(rest):
                continue
            value, axis = places[0]
            new = f"{name}/{value}" if f"{name}/{value}" not in lengths else f"{name}/{value}/{axis}"
            _name(model, dict.fromkeys(places, new))
            if all(_runs(runner, model, {**lengths, new: sizes[name] + change}, seeds) for change in _CHANGES):
                lengths[new] = sizes[name]
                renamed |= dict.fromkeys(places, new)
                rest = [place for place in rest if place not in places]
            else:
                _name(model, dict.fromkeys(places, name))
    return renamed


def _base(runner: Runner, model: ir.Model, sizes: Sizes) -> Sizes:
    """Sizes to vary: batches, too, are long enough to be shortened where the original takes that."""
    longer = {name: max(length, 1 - min(_CHANGES) + 2) for name, length in sizes.items()}
    return longer if _runs(runner, model, longer, _SEEDS[:1]) else sizes


def _runs(runner: Runner, model: ir.Model, sizes: Sizes, seeds: Collection[int]) -> bool:
    try:
        for seed in seeds:
            _answer(runner, draw(model, sizes, seed))
    except TxoptError:
        return False
    return True


def rename(model: ir.Model, renamed: Mapping[Place, str]) -> None:
    """Gives inputs of ``model`` their ``renamed`` axes; what else had one of the old names has none then."""
    names = _names(model)
    old = {names[place] for place in renamed}
    _name(model, renamed)
    for value in (*model.graph.outputs, *(output for node in model.graph.all_nodes() for output in node.outputs)):
        if value.shape is not None and any(old & set(symbols(dim)) for dim in _dims(value.shape)):
            value.shape = ir.Shape([None if old & set(symbols(dim)) else dim for dim in _dims(value.shape)])


def _names(model: ir.Model) -> dict[Place, int | str]:
    return {(str(value.name), axis): found for value in model.graph.inputs for axis, found in enumerate(axes(value))}


def _name(model: ir.Model, names: Mapping[Place, str]) -> None:
    for value in model.graph.inputs:
        if value.shape is not None:
            dims = enumerate(_dims(value.shape))
            value.shape = ir.Shape([names.get((str(value.name), axis), dim) for axis, dim in dims])


def _dims(shape: ir.Shape) -> list[int | str | None]:
    return [dim if isinstance(dim, int) else dim.value for dim in shape]
