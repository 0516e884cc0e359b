"""What a candidate lost beside the fp32 artifact: both asked the same, and judged by what such an artifact is for.

Owns which questions a kind of artifact is asked, and by what metric it is judged where nobody names one. What is said is
evaluate.py's and answered.py's, the verdict gate.py's.
"""

from collections.abc import Callable

from txopt.calibration import evaluate, gate, metrics
from txopt.calibration.answered import Answered, answered
from txopt.calibration.evaluate import Said
from txopt.calibration.heads import head_of
from txopt.calibration.kept import Kept
from txopt.calibration.likeness import Likeness
from txopt.calibration.samples import Samples
from txopt.runtime.errors import UsageError
from txopt.runtime.manifest import Manifest
from txopt.runtime.model import Model

Heard = Said | Answered
Progress = Callable[[int, int], None]


def heard(model: Model, samples: Samples, *, progress: Progress | None = None) -> Heard:
    """What ``model`` says or answers to every sample."""
    if model.manifest.kind == "encoder":
        return answered(model, samples, progress=progress)
    return evaluate.said(model, samples, progress=progress)


def judged(
    baseline: Model,
    candidate: Model,
    samples: Samples,
    before: Heard,
    *,
    compared: gate.Compared,
    metric: str | None = None,
    max_loss: float | None = None,
    kept: Kept | None = None,
    progress: Progress | None = None,
) -> gate.Verdict:
    """The verdict on ``candidate``.

    Args:
        baseline: the fp32 artifact, opened; ``before`` is what was heard of it.
        compared: see ``gate.judge``.
        metric: its name; None: as such an artifact is judged.
        max_loss: points that may be lost.
        kept: see ``evaluate.agreement``.
    """
    after = heard(candidate, samples, progress=progress)
    if isinstance(before, Answered):
        assert isinstance(after, Answered), "artifacts of one model"
        answers = [entry.answer for entry in samples.entries]
        right = [[answer] for answer in answers if answer is not None]
        return gate.judge(
            metrics.metric(before.head.metric),
            references=right if len(right) == len(answers) else None,
            baseline=before.chosen,
            candidate=after.chosen,
            agreement=Likeness.of(before, after),
            compared=compared,
            max_loss=max_loss,
        )
    assert isinstance(after, Said), "artifacts of one model"
    references = [entry.source.target for entry in samples.entries]
    known = None if None in references else [[str(reference)] for reference in references]
    manifest = baseline.manifest
    name = metric or metrics.pick(manifest.task, has_references=known is not None, frontend=manifest.frontend)
    return gate.judge(
        metrics.metric(name),
        references=known,
        baseline=before.texts,
        candidate=after.texts,
        agreement=evaluate.agreement(baseline, candidate, samples, (before, after), kept=kept, progress=progress),
        compared=compared,
        max_loss=max_loss,
    )


def check_metric(manifest: Manifest, metric: str | None) -> None:
    """UsageError where ``metric`` judges other artifacts than the one that ``manifest`` describes."""
    head = head_of(manifest)
    if metric is None or (metric == head.metric if head else metric not in metrics.OF_ANSWERS):
        return
    expected = f"{head.metric}, which it is judged by" if head else f"one of {', '.join(metrics.METRICS)}"
    raise UsageError(f"--metric: expected of a model for {manifest.task} {expected}, found {metric!r}; leave it out")
