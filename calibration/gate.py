"""The loss gate: what quantization cost in the task's own metric, and whether that is allowed.

Owns the verdict and its certificate. It runs no model and counts nothing itself: it is given what two artifacts said to the same
samples, and where there is nothing to compare with but the fp32 artifact, what that one said are the references.

The loss over all samples decides, its point estimate, not the upper end of its interval: a few hundred samples leave an interval of
about a point, and a limit of 0.3 would refuse nearly everything. The interval is in the certificate, and where its upper end is over
the limit a warning says so. A number that is not finite, in any of the figures, intervals or agreements, refuses.
"""

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from txopt.calibration.bootstrap import CONFIDENCE, RESAMPLES, SEED, Comparison, Estimate, compare
from txopt.calibration.metrics import Metric, References
from txopt.runtime.errors import ArtifactError, InputError, LossError, UsageError, explain
from txopt.runtime.manifest import Manifest

logger = logging.getLogger(__name__)

# Points. Figures are differences of float64 numbers near 100; without it, 5.3 - 5.0 would pass 0.3 or not by chance.
_RESOLUTION = 9  # decimal places


class Alike(Protocol):
    """Agreement of models that generate (agreement.py), or likeness of encoders' answers (likeness.py)."""

    @property
    def samples(self) -> int:
        """How many were compared."""

    def estimates(self) -> dict[str, Estimate]:
        """By the names of a certificate, the most telling first."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What was compared, each by the SHA-256 of it, 64 lowercase hex digits; ``fingerprint`` gives an artifact's."""

    data: str
    baseline: str
    candidate: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was measured, and whether it passes; ``certificate`` is its form in the manifest.

    Attributes:
        compared: the data and the two artifacts.
        metric: its name. signature: its rules and versions; figures are comparable where it is equal.
        references: "data", or "baseline" where what the fp32 artifact said took the place of references.
        comparison: both figures and the loss, in points.
        agreement: with the fp32 artifact, see ``Alike.estimates``.
        max_loss: points that may be lost; None: measured, not limited.
    """

    compared: Compared
    metric: str
    signature: str
    references: str
    comparison: Comparison
    agreement: Mapping[str, Estimate]
    max_loss: float | None = None

    @property
    def passed(self) -> bool:
        return not any(True for _ in self._problems())

    @property
    def headline(self) -> tuple[str, Estimate]:
        """The agreement that stands for all of them, with its name."""
        return next(iter(self.agreement.items()))

    def require(self) -> "Verdict":
        """Itself, or LossError that says what was lost and what can be done."""
        problems = list(self._problems())
        if problems:
            raise LossError(explain("the quantized artifact is refused:", problems))
        return self

    def certificate(self) -> dict[str, Any]:
        """JSON for the manifest and for reports; null stands for what is no finite number, and such a verdict has not passed."""
        found = self.comparison
        return {
            "data": {"sha256": self.compared.data, "samples": found.samples, "references": self.references},
            "metric": {"name": self.metric, "signature": self.signature},
            "baseline": {"sha256": self.compared.baseline, "figure": found.baseline.to_json()},
            "candidate": {"sha256": self.compared.candidate, "figure": found.candidate.to_json()},
            "loss": found.loss.to_json(),
            "changed": found.changed,
            "agreement": {name: value.to_json() for name, value in self.agreement.items()},
            "interval": {"method": "paired bootstrap", "confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED},
            "max_loss": self.max_loss,
            "decided_by": "point estimate",
            "passed": self.passed,
        }

    def __str__(self) -> str:
        found = self.comparison
        limit = "" if self.max_loss is None else f", allowed {self.max_loss:g}"
        return (
            f"{self.metric} {found.baseline.value:.2f} before, {found.candidate.value:.2f} after: "
            f"lost {found.loss.value:.2f} points (95% interval {found.loss.low:.2f} to {found.loss.high:.2f}){limit}; "
            f"{found.changed} of {found.samples} samples scored differently"
        )

    def _problems(self) -> Iterator[str]:
        found = self.comparison
        estimates = {"baseline": found.baseline, "candidate": found.candidate, "loss": found.loss, **self.agreement}
        for name, value in estimates.items():
            if not value.finite:
                yield f"{name}: expected finite numbers, found {value}; the quantized graphs give NaN or infinities"
        # Written so that NaN exceeds every limit.
        if self.max_loss is not None and not round(found.loss.value, _RESOLUTION) <= self.max_loss:
            yield f"{self}; choose a higher precision or another scheme, calibrate on more data, or allow more with --max-loss"


def judge(
    metric: Metric,
    *,
    references: References | None,
    baseline: Sequence[Any],
    candidate: Sequence[Any],
    agreement: Alike,
    compared: Compared,
    max_loss: float | None = None,
) -> Verdict:
    """Measures what ``candidate`` lost; the caller asks ``Verdict.require`` before anything is left behind.

    Args:
        metric: see ``metrics.pick`` and ``heads.Head.metric``.
        references: for each of N samples what would be right; None: what the fp32 artifact said.
        baseline, candidate: what the fp32 and the quantized artifact said, N texts or answers each.
        agreement: of both, over these N samples, and others that have no reference.
        compared: what to write into the certificate.
        max_loss: points that may be lost, 0 or more.

    Raises:
        UsageError: ``max_loss`` is no number of points.
        InputError: no samples, not as many of one kind as of another, or samples that cannot be measured.
    """
    check_limit(metric.name, max_loss)
    if agreement.samples < len(baseline):
        raise InputError(
            f"loss gate: expected the agreement of at least {len(baseline)} samples, found that of {agreement.samples}"
        )
    right = [[one] for one in baseline] if references is None else references
    before, after = metric.measure(baseline, right), metric.measure(candidate, right)
    verdict = Verdict(
        compared=compared,
        metric=metric.name,
        signature=before.signature,
        references="baseline" if references is None else "data",
        comparison=compare(
            before.statistics, after.statistics, metric.figures, higher_is_better=metric.higher_is_better
        ),
        agreement=agreement.estimates(),
        max_loss=max_loss,
    )
    if verdict.passed and max_loss is not None and verdict.comparison.loss.high > max_loss:
        logger.warning("the loss is within its limit, and may be over it on other data: %s", verdict)
    return verdict


def check_limit(metric: str | None, max_loss: float | None) -> None:
    """Raises UsageError where ``max_loss`` is no number of points."""
    if max_loss is not None and not (math.isfinite(max_loss) and max_loss >= 0):
        raise UsageError(
            f"--max-loss: expected points of {metric or 'the metric'}, a number of at least 0; found {max_loss}"
        )


def fingerprint(manifest: Manifest) -> str:
    """The SHA-256 of a manifest that lists its files, as its bytes would be if it had no "calibration".

    Of an fp32 artifact that is the SHA-256 of its manifest.json. A quantized one has the certificate in its "calibration", which can
    hold no hash of itself.

    Raises:
        ArtifactError: the manifest is not valid, lists no files, or lists them without their hashes.
    """
    if not manifest.files:
        raise ArtifactError("fingerprint: expected a manifest that lists its files, found a draft without any")
    return hashlib.sha256(replace(manifest, calibration=None).to_bytes()).hexdigest()
