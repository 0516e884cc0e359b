"""The training: from the dictionary to weights.safetensors, reproducible by seed (same machine, same torch).

This file owns batches, loss and schedule. After every epoch it prints the validation loss and error rates and writes
the weights, into a temporary file that then takes the old one's place.
"""

import argparse
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from examples.g2p.data import Lexicon, load_lexicon, take
from examples.g2p.evaluate import pronounce, score
from examples.g2p.make_tokenizers import FOLDER
from examples.g2p.model import G2P, WEIGHTS

PAD = G2P.special_ids["pad_token_id"]
START = G2P.special_ids["decoder_start_token_id"]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Every (word, pronunciation) of a split as ids, padded on the right."""

    source: Tensor  # int64 [N,T], letters and the end
    target: Tensor  # int64 [N,Q+1], the start, phonemes and the end

    def __len__(self) -> int:
        return self.source.shape[0]


def pad(rows: list[list[int]]) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])


def make_pairs(lexicon: Lexicon, source: Tokenizer, target: Tokenizer) -> Pairs:
    flat = [(word, " ".join(one)) for word, spoken in lexicon.items() for one in spoken]
    words, spoken = [word for word, _ in flat], [one for _, one in flat]
    return Pairs(
        source=pad([encoding.ids for encoding in source.encode_batch(words)]),
        target=pad([[START, *encoding.ids] for encoding in target.encode_batch(spoken)]),
    )


def batches(pairs: Pairs, size: int, generator: torch.Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of alike lengths together, cut to their longest; in a new order each time if there is a generator."""
    letters, phonemes = (pairs.source != PAD).sum(1), (pairs.target != PAD).sum(1)
    key = (letters * 64 + phonemes).float()
    if generator is not None:
        key = key + torch.rand(len(pairs), generator=generator)  # ties in another order each time
    groups = list(key.argsort(stable=True).split(size))
    order = range(len(groups)) if generator is None else torch.randperm(len(groups), generator=generator).tolist()
    for rows in (groups[i] for i in order):
        yield pairs.source[rows, : int(letters[rows].max())], pairs.target[rows, : int(phonemes[rows].max())]


def loss_of(model: G2P, source: Tensor, target: Tensor, smoothing: float) -> Tensor:
    mask = (source != PAD).long()
    tokens, labels = target[:, :-1], target[:, 1:]
    logits = model.decode(tokens, model.encode(source, mask), mask)
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=PAD, label_smoothing=smoothing)


@torch.inference_mode()
def validation_loss(model: G2P, pairs: Pairs, size: int) -> float:
    """Mean cross-entropy per phoneme in nats, without smoothing."""
    total = count = 0.0
    for source, target in batches(pairs, size, None):
        phonemes = float((target[:, 1:] != PAD).sum())
        total, count = total + phonemes * float(loss_of(model, source, target, 0.0)), count + phonemes
    return total / count


def rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """The learning rate: a linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def save(model: G2P, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(model.state_dict(), temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the g2p model and writes its weights.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=256, help="pairs per step")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="the highest learning rate")
    parser.add_argument("--warmup", type=int, default=400, help="steps")
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of the matrix products")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-steps", type=int, default=None, help="stop early: for trying things out")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    order = torch.Generator().manual_seed(arguments.seed)

    lexicon = load_lexicon()
    source, target = (Tokenizer.from_file(str(FOLDER / G2P.tokenizers[side])) for side in ("source", "target"))
    validation = take(lexicon, "validation")
    train_pairs = make_pairs(take(lexicon, "train"), source, target)
    validation_pairs = make_pairs(validation, source, target)
    model = G2P(source.get_vocab_size(), target.get_vocab_size(), dropout=arguments.dropout)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    steps = arguments.epochs * math.ceil(len(train_pairs) / arguments.batch)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size} parameters, {len(train_pairs)} pairs, {steps} steps", flush=True)

    step, begun = 0, time.monotonic()
    for epoch in range(1, arguments.epochs + 1):
        model.train()
        total = 0.0
        for inputs, outputs in batches(train_pairs, arguments.batch, order):
            for group in optimizer.param_groups:
                group["lr"] = rate(step, steps, arguments.rate, arguments.warmup)
            # On CPUs fused attention goes backward slowly in bfloat16; words are short, so the plain one is fast.
            with torch.autocast("cpu", enabled=arguments.precision == "bf16"), sdpa_kernel(SDPBackend.MATH):
                loss = loss_of(model, inputs, outputs, arguments.smoothing)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step, total = step + 1, total + loss.item()
            if step % 100 == 0:
                print(f"step {step} loss {loss.item():.4f} {time.monotonic() - begun:.0f} s", flush=True)
            if step == arguments.limit_steps:
                break
        model.eval()
        spoken = pronounce(model, list(validation), source, target)
        result = score(lexicon, dict(zip(validation, spoken, strict=True)))
        print(
            f"epoch {epoch}: training loss {total * arguments.epochs / steps:.4f},"
            f" validation loss {validation_loss(model, validation_pairs, arguments.batch):.4f},"
            f" PER {result.per:.2f} %, WER {result.wer:.2f} %, {time.monotonic() - begun:.0f} s",
            flush=True,
        )
        save(model, arguments.out)
        if step == arguments.limit_steps:
            break


if __name__ == "__main__":
    main()
