"""Beam search and beam sampling: the ids and scores of transformers 5's vectorised search (``_beam_search``).

Owns which continuations live on, which finished sequences are kept, and when to stop. Equal scores: the lower beam
first, then the better token, then the lower id (topk.py); PyTorch leaves that order open. It knows neither constraints
nor buffers.
Axes: B sources, K beams, C = (1 + ends of sequence) * K candidates, at least 2 * K, so that K of them can always go on.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.decoder import Decoder, Floats, GenerationResult, Ids, RankingDecoder
from txopt.runtime.errors import UsageError
from txopt.runtime.no_next_token import no_token_left, not_a_number
from txopt.runtime.options import GenerationOptions
from txopt.runtime.processors import Processors
from txopt.runtime.sampling import draw_several, log_softmax
from txopt.runtime.topk import top

# transformers' "as good as impossible". In float32 its neighbours are 64 apart, so sums with it are ties: keep it.
IMPOSSIBLE = np.float32(-1e9)
ROOM = 64  # new tokens that sequences have places for at first; they grow, for most end long before they may
_LEAST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclass
class _Hypotheses:
    """B x K sequences: ids int64 [B,K,M], the rows that their tokens continued int32 [B,K,M-P], scores [B,K].

    M is as many places as were needed so far, whatever length is allowed.
    """

    ids: Ids
    parents: NDArray[np.int32]
    scores: Floats

    def grown(self, fill: int) -> "_Hypotheses":
        """The same with twice as many places; new ones hold ``fill``."""
        sources, beams, places = self.ids.shape
        ids = np.full((sources, beams, places), fill, np.int64)
        parents = np.full((sources, beams, places), -1, np.int32)
        return _Hypotheses(
            np.concatenate([self.ids, ids], axis=2), np.concatenate([self.parents, parents], axis=2), self.scores
        )


@dataclass(frozen=True)
class _Candidates:
    """Continuations, [B,C] each, by falling score (when sampling: as drawn): beam, token, summed log probability."""

    beams: Ids
    tokens: Ids
    scores: Floats


def beam_search(
    decoder: Decoder, prompt: Ids, mask: Ids | None, options: GenerationOptions, max_length: int, processors: Processors
) -> GenerationResult:
    """Decodes with ``options.num_beams`` beams per source.

    Args:
        decoder: R = B*K rows, a source's beams adjacent.
        prompt: int64 [R,P], every source K times. mask: int64 [R,P] or None.
        max_length: the most tokens a row may have, prompt included.
        processors: applied to log probabilities, before they are summed.

    Raises:
        UsageError: the options leave a source no token before it has ended once, or length_penalty makes numbers
            that float32 does not hold.
        TxoptError: the decoder gives NaN.
    """
    (rows, length), beams = prompt.shape, options.num_beams
    prompt_length, sources = length, rows // beams
    # transformers fills with the end of sequence where pad_token_id is 0, which it takes for unset; here ids are to
    # equal its own.
    fill = (options.pad_token_id or options.eos_ids[0]) if options.eos_ids else -1
    running, finished = _start(prompt, beams, fill), _start(prompt, beams, fill)
    running.scores[:, 0] = 0  # all beams of a source are one at first: only one may be continued
    is_finished = np.zeros((sources, beams), np.bool_)
    improvable = np.ones(sources, np.bool_)  # may a running beam still beat the finished ones?
    count = max(2, 1 + len(options.eos_ids)) * beams
    first_row = np.arange(sources)[:, None] * beams
    source = np.arange(sources)[:, None]
    choose = _Chooser(options, processors, count)

    ranking = decoder if isinstance(decoder, RankingDecoder) and decoder.most_ranked >= count else None
    logits = decoder.prefill(prompt, mask)
    ends = np.isin(np.arange(logits.shape[1]), options.eos_ids)
    found = choose(logits, running, length)
    while True:
        # A source that has ended once may run dry: its result is there.
        if np.isneginf(found.scores[:, 0]).any() and (np.isneginf(found.scores[:, 0]) & ~is_finished.any(axis=1)).any():
            raise no_token_left(length, options)
        hits = ends[found.tokens] if length + 1 < max_length else np.ones_like(found.tokens, np.bool_)
        new = length - prompt_length
        if length == running.ids.shape[2]:
            running, finished = running.grown(fill), finished.grown(fill)

        if hits[:, :beams].any():  # what is beyond the first K only exists to go on
            scores = _per_length(found.scores[:, :beams], new + 1, options.length_penalty)
            refused = ~hits[:, :beams]
            refused |= ~improvable[:, None]
            if options.early_stopping is True:
                refused |= is_finished.all(axis=1, keepdims=True)
            scores[refused] += IMPOSSIBLE
            # The new come first: where both are impossible, a sequence with tokens is better than an empty place.
            best, order = top(np.concatenate([scores, finished.scores], axis=1), beams)
            ended = _continue(running, found, source, slice(0, beams), length, prompt_length)
            finished = _Hypotheses(
                np.concatenate([ended.ids, finished.ids], axis=1)[source, order],
                np.concatenate([ended.parents, finished.parents], axis=1)[source, order],
                best,
            )
            is_finished = np.concatenate([hits[:, :beams], is_finished], axis=1)[source, order]

        alive, picked = top(np.where(hits, found.scores + IMPOSSIBLE, found.scores), beams)
        running = _continue(running, found, source, picked, length, prompt_length)
        running.scores = alive
        length += 1

        longest = options.early_stopping == "never" and options.length_penalty > 0
        reach = _per_length(alive[:, 0], (max_length if longest else length) - prompt_length, options.length_penalty)
        improvable &= reach > finished.scores.min(axis=1)
        if not improvable.any() or hits.all() or (options.early_stopping is True and is_finished.all()):
            return _result(finished, prompt_length, options.num_return_sequences)

        decoder.reorder((first_row + found.beams[source, picked]).reshape(rows))
        tokens = running.ids[:, :, length - 1].reshape(rows)
        if ranking is None or choose.sees_all(length):
            found = choose(decoder.step(tokens), running, length)
        else:
            found = choose.ranked(*ranking.rank(tokens), running, length)


def _per_length(scores: Floats, tokens: int, penalty: float) -> Floats:
    """``scores`` over tokens ** penalty; UsageError where float32 does not hold that, and no score would tell a beam."""
    try:
        weight = float(tokens) ** penalty
    except OverflowError:
        weight = float("inf")
    if not _LEAST <= weight <= _LARGEST:
        raise UsageError(
            f"length_penalty={penalty:g} makes {tokens} ** {penalty:g} of the length of {tokens} tokens, which is "
            f"{'0' if weight < 1 else 'infinite'} in float32, so all beams would score the same; expected a number near 1"
        )
    with np.errstate(over="ignore"):  # "impossible" over a small weight is minus infinity: as impossible
        return scores / np.float32(weight)


def _start(prompt: Ids, beams: int, fill: int) -> _Hypotheses:
    rows, length = prompt.shape
    ids = np.full((rows // beams, beams, length + ROOM), fill, np.int64)
    ids[:, :, :length] = prompt.reshape(rows // beams, beams, length)
    parents = np.full((rows // beams, beams, ROOM), -1, np.int32)
    return _Hypotheses(ids, parents, np.full((rows // beams, beams), IMPOSSIBLE))


def _continue(
    running: _Hypotheses, found: _Candidates, source: Ids, picked: Ids | slice, length: int, prompt_length: int
) -> _Hypotheses:
    """The running hypotheses with the ``picked`` candidates appended; without scores, which the caller knows."""
    chosen = (slice(None), picked) if isinstance(picked, slice) else (source, picked)
    beams = found.beams[chosen]
    ids, parents = running.ids[source, beams], running.parents[source, beams]
    ids[:, :, length] = found.tokens[chosen]
    parents[:, :, length - prompt_length] = beams + source * running.ids.shape[1]
    return _Hypotheses(ids, parents, running.scores)


class _Chooser:
    """The ``count`` best, or drawn, continuations of all beams of a source."""

    def __init__(self, options: GenerationOptions, processors: Processors, count: int) -> None:
        self._processors, self._count = processors, count
        self._generator = np.random.default_rng(options.seed) if options.do_sample else None
        self._scratch: Floats | None = None

    def __call__(self, logits: Floats, running: _Hypotheses, length: int) -> _Candidates:
        if not self.sees_all(length):
            scores, tokens = self._best_of_each(logits, length)
        else:
            log_probabilities = log_softmax(logits)
            self._processors(running.ids[:, :, :length].reshape(len(logits), length), log_probabilities)
            # The largest score of each row tells: numpy's maximum of anything and NaN is NaN.
            if np.isnan(log_probabilities.max(axis=1)).any():
                raise not_a_number(length)
            if self._generator is not None:
                return self._draw(log_probabilities, running, self._generator)
            scores, tokens = top(log_probabilities, min(self._count, logits.shape[1]))
        return self._of_all_beams(scores, tokens, running)

    def sees_all(self, length: int) -> bool:
        """Whether the choice after ``length`` tokens is made of all scores, not of the likeliest alone."""
        return self._generator is not None or self._processors.active(length)

    def ranked(self, scores: Floats, tokens: Ids, running: _Hypotheses, length: int) -> _Candidates:
        """The same of log probabilities that fall already, [R,C] or more, and their tokens."""
        if not np.isfinite(scores[:, 0]).all():
            raise not_a_number(length)
        return self._of_all_beams(scores[:, : self._count], tokens[:, : self._count], running)

    def _of_all_beams(self, scores: Floats, tokens: Ids, running: _Hypotheses) -> _Candidates:
        (sources, beams), each = running.scores.shape, scores.shape[1]
        summed = (scores.reshape(sources, beams, each) + running.scores[:, :, None]).reshape(sources, beams * each)
        best, order = top(summed, self._count)
        chosen = np.take_along_axis(tokens.reshape(sources, beams * each), order, axis=1)
        return _Candidates(order // each, chosen, best)

    def _best_of_each(self, logits: Floats, length: int) -> tuple[Floats, Ids]:
        """Log probabilities and tokens [R,C] of each row's best, the only ones that are normalised."""
        largest = logits.max(axis=1, keepdims=True)
        if not np.isfinite(largest).all():  # nothing is removed here: an infinity would be the model's own
            raise not_a_number(length)
        values, tokens = top(logits, min(self._count, logits.shape[1]))
        if self._scratch is None:
            self._scratch = np.empty(logits.shape, np.float32)
        np.subtract(logits, largest, out=self._scratch)
        np.exp(self._scratch, out=self._scratch)
        return (values - largest) - np.log(self._scratch.sum(axis=1, keepdims=True)), tokens

    def _draw(self, log_probabilities: Floats, running: _Hypotheses, generator: np.random.Generator) -> _Candidates:
        sources, beams = running.scores.shape
        vocabulary = log_probabilities.shape[1]
        summed = log_probabilities.reshape(sources, beams, vocabulary) + running.scores[:, :, None]
        summed = summed.reshape(sources, beams * vocabulary)
        drawn = draw_several(summed, self._count, generator)
        return _Candidates(drawn // vocabulary, drawn % vocabulary, np.take_along_axis(summed, drawn, axis=1))


def _result(finished: _Hypotheses, prompt_length: int, returned: int) -> GenerationResult:
    parents = finished.parents[:, :returned].reshape(-1, finished.parents.shape[2])
    generated = int((parents >= 0).sum(axis=1).max())
    return GenerationResult(
        sequences=finished.ids[:, :returned].reshape(len(parents), -1)[:, : prompt_length + generated].copy(),
        scores=finished.scores[:, :returned].reshape(-1).copy(),
        beam_indices=parents[:, :generated].copy(),
    )
