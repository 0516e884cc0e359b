"""The caches of the trace: they write into buffers through txopt's operators and report lengths as tensors.

``DecodeState`` holds one decoder call; ``as_transformers`` shows it to transformers' models as the Cache they expect, and the
state itself is the ``cache`` of the custom protocol. ``CrossCollector`` is its counterpart in the encoder graph: it catches the
cross K/V that a decoder computes on its first step. Neither knows a model family.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from txopt.exporter.custom import CrossKV, check_layer
from txopt.exporter.operators import attention, cross_attention, fold_mask, kv_write
from txopt.runtime.errors import TxoptError

KV = tuple[Tensor, Tensor]

# The decoder call being traced: transformers' attention functions and position tables have no other way to learn of it.
_current: ContextVar["DecodeState | None"] = ContextVar("txopt_decode_state", default=None)


@dataclass
class DecodeState:
    """One decoder call over buffers: the custom protocol's cache, and the source of transformers' caches.

    Args:
        tokens: int64 [R,Q].
        position: int64 [R], where each row's first query token is written.
        self_kv: per layer K and V buffers, each [R,H,S,D]; empty for a model without self-attention cache.
        cross_kv: per cross-attention K and V of the source, each [B,H,T,D]; empty for decoder-only models.
        source_masks: by memory int64 [B,T], or None where it is never padded; empty for decoder-only models.
    """

    tokens: Tensor
    position: Tensor
    self_kv: list[KV]
    cross_kv: list[KV] = field(default_factory=list)
    source_masks: Sequence[Tensor | None] = ()

    def __post_init__(self) -> None:
        self.positions = self.position[:, None] + torch.arange(self.tokens.shape[1])  # [R,Q]
        keys = torch.arange(self.self_kv[0][0].shape[2])
        self.causal = keys[None, None, None, :] <= self.positions[:, None, :, None]  # [R,1,Q,S]
        self.folded = [None if mask is None else fold_mask(mask, self.tokens) for mask in self.source_masks]

    def write(self, layer: int, k: Tensor, v: Tensor) -> KV:
        keys, values = self.self_kv[layer]
        self.self_kv[layer] = kv_write(keys, k, self.position), kv_write(values, v, self.position)
        return self.self_kv[layer]

    def ask(self, times: int) -> None:
        """Every token asks the source ``times`` times, each time from another stream of states."""
        tokens = self.tokens.repeat(1, times)
        self.folded = [None if mask is None else fold_mask(mask, tokens) for mask in self.source_masks]

    def is_cross(self, key: Tensor) -> bool:
        return any(key is k for k, _ in self.cross_kv)

    def self_attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        mask = self.causal if bias is None else self._rows(bias)
        return attention(q, *self.write(layer, k, v), mask, q.shape[-1] ** -0.5 if scale is None else scale)

    def cross_attention(
        self, layer: int, q: Tensor, kv: CrossKV, *, memory: int = 0, scale: float | None = None
    ) -> Tensor:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return cross_attention(q, *self.cross_kv[layer], self.folded[memory], scale)

    def _rows(self, bias: Tensor) -> Tensor:
        """A bias [..,L,L] of all positions at this call's: [R,H or 1,Q,S]."""
        by_head = bias.reshape(-1, *bias.shape[-2:])  # [H or 1,L,L]
        return by_head[:, self.positions].transpose(0, 1)[..., : self.self_kv[0][0].shape[2]]


class CrossCollector:
    """The custom protocol's cache in the encoder graph: one dummy token runs through the decoder to give up its cross K/V."""

    def __init__(self, tokens: Tensor) -> None:
        self.positions = torch.zeros_like(tokens)
        self.cross_kv: list[KV] = []

    def self_attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        return v  # one token attends to itself alone

    def cross_attention(
        self, layer: int, q: Tensor, kv: CrossKV, *, memory: int = 0, scale: float | None = None
    ) -> Tensor:
        check_layer("cross", layer, len(self.cross_kv))
        self.cross_kv.append(kv())
        return q


@contextmanager
def decoding(state: DecodeState) -> Iterator[DecodeState]:
    """Makes ``state`` the current decoder call."""
    token = _current.set(state)
    try:
        yield state
    finally:
        _current.reset(token)


def current() -> "DecodeState | None":
    return _current.get()


class _Layer(CacheLayerMixin):
    """What all layers of the trace share; lengths are tensors, so nothing of the traced shape is frozen into the graph."""

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None: ...

    def get_seq_length(self) -> Any:
        state = current()
        return 0 if state is None else state.position[:, None]

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> KV:
        raise TxoptError("the decoder computes cross K/V again although they are cached; its family needs a hook")

    def get_max_length(self) -> Any:
        return -1 if self.keys is None else self.keys.shape[2]

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: Any) -> tuple[Any, int]:
        return (query_length if self.keys is None else self.keys.shape[2]), 0


class SelfLayer(_Layer):
    def __init__(self, state: DecodeState, layer: int) -> None:
        super().__init__(*state.self_kv[layer])
        self._state, self._layer = state, layer

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> KV:
        self.keys, self.values = self._state.write(self._layer, keys, values)
        return self.keys, self.values


class CollectLayer(_Layer):
    """Keeps what is written: the cross K/V of the encoder graph, the self K/V of a first step."""

    def __init__(self) -> None:
        super().__init__(None, None)

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> KV:
        self.keys, self.values = keys, values
        return keys, values


class CrossLayer(_Layer):
    """K and V of the source, there before the decoder starts."""

    def get_seq_length(self) -> int:
        return 1  # EncoderDecoderCache only asks whether there is anything


def as_transformers(state: DecodeState) -> Cache:
    """The state as transformers' Cache: an EncoderDecoderCache where there is a source, else a plain one."""
    _check_abstract_methods()
    own = Cache(layers=[SelfLayer(state, i) for i in range(len(state.self_kv))])
    if not state.cross_kv:
        return own
    return _pair(own, Cache(layers=[CrossLayer(k, v) for k, v in state.cross_kv]), updated=True)


def collecting(layers: int) -> Cache:
    """An empty EncoderDecoderCache that catches every layer's cross K/V."""
    _check_abstract_methods()
    return _pair(_collectors(layers), _collectors(layers), updated=False)


def _collectors(layers: int) -> Cache:
    return Cache(layers=[CollectLayer() for _ in range(layers)])


def _pair(own: Cache, cross: Cache, *, updated: bool) -> EncoderDecoderCache:
    cache = EncoderDecoderCache(own, cross)
    cache.is_updated = dict.fromkeys(range(len(cross.layers)), updated)
    return cache


def _check_abstract_methods() -> None:
    missing = sorted(_Layer.__abstractmethods__)
    if missing:
        import transformers

        raise TxoptError(
            f"transformers {transformers.__version__} asks cache layers for {', '.join(missing)}, which txopt does not offer yet; "
            "versions 5.17 to 5.23 are tested: install one of those"
        )
