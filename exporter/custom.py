"""The door for anyone's own encoder-decoder: what a module must offer, and the caches it is given.

A custom model is an ``nn.Module`` with two methods and a few facts, nothing to inherit from:

    class MyModel(nn.Module):
        special_ids = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}   # eos_token_id may be a list
        max_length = 64                    # target positions the model knows (optional)
        tokenizers = {"source": "source.json", "target": "target.json"}   # tokenizers' JSON files (optional)

        def encode(self, input_ids, attention_mask):      # int64 [B,T], int64 [B,T] (1: token, 0: padding)
            return memory                                 # [B,T,M]

        def decode(self, tokens, memory, cache):          # int64 [R,Q], [B,T,M]; R is B times the number of beams
            ... = self.position_table[cache.positions]    # cache.positions: int64 [R,Q]
            ... = cache.self_attention(layer, q, k, v)    # each [R,H,Q,D] -> [R,H,Q,D]; causal, scaled by D ** -0.5
            ... = cache.cross_attention(layer, q, lambda: (k, v))   # k, v [B,H,T,D], computed from memory when asked
            return logits                                 # [R,Q,V]

A decoder may read several memories: ``encode`` returns them as a tuple, ``decode`` takes that tuple, and two more facts say what
goes in and which input masks which memory:

        inputs = {"input_ids": {"axes": ("B", "T"), "vocabulary": 20}, "attention_mask": {"axes": ("B", "T")},
                  "regions": {"axes": ("B", "U", 8)}, "regions_mask": {"axes": ("B", "U")}}     # encode()'s arguments
        memory_masks = ("attention_mask", "regions_mask")

            ... = cache.cross_attention(number, q, lambda: (k, v), memory=1)                    # the second of them

The cache owns masks, positions and buffers; the module never sees them. In training, ``FullSequence`` is the cache.
It does not know about graphs: ``trace`` brings a cache of its own that writes into buffers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from txopt.runtime.errors import SourceError

CrossKV = Callable[[], tuple[Tensor, Tensor]]
Memories = Tensor | tuple[Tensor, ...]  # as encode() returns them: one alone, several as a tuple


class DecodeCache(Protocol):
    """What ``decode`` is given: positions, and the two attentions of a decoder layer."""

    @property
    def positions(self) -> Tensor:
        """int64 [R,Q]: the position of every query token in its own row."""

    def self_attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Causal attention over this and all earlier tokens of the row; q, k, v and the result are [R,H,Q,D].

        ``bias`` [..,L,L] for all query and key positions, boolean or additive, stands for the causal mask and must be causal;
        ``scale`` is D ** -0.5 unless given.
        """

    def cross_attention(
        self, layer: int, q: Tensor, kv: CrossKV, *, memory: int = 0, scale: float | None = None
    ) -> Tensor:
        """Attention over the source; ``kv()`` gives K and V, each [B,H,T,D], and is called only when they are not cached.

        ``layer`` counts the cross-attentions, of which a decoder layer may have several; ``memory`` says which memory K and V are of.
        """


class CustomEncoderDecoder(Protocol):
    """The protocol itself; see the module's docstring."""

    special_ids: dict[str, int | list[int]]

    def encode(self, *inputs: Tensor) -> Memories: ...

    def decode(self, tokens: Tensor, memory: Any, cache: DecodeCache) -> Tensor: ...


def as_memories(found: Any) -> tuple[Any, ...]:
    """What encode() returned, as a list of memories, usually of one."""
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


def in_a_tuple(returned: Any) -> str:
    """What to say beside an error of decode() where encode() put its memories into a tuple, perhaps a single one."""
    return "; encode() returns a tuple, so decode() is given one" if isinstance(returned, (tuple, list)) else ""


def described(found: Any) -> str:
    """What a module returned where a tensor of another shape was expected, and what to do about it."""
    if isinstance(found, Tensor):
        return f"got [{','.join(map(str, found.shape))}]"
    if found is None:
        return "got None (has it a return?)"
    kind = type(found).__name__
    if isinstance(found, Mapping):
        kind += f" with {', '.join(map(str, found))}"
    elif isinstance(found, (tuple, list)):
        kind += f" of {len(found)}"
    return f"got a {kind}; return the tensor alone"


def check_logits(found: Any, rows: int, length: int) -> None:
    """Raises SourceError unless decode() returned logits for ``rows`` of ``length`` tokens."""
    if not isinstance(found, Tensor) or found.dim() != 3 or found.shape[:2] != (rows, length):
        raise SourceError(f"decode() must return logits, a tensor [{rows},{length},V], {described(found)}")


def check_layer(kind: str, layer: int, before: int) -> None:
    """Raises SourceError unless ``layer`` is the next one of its kind ("self" or "cross") after ``before`` others."""
    if layer != before:
        again = " again" if layer in range(before) else ""
        raise SourceError(
            f"decode() asks for {kind}-attention of layer {layer}{again}, after {before} layers: number them 0, 1, ... in the order "
            f"of the calls, each {kind}-attention once; layers that share weights have K and V of their own all the same"
        )


class FullSequence:
    """The cache of training and of reference runs: all tokens at once, from position 0, nothing kept.

    Args:
        tokens: int64 [B,Q], only for its shape.
        attention_mask: int64 or bool [B,T], 1 where the source has a token; of several memories one each, None without padding.
    """

    def __init__(self, tokens: Tensor, attention_mask: Tensor | Sequence[Tensor | None]) -> None:
        self.positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        masks = as_memories(attention_mask)
        self._sources = [None if mask is None else mask.bool()[:, None, None, :] for mask in masks]

    def self_attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        length = q.shape[2]
        mask = None if bias is None else bias[..., :length, :length]
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=bias is None, scale=scale)

    def cross_attention(
        self, layer: int, q: Tensor, kv: CrossKV, *, memory: int = 0, scale: float | None = None
    ) -> Tensor:
        return scaled_dot_product_attention(q, *kv(), attn_mask=self._sources[memory], scale=scale)
