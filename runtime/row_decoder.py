"""A decoder's rows, each at its own position, over preallocated KV buffers: what a decoding loop steps and reorders.

Owns how long the buffers are: they are written in place by the graph, bound as input and output at one address, and grow
geometrically where the graph leaves their length open. It knows neither the engine, nor tokens' meaning, nor how the next one is
chosen. Axes: R rows, Q query tokens, S self-cache length, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.alignment import whole
from txopt.runtime.arrays import as_array
from txopt.runtime.backends.runner import Buffers, Call, Engines, Staged
from txopt.runtime.counts import allocating
from txopt.runtime.decoder import THIS_MODEL
from txopt.runtime.errors import ArtifactError, InputError, LimitError, TxoptError, UsageError
from txopt.runtime.graphs import CHOICE, RANKED
from txopt.runtime.strict_json import show

FIRST_BUCKET = 64  # self-cache length of a new decoder; attention costs time in proportion to it

Array = NDArray[Any]
Ids = NDArray[np.int64]
Floats = NDArray[np.float32]


class RowDecoder:
    """Rows that advance together, each at its own position; see ``generate.Decoder`` for the loop's view of it.

    Every ``group`` of adjacent rows belongs to one source (without sources, all do): what ``fixed`` holds is per source.
    """

    def __init__(self, engines: Engines, rows: int, group: int, fixed: Mapping[str, Any]) -> None:
        spec, cache = engines.specs["decoder"], engines.cache
        assert cache is not None  # where there is a decoder
        self._runner = runner = engines.runners["decoder"]
        self._cache, self._fixed = cache, dict(fixed)
        self._most_queries = engines.most_queries
        self.max_length, self.limited_by = cache.max_length, engines.limited_by
        buffers = [item for item in spec.inputs if item.name.startswith("self_")]
        self.names = [item.name for item in buffers]
        places = buffers[0].axes[2]  # a number where the graph does not leave it open
        self._places = places if isinstance(places, int) else None
        outputs = {item.name: item for item in spec.outputs}
        self._vocabulary = int(outputs["logits"].axes[-1])
        with allocating(rows * 4 * self._vocabulary + self._size(rows, self._places or FIRST_BUCKET), rows):
            self._position = runner.staged(np.zeros(rows, np.int64))
            self._ids = runner.staged(np.zeros((rows, 1), np.int64))
            self._logits = runner.staged(np.zeros((rows, 1, self._vocabulary), np.float32))
            self._chosen = {  # what the graph itself finds in the logits of each row's last token, where it does
                name: runner.staged(np.zeros((rows, *map(int, outputs[name].axes[1:])), dtype))
                for name, (dtype, _) in CHOICE.items()
                if name in outputs
            }
        self.chooses = "next" in self._chosen
        self.most_ranked = int(outputs["top_ids"].axes[1]) if "top_ids" in outputs else 0
        self._rows, self._group, self._first_of_group = rows, group, np.arange(rows) // group * group
        self._longest = 0  # the filled part of the buffers: no row is further
        self._capacity = 0
        self._buffers: Buffers | None = None
        self._steps: dict[str, Call] = {}

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
        self._position.array[:] = lengths
        self._longest = int(lengths.max())
        chosen: Floats = logits[np.arange(len(ids)), lengths - 1]
        return chosen

    def step(self, ids: Ids) -> Floats:
        """One token per row, int64 [R]; logits [R,V], a buffer that the next call overwrites."""
        self._advance(ids, "logits", [self._logits])
        scores: Floats = self._logits.array[:, 0]
        return scores

    def advance(self, ids: Ids) -> Ids:
        """Like ``step``, for who wants no more than the likeliest next token of each row, int64 [R], of equals one of them."""
        if "next" not in self._chosen:
            return self.step(ids).argmax(axis=1)
        self._advance(ids, "next", [self._chosen["next"]])
        chosen: Ids = self._chosen["next"].array
        return chosen

    def rank(self, ids: Ids) -> tuple[Floats, Ids]:
        """Like ``step``, for who wants no more than the likeliest next tokens: their log probabilities float32 [R,C], and ids.

        The former fall, and C is ``most_ranked``. Of equals the lower id comes first; at the end equals may be left out.
        """
        if not self.most_ranked:
            raise UsageError("this decoder's graph does not rank tokens: expected step()")
        read = [self._chosen[name] for name in RANKED]
        self._advance(ids, "ranked", read)
        values, tokens, total = (staged.array for staged in read)
        order = np.lexsort((tokens, -values), axis=1)
        scores = np.take_along_axis(values, order, axis=1) - total[:, None]
        return scores, np.take_along_axis(tokens, order, axis=1)

    def scores(self) -> Floats:
        """The logits [R,V] of the last ``step`` or ``advance``."""
        return self._logits.read()[:, 0]

    def _advance(self, ids: Ids, wanted: str, read: list[Staged]) -> None:
        """Feeds one token per row, and brings what is to be ``read``, which has the name ``wanted``, to the host."""
        if self._longest == self._capacity or wanted not in self._steps:
            self._reserve(self._longest + 1)
            self._steps[wanted] = self._bind(self._ids, self._logits, read)
        if not isinstance(ids, np.ndarray) or ids.dtype != np.int64 or ids.shape != (self._rows,):
            ids = self._checked(as_array("tokens", ids)[..., None])[:, 0]
        elif ids.min() < 0 or ids.max() >= self._vocabulary:
            self._checked(ids[:, None])
        self._ids.array[:, 0] = ids
        self._run(self._steps[wanted], 1)
        self._position.array += 1
        self._longest += 1

    def feed(self, ids: Ids) -> Floats:
        """Any number of tokens per row, int64 [R,Q]; logits [R,Q,V]."""
        ids = self._checked(ids)
        queries = ids.shape[1]
        if queries == 1:
            return self.step(ids[:, 0])[:, None].copy()
        self._reserve(self._longest + queries)
        most = self._most_queries or queries
        if queries > most:
            return np.concatenate([self.feed(ids[:, at : at + most]) for at in range(0, queries, most)], axis=1)
        with allocating(self._rows * queries * 4 * self._vocabulary, self._rows):
            logits = self._runner.staged(np.empty((self._rows, queries, self._vocabulary), np.float32))
            fed = self._runner.staged(ids)
        self._run(self._bind(fed, logits, [logits]), queries)
        self._position.array += queries
        self._longest += queries
        return logits.array

    def _run(self, call: Call, queries: int) -> None:
        """Runs ``call`` of so many tokens a row; ArtifactError where it is their positions that cannot be run."""
        try:
            call.run()
        except TxoptError as err:
            last = int(self._position.array.max()) + queries - 1
            if self._runs_at(last) or not self._runs_at(0):
                raise
            raise ArtifactError(
                f"manifest.json: cache.max_length: expected positions that the decoder's graph has, found {show(self.max_length)}, "
                f"and it fails at position {last}: was the manifest edited? Export it again, or stop before; {err}"
            ) from err

    def _runs_at(self, position: int) -> bool:
        """Whether one token runs there; of what is in the buffers, only ``position`` is written."""
        staged = self._runner.staged
        logits = staged(np.empty((self._rows, 1, self._vocabulary), np.float32))
        positions = staged(np.full(self._rows, position, np.int64))
        try:
            self._bind(staged(np.zeros((self._rows, 1), np.int64)), logits, [logits], positions).run()
        except TxoptError:
            return False
        return True

    def reorder(self, rows: Ids) -> None:
        """Row i goes on as what row ``rows[i]``, of the same source, was.

        Only rows that change are copied, and only their filled part.
        """
        rows = as_array("rows", rows)
        if rows.shape != (self._rows,) or rows.dtype.kind not in "iu":
            raise InputError(f"rows: expected int64 [{self._rows}], got {rows.dtype} {list(rows.shape)}")
        offsets = rows - self._first_of_group
        if offsets.min() < 0 or offsets.max() >= self._group:
            raise InputError(
                f"rows: expected numbers from 0 to {len(rows) - 1}, each within its source's {self._group} adjacent rows "
                f"(what the encoder gave stays where it is), got {rows.tolist()}"
            )
        changed = np.flatnonzero(rows != np.arange(len(rows)))
        if not len(changed):
            return
        if self._buffers is not None:
            self._buffers.copy_rows(changed, rows[changed], self._longest)
        self._position.array[changed] = self._position.array[rows[changed]]

    def _checked(self, ids: Any) -> Ids:
        """Tokens int64 [R,Q], or InputError."""
        tokens = as_array("tokens", ids)
        fits = tokens.dtype.kind in "iu" and tokens.ndim == 2 and len(tokens) == self._rows and tokens.size
        if not fits or tokens.min() < 0 or tokens.max() >= self._vocabulary:
            raise InputError(
                f"tokens: expected int64 [{self._rows},Q] from 0 to {self._vocabulary - 1}, "
                f"got {tokens.dtype} {list(tokens.shape)}" + (f" up to {tokens.max()}" if fits else "")
            )
        return np.ascontiguousarray(tokens, np.int64)

    def cached(self, name: str) -> Array:
        """A self-cache buffer's filled part, [R,H,filled,D]; for parity, not for the loop."""
        if self._buffers is None:
            raise UsageError("this decoder has read nothing yet: prefill() or feed() first")
        return self._buffers.array(name, self._longest)

    def _reserve(self, needed: int) -> None:
        if self.max_length is not None and needed > self.max_length:
            raise (InputError if self.limited_by == THIS_MODEL else LimitError)(
                f"{self.limited_by} has {self.max_length} target positions, asked for {needed}"
            )
        if needed <= self._capacity:
            return
        capacity = self._places or whole(max(needed, 2 * self._capacity, FIRST_BUCKET), self.max_length)
        with allocating(self._size(self._rows, capacity), self._rows):
            if self._buffers is None:
                shape = (self._rows, self._cache.heads, capacity, self._cache.head_size)
                self._buffers = self._runner.buffers(self.names, shape, self._cache.dtype)
            else:
                self._buffers.grow(capacity, self._longest)
        self._capacity = capacity
        self._steps.clear()

    def _size(self, rows: int, capacity: int) -> int:
        """Bytes of ``rows`` rows' buffers of ``capacity`` positions."""
        positions = capacity if self.max_length is None else min(capacity, self.max_length)
        numbers = len(self.names) * self._cache.heads * self._cache.head_size * positions
        return rows * numbers * (4 if self._cache.dtype == "float32" else 2)

    def _bind(self, ids: Staged, logits: Staged, read: list[Staged], positions: Staged | None = None) -> Call:
        """A call for ``ids`` at the rows' own positions, or at ``positions``."""
        buffers = {} if self._buffers is None else self._buffers.values
        inputs = {"input_ids": ids, "position": positions or self._position, **self._fixed, **buffers}
        outputs = {name.replace("self_", "present_"): value for name, value in buffers.items()}
        return self._runner.bind(inputs, {"logits": logits, **self._chosen, **outputs}, read)
