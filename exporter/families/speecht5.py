"""SpeechT5 (speech to text): raw samples in, reduced to frames by convolutions; relative positions in the encoder."""

from typing import Any

import torch
from torch import Tensor, nn

from txopt.exporter.attention import attend
from txopt.exporter.families.family import Family, Positions
from txopt.exporter.families.written_out import WrittenOut, wrap
from txopt.exporter.source import Input


class Distances(nn.Module):
    """In the place of the encoder's relative positions: rows of their table, int64 [T,T], instead of states [T,T,D]."""

    def __init__(self, positions: Any) -> None:
        super().__init__()
        self.reach = int(positions.max_length)

    def forward(self, hidden_states: Tensor) -> Tensor:
        places = torch.arange(hidden_states.shape[1])
        return (places[:, None] - places[None, :]).clamp(-self.reach, self.reach - 1) + self.reach


class Relative(nn.Module):
    """The encoder's self-attention: a query's product with the state of each distance is its bias (Shaw et al. 2018)."""

    def __init__(self, attention: Any, table: nn.Module) -> None:
        super().__init__()
        self.inner = attention
        self.table = table

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, position_bias: Tensor, **_: Any
    ) -> tuple[Tensor, None]:
        inner: Any = self.inner
        query, key, value = (
            project(hidden_states).view(*hidden_states.shape[:2], -1, inner.head_dim).transpose(1, 2)
            for project in (inner.q_proj, inner.k_proj, inner.v_proj)
        )
        states: Any = self.table.weight
        by_distance = (query * inner.scaling) @ states.T  # [B,H,T,distances]
        bias = by_distance.gather(3, position_bias.expand(*by_distance.shape[:3], -1))
        out, _weights = attend(inner, query, key, value, attention_mask, inner.scaling, bias)
        return inner.out_proj(out.flatten(2)), None


def route(module: nn.Module) -> nn.Module:
    """Routes every attention."""
    model: Any = module.speecht5
    encoder = model.encoder.wrapped_encoder
    for layer in encoder.layers:
        layer.attention = Relative(layer.attention, encoder.embed_positions.pe_k)
    encoder.embed_positions = Distances(encoder.embed_positions)
    wrap(model.decoder.wrapped_decoder, WrittenOut)
    return module


SPEECHT5 = Family(
    name="speecht5",
    model_types=("speecht5",),
    task="speech-to-text",
    inputs=(
        Input(name="input_values", dtype="float", axes=("B", "N")),
        Input(name="attention_mask", dtype="int64", axes=("B", "N")),
    ),
    convolutions=("conv_kernel", "conv_stride"),
    positions=(Positions(path="speecht5.decoder.prenet.embed_positions", weight="weights", after_padding=True),),
    limit="max_text_positions",
    source_limit="max_speech_positions",
    padding_mask=True,
    hook=route,
)
