"""How an encoder's states become one embedding, read from a sentence-transformers folder; torch's own mean where it says nothing."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from txopt.runtime.errors import SourceError


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """mode: "mean" over tokens that are not padding, or "cls"; ``normalize``: to length one."""

    mode: str = "mean"
    normalize: bool = False

    def __call__(self, memory: Tensor, mask: Tensor | None) -> Tensor:
        """memory [B,T,M], mask int64 [B,T] or None: [B,M] in float32."""
        states = memory.float()
        if self.mode == "cls":
            pooled = states[:, 0]
        elif mask is None:
            pooled = states.mean(1)
        else:
            # A product is summed in one order whatever the batch; ONNX Runtime sums (ReduceSum) a row alone in another.
            shares = mask.float() / mask.sum(1, keepdim=True).clamp(min=1)
            pooled = (shares[:, None] @ states)[:, 0]
        return torch.nn.functional.normalize(pooled, dim=1) if self.normalize else pooled


def read_pooling(directory: Path) -> Pooling:
    """The pooling of a sentence-transformers folder (modules.json, */config.json); the mean elsewhere."""
    listing = directory / "modules.json"
    if not listing.exists():
        return Pooling()
    modules = json.loads(listing.read_text("utf-8"))
    kinds = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
    settings: dict[str, object] = {}
    if "Pooling" in kinds:
        settings = json.loads((directory / kinds["Pooling"] / "config.json").read_text("utf-8"))
    if unknown := sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"}):
        raise SourceError(f"{listing} asks for {', '.join(unknown)}; txopt pools with Pooling and Normalize only")
    modes = [name for name, on in settings.items() if name.startswith("pooling_mode_") and on is True]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) > 1 or any(mode not in known for mode in modes):
        raise SourceError(f"{listing} pools by {', '.join(modes)}; txopt knows {', '.join(known)}, one at a time")
    return Pooling(mode=known[modes[0]] if modes else "mean", normalize="Normalize" in kinds)
