"""Decoders that take all tokens at once, in many spellings, and some that cannot be run token by token."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, einsum, nn
from torch.nn.functional import linear, scaled_dot_product_attention, softmax

LONGEST, WIDTH, HEADS = 80, 32, 4


class Learned(nn.Module):
    """Learned positions, a boolean causal mask; the others change one thing each."""

    special_ids: ClassVar = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    max_length = LONGEST

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(40, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.cross_q, self.cross_k, self.cross_v, self.cross_o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.first, self.second, self.third = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.feed = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.head = nn.Linear(WIDTH, 40)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.first(self.tokens(input_ids)) * attention_mask[..., None]

    def decode(self, tokens: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        x = self.placed(self.tokens(tokens))
        y = self.first(x)
        q, k, v = (split(project(y)) for project in (self.q, self.k, self.v))
        x = x + self.o(join(self.attend(self.turned(q), self.turned(k), v, self.mask(tokens))))
        seen = memory_mask.bool()[:, None, None, :]
        q, k, v = split(self.cross_q(self.second(x))), split(self.cross_k(memory)), split(self.cross_v(memory))
        x = x + self.cross_o(join(self.attend(q, k, v, seen)))
        return self.logits(x + self.feed(self.third(x)))

    def placed(self, x: Tensor) -> Tensor:
        return x + self.places(torch.arange(x.shape[1]))

    def turned(self, x: Tensor) -> Tensor:
        return x

    def mask(self, tokens: Tensor) -> Tensor:
        return torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(x)


def split(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], HEADS, -1).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], -1, WIDTH)


def distances(tokens: Tensor) -> Tensor:
    """How many positions a key stands after its query, [L,L]."""
    places = torch.arange(tokens.shape[1])
    return places[None, :] - places[:, None]


class Sinusoidal(Learned):
    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(LONGEST)[:, None] * torch.exp(torch.arange(0, WIDTH, 2) * (-math.log(1e4) / WIDTH))
        self.register_buffer("waves", torch.cat([angles.sin(), angles.cos()], 1))

    def placed(self, x: Tensor) -> Tensor:
        return x * math.sqrt(WIDTH) + self.waves[: x.shape[1]]


class Rotary(Learned):
    def placed(self, x: Tensor) -> Tensor:
        return x

    def turned(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        angles = torch.arange(x.shape[2])[:, None] * 1e4 ** (-torch.arange(0, size, 2) / size)
        cosine, sine = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        left, right = x.chunk(2, -1)
        return x * cosine + torch.cat([-right, left], -1) * sine


class Alibi(Learned):
    def placed(self, x: Tensor) -> Tensor:
        return x

    def mask(self, tokens: Tensor) -> Tensor:
        far, slopes = distances(tokens), 2.0 ** -torch.arange(1, HEADS + 1)
        return (slopes[:, None, None] * far).masked_fill(far > 0, -math.inf)


class Relative(Learned):
    """A learned bias by head and distance, as T5's."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(HEADS, 2 * LONGEST))

    def mask(self, tokens: Tensor) -> Tensor:
        far = distances(tokens)
        return self.bias[:, far + LONGEST].masked_fill(far > 0, torch.finfo(self.bias.dtype).min)


class Window(Learned):
    def mask(self, tokens: Tensor) -> Tensor:
        far = distances(tokens)
        return (far <= 0) & (far > -5)


class Written(Learned):
    """Attention as most write it: scores, mask, softmax."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return softmax(scores.masked_fill(~mask, -math.inf), -1) @ v


class Added(Learned):
    """Attention with scaled queries, an added mask and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)) + hidden
        return self.dropout(scores.softmax(-1)) @ v


class Tied(Learned):
    def logits(self, x: Tensor) -> Tensor:
        return linear(x, self.tokens.weight)


class PyTorchs(Learned):
    """nn.Transformer's layers: rows on the second axis inside, Q, K and V in one weight."""

    norm_first = False

    def __init__(self) -> None:
        super().__init__()
        options = {"batch_first": True, "norm_first": self.norm_first}
        encoder = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, **options)
        self.encoder = nn.TransformerEncoder(encoder, 1, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 64, **options), 2)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encoder(self.placed(self.tokens(input_ids)), src_key_padding_mask=attention_mask == 0)

    def decode(self, tokens: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        causal, padding = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1]), memory_mask == 0
        x = self.placed(self.tokens(tokens))
        return self.head(self.decoder(x, memory, tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=padding))


class PyTorchsNormFirst(PyTorchs):
    norm_first = True


class Einsums(Alibi):
    """Both products as einsum, one of them with its axes in another order; a bias added, and the future filled in after it."""

    def mask(self, tokens: Tensor) -> Tensor:
        return super().mask(tokens).clamp(min=-1.0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = einsum("bhqd, bhkd -> bhqk", q, k) * q.shape[-1] ** -0.5
        if mask.is_floating_point():
            places = torch.arange(q.shape[2])
            scores = (scores + mask).masked_fill(places[None, :] > places[:, None], -math.inf)
        else:
            scores = scores.masked_fill(~mask, -math.inf)
        return einsum("bhqk, bhkd -> bqhd", softmax(scores, -1), v).transpose(1, 2)


class PaddedTargets(Learned):
    """A mask for the target's padding, of which there is none, filled in and applied in place; rows that see nothing are zeroed."""

    def mask(self, tokens: Tensor) -> Tensor:
        padding = torch.ones(tokens.shape, dtype=torch.bool)
        padding[:, : tokens.shape[1]] = tokens == 0
        return super().mask(tokens) & ~padding[:, None, None, :]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores.masked_fill_(~mask, -math.inf)
        return (softmax(scores, -1) @ v).masked_fill(~mask.any(-1, keepdim=True), 0.0)


class Branching(Learned):
    """Asks which of two lengths is greater, casts inside autocast, and adds in place."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        if k.shape[2] > q.shape[2]:
            mask = mask.expand(-1, -1, q.shape[2], -1)
        with torch.autocast("cpu", enabled=False):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask).add_(0.0)


class Convolution(Learned):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(x.transpose(1, 2)).transpose(1, 2))


class Pooled(Learned):
    def logits(self, x: Tensor) -> Tensor:
        return self.head(x + x.mean(1, keepdim=True))


class Summed(Learned):
    def logits(self, x: Tensor) -> Tensor:
        return self.head(x.cumsum(1))


class Unmasked(Learned):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask if q.shape[2] != k.shape[2] else None)


class Bidirectional(Learned):
    def mask(self, tokens: Tensor) -> Tensor:
        return distances(tokens).abs() < 5


class MaskedByToken(Learned):
    """As a padding mask, but of a token that targets do hold."""

    def mask(self, tokens: Tensor) -> Tensor:
        return super().mask(tokens) & (tokens != 7)[:, None, None, :]


class Capped(Learned):
    """Scores in soft bounds, as Gemma has them."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = 20 * torch.tanh(q @ k.transpose(-1, -2) / 20)
        return softmax(scores.masked_fill(~mask, -math.inf), -1) @ v


class SideBySide(Learned):
    """Two attentions of one layer, masked one after the other; the softmax of the second comes first."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        first, second = ((part @ k.transpose(-1, -2)).masked_fill(~mask, -math.inf) for part in (q, -q))
        second = softmax(second.tanh(), -1)
        return softmax(first.sigmoid(), -1) @ v - second @ v


class WithoutSoftmax(Capped):
    """Scores that are rectified and masked, beside an attention that has a softmax."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2)).relu() * mask @ v + super().attend(q, k, v, mask)


class PaddedStart(Learned):
    """A padding mask where the first token of every target is the padding id."""

    special_ids: ClassVar = {"decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}

    def mask(self, tokens: Tensor) -> Tensor:
        return super().mask(tokens) & (tokens != 0)[:, None, None, :]


class SourceAdded(Learned):
    """Looks at the source outside of an attention."""

    def placed(self, x: Tensor) -> Tensor:
        return x

    def decode(self, tokens: Tensor, memory: Tensor, memory_mask: Tensor) -> Tensor:
        return super().decode(tokens, memory, memory_mask) + self.head(memory.mean(1, keepdim=True))


class SourceUnmasked(Learned):
    """Its cross-attention sees the padding of shorter sources."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=None if mask.dim() == 4 else mask)


class Numbers(Learned):
    """Takes a size as a number, which no trace survives."""

    def placed(self, x: Tensor) -> Tensor:
        return x + self.places(torch.arange(int(x.shape[1])))


class TwoMemories(Learned):
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        memory = super().encode(input_ids, attention_mask)
        return memory, memory[:, :1]


class Averaged(Learned):
    """Every row less the mean of the rows beside it."""

    def placed(self, x: Tensor) -> Tensor:
        return super().placed(x - x.mean(0, keepdim=True))


class NeverAlone(Learned):
    """One token is a step to it, for which it lacks a cache; eole's decoder does this."""

    def placed(self, x: Tensor) -> Tensor:
        if x.shape[1] == 1:
            raise AttributeError("no cache")
        return super().placed(x)


class NumbersInTheEncoder(Learned):
    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return super().encode(input_ids, attention_mask) + self.places(torch.arange(int(input_ids.shape[1])))


class Shrinking(Learned):
    """Positions counted from the end: every new token moves all others."""

    def placed(self, x: Tensor) -> Tensor:
        return x + self.places(torch.arange(x.shape[1]).flip(0))


class Boundless(Learned):
    max_length = None  # type: ignore[assignment]  # what is wrong with it


GOOD = (
    Learned,
    Sinusoidal,
    Rotary,
    Alibi,
    Relative,
    Window,
    Written,
    Added,
    Tied,
    PyTorchs,
    PyTorchsNormFirst,
    Einsums,
    PaddedTargets,
    Branching,
)

# what cannot be run token by token, and what must be said of it
BAD: dict[type[Learned], str] = {
    Convolution: "(conv1d in convolution) mixes positions",
    Pooled: "(mean) mixes positions",
    Summed: "(cumsum) mixes positions",
    Averaged: "(sub) mixes rows",
    Unmasked: "self-attention without a mask sees later tokens",
    Bidirectional: "this mask lets tokens see later ones",
    MaskedByToken: "node and_1 (__and__) relates positions to each other outside of an attention, by node tril (tril)",
    PaddedStart: "relates positions to each other outside of an attention",
    Capped: "by node bitwise_not (bitwise_not); its softmax is no attention that is known, because of node tanh (tanh)",
    SideBySide: "its softmax is no attention that is known, because of node sigmoid (sigmoid)",
    SourceAdded: "joins the source and the target outside of an attention",
    SourceUnmasked: "expected cross-attention to mask the source's padding and nothing else",
    TwoMemories: "encode() returns a tuple of 2 memories, and memory_masks is ('attention_mask',)",
    NeverAlone: "fails for 1 of at most 80 tokens: AttributeError: no cache",
    Numbers: "its code fixes the target length to 5",
    NumbersInTheEncoder: "fixes sizes of encoder.onnx to those of the example (input_ids: T = 7; attention_mask: T = 7)",
    Shrinking: "one more token changes what was",
    Boundless: "needs max_length",
}
