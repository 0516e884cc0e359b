"""CUDA graphs of an ONNX Runtime session: which run records one, which replays one, and when one is let go.

A graph holds for the addresses and shapes of everything that was bound when it was recorded. So each set of these has one, by a
number of its own. A set is recorded when it is run a second time: the call of a prompt comes once, and recording costs three runs.
Owns the numbers and how many there are. It knows no tensors and binds none.
"""

from collections.abc import Hashable
from itertools import count
from threading import RLock
from typing import Any

import onnxruntime

MOST = 16  # graphs of a session: each keeps its own copy of all launches
_NONE = "-1"  # ONNX Runtime's number for a run that neither records nor replays

# Held by whoever uses the GPU where graphs are recorded: meanwhile, CUDA lets nobody else in the process allocate there.
RECORDING = RLock()

Options = Any  # onnxruntime.RunOptions: the library ships no types


class Captures:
    """The graphs of ``session``, which was opened with ``enable_cuda_graph``."""

    def __init__(self, session: Any) -> None:
        # Before 1.31 nothing lets a graph go: what comes after MOST sets then runs without one.
        self._release = getattr(session, "release_captured_graph", None)
        self._numbers = count(1)
        self._graphs: dict[Hashable, tuple[int, Options]] = {}  # the one used longest ago first
        self._plain = _options(_NONE)

    def options(self, bound: Hashable, *, again: bool) -> Options:
        """How to run what is ``bound``: addresses and shapes by name. ``again``: it was run before, so it is worth a graph."""
        found = self._graphs.pop(bound, None)
        if found is None:
            if not again or not self._room():
                return self._plain
            number = next(self._numbers)
            found = number, _options(str(number))
        self._graphs[bound] = found
        return found[1]

    def _room(self) -> bool:
        if len(self._graphs) >= MOST and self._release is not None:
            number, _ = self._graphs.pop(next(iter(self._graphs)))
            self._release(number)
        return len(self._graphs) < MOST


def _options(number: str) -> Options:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", number)
    return options
