"""Drawing the next token: what shapes a distribution, and the draws themselves.

Owns temperature, top-k, top-p, min-p, typical, epsilon and eta filters in transformers' order (``WARPERS``), and draws
by numpy's Generator. Ids cannot equal PyTorch's, whose generator is another; the distributions can, and tests compare
them. Filters work in place on scores float32 [R,V]. It knows nothing of sequences.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.decoder import Floats, Ids
from txopt.runtime.no_next_token import no_next_token
from txopt.runtime.options import GenerationOptions
from txopt.runtime.topk import top

REMOVED = np.float32(-np.inf)
_LEAST = np.finfo(np.float32).min

Warper = Callable[[Floats], None]


def warpers(options: GenerationOptions) -> list[Warper]:
    """What ``options`` ask for, in transformers' order: filters with ``do_sample``, then ``renormalize_logits``."""
    # Beams need something to go on with besides all ends of sequence.
    keep = max(2, len(options.eos_ids) + 1) if options.num_beams > 1 else 1
    made = (make(options, keep) for make in WARPERS) if options.do_sample else ()
    found = [warper for warper in made if warper is not None]
    return [*found, _renormalize] if options.renormalize_logits else found


# A row of NaN is refused where a token is chosen; numpy's warnings would only come before.
@np.errstate(invalid="ignore")
def log_softmax(scores: Floats) -> Floats:
    """Log probabilities float32 [R,V] of scores [R,V], in a new array; removed tokens stay removed, be it all of them."""
    shifted = scores - _largest(scores)
    shifted -= np.log(_total(np.exp(shifted)))
    return shifted


@np.errstate(invalid="ignore")
def softmax(scores: Floats) -> Floats:
    """Probabilities float32 [R,V] of scores [R,V], in a new array; all 0 where every token is removed."""
    exponents = np.exp(scores - _largest(scores))
    exponents /= _total(exponents)
    return exponents


def draw(scores: Floats, generator: np.random.Generator, length: int, options: GenerationOptions) -> Ids:
    """One token per row, int64 [R], with the probabilities softmax(scores): one uniform number per row, by inversion.

    ``length`` and ``options``, how the scores came about, are only for the message.

    Errors:
        UsageError: the options have removed every token of a row. TxoptError: a row's scores are NaN.
    """
    weights = np.cumsum(softmax(scores), axis=1, dtype=np.float64)
    total = weights[:, -1]
    if not (total > 0).all():
        raise no_next_token(scores.max(axis=1)[~(total > 0)], length, options)
    # Rounding must not reach past the last token.
    points = np.minimum(generator.random(len(scores)) * total, np.nextafter(total, 0))
    return np.asarray((weights <= points[:, None]).sum(axis=1), np.int64)


def draw_several(scores: Floats, count: int, generator: np.random.Generator) -> Ids:
    """``count`` different tokens per row, int64 [R,count], drawn one after another, each by softmax(scores).

    Adding Gumbel noise and taking the largest is that draw (Vieira 2014; Kool et al., arXiv 1903.06059).
    """
    noise = generator.gumbel(size=scores.shape).astype(np.float32)
    return top(scores + noise, count)[1]


@np.errstate(over="ignore")  # the least numbers, which remove_invalid_values makes of removed tokens
def _temperature(temperature: float, scores: Floats) -> None:
    scores /= np.float32(temperature)


def _top_k(count: int, scores: Floats) -> None:
    least = top(scores, min(count, scores.shape[1]))[0][:, -1:]
    scores[scores < least] = REMOVED


def _top_p(share: float, keep: int, scores: Floats) -> None:
    rising = np.argsort(scores, axis=1, kind="stable")
    ordered = np.take_along_axis(scores, rising, axis=1)
    removed = _cumulative(ordered) <= 1 - share
    removed[:, -keep:] = False
    _remove(scores, rising, removed)


def _min_p(share: float, keep: int, scores: Floats) -> None:
    probabilities = softmax(scores)
    removed = probabilities < np.float32(share) * probabilities.max(axis=1, keepdims=True)
    np.put_along_axis(removed, top(scores, min(keep, scores.shape[1]))[1], False, axis=1)
    scores[removed] = REMOVED


def _typical(mass: float, keep: int, scores: Floats) -> None:
    """Locally typical sampling (arXiv 2202.00666): nearest to the entropy first, until ``mass`` is reached."""
    surprise = -log_softmax(scores)
    distance = np.abs(surprise - _entropy(surprise))
    order = np.argsort(distance, axis=1, kind="stable")
    nearest = np.take_along_axis(distance, order, axis=1)
    reached = (_cumulative(np.take_along_axis(scores, order, axis=1)) < mass).sum(axis=1, keepdims=True)
    removed = nearest > np.take_along_axis(nearest, np.minimum(reached, scores.shape[1] - 1), axis=1)
    removed[:, :keep] = False
    _remove(scores, order, removed)


def _epsilon(cutoff: float, keep: int, scores: Floats) -> None:
    scores[(softmax(scores) < np.float32(cutoff)) & _beyond(keep, scores)] = REMOVED


def _eta(cutoff: float, keep: int, scores: Floats) -> None:
    """Epsilon, lowered where the entropy is high (arXiv 2210.15191)."""
    surprise = -log_softmax(scores)
    threshold = np.minimum(np.float32(cutoff), np.sqrt(np.float32(cutoff)) * np.exp(-_entropy(surprise)))
    scores[(np.exp(-surprise) < threshold) & _beyond(keep, scores)] = REMOVED


def _renormalize(scores: Floats) -> None:
    scores[:] = log_softmax(scores)


# transformers' order (generation/utils.py, _get_logits_processor). Each takes the options and how many tokens must
# stay.
WARPERS: tuple[Callable[[GenerationOptions, int], Warper | None], ...] = (
    lambda options, keep: partial(_temperature, options.temperature) if options.temperature != 1 else None,
    lambda options, keep: partial(_top_k, max(options.top_k, keep)) if options.top_k else None,
    lambda options, keep: partial(_top_p, options.top_p, keep) if options.top_p < 1 else None,
    lambda options, keep: partial(_min_p, options.min_p, keep) if options.min_p is not None else None,
    lambda options, keep: partial(_typical, options.typical_p, keep) if options.typical_p < 1 else None,
    lambda options, keep: partial(_epsilon, options.epsilon_cutoff, keep) if options.epsilon_cutoff > 0 else None,
    lambda options, keep: partial(_eta, options.eta_cutoff, keep) if options.eta_cutoff > 0 else None,
)


def _largest(scores: Floats) -> Floats:
    """Each row's largest score float32 [R,1], a finite one where every token is removed: there is no -inf - -inf."""
    return np.maximum(scores.max(axis=1, keepdims=True), _LEAST)


def _total(exponents: Floats) -> Floats:
    """Each row's sum float32 [R,1]; the largest exponent is 1, so less than that is the 0 of a row with nothing left."""
    return np.maximum(exponents.sum(axis=1, keepdims=True), np.float32(1))


def _cumulative(scores: Floats) -> Floats:
    """Running sums of softmax(scores); summed in float64, as PyTorch does on a CPU, and rounded."""
    return np.cumsum(softmax(scores), axis=1, dtype=np.float64).astype(np.float32)


def _entropy(surprise: Floats) -> Floats:
    """Entropy float32 [R,1] of rows whose negative log probabilities are given; removed tokens count for nothing."""
    finite = np.where(np.isfinite(surprise), surprise, np.float32(0))
    return np.asarray((finite * np.exp(-surprise)).sum(axis=1, keepdims=True))


def _beyond(keep: int, scores: Floats) -> NDArray[np.bool_]:
    return scores < top(scores, min(keep, scores.shape[1]))[0][:, -1:]


def _remove(scores: Floats, order: NDArray[np.int64], removed: NDArray[np.bool_]) -> None:
    np.put_along_axis(scores, order, np.where(removed, REMOVED, np.take_along_axis(scores, order, axis=1)), axis=1)
