"""PyTorch's own modules without the shortcuts that no trace can follow, while they are traced."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch


@contextmanager
def plain_modules() -> Iterator[None]:
    """Inside, ``nn.MultiheadAttention`` and ``nn.Transformer`` take no fast path, and no mask is asked whether it is causal."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with patch("torch.nn.modules.transformer._detect_is_causal_mask", _as_told):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _as_told(mask: object, is_causal: bool | None = None, size: int | None = None) -> bool:
    return bool(is_causal) and mask is None
