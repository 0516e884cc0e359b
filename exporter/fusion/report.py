"""What a fusion did to one graph: how often it matched, and why it refused where it nearly did."""

from dataclasses import dataclass, field


@dataclass
class Report:
    """``fused`` counts rewrites; ``refused`` names nodes and reasons."""

    operator: str
    fused: int = 0
    refused: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        return {"fused": self.fused, "refused": self.refused}
