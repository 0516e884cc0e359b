"""Routes the attention of transformers' models to txopt's operators while they are traced.

transformers 5 sends every attention through ``ALL_ATTENTION_FUNCTIONS``; what a model adds to it (T5's relative position bias)
arrives as a keyword. Outside ``routed`` the models are as they were.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from txopt.exporter.cache import current
from txopt.exporter.operators import attention, cross_attention

NAME = "txopt"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [R,H,Q,D], result [R,Q,H,D]; no attention weights come back."""
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    state = current()
    if state is not None and state.is_cross(key):
        # A bias over the source would need a fold of its own; no supported family has one (T5 passes zeros).
        out = cross_attention(query, key, value, state.folded[0], scale)
    else:
        out = attention(query, key, value, _with_bias(attention_mask, position_bias), scale)
    return out.transpose(1, 2), None


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if mask is None or bias is None:
        return mask if bias is None else bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return mask + bias


@contextmanager
def routed(model: nn.Module) -> Iterator[None]:
    """Inside, every attention of ``model`` runs through ``attend``; afterwards the model's own choice is back."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    found: list[Any] = [getattr(part, "config", None) for part in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "_attn_implementation")}
    chosen = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = chosen[key]
