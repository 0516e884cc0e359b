"""Attention that is written out in transformers (TrOCR, MVP, FSMT, ...), routed like everyone else's."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from txopt.exporter.attention import attend
from txopt.runtime.errors import SourceError


class WrittenOut(nn.Module):
    """An attention in the words of transformers' attention interface, which its own code does not use.

    ``projections``: what it calls the projections of query, key and value.
    """

    def __init__(self, attention: Any, projections: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")) -> None:
        super().__init__()
        self.inner = attention
        self.projections = projections

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
        to_query, to_key, to_value = (getattr(inner, name) for name in self.projections)
        query = self._heads(to_query(hidden_states))
        if cross and past_key_values is not None and past_key_values.is_updated.get(inner.layer_idx):
            layer = past_key_values.cross_attention_cache.layers[inner.layer_idx]
            key, value = layer.keys, layer.values
        else:
            key, value = self._heads(to_key(source)), self._heads(to_value(source))
            if past_key_values is not None:
                cache = past_key_values.cross_attention_cache if cross else past_key_values.self_attention_cache
                key, value = cache.update(key, value, inner.layer_idx)
        out, _weights = attend(inner, query, key, value, attention_mask, scaling=getattr(inner, "scaling", None))
        return inner.out_proj(out.reshape(*hidden_states.shape[:2], -1)), None

    def _heads(self, x: Tensor) -> Tensor:
        size: Any = self.inner.head_dim
        return x.view(x.shape[0], -1, x.shape[-1] // size, size).transpose(1, 2)


def wrap(stack: Any, wrapper: Callable[[nn.Module], nn.Module] = WrittenOut) -> None:
    """Puts ``wrapper`` around every attention in the layers of an encoder or a decoder."""
    for layer in stack.layers:
        layer.self_attn = wrapper(layer.self_attn)
        if hasattr(layer, "encoder_attn"):
            layer.encoder_attn = wrapper(layer.encoder_attn)
