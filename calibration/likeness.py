"""How often a quantized encoder answers as the fp32 artifact does, whatever these answers are worth.

Owns the comparisons, one row of counts per sample each; what agreement.py is to models that generate. By the names of a certificate,
the first of which stands for all where there is room for one:

| head | name | is |
|---|---|---|
| label, labels, tokens | same_labels | percent of texts, or of tokens, with the labels that fp32 gives them; of several labels all |
| numbers | r_squared | percent of the variance of fp32's numbers that is reproduced, the metric r-squared with these as references |
| embedding | same_neighbour | percent of samples whose nearest other sample is the same; one that has no other counts |
| all | divergence_nats | mean over places of how far answers are apart (heads.apart) |
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from txopt.calibration.answer_metrics import count_right, count_squares, r_squared
from txopt.calibration.answered import Answered
from txopt.calibration.bootstrap import Estimate, Figures, Statistics, estimate, mean, percent
from txopt.calibration.heads import Head, apart, unit


@dataclass(frozen=True, kw_only=True)
class Likeness:
    """Counts [N,C] of N samples by name, and what makes a figure of their sum."""

    counted: Mapping[str, tuple[Statistics, Figures]]

    @classmethod
    def of(cls, before: Answered, after: Answered) -> "Likeness":
        """The counts of what the fp32 artifact answered to N samples, and what the quantized one did."""
        nats = apart(before.head, before.values, after.values)
        rows = np.array([(values.sum(), values.size) for values in nats], np.float64)
        return cls(counted={**_alike(before, after), "divergence_nats": (rows, mean)})

    @property
    def samples(self) -> int:
        return len(self.counted["divergence_nats"][0])

    def estimates(self) -> dict[str, Estimate]:
        """With intervals over the samples."""
        return {name: estimate(rows, figures) for name, (rows, figures) in self.counted.items()}


def _alike(before: Answered, after: Answered) -> dict[str, tuple[Statistics, Figures]]:
    if before.head is Head.EMBEDDING:
        return {"same_neighbour": (_neighbours(before, after), percent)}
    right = [[answer] for answer in before.chosen]
    if before.head is Head.NUMBERS:
        return {"r_squared": (count_squares(after.chosen, right)[0], r_squared)}
    return {"same_labels": (count_right(after.chosen, right)[0], percent)}


def _neighbours(before: Answered, after: Answered) -> Statistics:
    """[N,2]: whether a sample's nearest neighbour by cosine is the same, 1."""
    nearest = []
    for answers in (before, after):
        vectors = unit(np.concatenate(answers.values))
        near = vectors @ vectors.T
        np.fill_diagonal(near, -np.inf)  # nobody's neighbour is himself
        nearest.append(near.argmax(axis=1))
    same = nearest[0] == nearest[1]
    return np.stack([same, np.ones(len(same))], axis=1).astype(np.float64)
