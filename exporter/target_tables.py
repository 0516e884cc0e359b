"""What a full-sequence decoder makes of the target's length alone, read as tables: positions, the causal mask, a bias by distance.

Each is computed for the greatest length and judged by its numbers, however the exporter wrote it. It changes no graph.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.exporter.measured import Reading
from txopt.exporter.probe import Probe
from txopt.runtime.errors import SourceError

Array = NDArray[Any]

MASKED = -1e4  # an additive mask at or below this lets nothing through
UNBOUNDED = (
    512,
    2048,
)  # lengths at which a decoder without a greatest length is looked at, until its bias repeats itself


@dataclass(frozen=True, kw_only=True)
class SelfMask:
    """The mask of a self-attention: causal, and a bias by distance and head, float32 [reach+1,H], where there is one.

    Whatever lies farther back than ``reach`` has the last row's bias.
    """

    bias: Array | None

    @property
    def reach(self) -> int:
        return 0 if self.bias is None else len(self.bias) - 1


def rows(graph: ir.Graph, value: ir.Value, reading: Reading, limit: int | None) -> Array:
    """A value [L,..], [1,L,..] or [B,L,..] of the length alone as a table [limit,..].

    Raises:
        SourceError: it is no table of positions: it has none or several axes of that length, or earlier rows change with it.
    """
    if limit is None:
        raise SourceError(f"{value.name} holds positions, but config.json names no greatest length of the target")
    with Probe(graph, [value]) as probe:
        longest = _at(probe, graph, value, reading, limit, rows=2)
        shorter = _at(probe, graph, value, reading, limit - 1, rows=1)
    if longest.ndim != shorter.ndim or longest.ndim < 2:
        raise SourceError(f"{value.name}: expected a row for each position, found the shape {list(longest.shape)}")
    if longest.shape[0] == limit:
        longest, shorter = longest[None], shorter[None]
    fits = longest.shape[1] == limit and shorter.shape[1] == limit - 1 and longest.shape[2:] == shorter.shape[2:]
    if not fits or not np.array_equal(longest[:, :-1], np.broadcast_to(shorter, (len(longest), *shorter.shape[1:]))):
        raise SourceError(f"{value.name}: expected a row for each position, found rows that change with the length")
    return np.ascontiguousarray(longest[0])


def self_mask(graph: ir.Graph, value: ir.Value, reading: Reading, limit: int | None) -> SelfMask:
    """The mask [1 or B,1 or H,L,L] of a self-attention.

    Raises:
        SourceError: it lets tokens see later ones, hides earlier ones, or biases them by more than distance and head.
    """
    with Probe(graph, [value]) as probe:
        for length in UNBOUNDED if limit is None else (limit,):
            mask = _at(probe, graph, value, reading, length, rows=1)
            visible = mask if mask.dtype == bool else mask > MASKED
            if mask.shape[-2:] != (length, length) or not np.array_equal(
                visible, np.broadcast_to(np.tri(length, dtype=bool), mask.shape)
            ):
                raise SourceError(f"{value.name}: expected a causal mask of self-attention, found one that is not")
            if mask.dtype == bool or not mask[visible].any():
                return SelfMask(bias=None)
            bias = _by_distance(mask.reshape(-1, length, length), str(value.name))
            repeats = _without_repetition(bias)
            if limit is not None or len(repeats) <= length // 2:
                return SelfMask(bias=repeats)
    raise SourceError(
        f"{value.name}: the bias of self-attention still changes at a distance of {UNBOUNDED[-1] // 2}, "
        "and config.json names no greatest length of the target"
    )


def check_source_mask(graph: ir.Graph, value: ir.Value, reading: Reading, mask_input: str) -> None:
    """Raises SourceError unless ``value``, the mask of a cross-attention, shows exactly the source's tokens, and equally."""
    sizes = {**{name: pair[1] for name, pair in reading.sizes.items()}, "B": 2}
    feeds = reading.feeds(graph, sizes)
    if mask_input in feeds:
        feeds[mask_input][1, 3:] = 0
    with Probe(graph, [value]) as probe:
        mask = probe.run(feeds)[str(value.name)]
    given = feeds.get(mask_input, np.ones((2, mask.shape[-1]), np.int64)).astype(bool)[:, None, None, :]
    visible = mask if mask.dtype == bool else mask > MASKED
    plain = mask.dtype == bool or not mask[visible].any()
    if mask.ndim != 4 or not plain or not np.array_equal(visible, np.broadcast_to(given, mask.shape)):
        raise SourceError(
            f"{value.name}: expected a mask of cross-attention that shows the source's tokens and adds nothing, found another"
        )


def _at(probe: Probe, graph: ir.Graph, value: ir.Value, reading: Reading, length: int, *, rows: int) -> Array:
    sizes: Mapping[str, int] = {**{name: pair[0] for name, pair in reading.sizes.items()}, "B": rows, "L": length}
    return probe.run(reading.feeds(graph, sizes))[str(value.name)]


def _by_distance(mask: Array, name: str) -> Array:
    """[H,L,L] as [L,H]: the bias of each distance between query and key."""
    length = mask.shape[-1]
    table = mask[:, -1, ::-1]  # the last query sees every distance
    distances = np.arange(length)[:, None] - np.arange(length)
    seen = distances >= 0
    if not np.array_equal(mask[:, seen], table[:, distances[seen]]):
        raise SourceError(f"{name}: expected a bias by distance alone, found one that also depends on the position")
    return np.ascontiguousarray(table.T)


def _without_repetition(bias: Array) -> Array:
    changing = np.flatnonzero((bias != bias[-1]).any(1))
    return bias[: (int(changing[-1]) + 2 if len(changing) else 1)]
