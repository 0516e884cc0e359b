"""What a session asks of an engine, whichever it is: the protocols that ort.py and trt.py keep.

Owns the interfaces only. An engine's own tensors are ``Value``s here: a session hands them on and never looks inside. Axes: R rows,
H heads, S self-cache length, D head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from txopt.runtime.arrays import Array
from txopt.runtime.decoder import THIS_MODEL, Ids
from txopt.runtime.graphs import CacheSpec, GraphSpec
from txopt.runtime.opened import Opened

Value = Any


class Staged(Protocol):
    """A tensor that crosses between host and engine at every call: the host writes it before one, or reads it after one.

    ``array`` is the host's side of it, the same memory for as long as it lives. Where the engine computes on the host, its own side
    is that memory, too.
    """

    array: Array

    def read(self) -> Array:
        """``array``, made to hold what the engine wrote last."""
        ...


class Call(Protocol):
    """One set of bound tensors, run as often as wanted; inputs and outputs stay where they are."""

    def run(self) -> None:
        """Feeds the staged inputs as their arrays are now, runs, and returns when everything that it ``reads`` is in its array.

        Errors:
            TxoptError: the engine failed.
        """
        ...


class Buffers(Protocol):
    """The self-attention cache: tensors [R,H,S,D] that the graph writes in place, by the names of its inputs."""

    @property
    def values(self) -> Mapping[str, Value]:
        """What is bound; others after ``grow``."""
        ...

    def grow(self, length: int, filled: int) -> None:
        """Makes S ``length``, with new ``values``; the first ``filled`` places keep their content.

        Errors:
            MemoryError: the memory does not hold them; they stay as they were.
        """
        ...

    def copy_rows(self, rows: Ids, sources: Ids, filled: int) -> None:
        """Lets row ``rows[i]`` (int64 [changed]) hold what row ``sources[i]`` held before the call, in the first ``filled`` places."""
        ...

    def array(self, name: str, filled: int) -> Array:
        """A copy of the first ``filled`` places, [R,H,filled,D]; bfloat16 as float32."""
        ...


class Runner(Protocol):
    """One graph, opened by an engine."""

    def opened(self) -> Opened:
        """The graph's inputs and outputs."""
        ...

    def describe(self, value: Value) -> tuple[str, tuple[int, ...]]:
        """A tensor's dtype, by the name that manifests use, and its shape."""
        ...

    def array(self, value: Value) -> Array:
        """The tensor's numbers, a copy that outlives it; bfloat16 as float32."""
        ...

    def tensor(self, array: Array) -> Value:
        """A tensor of ``array``'s numbers where the engine reads it; on the host the two share memory."""
        ...

    def staged(self, array: Array) -> Staged:
        """A staged tensor of ``array``'s numbers; on the host its ``array`` is this one.

        Errors:
            MemoryError: the memory does not hold it.
        """
        ...

    def buffers(self, names: Sequence[str], shape: tuple[int, ...], dtype: str) -> Buffers:
        """Buffers of zeros, of one shape [R,H,S,D] and dtype.

        Errors:
            MemoryError: the memory does not hold them.
        """
        ...

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any], reads: Sequence[Any]) -> Call:
        """A call of the graph on values and staged tensors; ``reads`` are the staged outputs that the host wants after each run.

        Errors:
            LimitError: lengths that the engine was not built for.
        """
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Value]:
        """Runs once on fresh outputs, which stay with the engine; for graphs outside the token loop.

        Errors:
            InputError: ids or lengths that the engine does not take. LimitError: lengths that it was not built for.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Engines:
    """An artifact's graphs, opened for one device.

    Attributes:
        runners: by the graph's name. specs: each as its engine has it: dtypes and fixed lengths may differ from the manifest's.
        cache: the decoder's, likewise; None without one.
        precision: what was made: the artifact's own, or the engines'.
        arithmetic: what it computes in, one of the names of precisions.
        most_queries: the tokens a row that one call of the decoder takes; None: any number.
        limited_by: what bounds the cache, for messages; THIS_MODEL where it is not engines that could be others.
    """

    runners: Mapping[str, Runner]
    specs: Mapping[str, GraphSpec]
    cache: CacheSpec | None
    precision: str
    arithmetic: str
    most_queries: int | None = None
    limited_by: str = THIS_MODEL
