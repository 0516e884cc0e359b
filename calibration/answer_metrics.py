"""Metrics of what an encoder alone answers: how counts are taken of each sample, and what makes points of their sum.

What metrics.py is to text. Each takes N answers, and for each a list of the one that is right, and gives counts [N,C] and the rules
that they were counted by. Answers are as ``heads.chosen`` makes them.

| metric | points, summed over all samples |
|---|---|
| accuracy | 100 * places with the right label / places; of a text with several labels, 1 place: all of them |
| r-squared | 100 (1 - SSE / SST), of a number: squared errors over squared distances from the references' mean; mean over numbers |
| cosine | 100 * sum of cosines with the right vector / samples |

Where references are all the same, r-squared is 100 if nothing is off and else 0, as scikit-learn has it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.agreement import NO_CHOICE
from txopt.calibration.bootstrap import Statistics
from txopt.calibration.heads import unit
from txopt.calibration.targets import IGNORED

Answer = NDArray[Any]
Right = Sequence[Sequence[Answer]]
Counted = tuple[Statistics, str]

_ROUNDING = 1e-12  # of a sum of squares: what is left of equal numbers once their mean was taken off


def count_right(said: Sequence[Answer], references: Right) -> Counted:
    """[N,2]: places with the right label, places that count; labels that are IGNORED do not."""
    rows = [_right(answer, right) for answer, (right,) in zip(said, references, strict=True)]
    return np.array(rows, np.float64), f"refs:one|unit:{'text' if said[0].dtype == bool else 'place'}"


def count_cosines(said: Sequence[Answer], references: Right) -> Counted:
    """[N,2]: the cosine, 1."""
    # By the distance of unit vectors, which is 0 where they are equal.
    off = [np.square(unit(answer) - unit(right)).sum() / 2 for answer, (right,) in zip(said, references, strict=True)]
    return np.stack([1 - np.array(off), np.ones(len(off))], axis=1), "refs:one|norm:l2"


def count_squares(said: Sequence[Answer], references: Right) -> Counted:
    """[N,3C+1], of C numbers: squared errors, what is right, its squares; 1. What is right is taken from its mean over all samples."""
    right = np.stack([one for (one,) in references]).astype(np.float64)
    errors = np.square(np.stack(said) - right)
    centred = right - right.mean(axis=0)  # which makes no difference but to rounding
    ones = np.ones((len(right), 1))
    return np.concatenate([errors, centred, np.square(centred), ones], axis=1), f"refs:one|numbers:{right.shape[1]}"


def r_squared(sums: Statistics) -> NDArray[np.float64]:
    """Points [R] of sums [R,3C+1] of ``count_squares``."""
    errors, totals, squares = np.split(sums[:, :-1], 3, axis=1)
    scatter = squares - np.square(totals) / sums[:, -1:]
    same = scatter <= _ROUNDING * squares
    constant = np.where(errors == 0, 100, 0 * errors)  # which NaN stays
    points: NDArray[np.float64] = np.where(same, constant, 100 * (1 - errors / np.where(same, 1, scatter))).mean(axis=1)
    return points


def _right(answer: Answer, right: Answer) -> tuple[int, int]:
    assert answer.shape == right.shape, (answer.shape, right.shape)
    if right.dtype == bool:
        return int(np.array_equal(answer, right)), 1
    counted = right != IGNORED
    return int(((answer == right) & counted & (answer != NO_CHOICE)).sum()), int(counted.sum())
