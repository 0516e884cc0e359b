"""Decoders that take past keys and values and join the new ones to them, in several ways to mask and to count positions."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

LAYERS, WIDTH, HEADS, WORDS, LONGEST = 2, 32, 4, 40, 128
NAMES = [f"past_{kind}.{layer}" for layer in range(LAYERS) for kind in ("key", "value")]
PRESENTS = [name.replace("past", "present") for name in NAMES]


class Layer(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.norm, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, heads * (WIDTH // HEADS)) for _ in range(2))
        self.feed = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))


class Unmasked(nn.Module):
    """Every token sees all others, new ones too; positions are counted from the past. The others change one thing each."""

    inputs = ("ids",)
    heads = HEADS  # of K and V

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.layers = nn.ModuleList(Layer(self.heads) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WORDS)
        self.bias = nn.Embedding(9, HEADS)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        ids, pasts, presents = given[0], given[-2 * LAYERS :], []
        before, count = pasts[0].shape[2], ids.shape[1]
        x = self.words(ids) + self.places(torch.arange(before, before + count))
        mask = self.mask(before, count, *given[1 : -2 * LAYERS])
        for number, layer in enumerate(self.layers):
            y = layer.norm(x)
            q, k, v = (cut(project(y)) for project in (layer.q, layer.k, layer.v))
            k, v = (self.joined(old, new) for old, new in zip(pasts[2 * number :], (k, v), strict=False))
            presents += [k, v]
            x = x + layer.o(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))
            x = x + layer.feed(layer.after(x))
        return self.head(x), *presents

    def joined(self, old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([old, new], dim=2)

    def mask(self, before: int, count: int) -> Tensor | None:
        return None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5
        return (scores if mask is None else scores + mask).softmax(-1) @ v


class Causal(Unmasked):
    """The dtype's least number is added to what comes later."""

    def mask(self, before: int, count: int) -> Tensor | None:
        later = torch.arange(before + count)[None, :] > torch.arange(before, before + count)[:, None]
        return later.float() * torch.finfo(torch.float32).min


class Filled(Causal):
    """-inf takes the place of what comes later."""

    def mask(self, before: int, count: int) -> Tensor | None:
        return torch.arange(before + count)[None, :] > torch.arange(before, before + count)[:, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        scores = q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5
        return scores.masked_fill(mask, -torch.inf).softmax(-1) @ v


class Padded(Unmasked):
    """A mask of all tokens so far is an input; causal too."""

    inputs = ("ids", "attention_mask")

    def mask(self, before: int, count: int, *given: Tensor) -> Tensor | None:
        seen = torch.arange(before + count)[None, :] <= torch.arange(before, before + count)[:, None]
        return torch.where(seen & (given[0] > 0)[:, None, None, :], 0.0, -1e9)


class Biased(Unmasked):
    """A bias by distance, which no past and no token tells but by its length; causal too."""

    def mask(self, before: int, count: int) -> Tensor | None:
        distance = torch.arange(before, before + count)[:, None] - torch.arange(before + count)[None, :]
        bias = self.bias(distance.clamp(0, 8)).permute(2, 0, 1)[None]
        return bias + (distance < 0).float() * -1e9


class Sdpa(Filled):
    """torch's own attention, with a boolean mask of what is seen."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        return scaled_dot_product_attention(q, k, v, attn_mask=~mask)


class UpperLeft(Unmasked):
    """torch's own attention with is_causal, which counts keys from the first one, whatever was before the queries."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)


class Grouped(Causal):
    """Each head of K and V serves two of Q, for which it is repeated, as Llama does it; the next ones do it in other words."""

    heads = HEADS // 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return super().attend(q, self.repeated(k), self.repeated(v), mask)

    def repeated(self, x: Tensor) -> Tensor:
        batch, heads, length, size = x.shape
        return x[:, :, None].expand(batch, heads, 2, length, size).reshape(batch, 2 * heads, length, size)


class Interleaved(Grouped):
    def repeated(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=1)


class InTurn(Grouped):
    """Neighbouring heads of Q have different ones of K and V, which is not what the operator does."""

    def repeated(self, x: Tensor) -> Tensor:
        return x.repeat(1, 2, 1, 1)


class Reversed(Unmasked):
    def joined(self, old: Tensor, new: Tensor) -> Tensor:
        return torch.cat([new, old], dim=2)


class Peeking(Unmasked):
    """The past is read beside its attention."""

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        logits, *presents = super().forward(*given)
        return logits + given[-1].mean(), *presents


class Capped(Unmasked):
    """Scores that a tanh caps, which no operator Attention stands for here."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return (5 * torch.tanh(q @ k.transpose(-1, -2) / 5)).softmax(-1) @ v


def cut(x: Tensor) -> Tensor:
    return x.unflatten(2, (-1, WIDTH // HEADS)).transpose(1, 2)


def exported(
    kind: type[Unmasked], folder: Path, *, dynamo: bool = False, tokens: int | None = None, opset: int = 18
) -> Path:
    """``kind`` as folder/in.onnx, by one of torch's exporters; ``tokens``: a fixed number of new ones."""
    past, new = 6, tokens or 3
    given = {"ids": torch.ones(2, new, dtype=torch.int64)}
    axes: dict[str, dict[int, str]] = {"ids": {0: "batch"} if tokens else {0: "batch", 1: "length"}}
    if "attention_mask" in kind.inputs:
        given["attention_mask"] = torch.ones(2, past + new, dtype=torch.int64)
        axes["attention_mask"] = {0: "batch", 1: "total"}
    given |= {name: torch.zeros(2, kind.heads, past, WIDTH // HEADS) for name in NAMES}
    axes |= {name: {0: "batch", 2: "past"} for name in NAMES}
    results = {"logits": axes["ids"], **{name: {0: "batch", 2: "present"} for name in PRESENTS}}
    file = folder / "in.onnx"
    names: dict[str, Any] = {"input_names": list(given), "output_names": ["logits", *PRESENTS]}
    module, arguments = kind().eval(), tuple(given.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        if dynamo:
            dims = {name: torch.export.Dim(name) for name in ("batch", "length", "past")}
            shapes = tuple(
                {axis: dims.get(name, torch.export.Dim.DYNAMIC) for axis, name in found.items()}
                for found in axes.values()
            )
            options = {"dynamic_shapes": (shapes,), "verbose": False}
            torch.onnx.export(module, arguments, file, dynamo=True, opset_version=opset, **options, **names)
        else:
            torch.onnx.export(
                module, arguments, file, dynamo=False, opset_version=opset, dynamic_axes=axes | results, **names
            )
    return file
