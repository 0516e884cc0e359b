"""A BERT classifier from nothing in a few seconds: writes a Hugging Face checkpoint that ``txopt export`` takes.

It owns a toy data set (sentences about meals, made from lists of words), a WordPiece tokenizer trained on it, and a
tiny BERT. The checkpoint shows the road for classifiers; nobody needs this classifier itself.

    python -m examples.classifier.train DIR
"""

import random
import sys
from itertools import product
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

LABELS = ("negative", "positive")
WORDS = (
    ("awful", "cold", "bland", "stale", "slow", "rude", "dirty", "terrible"),
    ("great", "warm", "tasty", "fresh", "quick", "kind", "clean", "wonderful"),
)
SUBJECTS = ("the soup", "the bread", "the waiter", "the room", "our table", "the service")
FRAMES = ("{} was {}", "{} is {} today", "i found {} really {}", "we thought that {} was {}")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def sentences() -> list[tuple[str, int]]:
    """Every sentence with its label; "not" in front of the word turns it around."""
    found = []
    for label, words in enumerate(WORDS):
        for frame, subject, word in product(FRAMES, SUBJECTS, words):
            found.append((frame.format(subject, word), label))
            found.append((frame.format(subject, f"not {word}"), 1 - label))
    return found


def wordpiece(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def main(directory: Path) -> None:
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # matrices this small are slower on several
    data = sentences()
    random.shuffle(data)
    held_out, training = data[:100], data[100:]
    tokenizer = wordpiece([text for text, _ in training])
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        id2label=dict(enumerate(LABELS)),
        label2id={label: index for index, label in enumerate(LABELS)},
    )
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(1, 11):
        random.shuffle(training)
        for start in range(0, len(training), 32):
            texts, labels = zip(*training[start : start + 32], strict=True)
            loss = model(**tokenizer(list(texts), padding=True, return_tensors="pt"), labels=torch.tensor(labels)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch}: loss of the last batch {loss.item():.4f}")
    model.eval()
    with torch.no_grad():
        texts, labels = zip(*held_out, strict=True)
        guesses = model(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits.argmax(-1)
    right = int((guesses == torch.tensor(labels)).sum())
    print(f"{right} of {len(held_out)} held-out sentences right; checkpoint in {directory}")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m examples.classifier.train DIR")
    main(Path(sys.argv[1]))
