"""generate(): prompt and options in, ids out, equal to transformers' generate() for the same options.

Owns lengths, the repetition of the prompt, and the loop of greedy search and sampling; beam search is in beam.py. It
knows a model only as a ``Decoder``: neither families, nor encoders, nor buffers.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.beam import ROOM, beam_search
from txopt.runtime.decoder import THIS_MODEL, Decoder, Floats, GenerationResult, GreedyDecoder, Ids
from txopt.runtime.errors import InputError, LimitError, UsageError
from txopt.runtime.no_next_token import no_token_left, not_a_number
from txopt.runtime.options import GenerationOptions
from txopt.runtime.processors import Processor, Processors, Request, constraints
from txopt.runtime.sampling import draw, warpers

__all__ = ["Decoder", "GenerationResult", "OpenDecoder", "generate", "tokens"]

logger = logging.getLogger(__name__)

NEW_TOKENS = 20  # transformers' default when nobody says how long

OpenDecoder = Callable[[int], Decoder]


def generate(
    open_decoder: OpenDecoder,
    prompt: Ids,
    options: GenerationOptions,
    *,
    prompt_mask: Ids | None = None,
    encoder_ids: Ids | None = None,
    processors: Sequence[Processor] = (),
    stream: Callable[[Ids], None] | None = None,
) -> GenerationResult:
    """Decodes from ``prompt`` until every row has ended or is as long as it may be.

    Args:
        open_decoder: gives a decoder of B*K rows for K, a source's rows adjacent; called once.
        prompt: int64 [B,P], what the decoder starts from; repeated K times here.
        options: see ``GenerationOptions``.
        prompt_mask: [B,P], 0 where a row is padded on the left; None without padding.
        encoder_ids: int64 [B,T], the encoder's tokens, for the encoder_* options (as in transformers, a decoder alone
            gives its prompt).
        processors: further constraints, after those of ``options`` and before temperature and its like.
        stream: called with the next token of every row, int64 [B*num_return_sequences], as soon as it is chosen.

    Raises:
        InputError: an ill-shaped prompt or mask, or a prompt as long as the model allows.
        UsageError: lengths beyond what the model can or not beyond the prompt, token ids beyond the vocabulary,
            streaming of beams, options that leave no token.
        TxoptError: the decoder gives NaN.
    """
    run = _prepare(open_decoder, prompt, options, prompt_mask, encoder_ids, processors, streams=stream is not None)
    if options.num_beams > 1:
        return beam_search(run.decoder, run.prompt, run.mask, options, run.max_length, run.processors)
    length = run.prompt.shape[1]
    sequences = _Sequences(run.prompt)
    for chosen in _sequential(run, sequences):
        length += 1
        if stream is not None:
            stream(chosen.copy())
    return GenerationResult(sequences=sequences.ids[:, :length].copy())


def tokens(
    open_decoder: OpenDecoder,
    prompt: Ids,
    options: GenerationOptions,
    *,
    prompt_mask: Ids | None = None,
    encoder_ids: Ids | None = None,
    processors: Sequence[Processor] = (),
) -> Iterator[Ids]:
    """Like ``generate``, of one beam: yields the next token of every row, int64 [B*num_return_sequences].

    Whatever ``_prepare`` can refuse is refused by the call, not by the first ``next``.
    """
    run = _prepare(open_decoder, prompt, options, prompt_mask, encoder_ids, processors, streams=True)
    return (chosen.copy() for chosen in _sequential(run, _Sequences(run.prompt)))


@dataclass(frozen=True)
class _Run:
    """A call, checked: R rows of ``prompt`` int64 [R,P] and ``mask`` int64 [R,P] (None: no padding)."""

    decoder: Decoder
    prompt: Ids
    mask: Ids | None
    options: GenerationOptions
    max_length: int
    processors: Processors


class _Sequences:
    """Rows that grow: ``ids`` int64 [R,places], as wide as has been needed, whatever length is allowed."""

    def __init__(self, prompt: Ids) -> None:
        rows, length = prompt.shape
        self.ids = np.empty((rows, length + ROOM), np.int64)
        self.ids[:, :length] = prompt

    def grow(self) -> Ids:
        """``ids``, twice as wide as before."""
        rows, places = self.ids.shape
        wider = np.empty((rows, 2 * places), np.int64)
        wider[:, :places] = self.ids
        self.ids = wider
        return wider


def _sequential(run: _Run, sequences: _Sequences) -> Iterator[Ids]:
    """Greedy search or sampling: fills ``sequences`` and yields each step's tokens [R].

    The loop runs once per token, so it does nothing that the options did not ask for: without processors that is one comparison and
    one store, and scores stay with a decoder that finds the largest itself.
    """
    decoder, processors, max_length, (rows, length) = run.decoder, run.processors, run.max_length, run.prompt.shape
    ids, places = sequences.ids, sequences.ids.shape[1]
    end_ids, padding = frozenset(run.options.eos_ids), run.options.padding
    constrained = bool(processors)
    generator = np.random.default_rng(run.options.seed) if run.options.do_sample else None
    greedy = decoder if generator is None and isinstance(decoder, GreedyDecoder) else None
    logits = np.ascontiguousarray(decoder.prefill(run.prompt, run.mask))  # of long prompts it is one slice in many
    likeliest: Ids | None = None
    ends = np.isin(np.arange(logits.shape[1]), run.options.eos_ids)
    finished, every_row = np.zeros(rows, np.bool_), np.arange(rows)
    while True:
        active = constrained and processors.active(length)
        if active:
            processors(ids[:, :length], logits)
        if generator is not None:
            chosen = draw(logits, generator, length, run.options)
        else:
            chosen = logits.argmax(axis=1) if likeliest is None else likeliest
        if active and generator is None and not chosen.all():  # where every token is removed, argmax says 0
            _check_left(logits[every_row, chosen], finished, length, run.options)
        if rows == 1:
            done = chosen.item() in end_ids
        elif end_ids:
            hits = ends[chosen]
            if padding is not None:
                chosen[finished] = padding
            finished |= hits
            done = bool(finished.all())
        else:
            done = False
        if length == places:
            ids = sequences.grow()
            places = ids.shape[1]
        ids[:, length] = chosen
        length += 1
        yield chosen
        if done or length == max_length:
            # NaN stays in a row's cache once it is there, so looking at the last scores is enough.
            last = logits if greedy is None or likeliest is None else greedy.scores()
            if np.isnan(last.max()):
                raise not_a_number(length - 1)
            return
        if greedy is None or (constrained and processors.active(length)):
            logits, likeliest = decoder.step(chosen), None
        else:
            likeliest = greedy.advance(chosen)


def _check_left(largest: Floats, finished: NDArray[np.bool_], length: int, options: GenerationOptions) -> None:
    """Refuses a row that goes on and whose ``largest`` score [R] says that no token is left: argmax makes one up."""
    empty = np.isneginf(largest) & ~finished
    if empty.any():
        raise no_token_left(length, options)


def _prepare(
    open_decoder: OpenDecoder,
    prompt: Ids,
    options: GenerationOptions,
    prompt_mask: Ids | None,
    encoder_ids: Ids | None,
    processors: Sequence[Processor],
    *,
    streams: bool,
) -> _Run:
    if streams and options.num_beams > 1:
        raise UsageError(
            f"num_beams={options.num_beams} cannot be streamed: its tokens are known only at the end; use num_beams=1"
        )
    prompt, mask, padding = _checked_prompt(prompt, prompt_mask)
    if encoder_ids is not None and (np.ndim(encoder_ids) != 2 or len(encoder_ids) != len(prompt)):
        raise InputError(f"encoder_ids: expected int64 [{len(prompt)},T], got shape {list(np.shape(encoder_ids))}")
    copies = max(options.num_beams, options.num_return_sequences)
    decoder = open_decoder(copies)
    max_length = _longest(options, prompt.shape[1], decoder.max_length, getattr(decoder, "limited_by", THIS_MODEL))
    request = Request(
        prompt_length=prompt.shape[1],
        max_length=max_length,
        padding=None if padding is None else np.repeat(padding, copies),
        encoder_ids=encoder_ids,
    )
    return _Run(
        decoder=decoder,
        prompt=np.repeat(prompt, copies, axis=0),
        mask=None if mask is None else np.repeat(mask, copies, axis=0),
        options=options,
        max_length=max_length,
        processors=Processors([*constraints(options, request), *processors], warpers(options)),
    )


def _checked_prompt(prompt: Ids, prompt_mask: Ids | None) -> tuple[Ids, Ids | None, NDArray[np.int64] | None]:
    """The prompt, its mask and how many positions of each row are padding; the latter two None where none is."""
    prompt = np.asarray(prompt)
    if prompt.ndim != 2 or not prompt.size or prompt.dtype.kind not in "iu":
        raise InputError(
            f"prompt: expected int64 [B,P] with at least one token a row, got {prompt.dtype} {list(prompt.shape)}"
        )
    prompt = prompt.astype(np.int64, copy=False)
    if prompt_mask is None:
        return prompt, None, None
    mask = np.asarray(prompt_mask)
    if mask.shape != prompt.shape:
        raise InputError(f"prompt mask: expected the prompt's shape {list(prompt.shape)}, got {list(mask.shape)}")
    mask = (mask != 0).astype(np.int64)
    if (np.diff(mask, axis=1) < 0).any() or not mask[:, -1].all():
        raise InputError(
            "prompt mask: expected padding (0) on the left only and a last token in every row; pad on the left"
        )
    if mask.all():
        return prompt, None, None
    return prompt, mask, mask.argmax(axis=1)


def _longest(options: GenerationOptions, prompt_length: int, limit: int | None, limited_by: str) -> int:
    """The most tokens a row may have, prompt included; ``limited_by`` has the positions that are the ``limit``."""
    engines = limited_by != THIS_MODEL
    if limit is not None and prompt_length >= limit:
        raise (LimitError if engines else InputError)(
            f"the prompt has {prompt_length} tokens and {limited_by} at most {limit} positions: "
            f"expected at most {limit - 1} tokens"
        )
    if options.max_new_tokens is not None:
        asked, option = prompt_length + options.max_new_tokens, f"max_new_tokens={options.max_new_tokens}"
    elif options.max_length is not None:
        asked, option = options.max_length, f"max_length={options.max_length}"
    else:
        asked, option = prompt_length + NEW_TOKENS, ""
    if limit is not None and asked > limit:
        if option and not options.clip_length:
            raise (LimitError if engines else UsageError)(
                f"{option} makes rows of up to {asked} tokens with this prompt of {prompt_length}, "
                f"and {limited_by} has {limit} positions: ask for max_new_tokens={limit - prompt_length} at most"
            )
        asked = limit
    if asked <= prompt_length:
        raise UsageError(
            f"{option} leaves no room after a prompt of {prompt_length} tokens: ask for max_new_tokens instead"
        )
    least = options.min_length if options.min_new_tokens is None else prompt_length + options.min_new_tokens
    if least > asked:
        logger.warning("a least length of %d tokens cannot be reached: rows stop at %d", least, asked)
    return asked
