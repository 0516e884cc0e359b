"""What an encoder alone is asked for, read off its manifest: a label, several, one for each token, numbers, or an embedding.

Owns what its answers come to: which labels are chosen, and how far two answers are apart. It runs no model; references are
classes.py's.

An answer is float [P,C]: P places, one of a text and one for each token where these are labelled, and C logits, numbers, or
dimensions. How far two are apart at a place is the divergence of Kullback and Leibler in nats, of what an answer stands for:

| head | stands for |
|---|---|
| label, tokens | a distribution over labels, softmax of logits (agreement.divergences) |
| labels | for each label whether it applies, sigmoid of its logit; the sum over labels |
| numbers | normal distributions around them, as wide as the first's numbers scatter over all places: the sum of (x - y)^2 / 2 s^2 |
| embedding | one of width 1 around the vector of length 1: |u - v|^2 / 2, which is 1 - the cosine |
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.agreement import choices, divergences
from txopt.runtime.manifest import Manifest

Floats = NDArray[np.floating[Any]]
Wide = NDArray[np.float64]


class Head(StrEnum):
    """What one source is answered with."""

    LABEL = "label"  # one of all
    LABELS = "labels"  # those that apply, whether one or many or none
    TOKENS = "tokens"  # a label for each token
    NUMBERS = "numbers"  # of a regression, or one score alone
    EMBEDDING = "embedding"  # a vector, of which the direction counts

    @property
    def output(self) -> str:
        """The encoder's output that it is read off."""
        return "embedding" if self is Head.EMBEDDING else "logits"

    @property
    def metric(self) -> str:
        """The name of the metric that judges it; of an embedding, and where data have no references, beside fp32's answers."""
        return {Head.NUMBERS: "r-squared", Head.EMBEDDING: "cosine"}.get(self, "accuracy")


def head_of(manifest: Manifest) -> Head | None:
    """The head of an encoder alone; None of a model that generates, and of one that gives neither logits nor an embedding."""
    if manifest.kind != "encoder":
        return None
    outputs = {item.name: item.axes for item in manifest.graphs["encoder"].outputs}
    if "logits" not in outputs:
        return Head.EMBEDDING if "embedding" in outputs else None
    if len(outputs["logits"]) == 3:
        return Head.TOKENS
    scores = manifest.frontend.get("scores", "softmax")
    if scores == "none" or (scores == "sigmoid" and outputs["logits"][-1] == 1):
        return Head.NUMBERS
    return Head.LABELS if scores == "sigmoid" else Head.LABEL


def chosen(head: Head, answer: Floats) -> NDArray[Any]:
    """What ``answer`` [P,C] is judged as.

    int64 [P], the likeliest labels (NO_CHOICE of NaN); of several labels bool [C], which apply; of numbers and vectors float64 [C].
    """
    if head in (Head.LABEL, Head.TOKENS):
        return choices(answer)
    if head is Head.LABELS:
        return np.asarray(answer[0] > 0)  # a probability of more than a half
    return answer[0].astype(np.float64)


def apart(head: Head, before: Sequence[Floats], after: Sequence[Floats]) -> list[Wide]:
    """Of each pair of answers [P,C], the divergence at each place in nats, float64 [P]; NaN where a number is."""
    pairs = list(zip(before, after, strict=True))
    if head in (Head.LABEL, Head.TOKENS):
        return [divergences(one, other) for one, other in pairs]
    if head is Head.LABELS:
        return [divergences(_or_not(one), _or_not(other)).sum(-1) for one, other in pairs]
    if head is Head.NUMBERS:
        variance = np.concatenate(before).astype(np.float64).var(axis=0)
        variance[variance == 0] = 1  # of one sample, or of a number that is always the same
        return [(np.square(one.astype(np.float64) - other) / (2 * variance)).sum(-1) for one, other in pairs]
    return [np.square(unit(one) - unit(other)).sum(-1) / 2 for one, other in pairs]


def unit(vectors: Floats) -> Wide:
    """``vectors`` [..,M] at length 1; 0 stays 0."""
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=-1, keepdims=True)
    return wide / np.where(lengths == 0, 1, lengths)


def _or_not(logits: Floats) -> Floats:
    """[P,C,2]: of each label by itself, softmax of which is the sigmoid of its logit, and the rest."""
    return np.stack([logits, np.zeros_like(logits)], axis=-1)
