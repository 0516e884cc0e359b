"""Scores that hold no next token, NaN or every token removed: which of the two it is, and what to do about it.

Owns the two errors. Loops come here with scores that a choice has failed on; it knows neither loops nor processors.
"""

import numpy as np

from txopt.runtime.decoder import Floats
from txopt.runtime.errors import TxoptError, UsageError
from txopt.runtime.options import GenerationOptions

# Options that can remove tokens, alone or together.
REMOVING = (
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "min_length",
    "min_new_tokens",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


def no_next_token(largest: Floats, length: int, options: GenerationOptions) -> TxoptError:
    """What to raise for rows that nothing can be chosen from, by their ``largest`` scores [R] after ``length`` tokens."""
    return no_token_left(length, options) if np.isneginf(largest).all() else not_a_number(length)


def not_a_number(length: int) -> TxoptError:
    """What to raise when a decoder's scores after ``length`` tokens hold NaN, or an infinity that becomes NaN."""
    return TxoptError(
        f"the scores after {length} tokens hold NaN or infinity, so there is no next token: in float16 this is mostly an "
        "overflow, and --precision fp32 or bf16 helps; in float32 the weights or the inputs hold them already; "
        "remove_invalid_values=True goes on regardless"
    )


def no_token_left(length: int, options: GenerationOptions) -> TxoptError:
    """What to raise when every token is removed after ``length`` tokens: the user's doing if ``options`` can do it."""
    asked = [name for name in REMOVING if getattr(options, name) != getattr(GenerationOptions, name)]
    title = f"no token is left to choose after {length} tokens"
    if not asked:
        return TxoptError(f"{title}: the model or a processor of your own scores all of them with minus infinity")
    return UsageError(
        f"{title}: expected {' and '.join(asked)} to leave at least one of the vocabulary, found all removed; "
        "remove fewer tokens"
    )
