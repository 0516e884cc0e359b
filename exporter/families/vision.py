"""Images to text: a vision encoder and a TrOCR decoder, whose attention is written out."""

from typing import Any

from torch import Tensor, nn

from txopt.exporter.attention import attend
from txopt.exporter.families.family import Family, Positions
from txopt.exporter.source import Input


class WrittenOut(nn.Module):
    """TrOCR's attention in the words of transformers' attention interface, which its own code does not use."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = attention

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        inner: Any = self.inner
        cross = key_value_states is not None
        source = hidden_states if key_value_states is None else key_value_states
        cache = past_key_values.cross_attention_cache if cross else past_key_values.self_attention_cache
        query = self._heads(inner.q_proj(hidden_states))
        if cross and past_key_values.is_updated.get(inner.layer_idx):
            key, value = cache.layers[inner.layer_idx].keys, cache.layers[inner.layer_idx].values
        else:
            key, value = self._heads(inner.k_proj(source)), self._heads(inner.v_proj(source))
            key, value = cache.update(key, value, inner.layer_idx)
        out, _weights = attend(inner, query, key, value, attention_mask, scaling=inner.scaling)
        return inner.out_proj(out.reshape(*hidden_states.shape[:2], -1)), None

    def _heads(self, x: Tensor) -> Tensor:
        inner: Any = self.inner
        return x.view(x.shape[0], -1, inner.num_heads, inner.head_dim).transpose(1, 2)


def wrap_attention(module: nn.Module) -> nn.Module:
    """Puts ``WrittenOut`` around every attention of a TrOCR decoder."""
    for layer in module.decoder.model.decoder.layers:  # type: ignore[union-attr]
        layer.self_attn, layer.encoder_attn = WrittenOut(layer.self_attn), WrittenOut(layer.encoder_attn)
    return module


VISION_ENCODER_DECODER = Family(
    name="vision-encoder-decoder",
    model_types=("vision-encoder-decoder",),
    task="image-to-text",
    inputs=(
        Input(
            name="pixel_values",
            dtype="float",
            axes=("B", "encoder.num_channels", "encoder.image_size.0", "encoder.image_size.1"),
        ),
    ),
    decoders=("trocr",),
    positions=(
        Positions(path="decoder.model.decoder.embed_positions", offset=2),
        Positions(path="decoder.model.decoder.embed_positions", weight="weights", after_padding=True),  # sinusoidal
    ),
    limit="decoder.max_position_embeddings",
    hook=wrap_attention,
)
