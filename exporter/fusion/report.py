"""What a fusion did to one graph: how often it matched, why it refused where it nearly did, and what was proved of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

Barred = Mapping[str, str]
"""Why nodes, by name, must not be fused although they match."""

NOTHING: Barred = {}


@dataclass(frozen=True)
class Place:
    """One rewrite: the node it is named after, and the names of the values that the new nodes give under their old names."""

    node: str
    values: tuple[str, ...]


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

    ``proof`` is there where the rewrites were replayed.
    """

    operator: str
    barred: Barred = field(default_factory=dict)
    fused: int = 0
    refused: list[str] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    proof: Proof | None = None

    def took(self, node: ir.Node, *values: ir.Value) -> None:
        """Counts the rewrite of what ``node`` stands for; the new nodes give ``values``, or others of the same names."""
        self.fused += 1
        self.places.append(Place(str(node.name), tuple(str(value.name) for value in values)))

    def bars(self, node: ir.Node) -> bool:
        """Whether ``node`` must not be fused; notes the reason."""
        reason = self.barred.get(str(node.name))
        if reason is not None:
            self.refused.append(f"{node.name}: {reason}")
        return reason is not None

    def to_json(self) -> dict[str, object]:
        proof = {} if self.proof is None else {"proof": self.proof.to_json()}
        return {"fused": self.fused, "refused": self.refused, **proof}
