"""What values of a foreign graph are, found by running the part of it that makes them.

Reading values beats reading patterns: every exporter spells a causal mask in its own way, but all of them mean the same numbers.
It knows nothing of what the numbers are for.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from txopt.exporter import weights
from txopt.runtime.backends.ort import Runner
from txopt.runtime.errors import SourceError, TxoptError

Array = NDArray[Any]

_IR_VERSION = 10


class Probe:
    """The part of ``graph`` that makes ``values``, opened once, run for as many feeds as wanted.

    Its weights go to a directory of their own until the probe is closed; the graph is left alone.

    Raises:
        SourceError: ONNX Runtime does not open the part.
    """

    def __init__(self, graph: ir.Graph, values: Sequence[ir.Value]) -> None:
        self.inputs = tuple(str(value.name) for value in inputs_of(graph, values))
        self._names = tuple(dict.fromkeys(str(value.name) for value in values))
        part = ir.convenience.extract(graph, self.inputs, self._names)
        part.name = "probe"
        self._directory = tempfile.TemporaryDirectory(prefix="txopt-probe-")
        folder = Path(self._directory.name)
        model = ir.Model(part, ir_version=_IR_VERSION)
        model.opset_imports.update(graph.opset_imports)
        weights.write({"probe": model}, folder)
        try:
            self._runner = Runner(folder / "probe.onnx")
        except TxoptError as err:
            self._directory.cleanup()
            raise SourceError(f"expected a graph that ONNX Runtime opens, found: {err}") from err

    def __enter__(self) -> "Probe":
        return self

    def __exit__(self, *_: object) -> None:
        self._directory.cleanup()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """The values by name; what ``feeds`` has beyond the inputs that they need is ignored.

        Raises:
            SourceError: the part does not run on them.
        """
        try:
            answers = self._runner.run({name: feeds[name] for name in self.inputs})
        except TxoptError as err:
            sizes = ", ".join(f"{name} {list(feeds[name].shape)}" for name in self.inputs)
            raise SourceError(f"expected a graph that runs on {sizes}, found: {err.__cause__ or err}") from err
        return {name: self._runner.array(answers[name]) for name in self._names}


def inputs_of(graph: ir.Graph, values: Sequence[ir.Value]) -> list[ir.Value]:
    """The inputs of ``graph`` from which ``values`` are made, in the graph's order."""
    seen: set[ir.Value] = set()
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        node = value.producer()
        waiting += [] if node is None else [before for before in node.inputs if before is not None]
    return [value for value in graph.inputs if value in seen]
