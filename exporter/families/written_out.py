"""Attention that is written out in transformers (TrOCR, MVP), routed like everyone else's."""

from typing import Any

from torch import Tensor, nn

from txopt.exporter.attention import attend
from txopt.runtime.errors import SourceError


class WrittenOut(nn.Module):
    """An attention in the words of transformers' attention interface, which its own code does not use."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inner = attention

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        attn_prompt: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if attn_prompt is not None:
            raise SourceError(
                "prompts for attention (MVP's use_prompt) are not supported, and without them this is another model"
            )
        inner: Any = self.inner
        cross = key_value_states is not None
        source = hidden_states if key_value_states is None else key_value_states
        query = self._heads(inner.q_proj(hidden_states))
        if cross and past_key_values is not None and past_key_values.is_updated.get(inner.layer_idx):
            layer = past_key_values.cross_attention_cache.layers[inner.layer_idx]
            key, value = layer.keys, layer.values
        else:
            key, value = self._heads(inner.k_proj(source)), self._heads(inner.v_proj(source))
            if past_key_values is not None:
                cache = past_key_values.cross_attention_cache if cross else past_key_values.self_attention_cache
                key, value = cache.update(key, value, inner.layer_idx)
        out, _weights = attend(inner, query, key, value, attention_mask, scaling=inner.scaling)
        return inner.out_proj(out.reshape(*hidden_states.shape[:2], -1)), None

    def _heads(self, x: Tensor) -> Tensor:
        inner: Any = self.inner
        return x.view(x.shape[0], -1, inner.num_heads, inner.head_dim).transpose(1, 2)


def wrap(stack: Any) -> None:
    """Puts ``WrittenOut`` around every attention in the layers of an encoder or a decoder."""
    for layer in stack.layers:
        layer.self_attn = WrittenOut(layer.self_attn)
        if hasattr(layer, "encoder_attn"):
            layer.encoder_attn = WrittenOut(layer.encoder_attn)
