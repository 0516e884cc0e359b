"""The two graphs of an artifact, opened: ``encode`` once, then a ``RowDecoder`` over preallocated KV buffers.

Owns the buffers: they are written in place by the graph, grow geometrically and are bound as input and output at one address.
It knows neither tokens' meaning nor how the next one is chosen, nor how many memories there are: what a decoder reads of its encoder
goes by name. Axes: B sources, R rows (B times the number of beams), Q query tokens, S self-cache length, T (or U, W) source length,
V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.alignment import aligned, cut, source_lengths, whole
from txopt.runtime.arrays import as_array
from txopt.runtime.artifact import Artifact
from txopt.runtime.backends.ort import Call, Runner
from txopt.runtime.counts import allocating, count
from txopt.runtime.errors import ArtifactError, InputError, TxoptError, UsageError, explain
from txopt.runtime.graphs import MASKS, Axes, CacheSpec, GraphSpec, frame_masks, source_masks
from txopt.runtime.inputs import axes_of, bounds_of, check_inputs
from txopt.runtime.manifest import QUANTIZED
from txopt.runtime.opened import mismatches
from txopt.runtime.strict_json import limited, show

FIRST_BUCKET = 64  # self-cache length of a new decoder; attention costs time in proportion to it

Array = NDArray[Any]
Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Encoded:
    """The encoder's results, where the engine left them, by output name; ``masks`` int64 [B,T] by the name that such an input has."""

    batch: int
    values: dict[str, Any]
    masks: dict[str, Ids]


class Session:
    """An artifact's graphs, ready to run; open it through ``txopt.load``.

    Args:
        artifact: opened, so its hashes are checked already.
        device: "cpu" or "cuda".
        threads: engine threads, None for one per core.
        as_written: see ``Runner``: what the graphs mean, without the engine's fusions.

    Errors:
        ArtifactError: a file holds no graph, or another than the manifest says.
    """

    def __init__(
        self, artifact: Artifact, *, device: str = "cpu", threads: int | None = None, as_written: bool = False
    ) -> None:
        self.manifest = artifact.manifest
        self._runners = {
            name: Runner(artifact.file(spec.file), device=device, threads=threads, as_written=as_written)
            for name, spec in artifact.manifest.graphs.items()
        }
        problems = [
            problem
            for name, spec in artifact.manifest.graphs.items()
            for problem in mismatches(name, spec, self._runners[name].opened())
        ]
        if problems:
            title = (
                f"{artifact.path}: the graphs in its files are not those of its manifest (was it edited, or were files "
                "swapped?); export it again:"
            )
            raise ArtifactError(explain(title, limited(problems)))
        self._masks, self._made = source_masks(self.manifest.graphs), frame_masks(self.manifest.graphs)
        frontend = self.manifest.frontend
        self._bounds = bounds_of(frontend)
        self._samples = frontend.get("least_samples"), frontend.get("most_samples")
        self._aligns = self.manifest.precision in QUANTIZED

    def array(self, value: Any) -> Array:
        return next(iter(self._runners.values())).array(value)

    def encode(self, inputs: Mapping[str, Any]) -> Encoded:
        """Runs the encoder; ``inputs`` by name, a missing mask means no padding.

        Errors:
            InputError: unknown, missing or ill-shaped inputs, ids that the model does not know, and sources longer than
                it reads, all of them listed.
        """
        runner = self._runners.get("encoder")
        if runner is None:
            raise UsageError(f"this artifact ({self.manifest.kind}) has no encoder")
        feeds = check_inputs(
            self.manifest.graphs["encoder"], inputs, masks=self._masks, bounds=self._bounds, samples=self._samples
        )
        lengths = source_lengths(feeds, self._masks)
        if self._aligns:
            feeds = aligned(self.manifest.graphs["encoder"], feeds, self._masks, self._bounds)
        values: dict[str, Any] = runner.run(feeds)
        if self._aligns and self.manifest.cache is None:  # a decoder is told by masks where places end, a caller is not
            for out in self.manifest.graphs["encoder"].outputs:
                if not lengths.keys().isdisjoint(out.axes):
                    values[out.name] = runner.tensor(cut(out.axes, runner.view(values[out.name]), lengths))
        masks = {name: feeds[name] for name in self._masks}
        masks |= {name.removeprefix(MASKS): runner.array(values[name]) for name in self._made}
        return Encoded(len(next(iter(feeds.values()))), values, masks)

    def decoder(self, encoded: Encoded | None, *, beams: int = 1, batch: int = 1) -> "RowDecoder":
        """A decoder of batch times ``beams`` rows; the batch is the encoded sources' where there are any.

        Errors:
            UsageError: no decoder, sources where there is no encoder or the reverse, or more rows than memory holds.
            InputError: ``encoded`` does not fit the decoder: it is another model's.
        """
        beams, batch = count("beams", beams), count("batch", batch)
        spec, cache = self.manifest.graphs.get("decoder"), self.manifest.cache
        if spec is None or cache is None:
            raise UsageError(
                f"this artifact ({self.manifest.kind}, {self.manifest.task}) has no decoder and cannot generate"
            )
        runner = self._runners["decoder"]
        if (encoded is None) is ("encoder" in self.manifest.graphs):
            raise UsageError(
                "this decoder reads an encoder's results: expected decode(model.encode(...)), got no sources"
                if encoded is None
                else "this artifact is a decoder alone: expected decode(batch=B), got encoded sources"
            )
        if not isinstance(encoded, Encoded | None):
            raise InputError(f"encoded: expected what encode() gave, got {type(encoded).__name__}")
        if encoded is None:
            return RowDecoder(runner, spec, cache, batch * beams, batch * beams, {})
        if batch not in (1, encoded.batch):
            raise UsageError(f"batch={batch} and {encoded.batch} encoded sources: leave batch out, the sources say it")
        fixed = _sources(runner, spec, encoded)
        return RowDecoder(runner, spec, cache, encoded.batch * beams, beams, fixed)


class RowDecoder:
    """Rows that advance together, each at its own position; see ``generate.Decoder`` for the loop's view of it.

    Every ``group`` of adjacent rows belongs to one source (without sources, all do): what ``fixed`` holds is per source.
    """

    def __init__(
        self, runner: Runner, spec: GraphSpec, cache: CacheSpec, rows: int, group: int, fixed: Mapping[str, Any]
    ) -> None:
        self.max_length = cache.max_length
        self._runner, self._cache, self._fixed = runner, cache, dict(fixed)
        self.names = [name for name in (item.name for item in spec.inputs) if name.startswith("self_")]
        self._vocabulary = int(next(item for item in spec.outputs if item.name == "logits").axes[-1])
        with allocating(rows * 4 * self._vocabulary + self._size(rows, FIRST_BUCKET), rows):
            self._position = np.zeros(rows, np.int64)
            self._ids = np.zeros((rows, 1), np.int64)
            self._logits = np.empty((rows, 1, self._vocabulary), np.float32)
        self._group, self._first_of_group = group, np.arange(rows) // group * group
        self._longest = 0  # the filled part of the buffers: no row is further
        self._capacity = 0
        self._buffers: dict[str, Any] = {}
        self._step: Call | None = None

    def prefill(self, ids: Ids, mask: Ids | None = None) -> Floats:
        """Feeds prompts int64 [R,P]; logits [R,V] after each row's last token.

        ``mask`` [R,P] marks left padding, which takes no place in the cache.
        """
        ids = self._checked(ids)
        if self._longest:
            raise UsageError(
                "this decoder has begun already: prefill once, then step() or feed(); open another for another prompt"
            )
        if mask is None:
            last: Floats = self.feed(ids)[:, -1]
            return last
        mask = as_array("mask", mask)
        if mask.shape != ids.shape or (np.diff(mask != 0, axis=1) & (mask[:, 1:] == 0)).any() or not mask[:, -1].all():
            raise InputError(
                f"mask: expected {list(ids.shape)}, 0 on the left where padding is, and a last token in every row"
            )
        lengths = (mask != 0).sum(1)
        width = ids.shape[1]
        # Rows start at position 0: what was padding on the left is now free space on the right, overwritten by later steps.
        source = np.minimum(np.arange(width) + (width - lengths)[:, None], width - 1)
        logits = self.feed(np.take_along_axis(ids, source, axis=1))
        self._position[:] = lengths
        self._longest = int(lengths.max())
        chosen: Floats = logits[np.arange(len(ids)), lengths - 1]
        return chosen

    def step(self, ids: Ids) -> Floats:
        """One token per row, int64 [R]; logits [R,V], a buffer that the next call overwrites."""
        if self._longest == self._capacity or self._step is None:
            self._reserve(self._longest + 1)
            self._step = self._bind(self._ids, self._logits)
        if not isinstance(ids, np.ndarray) or ids.dtype != np.int64 or ids.shape != self._position.shape:
            ids = self._checked(as_array("tokens", ids)[..., None])[:, 0]
        elif ids.min() < 0 or ids.max() >= self._vocabulary:
            self._checked(ids[:, None])
        self._ids[:, 0] = ids
        if not self._runner.on_host:
            return self.feed(self._ids)[:, 0]
        self._run(self._step, 1)
        self._position += 1
        self._longest += 1
        return self._logits[:, 0]

    def feed(self, ids: Ids) -> Floats:
        """Any number of tokens per row, int64 [R,Q]; logits [R,Q,V]."""
        ids = self._checked(ids)
        rows, queries = ids.shape
        self._reserve(self._longest + queries)
        logits = np.empty((rows, queries, self._vocabulary), np.float32)
        bound = self._runner.tensor(logits)
        self._run(self._bind(np.ascontiguousarray(ids, np.int64), bound), queries)
        self._position += queries
        self._longest += queries
        return logits if self._runner.on_host else self._runner.view(bound)

    def _run(self, call: Call, queries: int) -> None:
        """Runs ``call`` of so many tokens a row; ArtifactError where it is their positions that cannot be run."""
        try:
            call.run()
        except TxoptError as err:
            last = int(self._position.max()) + queries - 1
            if self._runs_at(last) or not self._runs_at(0):
                raise
            raise ArtifactError(
                f"manifest.json: cache.max_length: expected positions that the decoder's graph has, found {show(self.max_length)}, "
                f"and it fails at position {last}: was the manifest edited? Export it again, or stop before; {err}"
            ) from err

    def _runs_at(self, position: int) -> bool:
        """Whether one token runs there; of what is in the buffers, only ``position`` is written."""
        positions, ids = np.full_like(self._position, position), np.zeros_like(self._ids)
        try:
            self._bind(ids, np.empty_like(self._logits), positions).run()
        except TxoptError:
            return False
        return True

    def reorder(self, rows: Ids) -> None:
        """Row i goes on as what row ``rows[i]``, of the same source, was.

        Only rows that change are copied, and only their filled part.
        """
        rows = as_array("rows", rows)
        if rows.shape != self._position.shape or rows.dtype.kind not in "iu":
            raise InputError(f"rows: expected int64 [{len(self._position)}], got {rows.dtype} {list(rows.shape)}")
        offsets = rows - self._first_of_group
        if offsets.min() < 0 or offsets.max() >= self._group:
            raise InputError(
                f"rows: expected numbers from 0 to {len(rows) - 1}, each within its source's {self._group} adjacent rows "
                f"(what the encoder gave stays where it is), got {rows.tolist()}"
            )
        changed = np.flatnonzero(rows != np.arange(len(rows)))
        if not len(changed):
            return
        for name, value in self._buffers.items():
            array = self._runner.view(value)
            array[changed, :, : self._longest] = array[rows[changed], :, : self._longest]
            if not self._runner.on_host:
                self._buffers[name] = self._runner.tensor(array, self._cache.dtype)
        self._position[changed] = self._position[rows[changed]]

    def _checked(self, ids: Any) -> Ids:
        """Tokens int64 [R,Q], or InputError."""
        tokens = as_array("tokens", ids)
        fits = tokens.dtype.kind in "iu" and tokens.ndim == 2 and len(tokens) == len(self._position) and tokens.size
        if not fits or tokens.min() < 0 or tokens.max() >= self._vocabulary:
            raise InputError(
                f"tokens: expected int64 [{len(self._position)},Q] from 0 to {self._vocabulary - 1}, "
                f"got {tokens.dtype} {list(tokens.shape)}" + (f" up to {tokens.max()}" if fits else "")
            )
        return np.ascontiguousarray(tokens, np.int64)

    def cached(self, name: str) -> Array:
        """A self-cache buffer's filled part, [R,H,filled,D]; for parity, not for the loop."""
        return self._runner.view(self._buffers[name])[:, :, : self._longest].copy()

    def _reserve(self, needed: int) -> None:
        if self.max_length is not None and needed > self.max_length:
            raise InputError(f"the model knows {self.max_length} target positions, asked for {needed}")
        if needed <= self._capacity:
            return
        rows, capacity = len(self._position), max(needed, 2 * self._capacity, FIRST_BUCKET)
        capacity = whole(capacity, self.max_length)
        shape = (rows, self._cache.heads, capacity, self._cache.head_size)
        with allocating(self._size(rows, capacity), rows):
            for name in self.names:
                grown = self._runner.zeros(shape, self._cache.dtype)
                if self._longest:
                    array = self._runner.view(grown)
                    array[:, :, : self._longest] = self._runner.view(self._buffers[name])[:, :, : self._longest]
                    grown = grown if self._runner.on_host else self._runner.tensor(array, self._cache.dtype)
                self._buffers[name] = grown
        self._capacity, self._step = capacity, None

    def _size(self, rows: int, capacity: int) -> int:
        """Bytes of ``rows`` rows' buffers of ``capacity`` positions."""
        positions = capacity if self.max_length is None else min(capacity, self.max_length)
        numbers = len(self.names) * self._cache.heads * self._cache.head_size * positions
        return rows * numbers * (4 if self._cache.dtype == "float32" else 2)

    def _bind(self, ids: Ids, logits: Any, positions: Ids | None = None) -> Call:
        """A call for ``ids`` at the rows' own positions, or at ``positions``."""
        tensor = self._runner.tensor
        bound = tensor(logits) if isinstance(logits, np.ndarray) else logits
        position = self._position if positions is None else positions
        inputs = {"input_ids": tensor(ids), "position": tensor(position), **self._fixed, **self._buffers}
        outputs = {name.replace("self_", "present_"): value for name, value in self._buffers.items()}
        return self._runner.bind(inputs, {"logits": bound, **outputs})


def _sources(runner: Runner, spec: GraphSpec, encoded: Encoded) -> dict[str, Any]:
    """What a decoder reads of an encoder's results; InputError where they are another model's."""
    wanted = {item.name: item for item in spec.inputs if item.name.startswith("cross_")}
    found = {name: value for name, value in encoded.values.items() if name.startswith("cross_")}
    problems = [f"{name}: missing; expected {item}" for name, item in wanted.items() if name not in found]
    problems += [f"{name}: unknown; this decoder has no such layer" for name in found if name not in wanted]
    sizes = {"B": encoded.batch}
    for name in wanted.keys() & found.keys():
        dtype, shape = runner.describe(found[name])
        if dtype != wanted[name].dtype or not _fits(wanted[name].axes, shape, sizes):
            problems.append(
                f"{name}: expected {wanted[name].dtype} {axes_of(wanted[name].axes)}, got {dtype} {list(shape)}"
            )
    for item in (item for item in spec.inputs if item.name.startswith(MASKS)):
        mask = encoded.masks.get(item.name.removeprefix(MASKS))
        if mask is None or not _fits(item.axes, mask.shape, sizes):
            problems.append(f"{item.name}: expected the mask that encode() read, int64 {axes_of(item.axes)}")
        else:
            found[item.name] = runner.tensor(mask)
    if problems:
        title = "these encoded sources are not this model's; expected what its own encode() gave:"
        raise InputError(explain(title, sorted(problems)))
    return found


def _fits(axes: Axes, shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Whether ``shape`` has these ``axes``; lengths that vary are looked up in ``sizes``, new ones noted there."""
    return len(axes) == len(shape) and all(
        size == (axis if isinstance(axis, int) else sizes.setdefault(axis, size))
        for axis, size in zip(axes, shape, strict=True)
    )
