"""The tokenizers: writes source.json (letters) and target.json (phonemes), which both training and the runtime read.

This file owns ids: 0 padding, 1 start, 2 end, 3 unknown, then the letters or the phonemes in sorted order.
"""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing

from examples.g2p.data import letters, load_lexicon, phonemes

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
FOLDER = Path(__file__).parent


def word_level(symbols: list[str]) -> Tokenizer:
    """One id per symbol, the special ones first; the end is appended to what is encoded."""
    ids = {symbol: i for i, symbol in enumerate((*SPECIAL, *symbols))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", ids["</s>"])])
    return tokenizer


def source_tokenizer(symbols: list[str]) -> Tokenizer:
    """Text to letters: case and accents are dropped, a typographic apostrophe is an apostrophe."""
    tokenizer = word_level(symbols)
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace("\u2019", "'"),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def target_tokenizer(symbols: list[str]) -> Tokenizer:
    """Phonemes joined by spaces, as the dictionary writes them; without a decoder, tokens are joined by spaces."""
    tokenizer = word_level(symbols)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def main() -> None:
    lexicon = load_lexicon()
    source_tokenizer(letters(lexicon)).save(str(FOLDER / "source.json"))
    target_tokenizer(phonemes(lexicon)).save(str(FOLDER / "target.json"))


if __name__ == "__main__":
    main()
