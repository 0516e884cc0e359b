"""The figures: phoneme and word error rates on words that training never saw.

This file owns decoding without a cache (the whole prefix again at every step: slow, and plainly right) and the two
error rates. It knows nothing of how the model was trained.

PER: edits (insertions, deletions, substitutions) to the closest listed pronunciation, summed over all words, divided by
the summed lengths of those closest pronunciations. WER: share of words that equal none of their listed pronunciations.
"""

import argparse
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from examples.g2p.data import Lexicon, Pronunciation, has_inflection, load_lexicon, take
from examples.g2p.make_tokenizers import FOLDER
from examples.g2p.model import G2P, factory


@dataclass(frozen=True, kw_only=True)
class Score:
    """Error rates in percent over ``words`` words."""

    words: int
    per: float
    wer: float


def encode_words(words: list[str], source: Tokenizer) -> tuple[Tensor, Tensor]:
    """int64 [B,T] ids and int64 [B,T] mask, padded to the longest word."""
    rows = [encoding.ids for encoding in source.encode_batch(words)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [G2P.special_ids["pad_token_id"]] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


@torch.inference_mode()
def beam_search(model: G2P, input_ids: Tensor, attention_mask: Tensor, beams: int = 1, steps: int = 40) -> Tensor:
    """The likeliest ids of each row, int64 [B,Q] without the start; after the end comes padding. One beam is greedy.

    Hypotheses are compared by summed log-probability divided by length, the end included.
    """
    batch = input_ids.shape[0]
    end, pad = model.special_ids["eos_token_id"], model.special_ids["pad_token_id"]
    memory = model.encode(input_ids, attention_mask).repeat_interleave(beams, dim=0)
    mask = attention_mask.repeat_interleave(beams, dim=0)
    tokens = torch.full((batch * beams, 1), model.special_ids["decoder_start_token_id"])
    scores = torch.full((batch, beams), float("-inf"))
    scores[:, 0] = 0.0  # the beams of a row start equal: only one of them counts
    done = torch.zeros(batch * beams, dtype=torch.bool)
    first = torch.arange(batch)[:, None] * beams
    for _ in range(steps):
        logits = model.decode(tokens, memory, mask)[:, -1]
        gains = logits.log_softmax(-1)
        gains[done] = float("-inf")
        gains[done, pad] = 0.0  # what has ended goes on with padding, at no cost
        vocabulary = gains.shape[1]
        scores, best = (scores[:, :, None] + gains.view(batch, beams, -1)).flatten(1).topk(beams)
        rows = (first + best // vocabulary).flatten()
        chosen = (best % vocabulary).flatten()
        tokens = torch.cat((tokens[rows], chosen[:, None]), dim=1)
        done = done[rows] | (chosen == end)
        if bool(done.all()):
            break
    lengths = (tokens[:, 1:] != pad).sum(1).view(batch, beams)
    return tokens[first[:, 0] + (scores / lengths).argmax(1), 1:]


def pronounce(
    model: G2P, words: list[str], source: Tokenizer, target: Tokenizer, *, beams: int = 1, batch: int = 512
) -> list[Pronunciation]:
    """One pronunciation per word, in the order of the words."""
    # Alike lengths together: less padding.
    order = sorted(range(len(words)), key=lambda i: len(words[i]))
    spoken: list[Pronunciation] = [()] * len(words)
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        ids = beam_search(model, *encode_words([words[i] for i in places], source), beams)
        for place, text in zip(places, target.decode_batch(ids.tolist()), strict=True):
            spoken[place] = tuple(text.split())
    return spoken


def edits(one: Pronunciation, other: Pronunciation) -> int:
    """Levenshtein's distance."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def without_stress(spoken: Pronunciation) -> Pronunciation:
    return tuple(phoneme.rstrip("012") for phoneme in spoken)


def score(lexicon: Lexicon, predicted: dict[str, Pronunciation]) -> Score:
    """Scores the words of ``predicted`` against their pronunciations in ``lexicon``."""
    wrong = errors = length = 0
    for word, spoken in predicted.items():
        distance, size = min((edits(spoken, reference), len(reference)) for reference in lexicon[word])
        errors, length, wrong = errors + distance, length + size, wrong + (distance > 0)
    return Score(words=len(predicted), per=100 * errors / length, wer=100 * wrong / len(predicted))


def table(lexicon: Lexicon, predicted: dict[str, Pronunciation]) -> str:
    """The figures as a Markdown table, over all words and over those without a relative in training."""
    train = take(lexicon, "train")
    strangers = {word: spoken for word, spoken in predicted.items() if not has_inflection(word, train)}
    bare = {word: tuple(without_stress(one) for one in spoken) for word, spoken in lexicon.items()}
    rows = [
        ("all words", score(lexicon, predicted)),
        ("all words, stress ignored", score(bare, {word: without_stress(said) for word, said in predicted.items()})),
        ("no inflection of the word in training", score(lexicon, strangers)),
    ]
    lines = [f"| {name} | {one.words} | {one.per:.2f} % | {one.wer:.2f} % |" for name, one in rows]
    return "\n".join(["| | words | PER | WER |", "|---|---|---|---|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description="Error rates of the committed weights on held-out words.")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--beams", type=int, default=1, help="1 is greedy")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    lexicon = load_lexicon()
    words = list(take(lexicon, arguments.split))
    source, target = (Tokenizer.from_file(str(FOLDER / G2P.tokenizers[side])) for side in ("source", "target"))
    spoken = pronounce(factory(), words, source, target, beams=arguments.beams)
    print(f"{arguments.split}, {'greedy' if arguments.beams == 1 else f'{arguments.beams} beams'}\n")
    print(table(lexicon, dict(zip(words, spoken, strict=True))))


if __name__ == "__main__":
    main()
