"""PyTorch's own modules without the shortcuts that no trace can follow, while they are traced."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def plain_modules() -> Iterator[None]:
    """Inside, ``nn.MultiheadAttention`` and ``nn.Transformer`` take no fast path, no mask is asked whether it is causal, and
    ``autocast(enabled=False)``, which rotary embeddings like to wear, does nothing: a trace is in one precision anyway."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    autocast: Any = torch.autocast
    enter, leave = autocast.__enter__, autocast.__exit__

    def entered(self: Any) -> Any:
        return enter(self) if self._enabled else self

    def left(self: Any, *raised: Any) -> Any:
        return leave(self, *raised) if self._enabled else None

    try:
        with (
            patch("torch.nn.modules.transformer._detect_is_causal_mask", _as_told),
            patch.object(torch.autocast, "__enter__", entered),
            patch.object(torch.autocast, "__exit__", left),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _as_told(mask: object, is_causal: bool | None = None, size: int | None = None) -> bool:
    return bool(is_causal) and mask is None
