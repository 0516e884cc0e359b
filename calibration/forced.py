"""One pass of teacher forcing through an artifact's two graphs, with values of their insides as outputs.

Feeding all tokens of a target at once computes what the decode loop computes step by step, position by position, over the same
caches; so one run shows every step. Owns the copies of the graphs whose values are exposed, and which places are padding. Knows
neither where tokens come from nor what is done with what is seen.
"""

import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.gemms import split
from txopt.calibration.silence import counted
from txopt.runtime.artifact import Artifact
from txopt.runtime.backends.ort import Runner
from txopt.runtime.errors import UsageError
from txopt.runtime.frontend import kind_of
from txopt.runtime.graphs import MASKS, frame_masks, source_masks
from txopt.runtime.inputs import check_inputs
from txopt.runtime.manifest import Manifest
from txopt.runtime.strict_json import show

Array = NDArray[Any]
Axis = str | int
Dims = tuple[Axis | None, ...]


@dataclass(frozen=True)
class Seen:
    """A value of a graph at the places that are no padding: float [places, K]."""

    graph: str
    name: str
    values: Array


class Forced:
    """An artifact's graphs, opened once more with inner values as outputs; a context: its files are temporary.

    Args:
        artifact: opened.
        taps: names of values by graph; graphs that are not named are not opened.
        threads: engine threads, None for one per core.
        weights: other numbers for weights of the graphs, by graph and name.
        edits: changes of the graphs, made in place before they are opened.
        tails: whether all places of the silence behind a sound are seen, or few of them (silence.py).

    Raises:
        UsageError: a graph has no value of a tap's name.
    """

    def __init__(
        self,
        artifact: Artifact,
        taps: Mapping[str, Sequence[str]],
        *,
        threads: int | None = None,
        weights: Mapping[str, Mapping[str, Array]] | None = None,
        edits: Mapping[str, Callable[[ir.Graph], object]] | None = None,
        tails: bool = True,
    ) -> None:
        self._manifest: Manifest = artifact.manifest
        self._tails = tails or kind_of(artifact.manifest.frontend) != "audio"
        self._taps = {name: list(dict.fromkeys(mine)) for name, mine in taps.items()}
        self._axes: dict[str, dict[str, Dims]] = {}
        self._runners: dict[str, Runner] = {}
        others, changes = weights or {}, edits or {}
        self._folder = tempfile.TemporaryDirectory(prefix="txopt-")
        try:
            for name, wanted in self._taps.items():
                path, self._axes[name] = _tapped(artifact, name, wanted, Path(self._folder.name), changes.get(name))
                self._runners[name] = Runner(path, threads=threads, weights=others.get(name), beside=artifact.path)
        except BaseException:
            self._folder.cleanup()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runners.clear()  # they map the files
        self._folder.cleanup()

    def run(self, inputs: Mapping[str, Array], tokens: NDArray[np.int64], lengths: Sequence[int]) -> Iterator[Seen]:
        """What the taps hold for one batch.

        Args:
            inputs: the encoder's, by name; a decoder alone has none.
            tokens: int64 [B,L], what the decoder reads, padded on the right.
            lengths: tokens of each row that count.
        """
        given: dict[str, Array] = {}
        if "encoder" in self._runners:
            given = yield from self._encoded(inputs)
        if "decoder" in self._runners:
            yield from self.decoded(given, tokens, lengths)

    def encoded(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """What the decoder reads of the encoder, by the decoder's names; of a decoder alone nothing."""
        if "encoder" not in self._runners:
            return {}
        steps = self._encoded(inputs)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                given: dict[str, Array] = done.value
                return given

    def _encoded(self, inputs: Mapping[str, Array]) -> Generator[Seen, None, dict[str, Array]]:
        """The encoder's taps, then, as the generator's value, what the decoder reads of the encoder."""
        spec, runner = self._manifest.graphs["encoder"], self._runners["encoder"]
        inputs_masked, frames = source_masks(self._manifest.graphs), frame_masks(self._manifest.graphs)
        feeds = check_inputs(spec, inputs, masks=inputs_masked)
        values = feeds | {name: runner.array(value) for name, value in runner.run(feeds).items()}
        masks: dict[Axis, NDArray[np.bool_]] = {}
        for name, axis in {**inputs_masked, **frames}.items():
            seen = values[name] != 0
            masks[axis] = masks[axis] | seen if axis in masks else seen  # what no mask lets through is padding
        for name in self._taps["encoder"]:
            axes = self._axes["encoder"][name]
            yield Seen(
                "encoder", name, _kept(values[name], axes, masks if self._tails else masks | _silent(feeds, axes))
            )
        made = {f"{MASKS}{name}": feeds[name] for name in inputs_masked}
        return made | {name: value for name, value in values.items() if name.startswith(("cross_", MASKS))}

    def decoded(self, given: Mapping[str, Array], tokens: NDArray[np.int64], lengths: Sequence[int]) -> Iterator[Seen]:
        """The decoder's taps along ``tokens``; ``given`` is what ``encoded`` gave."""
        valid = np.arange(tokens.shape[1]) < np.asarray(lengths)[:, None]
        spec, cache = self._manifest.graphs["decoder"], self._manifest.cache
        assert cache is not None
        rows, length = tokens.shape
        dtype = {"float32": np.float32, "float16": np.float16}[cache.dtype]
        buffers = np.zeros((rows, cache.heads, length, cache.head_size), dtype)
        feeds: dict[str, Array] = {"input_ids": tokens, "position": np.zeros(rows, np.int64)}
        for item in spec.inputs:
            if item.name not in feeds:
                feeds[item.name] = buffers if item.name.startswith("self_") else given[item.name]
        runner = self._runners["decoder"]
        values = feeds | runner.run(feeds)
        for name in self._taps["decoder"]:
            value = values[name] if name in feeds else runner.array(values[name])
            yield Seen("decoder", name, _kept(value, self._axes["decoder"][name], {"Q": valid}))


def _tapped(
    artifact: Artifact, name: str, taps: Sequence[str], folder: Path, edit: Callable[[ir.Graph], object] | None
) -> tuple[Path, dict[str, Dims]]:
    """A copy of one graph in ``folder`` with ``taps`` as outputs, and their axes; its weights stay where they are."""
    file = artifact.manifest.graphs[name].file
    model = ir.load(artifact.file(file))
    if edit is not None:
        split(model.graph)  # as whoever made the edit saw it
        edit(model.graph)
    fed = {str(value.name): value for value in model.graph.inputs}
    made = {str(out.name): out for node in model.graph for out in node.outputs}
    if unknown := [tap for tap in taps if tap not in fed | made]:
        raise UsageError(
            f"{file}: expected names of values between its nodes, found no {', '.join(map(show, unknown[:8]))}"
        )
    already = {*fed, *(str(out.name) for out in model.graph.outputs)}
    model.graph.outputs.extend(made[tap] for tap in taps if tap not in already)
    ir.save(model, folder / file)
    return folder / file, {tap: _axes((fed | made)[tap]) for tap in taps}


def _axes(value: ir.Value) -> Dims:
    """Lengths and names of a value's axes; empty where the file does not say."""
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape or ())


def _silent(feeds: Mapping[str, Array], axes: Dims) -> dict[Axis, NDArray[np.bool_]]:
    """Which places of X of a value [B,X,K] count, by X, where these are stretches of sound of a fixed number of frames [B,F,T]."""
    places = axes[1] if len(axes) == 3 else None
    sounds = [value for value in feeds.values() if value.ndim == 3 and value.dtype.kind == "f"]
    if not isinstance(places, int) or len(sounds) != 1 or sounds[0].shape[2] % places:
        return {}
    return {places: counted(sounds[0], places)}


def _kept(value: Array, axes: Dims, masks: Mapping[Axis, NDArray[np.bool_]]) -> Array:
    """[places, K] of [B,X,K] without the padding of X; all places where X has no mask. Equal lengths say nothing: X goes by name."""
    axis = axes[1] if len(axes) == 3 else None
    mask = None if axis is None else masks.get(axis)
    return value.reshape(-1, value.shape[-1]) if mask is None else value[mask]
