"""T5, with ReLU or gated feed-forward, and UMT5, whose layers each have a bias: it becomes a table over distances."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from txopt.exporter.cache import current
from txopt.exporter.families.family import Family


class DistanceTable(nn.Module):
    """T5's bias as rows of one table, exact: beyond ``max_distance`` every distance has the last bucket.

    Saves the twenty nodes of the bucket formula in every step, and gives each row its own position.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.causal = bool(attention.is_decoder)
        self.reach = int(attention.relative_attention_max_distance)
        keys = self.reach + 1 if self.causal else 2 * self.reach + 1
        of_last: Tensor = attention.compute_bias(self.reach + 1, keys)[0, :, self.reach]  # [H,keys]
        table = of_last.flip(1).T.contiguous()  # by how far a key lies before the query, from the furthest behind it
        self.table = nn.Parameter(table.detach(), requires_grad=False)

    def forward(self, query_length: Any, key_length: Any, device: Any = None, past_seen_tokens: Any = 0) -> Tensor:
        """[R or 1,H,Q,S] in the table's dtype."""
        state = current()
        queries = torch.arange(query_length)[None] if state is None else state.positions
        distances = queries[:, :, None] - torch.arange(key_length)
        low = 0 if self.causal else -self.reach
        return self.table[distances.clamp(low, self.reach) - low].permute(0, 3, 1, 2)


def tabulate_bias(module: nn.Module) -> nn.Module:
    """Gives every attention that owns a relative bias its table."""
    for attention in module.modules():
        if getattr(attention, "has_relative_attention_bias", False):
            attention.distance_table = DistanceTable(attention)
            # A method of the class would win over a submodule of its name: the instance's own dict comes first.
            attention.__dict__["compute_bias"] = attention.distance_table
    return module


T5 = Family(name="t5", model_types=("t5", "mt5"), hook=tabulate_bias)

UMT5 = replace(T5, name="umt5", model_types=("umt5",))
