"""What a fusion did to one graph: how often it matched, why it refused where it nearly did, and what was proved of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from txopt.exporter.bodies import NOWHERE, Paths, place_of

Barred = Mapping[str, str]
"""Why nodes, by name, must not be fused although they match."""

NOTHING: Barred = {}


@dataclass(frozen=True)
class Place:
    """One rewrite: the node it is named after, and the names of the values that the new nodes give under their old names.

    Names of what is in a body are behind its path; ``inside`` says that some is.
    """

    node: str
    values: tuple[str, ...]
    inside: bool = False


@dataclass(frozen=True)
class Proof:
    """Rewrites that were replayed: how many hold, the largest error among them and at which node (None where it is 0);
    ``unproved`` says which could not be replayed and why."""

    held: int
    largest_error: float
    at: str | None
    unproved: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        largest = float(f"{self.largest_error:.2e}")
        return {"held": self.held, "largest_error": largest, "at": self.at, "unproved": list(self.unproved)}


@dataclass
class Report:
    """``fused`` counts rewrites, ``places`` says where they are; ``refused`` names nodes and reasons.

    ``paths`` say in which body of an If, Loop or Scan a node is; names are told with them. ``proof`` is there where the rewrites
    were replayed.
    """

    operator: str
    barred: Barred = field(default_factory=dict)
    paths: Paths = field(default_factory=lambda: NOWHERE)
    fused: int = 0
    refused: list[str] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    proof: Proof | None = None

    def took(self, node: ir.Node, *values: ir.Value) -> None:
        """Counts the rewrite of what ``node`` stands for; the new nodes give ``values``, or others of the same names."""
        self.fused += 1
        inside = any(value.graph is not None and self.paths.get(value.graph) for value in values)
        self.places.append(Place(self._name(node), tuple(map(self._name, values)), inside))

    def refuse(self, node: ir.Node, reason: str) -> None:
        """Notes why what ``node`` stands for is left as it is."""
        self.refused.append(f"{self._name(node)}: {reason}")

    def bars(self, node: ir.Node) -> bool:
        """Whether ``node`` must not be fused; notes the reason."""
        reason = self.barred_for(node)
        if reason is not None:
            self.refuse(node, reason)
        return reason is not None

    def barred_for(self, node: ir.Node) -> str | None:
        return self.barred.get(self._name(node))

    def _name(self, named: ir.Node | ir.Value) -> str:
        return place_of(named, self.paths)

    def to_json(self) -> dict[str, object]:
        proof = {} if self.proof is None else {"proof": self.proof.to_json()}
        return {"fused": self.fused, "refused": self.refused, **proof}
