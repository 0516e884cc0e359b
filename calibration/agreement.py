"""How often a quantized artifact chooses the tokens that the fp32 artifact chooses, whatever these are worth.

Owns three comparisons, one row of counts per sample each. It runs no model: whoever does brings ids and logits. All ids are those
behind the decoder's start, the end of sequence included, padding not.

- Teacher forcing: both are fed the same tokens, and asked at every place what would come next. The share of places where the
  likeliest tokens are equal: one wrong choice counts once.
- Free running: each goes on with its own choices. The share of sequences that are equal to the end, and the share of places up
  to the first difference: one wrong choice may change everything behind it, as for users.
- Divergence: how far the distributions are apart under teacher forcing, Kullback and Leibler's sum of p (log p - log q) in
  nats, p the fp32 artifact's, mean over places. It sees what is lost before any choice changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.bootstrap import Estimate, Statistics, estimate, mean, percent
from txopt.runtime.errors import InputError, explain

Ids = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]
Pair = tuple[Ids, Ids]

NO_CHOICE = -1  # of NaN: equal to nothing, not even to itself


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Counts of N samples.

    Attributes:
        forced: [N,2], places of equal choices under teacher forcing, places.
        free: [N,4], places up to the first difference, places of the longer sequence, 1 where the sequences are equal, 1.
        divergence: [N,2], summed divergence in nats, places; None where no logits were compared.
    """

    forced: Statistics
    free: Statistics
    divergence: Statistics | None = None

    @classmethod
    def of(
        cls, forced: Sequence[Pair], free: Sequence[Pair], divergence: Sequence[NDArray[np.float64]] | None = None
    ) -> "Agreement":
        """The counts of N samples, of each what the fp32 artifact gave and what the quantized one gave.

        Args:
            forced: N pairs of choices [Q] and [Q] under teacher forcing: see ``choices``.
            free: N pairs of generated ids [any length].
            divergence: N arrays [Q]: see ``divergences``.

        Raises:
            InputError: no samples; not as many of one kind as of another; choices at no place, or at different ones.
        """
        counts = {"forced": len(forced), "free": len(free)} | (
            {} if divergence is None else {"divergence": len(divergence)}
        )
        if len(set(counts.values())) > 1 or not counts["forced"]:
            found = ", ".join(f"{number} of {name}" for name, number in counts.items())
            raise InputError(f"agreement: expected as many samples of each kind and at least one, found {found}")
        problems = [
            f"sample {index}: expected as many choices of both artifacts and at least one, found {one.size} and {other.size}"
            for index, (one, other) in enumerate(forced)
            if one.shape != other.shape or not one.size
        ]
        if problems:
            raise InputError(explain("agreement under teacher forcing:", problems[:12]))
        return cls(
            forced=np.array([_equal(*pair) for pair in forced], np.float64),
            free=np.array([_prefix(*pair) for pair in free], np.float64),
            divergence=None
            if divergence is None
            else np.array([(values.sum(), values.size) for values in divergence], np.float64),
        )

    @property
    def samples(self) -> int:
        return len(self.forced)

    def estimates(self) -> dict[str, Estimate]:
        """Shares in percent, divergence in nats, with intervals over the samples; by the names that a certificate has."""
        found = {
            "forced_tokens": estimate(self.forced, percent),
            "free_prefix": estimate(self.free[:, :2], percent),
            "free_sequences": estimate(self.free[:, 2:], percent),
        }
        return found if self.divergence is None else found | {"divergence_nats": estimate(self.divergence, mean)}


def choices(logits: Floats) -> Ids:
    """The likeliest token at each place, int64 [Q] of logits [Q,V]; NO_CHOICE where one of them is NaN."""
    return np.where(np.isnan(logits).any(axis=-1), NO_CHOICE, logits.argmax(axis=-1))


def divergences(baseline: Floats, candidate: Floats) -> NDArray[np.float64]:
    """KL(baseline || candidate) at each place in nats, float64 [Q], of logits [Q,V] of any precision.

    Where only ``candidate`` rules a token out (-inf), it is infinite. It is NaN where logits are NaN or rule everything out.

    Raises:
        InputError: the shapes differ.
    """
    if baseline.shape != candidate.shape:
        raise InputError(f"divergence: expected logits of one shape, found {baseline.shape} and {candidate.shape}")
    log_p, log_q = _log_softmax(baseline), _log_softmax(candidate)
    with np.errstate(invalid="ignore"):  # NaN in, NaN out
        terms = np.exp(log_p) * (log_p - log_q)
    terms[np.isneginf(log_p)] = 0  # what p rules out adds nothing, whatever q says: the limit of p log p
    total: NDArray[np.float64] = np.maximum(terms.sum(axis=-1), 0)  # which rounding may leave a hair below
    return total


def _equal(baseline: Ids, candidate: Ids) -> tuple[int, int]:
    return int(((baseline == candidate) & (baseline != NO_CHOICE)).sum()), baseline.size


def _prefix(baseline: Ids, candidate: Ids) -> tuple[int, int, bool, int]:
    """Two empty sequences agree at one place, that of the end."""
    shorter, longer = sorted((len(baseline), len(candidate)))
    differs = np.flatnonzero(baseline[:shorter] != candidate[:shorter])
    prefix = int(differs[0]) if differs.size else shorter
    equal = prefix == longer
    return (prefix, longer, equal, 1) if longer else (1, 1, True, 1)


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):  # rows of -inf become NaN
        wide -= wide.max(axis=-1, keepdims=True)
        wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide
