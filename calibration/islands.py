"""FP32 islands: which nodes of a graph must not compute in float16, and why.

A node is kept in float32 where
1. a value that it reads or gives comes near the largest number of float16 (OVERFLOW), as T5's residual stream does behind ``wo``;
2. a product's partial sums may pass it (SUM);
3. such a value lies below the smallest normal number as a whole (UNDERFLOW), or rounding a constant loses more than normal numbers do
   (CONSTANT), as an epsilon of 1e-12 that becomes 0;
4. it counts (COUNTED): positions, lengths and angles, computed from integers alone; float16 counts exactly to 2048 only;
5. its operator has no float16 (OPERATOR).
A value near the limit is neither stored nor read in float16, so islands are as small as they can be; a cheap node between two of them
joins them. What goes into Attention's mask and nowhere else is left out of 1 and 3: -65504 hides as well as -3e38 does. Small numbers
within a value that holds normal ones too lose no more than the value's own rounding; whether that matters is measured, not guessed.

Owns the choice. Magnitudes are magnitudes.py's, the edit halves.py's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from txopt.calibration.dtypes import SHAPES, floats_of, is_float
from txopt.calibration.magnitudes import PRODUCTS, Magnitudes

LARGEST = float(np.finfo(np.float16).max)  # 65504
SMALLEST = float(np.finfo(np.float16).tiny)  # 2**-14, the smallest normal number
MARGIN = 4.0  # other inputs than the data may be larger
_ROUNDING = 2.0**-10  # of a constant's norm; normal numbers lose at most half of it

_COSTLY = (*PRODUCTS, "Attention")  # never moved into an island for the sake of its neighbours
_LOOKUPS = ("Gather", "GatherND", "GatherElements")


class Why(StrEnum):
    """See the module."""

    OVERFLOW = "overflow"
    SUM = "sum"
    UNDERFLOW = "underflow"
    CONSTANT = "constant"
    COUNTED = "counted"
    OPERATOR = "operator"


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why a node is kept: a value, the operator's where the operator is the reason, and the largest magnitude that was seen of it."""

    why: Why
    value: str
    largest: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {"why": str(self.why), "tensor": self.value} | (
            {} if self.largest is None else {"largest": float(f"{self.largest:.3g}")}
        )


@dataclass(frozen=True, kw_only=True)
class Islands:
    """The nodes to keep, in their order, and the reasons of each; those that only join others have none."""

    nodes: Mapping[ir.Node, tuple[Reason, ...]]

    def to_json(self) -> list[dict[str, Any]]:
        """One entry for every island, a set of nodes that hand float32 to each other."""
        found = []
        for island in self._connected():
            reasons = dict.fromkeys(reason for node in island for reason in self.nodes[node])
            found.append({"nodes": [_name(node) for node in island], "reasons": [each.to_json() for each in reasons]})
        return found

    def _connected(self) -> list[list[ir.Node]]:
        order = {node: index for index, node in enumerate(self.nodes)}
        home = {node: {node} for node in self.nodes}
        for node in self.nodes:
            for value in node.outputs:
                for user, _ in value.uses() if is_float(value) else ():
                    if user in home and home[user] is not home[node]:
                        home[node] |= home[user]
                        for moved in home[user]:
                            home[moved] = home[node]
        islands = {id(mine): mine for mine in home.values()}.values()
        return [sorted(mine, key=order.__getitem__) for mine in islands]


def choose(model: ir.Model, seen: Magnitudes) -> Islands:
    """The islands of ``model``, whose values have types (dtypes.infer), for what was ``seen`` of it on data."""
    masks = masks_of(model.graph)
    counted = counted_nodes(model.graph, masks)
    opset = model.graph.opset_imports
    reasons: dict[ir.Node, list[Reason]] = {}
    for node in model.graph:
        values = dict.fromkeys([*floats_of(node), *filter(is_float, node.outputs)])
        if not values:
            continue
        mine = [reason for value in values if value not in masks and (reason := _reason(value, seen))]
        total = seen.sums.get(str(node.outputs[0].name), 0.0)
        if total > LARGEST and not mine:
            mine.append(Reason(why=Why.SUM, value=str(node.outputs[0].name), largest=total))
        if node in counted:
            mine.append(Reason(why=Why.COUNTED, value=str(node.outputs[0].name)))
        if not _has_float16(node, opset):
            mine.append(Reason(why=Why.OPERATOR, value=str(node.outputs[0].name)))
        if mine:
            reasons[node] = mine
    joined = _joined(model.graph, set(reasons))
    return Islands(nodes={node: tuple(reasons.get(node, ())) for node in model.graph if node in joined})


def masks_of(graph: ir.Graph) -> set[ir.Value]:
    """Float values that go into Attention's mask, and nowhere else."""
    found: set[ir.Value] = set()
    for node in reversed(list(graph)):
        for value in node.inputs:
            if value is None or not is_float(value) or value.is_graph_output() or value in found:
                continue
            if all(_masks(user, place, found) for user, place in value.uses()):
                found.add(value)
    return found


def _masks(user: ir.Node, place: int, masks: set[ir.Value]) -> bool:
    if user.op_type == "Attention":
        return place == 3
    outputs = [value for value in user.outputs if is_float(value)]
    return bool(outputs) and all(value in masks for value in outputs)


def _reason(value: ir.Value, seen: Magnitudes) -> Reason | None:
    name = str(value.name)
    if value.const_value is not None:
        largest = float(np.abs(value.const_value.numpy()).max(initial=0.0))
        if not holds(value.const_value.numpy()):
            return Reason(why=Why.CONSTANT, value=name, largest=largest)
        return None
    largest = seen.values.get(name, 0.0)
    if largest * MARGIN > LARGEST:
        return Reason(why=Why.OVERFLOW, value=name, largest=largest)
    if 0.0 < largest < SMALLEST:
        return Reason(why=Why.UNDERFLOW, value=name, largest=largest)
    return None


def holds(array: np.ndarray[Any, Any]) -> bool:
    """Whether float16 holds the numbers of ``array`` as well as normal ones; infinities are infinities in both."""
    numbers = array[np.isfinite(array)].astype(np.float64)
    if not numbers.size:
        return True
    with np.errstate(over="ignore"):
        lost = numbers - numbers.astype(np.float16)
    return bool(np.linalg.norm(lost) <= _ROUNDING * np.linalg.norm(numbers))


def counted_nodes(graph: ir.Graph, masks: set[ir.Value]) -> set[ir.Node]:
    """Nodes whose floats are computed from integers and constants alone; what is looked up in a table, and masks, are not."""
    values: set[ir.Value] = set()
    found: set[ir.Node] = set()
    for node in graph:
        outputs = [value for value in node.outputs if is_float(value)]
        inputs = floats_of(node)
        computed = [value for value in inputs if value.const_value is None]
        if node.op_type in SHAPES or (node.op_type in _LOOKUPS and not computed):
            continue
        made = all(value in values for value in computed) and (bool(computed) or not inputs)
        if made and (outputs or computed) and not (outputs and all(value in masks for value in outputs)):
            found.add(node)
            values |= set(outputs)
    return found


def _has_float16(node: ir.Node, opsets: Mapping[str, int]) -> bool:
    """Whether the standard lets ``node`` take and give float16 wherever it takes and gives float32."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:
        return False
    allowed = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
    for values, parameters in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for index, value in enumerate(values):
            kind = parameters[min(index, len(parameters) - 1)].type_str
            if is_float(value) and "tensor(float16)" not in allowed.get(kind, (kind,)):
                return False
    return True


def _joined(graph: ir.Graph, kept: set[ir.Node]) -> set[ir.Node]:
    """``kept`` and the cheap nodes between: all that they compute comes from islands, and goes to islands."""
    grown = True
    while grown:
        before = len(kept)
        kept |= {node for node in graph if node not in kept and _between(node, kept)}
        grown = len(kept) > before
    return kept


def _between(node: ir.Node, kept: set[ir.Node]) -> bool:
    if node.op_type in (*_COSTLY, *SHAPES):
        return False
    computed = [value for value in floats_of(node) if value.const_value is None]
    outputs = [value for value in node.outputs if is_float(value)]
    return bool(computed and outputs) and all(
        (
            *(value.producer() in kept for value in computed),
            *(not value.is_graph_output() and bool(value.uses()) for value in outputs),
            *(user in kept for user in _readers(outputs)),
        )
    )


def _readers(values: list[ir.Value]) -> Iterator[ir.Node]:
    return (user for value in values for user, _ in value.uses() if user.op_type not in SHAPES)


def _name(node: ir.Node) -> str:
    return str(node.name or node.outputs[0].name)
