"""The nodes that take the place of attention within windows; windows.py says where one is, this file what it becomes.

Chunks of two blocks become blocks: the first half of each, and the second half of the last. A block of queries sees its own block of
keys, the one before and the one behind it, which there are also for the first and the last: hidden ones.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from txopt.calibration.quantize import constant
from txopt.exporter.fusion.attention_rewrite import Nodes
from txopt.exporter.graph import integers

_END = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class Window:
    """One attention: chunks of Q, K [N,C-1,2w,D] and the keys' mask [B,C-1,2w,1], V in blocks [N,C,3w,D], N rows and heads; what Q is
    to K, ``ones`` are to the mask.

    ``hidden`` [B,T,1,1] says of which tokens the result is zero, None of none; ``wide``: the Softmax is computed in float32 for
    narrower Q. ``nodes`` lead from these to ``last``, the MatMul with V, ``counting`` to the ``places`` at which chunks are looked up;
    of other values both read ``lengths`` [1] alone.
    """

    name: str
    query: ir.Value
    key: ir.Value
    mask: ir.Value
    ones: ir.Value
    values: ir.Value
    hidden: ir.Value | None
    wide: bool
    last: ir.Node
    nodes: tuple[ir.Node, ...]
    places: tuple[ir.Value, ...]
    counting: tuple[ir.Node, ...]
    lengths: tuple[ir.Value, ...]


def spelled(graph: ir.Graph, window: Window, half: int) -> list[ir.Node]:
    """Nodes for ``window``, which sees ``half`` tokens to either side; the last of them gives what ``window.last`` does."""
    new, dtype = Nodes(graph, window.name), window.query.dtype or ir.DataType.FLOAT
    query = _blocks(new, window.query, half)
    key = _around(new, _blocks(new, window.key, half), new.number(0, dtype))
    hiding = _around(new, _blocks(new, window.mask, half), new.number(-np.inf, dtype))
    row = new.add("Transpose", [hiding], perm=[0, 1, 3, 2])
    mask = _by_head(new, window, new.add("Add", [row, _band(graph, half, dtype)]))
    precision = {"softmax_precision": int(ir.DataType.FLOAT)} if window.wide else {}
    y = new.add("Attention", [query, key, window.values, mask], scale=1.0, **precision)
    if window.hidden is not None:
        _hide(new, window.hidden, y, new.number(0, dtype))
    return new.nodes


def _blocks(new: Nodes, chunks: ir.Value, half: int) -> ir.Value:
    """[N,C-1,2w,D] to [N,C,w,D]."""
    firsts = _slice(new, chunks, 2, 0, half)
    last = _slice(new, _slice(new, chunks, 1, -1, _END), 2, half, _END)
    return new.add("Concat", [firsts, last], axis=1)


def _around(new: Nodes, blocks: ir.Value, fill: ir.Value) -> ir.Value:
    """[N,C,w,D] to [N,C,3w,D]: each block between its neighbours, those before the first and behind the last filled with ``fill``."""
    one = integers(new.graph, [1])
    padded = new.add("Pad", [blocks, integers(new.graph, [1, 1]), fill, one])
    neighbours = [_slice(new, padded, 1, *ends) for ends in ((0, -2), (1, -1), (2, _END))]
    return new.add("Concat", neighbours, axis=2)


def _slice(new: Nodes, value: ir.Value, axis: int, start: int, end: int) -> ir.Value:
    return new.add("Slice", [value, *(integers(new.graph, [number]) for number in (start, end, axis))])


def _band(graph: ir.Graph, half: int, dtype: ir.DataType) -> ir.Value:
    """[w,3w]: zeros where token x of a block sees token y - w, at most w before or behind it, and -inf elsewhere; made once."""
    ahead = np.arange(3 * half) - half - np.arange(half)[:, None]
    tensor = ir.tensor(np.where(np.abs(ahead) <= half, 0, -np.inf).astype(dtype.numpy()))
    return constant(graph, f"windows/{dtype.name.lower()}_{half}", tensor)


def _by_head(new: Nodes, window: Window, mask: ir.Value) -> ir.Value:
    """[B,C,w,3w] to [N,C,w,3w], the same for all heads of a row."""
    one, rest = integers(new.graph, [1]), new.add("Shape", [mask], start=1)
    rows, sources = (new.add("Shape", [chunks], start=0, end=1) for chunks in (window.query, window.mask))
    heads = new.add("Concat", [one, new.add("Div", [rows, sources]), one, one, one], axis=0)
    wide = new.add("Expand", [new.add("Unsqueeze", [mask, one]), heads])
    return new.add("Reshape", [wide, new.add("Concat", [rows, rest], axis=0)])


def _hide(new: Nodes, hidden: ir.Value, y: ir.Value, zero: ir.Value) -> ir.Value:
    """``y`` [N,C,w,D], zero for tokens that are ``hidden`` [B,T,1,1]: [N,C,w,D] is [B,H,T,D] in the same order."""
    sources, tokens = (new.add("Shape", [hidden], start=axis, end=axis + 1) for axis in (0, 1))
    size = new.add("Shape", [y], start=3)
    by_token = new.add("Concat", [sources, integers(new.graph, [-1]), tokens, size], axis=0)
    kept = [new.add("Transpose", [hidden], perm=[0, 2, 1, 3]), zero, new.add("Reshape", [y, by_token])]
    return new.add("Reshape", [new.add("Where", kept), new.add("Shape", [y])])
