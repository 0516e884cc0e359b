"""LED: BART with a long encoder, whose tokens attend to a window around them, and to the tokens of global attention."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from txopt.exporter.attention import attend
from txopt.exporter.families.family import TEXT, Family, Positions
from txopt.exporter.families.written_out import WrittenOut, wrap
from txopt.exporter.source import Input


class Sight(NamedTuple):
    """What the tokens of a layer see. T tokens, of which G places are global in some source.

    Args:
        near: boolean [B,1,T,T], of every token: its window, and what is global.
        everything: boolean [B,1,G,T], of the global ones.
        places: int64 [G], where these are.
        order: int64 [T], which of them a token is; anything where it is none.
        is_global: boolean [B,T,1].
    """

    near: Tensor
    everything: Tensor
    places: Tensor
    order: Tensor
    is_global: Tensor


class Windowed(nn.Module):
    """The encoder's self-attention: one over windows, and one with projections of its own for the global tokens.

    A window is a mask over all pairs here, as long as LED's own chunks are not; what it says is the same.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.inner = attention.longformer_self_attn
        self.output = attention.output

    def forward(self, hidden_states: Tensor, attention_mask: dict[int, Sight], **_: Any) -> tuple[Tensor]:
        inner: Any = self.inner
        sight = attention_mask[inner.one_sided_attn_window_size]
        near = self._attend(
            inner.query(hidden_states), inner.key(hidden_states), inner.value(hidden_states), sight.near
        )
        asking = hidden_states[:, sight.places]
        far = self._attend(
            inner.query_global(asking),
            inner.key_global(hidden_states),
            inner.value_global(hidden_states),
            sight.everything,
        )
        return (self.output(torch.where(sight.is_global, far[:, sight.order], near)),)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        size: Any = self.inner.head_dim
        query, key, value = (x.view(*x.shape[:2], -1, size).transpose(1, 2) for x in (query, key, value))
        out, _weights = attend(self.inner, query, key, value, seen)
        return out.flatten(2)


class Encoder(nn.Module):
    """LED's encoder without the padding to whole windows, which no token sees."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.embed_tokens = encoder.embed_tokens
        self.positions = encoder.embed_positions.weight
        self.layernorm_embedding = encoder.layernorm_embedding
        self.layers = encoder.layers
        for layer in self.layers:
            layer.self_attn = Windowed(layer.self_attn)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, global_attention_mask: Tensor, **_: Any
    ) -> tuple[Tensor]:
        hidden = self.embed_tokens(input_ids) + self.positions[: input_ids.shape[1]]
        hidden = self.layernorm_embedding(hidden)
        sights = self._sights(attention_mask.bool(), global_attention_mask.bool())
        for layer in self.layers:
            (hidden,) = layer(hidden, sights)
        return (hidden,)

    def _sights(self, tokens: Tensor, marked: Tensor) -> dict[int, Sight]:
        """By the width of a window to one side."""
        place = torch.arange(tokens.shape[1])
        distance = (place[:, None] - place).abs()
        is_global = marked & tokens
        # Place 0 is always asked for: without it no source would have global tokens, and an engine nothing to compute.
        somewhere = is_global.any(0) | (place == 0)
        places = somewhere.nonzero()[:, 0]
        everything = tokens[:, None, None, :].expand(-1, 1, places.shape[0], -1)
        order = (somewhere.cumsum(0) - 1).clamp(min=0)
        sights = {}
        for width in {layer.self_attn.inner.one_sided_attn_window_size: None for layer in self.layers}:
            near = (distance <= width) | is_global[:, None, None, :]
            seen = (near & tokens[:, None, None, :]) | (distance == 0)  # padding, which nobody reads, sees itself
            sights[width] = Sight(seen, everything, places, order, is_global[:, :, None])
        return sights


class _Triple(WrittenOut):
    """The decoder's attention, whose layers expect a third thing back."""

    def forward(self, *arguments: Any, **named: Any) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return *super().forward(*arguments, **named), None


def route(module: nn.Module) -> nn.Module:
    """Routes every attention."""
    model: Any = module.led
    model.encoder = Encoder(model.encoder)
    wrap(model.decoder, _Triple)
    return module


LED = Family(
    name="led",
    model_types=("led",),
    inputs=(*TEXT, Input(name="global_attention_mask", dtype="int64", axes=("B", "T"))),
    positions=(Positions(path="led.decoder.embed_positions"),),
    limit="max_decoder_position_embeddings",
    source_limit="max_encoder_position_embeddings",
    padding_mask=True,
    hook=route,
)
