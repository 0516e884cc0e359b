"""FSMT: two vocabularies, sinusoidal positions counted from after the padding id, and attention that has words of its own."""

from typing import Any

from torch import Tensor, nn

from txopt.exporter.cache import current
from txopt.exporter.families.family import Family, Positions
from txopt.exporter.families.written_out import WrittenOut, wrap


class TimeFirst(nn.Module):
    """FSMT's attention: time before batch, [L,B,M], and padding as what is not to be seen, boolean [B,T]."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = WrittenOut(attention)
        self.cache_key: str = attention.cache_key  # the decoder's layers ask for it
        self.crosses = bool(attention.encoder_decoder_attention)

    def forward(
        self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None = None, layer_state: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        state = current()
        seen = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
        if state is not None and not self.crosses:
            seen = state.causal  # the decoder itself has no mask where there is a cache
        source = key.transpose(0, 1) if self.crosses else None
        out, _weights = self.attention(query.transpose(0, 1), source, layer_state, seen)
        return out.transpose(0, 1), None


def wrap_attention(module: nn.Module) -> nn.Module:
    """Puts ``TimeFirst`` around every attention."""
    wrap(module.model.encoder, TimeFirst)  # type: ignore[union-attr]
    wrap(module.model.decoder, TimeFirst)  # type: ignore[union-attr]
    return module


FSMT = Family(
    name="fsmt",
    model_types=("fsmt",),
    positions=(Positions(path="model.decoder.embed_positions", after_padding=True),),
    limit="max_position_embeddings",
    source_limit="max_position_embeddings",
    padding_mask=True,
    stepwise=True,
    hook=wrap_attention,
)
