"""Constraints on the next token, in transformers' order: forced, suppressed and repeated ids, least lengths.

Owns what each option does to scores, and ``PROCESSORS``, the order. Each works in place on scores float32 [R,V] that
the loop owns, given the tokens so far, int64 [R,L]; ``active`` says beforehand whether there is anything to do at
length L, so that a loop need not copy the decoder's logits for nothing. It knows neither how a token is chosen nor
decoders. What shapes a distribution before sampling is in sampling.py.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from txopt.runtime.decoder import Floats, Ids
from txopt.runtime.errors import UsageError
from txopt.runtime.no_next_token import not_a_number
from txopt.runtime.options import GenerationOptions
from txopt.runtime.sampling import Warper

logger = logging.getLogger(__name__)

BANNED = np.float32(-np.inf)


class Processor(Protocol):
    """Changes scores before a token is chosen."""

    def active(self, length: int) -> bool:
        """Whether calling it with ``length`` tokens per row would change anything."""
        ...

    def __call__(self, ids: Ids, scores: Floats) -> None:
        """Changes ``scores`` [R,V] in place, given ``ids`` [R,L]."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the constraints need to know of a call besides its options.

    Attributes:
        prompt_length: P, padding included.
        max_length: the most tokens a row may have, prompt included.
        padding: int64 [R], padded positions at the left of each row's prompt, None without padding.
        encoder_ids: int64 [B,T], the encoder's tokens; None where its input is no text.
    """

    prompt_length: int
    max_length: int
    padding: Ids | None = None
    encoder_ids: Ids | None = None


class _Always:
    def active(self, length: int) -> bool:
        return True


class EncoderRepetitionPenalty(_Always):
    """Makes tokens of the source likelier (``penalty`` above 1) or less likely."""

    def __init__(self, penalty: float, encoder_ids: Ids) -> None:
        self._penalty, self._encoder_ids, self._largest = 1 / penalty, encoder_ids, int(encoder_ids.max())

    def __call__(self, ids: Ids, scores: Floats) -> None:
        rows = np.arange(len(scores))[:, None]
        if self._largest >= scores.shape[1]:  # transformers' gather fails here too
            raise UsageError(
                f"encoder_repetition_penalty: expected a source in the target's vocabulary of {scores.shape[1]}, got "
                f"{self._largest} in it; source and target have vocabularies of their own: leave the option out"
            )
        tokens = self._encoder_ids[_sources(len(scores), self._encoder_ids)]
        scores[rows, tokens] = _penalized(scores[rows, tokens], self._penalty)


class RepetitionPenalty(_Always):
    """Makes tokens that a row has already less likely, padding not counted (CTRL, arXiv 1909.05858, section 4.1)."""

    def __init__(self, penalty: float, padding: Ids | None) -> None:
        self._penalty, self._padding = penalty, padding

    def __call__(self, ids: Ids, scores: Floats) -> None:
        counted = (ids >= 0) & (ids < scores.shape[1])  # an embedding may know ids that the output does not
        if self._padding is not None:
            counted &= np.arange(ids.shape[1]) >= self._padding[:, None]
        rows, positions = np.nonzero(counted)
        tokens = ids[rows, positions]
        scores[rows, tokens] = _penalized(scores[rows, tokens], self._penalty)


class NoRepeatNgram:
    """Bans tokens that would complete an n-gram which the row has already."""

    def __init__(self, size: int) -> None:
        self._size = size

    def active(self, length: int) -> bool:
        return length >= self._size

    def __call__(self, ids: Ids, scores: Floats) -> None:
        _ban_completions(ids, np.lib.stride_tricks.sliding_window_view(ids, self._size, axis=1), scores)


class EncoderNoRepeatNgram:
    """Bans tokens that would complete an n-gram of the source."""

    def __init__(self, size: int, encoder_ids: Ids) -> None:
        self._size, self._possible = size, encoder_ids.shape[1] >= size
        if self._possible:
            self._windows = np.lib.stride_tricks.sliding_window_view(encoder_ids, size, axis=1)

    def active(self, length: int) -> bool:
        return self._possible and length >= self._size - 1

    def __call__(self, ids: Ids, scores: Floats) -> None:
        _ban_completions(ids, self._windows[_sources(len(scores), self._windows)], scores)


class BadWords(_Always):
    """Bans the last token of each sequence where the ones before it have just been said.

    A word that is only an end of sequence is not banned.
    """

    def __init__(self, words: Sequence[Sequence[int]], eos: Sequence[int]) -> None:
        words = [tuple(word) for word in words if len(word) > 1 or word[0] not in eos]
        self._largest = max((token for word in words for token in word), default=0)
        self._single = np.array(sorted({word[0] for word in words if len(word) == 1}), np.int64)
        self._longer = []
        for size in sorted({len(word) for word in words if len(word) > 1}):
            group = np.array([word for word in words if len(word) == size], np.int64)
            self._longer.append((group[:, :-1], group[:, -1]))

    def __call__(self, ids: Ids, scores: Floats) -> None:
        if self._largest >= scores.shape[1]:
            raise UsageError(
                f"bad_words_ids: expected ids below the vocabulary's {scores.shape[1]}, got {self._largest}"
            )
        scores[:, self._single] = BANNED
        for beginnings, last in self._longer:
            said = beginnings.shape[1]
            if said <= ids.shape[1]:
                rows, words = np.nonzero((ids[:, None, -said:] == beginnings).all(axis=2))
                scores[rows, last[words]] = BANNED


@dataclass(frozen=True)
class Ban:
    """Bans ``tokens`` while a row's length is at least ``first`` and below ``end`` (None: for ever)."""

    tokens: Ids
    first: int = 0
    end: int | None = None

    def active(self, length: int) -> bool:
        return self.first <= length and (self.end is None or length < self.end)

    def __call__(self, ids: Ids, scores: Floats) -> None:
        scores[:, _within(self.tokens, scores)] = BANNED


@dataclass(frozen=True)
class Force:
    """Leaves only ``tokens``, at one length."""

    tokens: Ids
    length: int
    option: str

    def active(self, length: int) -> bool:
        return length == self.length

    def __call__(self, ids: Ids, scores: Floats) -> None:
        if self.tokens.max() >= scores.shape[1]:
            raise UsageError(
                f"{self.option}: expected an id below the vocabulary's {scores.shape[1]}, got {self.tokens.max()}"
            )
        scores[:] = BANNED
        scores[:, self.tokens] = 0


class RemoveInvalid(_Always):
    """NaN becomes 0 and infinities the largest finite numbers."""

    def __call__(self, ids: Ids, scores: Floats) -> None:
        np.nan_to_num(scores, copy=False, nan=0.0)


class ExponentialDecay:
    """From ``start`` on, raises the end of sequence more at every step."""

    def __init__(self, start: int, factor: float, eos: Ids) -> None:
        self._start, self._factor, self._eos = start, factor, eos

    def active(self, length: int) -> bool:
        return length > self._start

    def __call__(self, ids: Ids, scores: Floats) -> None:
        tokens = _within(self._eos, scores)
        values = scores[:, tokens]
        with np.errstate(over="ignore", invalid="ignore"):  # long texts outgrow float32; banned ends stay banned
            gain = np.abs(values) * np.float32(np.float64(self._factor) ** (ids.shape[1] - self._start) - 1)
            scores[:, tokens] = np.where(np.isfinite(values), values + gain, values)


class Processors:
    """Constraints, then what shapes the distribution, as one processor; false where there is nothing to do."""

    def __init__(self, processors: Sequence[Processor], warpers: Sequence[Warper] = ()) -> None:
        self._processors, self._warpers = tuple(processors), tuple(warpers)

    def __bool__(self) -> bool:
        return bool(self._processors or self._warpers)

    def active(self, length: int) -> bool:
        return bool(self._warpers) or any(processor.active(length) for processor in self._processors)

    def __call__(self, ids: Ids, scores: Floats) -> None:
        length = ids.shape[1]
        for processor in self._processors:
            if processor.active(length):
                processor(ids, scores)
        # What shapes a distribution sorts it, and NaN has no place in an order.
        if self._warpers and np.isnan(scores.max(axis=1)).any():
            raise not_a_number(length)
        for warp in self._warpers:
            warp(scores)


def constraints(options: GenerationOptions, request: Request) -> list[Processor]:
    """The constraints that ``options`` ask for, in transformers' order.

    Errors:
        UsageError: at their first use, ids beyond the vocabulary where they cannot be meant.
    """
    made = (make(options, request) for make in PROCESSORS)
    return [processor for processor in made if processor is not None]


def _encoder_repetition_penalty(options: GenerationOptions, request: Request) -> Processor | None:
    if options.encoder_repetition_penalty == 1.0 or not _has_encoder_ids(request, "encoder_repetition_penalty"):
        return None
    assert request.encoder_ids is not None
    return EncoderRepetitionPenalty(options.encoder_repetition_penalty, request.encoder_ids)


def _repetition_penalty(options: GenerationOptions, request: Request) -> Processor | None:
    return None if options.repetition_penalty == 1.0 else RepetitionPenalty(options.repetition_penalty, request.padding)


def _no_repeat_ngram(options: GenerationOptions, request: Request) -> Processor | None:
    return NoRepeatNgram(options.no_repeat_ngram_size) if options.no_repeat_ngram_size else None


def _encoder_no_repeat_ngram(options: GenerationOptions, request: Request) -> Processor | None:
    if not options.encoder_no_repeat_ngram_size or not _has_encoder_ids(request, "encoder_no_repeat_ngram_size"):
        return None
    assert request.encoder_ids is not None
    return EncoderNoRepeatNgram(options.encoder_no_repeat_ngram_size, request.encoder_ids)


def _bad_words(options: GenerationOptions, request: Request) -> Processor | None:
    return BadWords(options.bad_words_ids, options.eos_ids) if options.bad_words_ids else None


def _minimum(options: GenerationOptions, request: Request) -> Processor | None:
    new = options.min_new_tokens
    least = options.min_length if new is None else request.prompt_length + new
    return Ban(_array(options.eos_ids), end=least) if options.eos_ids and least > 0 else None


def _forced_bos(options: GenerationOptions, request: Request) -> Processor | None:
    token = options.forced_bos_token_id
    return None if token is None else Force(_array([token]), 1, "forced_bos_token_id")


def _forced_eos(options: GenerationOptions, request: Request) -> Processor | None:
    tokens = options.forced_eos_ids
    return Force(_array(tokens), request.max_length - 1, "forced_eos_token_id") if tokens else None


def _remove_invalid(options: GenerationOptions, request: Request) -> Processor | None:
    return RemoveInvalid() if options.remove_invalid_values else None


def _exponential_decay(options: GenerationOptions, request: Request) -> Processor | None:
    if options.exponential_decay_length_penalty is None:
        return None
    start, factor = options.exponential_decay_length_penalty
    return ExponentialDecay(start + request.prompt_length, factor, _array(options.eos_ids))


def _suppress(options: GenerationOptions, request: Request) -> Processor | None:
    return Ban(_array(options.suppress_tokens)) if options.suppress_tokens else None


def _begin_suppress(options: GenerationOptions, request: Request) -> Processor | None:
    if not options.begin_suppress_tokens:
        return None
    # After a lone start token the first place belongs to forced_bos_token_id, so the text begins one later.
    forced = request.prompt_length == 1 and options.forced_bos_token_id is not None
    begin = request.prompt_length + forced
    return Ban(_array(options.begin_suppress_tokens), first=begin, end=begin + 1)


# transformers' order (generation/utils.py, _get_logits_processor): penalties see the model's own scores, forcing
# overrules every ban before it, and what is suppressed stays so even where it is forced.
PROCESSORS: tuple[Callable[[GenerationOptions, Request], Processor | None], ...] = (
    _encoder_repetition_penalty,
    _repetition_penalty,
    _no_repeat_ngram,
    _encoder_no_repeat_ngram,
    _bad_words,
    _minimum,
    _forced_bos,
    _forced_eos,
    _remove_invalid,
    _exponential_decay,
    _suppress,
    _begin_suppress,
)


def _has_encoder_ids(request: Request, option: str) -> bool:
    if request.encoder_ids is None:
        logger.warning("%s needs a text encoder's input_ids and is ignored", option)
    return request.encoder_ids is not None


def _array(tokens: Sequence[int] | None) -> Ids:
    return np.unique(np.array(tokens or (), np.int64))


def _within(tokens: Ids, scores: Floats) -> Ids:
    """The tokens that exist; checkpoints list others, and a negative index would hit the vocabulary's end."""
    return tokens[(tokens >= 0) & (tokens < scores.shape[1])]


def _sources(rows: int, per_source: Ids) -> Ids:
    """The source that each row belongs to: rows of one source are adjacent."""
    return np.arange(rows) // (rows // len(per_source))


def _penalized(values: Floats, penalty: float) -> Floats:
    return np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))


def _ban_completions(ids: Ids, windows: Ids, scores: Floats) -> None:
    """Bans the last token of every window [R,W,n] that begins as the row ends."""
    size = windows.shape[2]
    ending = ids[:, ids.shape[1] + 1 - size :]
    rows, places = np.nonzero((windows[:, :, :-1] == ending[:, None]).all(axis=2))
    tokens = windows[rows, places, -1]
    known = tokens < scores.shape[1]
    scores[rows[known], tokens[known]] = BANNED
