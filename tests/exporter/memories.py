"""Decoders that read several memories, with a cache of their own and without, and some whose memories cannot be carried."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tests.exporter.cacheless import LONGEST, WIDTH, join, split
from txopt.exporter.custom import DecodeCache

REGIONS = 12  # width of what the second encoder reads


class Attention(nn.Module):
    """Projections of one attention, and the norm before it."""

    def __init__(self, source: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(source, WIDTH), nn.Linear(source, WIDTH)

    def kv(self, source: Tensor) -> tuple[Tensor, Tensor]:
        return split(self.k(source)), split(self.v(source))


class Layer(nn.Module):
    """Self-attention, a cross-attention for each memory, feed-forward."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.own, self.cross = Attention(), nn.ModuleList(Attention(width) for width in widths)
        self.feed = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))


class Two(nn.Module):
    """A document and regions of an image: lengths T and U, widths that differ, two layers."""

    special_ids: ClassVar = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    max_length = LONGEST
    inputs: ClassVar[dict[str, Any]] = {
        "input_ids": {"axes": ("B", "T"), "vocabulary": 40},
        "attention_mask": {"axes": ("B", "T")},
        "regions": {"axes": ("B", "U", REGIONS)},
        "regions_mask": {"axes": ("B", "U")},
    }
    memory_masks: ClassVar[tuple[str | None, ...]] = ("attention_mask", "regions_mask")
    widths: ClassVar[tuple[int, ...]] = (WIDTH, 24)

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(40, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.regions = nn.Sequential(nn.Linear(REGIONS, 24), nn.Tanh())
        self.layers = nn.ModuleList(Layer(self.widths) for _ in range(2))
        self.head = nn.Linear(WIDTH, 40)

    def encode(self, input_ids: Tensor, attention_mask: Tensor, regions: Tensor, regions_mask: Tensor) -> Any:
        return self.tokens(input_ids) * attention_mask[..., None], self.regions(regions)

    def decode(self, tokens: Tensor, memories: Any, masks: Any) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()
        for layer in self.layers:
            y = layer.own.norm(x)
            x = x + attended(layer.own, y, layer.own.kv(y), causal)
            for cross, memory, mask in zip(layer.cross, memories, masks, strict=True):
                seen = None if mask is None else mask.bool()[:, None, None, :]
                x = x + attended(cross, cross.norm(x), cross.kv(memory), seen)
            x = x + layer.feed(x)
        return self.head(x)


def attended(part: Attention, y: Tensor, kv: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
    out: Tensor = part.o(join(scaled_dot_product_attention(split(part.q(y)), *kv, attn_mask=mask)))
    return out


class TwoCached(Two):
    """The same decoder by the explicit protocol: cross-attentions are counted through all layers."""

    def decode(self, tokens: Tensor, memories: Any, cache: DecodeCache) -> Tensor:
        x = self.tokens(tokens) + self.places(cache.positions)
        number = 0
        for index, layer in enumerate(self.layers):
            y = layer.own.norm(x)
            x = x + layer.own.o(join(cache.self_attention(index, split(layer.own.q(y)), *layer.own.kv(y))))
            for which, cross in enumerate(layer.cross):
                q = split(cross.q(cross.norm(x)))
                x = x + cross.o(
                    join(cache.cross_attention(number, q, lambda c=cross, w=which: c.kv(memories[w]), memory=which))
                )
                number += 1
            x = x + layer.feed(x)
        return self.head(x)


class OneLength(Two):
    """Both memories are of the same ids: one length, one mask."""

    inputs: ClassVar[dict[str, Any]] = {name: Two.inputs[name] for name in ("input_ids", "attention_mask")}
    memory_masks: ClassVar[tuple[str | None, ...]] = ("attention_mask", "attention_mask")
    widths: ClassVar[tuple[int, ...]] = (WIDTH, WIDTH)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Any:  # type: ignore[override]
        memory = self.tokens(input_ids)
        return memory * attention_mask[..., None], memory.flip(-1)


class OneLengthTwoMasks(OneLength):
    """Guided summarization: the second memory is the same document, of which the decoder may see the guidance alone."""

    inputs: ClassVar[dict[str, Any]] = {**OneLength.inputs, "guidance_mask": {"axes": ("B", "T")}}
    memory_masks: ClassVar[tuple[str | None, ...]] = ("attention_mask", "guidance_mask")

    def encode(self, input_ids: Tensor, attention_mask: Tensor, guidance_mask: Tensor) -> Any:  # type: ignore[override]
        return super().encode(input_ids, attention_mask)


class Image(Two):
    """The second memory is of a fixed length, and so never padded."""

    inputs: ClassVar[dict[str, Any]] = {**OneLength.inputs, "pixels": {"axes": ("B", 5, REGIONS)}}
    memory_masks: ClassVar[tuple[str | None, ...]] = ("attention_mask", None)

    def encode(self, input_ids: Tensor, attention_mask: Tensor, pixels: Tensor) -> Any:  # type: ignore[override]
        return self.tokens(input_ids) * attention_mask[..., None], self.regions(pixels)


class Three(Two):
    """A third memory, of ids with a vocabulary and positions of their own."""

    inputs: ClassVar[dict[str, Any]] = {
        **Two.inputs,
        "tags": {"axes": ("B", "W"), "vocabulary": 9, "max_length": 8},
        "tags_mask": {"axes": ("B", "W")},
    }
    memory_masks: ClassVar[tuple[str | None, ...]] = ("attention_mask", "regions_mask", "tags_mask")
    widths: ClassVar[tuple[int, ...]] = (WIDTH, 24, 16)

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.tag_places = nn.Embedding(9, 16), nn.Embedding(8, 16)

    def encode(self, *inputs: Tensor) -> Any:
        input_ids, attention_mask, regions, regions_mask, tags, _ = inputs
        tagged = self.tags(tags) + self.tag_places(torch.arange(tags.shape[1]))
        return *super().encode(input_ids, attention_mask, regions, regions_mask), tagged


class Unnamed(Two):
    """Two memories and the name of one mask."""

    memory_masks: ClassVar[tuple[str | None, ...]] = ("attention_mask",)


class Swapped(Two):
    """Masks in the wrong order."""

    memory_masks: ClassVar[tuple[str | None, ...]] = ("regions_mask", "attention_mask")


class Unmasked(Two):
    """A length that varies, and no mask for it."""

    memory_masks: ClassVar[tuple[str | None, ...]] = ("attention_mask", None)


class Unread(Two):
    """A third result that no cross-attention reads."""

    memory_masks: ClassVar[tuple[str | None, ...]] = ("attention_mask", "regions_mask", None)

    def encode(self, *inputs: Tensor) -> Any:
        memory, regions = super().encode(*inputs)
        return memory, regions, regions[:, :1]

    def decode(self, tokens: Tensor, memories: Any, masks: Any) -> Tensor:
        return super().decode(tokens, memories[:2], masks[:2])


class Mixed(OneLength):
    """K of one memory, V of the other."""

    def decode(self, tokens: Tensor, memories: Any, masks: Any) -> Tensor:
        first, second = memories
        return super().decode(tokens, (first + second, second), masks)


class OthersMask(OneLengthTwoMasks):
    """Masks each memory with the padding of the other."""

    def decode(self, tokens: Tensor, memories: Any, masks: Any) -> Tensor:
        return super().decode(tokens, memories, masks[::-1])


class KeysOfTheMask(Two):
    """Makes K and V of the mask too."""

    def decode(self, tokens: Tensor, memories: Any, masks: Any) -> Tensor:
        return super().decode(tokens, (memories[0] * masks[0][..., None], memories[1]), masks)


class NoSuchMemory(TwoCached):
    """Asks for a third memory."""

    def decode(self, tokens: Tensor, memories: Any, cache: DecodeCache) -> Tensor:
        q = split(self.tokens(tokens))
        return self.head(join(cache.cross_attention(0, q, lambda: self.layers[0].own.kv(memories[0]), memory=2)))


def made(kind: type[Two]) -> Two:
    """Seeded, with weights so wide that ids vary from step to step and every memory matters."""
    torch.manual_seed(0)
    module = kind().eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3)
    return module


def factory() -> Two:
    return made(Two)


GOOD: tuple[type[Two], ...] = (OneLength, OneLengthTwoMasks, Image, Three)

# what cannot be carried, and what must be said of it
BAD: dict[type[Two], str] = {
    Unnamed: "encode() returns a tuple of 2 memories, and memory_masks is ('attention_mask',): expected the name of one mask for each",
    Swapped: "as long as regions_mask, got",
    Unmasked: "memory_masks[1] is None, so memory 1 must be of one length for all sources",
    Unread: "no cross-attention reads memory 2",
    Mixed: "expected K and V of one memory, found them made of memories 0 and 1",
    OthersMask: "expected cross-attention to mask the source's padding and nothing else",
    KeysOfTheMask: "K and V of cross-attention depend on the source's mask",
    NoSuchMemory: "cross-attention 0 to memory 2: encode() returns 2, from 0 on",
}
