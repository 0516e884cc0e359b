"""What a candidate lost beside the fp32 artifact: both asked the same, and judged by what such an artifact is for.

Owns which questions a kind of artifact is asked, and by what metric it is judged where nobody names one. What is said is
evaluate.py's and answered.py's, the verdict gate.py's.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.calibration import evaluate, gate, metrics
from txopt.calibration.answered import Answered, answered
from txopt.calibration.evaluate import Said
from txopt.calibration.heads import head_of
from txopt.calibration.kept import Kept
from txopt.calibration.likeness import Likeness
from txopt.calibration.metrics import References
from txopt.calibration.samples import Samples
from txopt.runtime.errors import InputError, UsageError
from txopt.runtime.manifest import Manifest
from txopt.runtime.model import Model
from txopt.runtime.options import GenerationOptions
from txopt.runtime.pipeline import Pipeline

logger = logging.getLogger(__name__)

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
        which, right = _known(answers, before.head.metric)
        if right is not None and before.head.metric == "r-squared":
            _check_scatter([one for (one,) in right])
        return gate.judge(
            metrics.metric(before.head.metric),
            references=right,
            baseline=[before.chosen[index] for index in which],
            candidate=[after.chosen[index] for index in which],
            agreement=Likeness.of(before, after),
            compared=compared,
            max_loss=max_loss,
        )
    assert isinstance(after, Said), "artifacts of one model"
    references = _references(baseline, samples)
    manifest = baseline.manifest
    has_references = any(reference is not None for reference in references)
    name = metric or metrics.pick(manifest.task, has_references=has_references, frontend=manifest.frontend)
    which, known = _known(references, name)
    return gate.judge(
        metrics.metric(name),
        references=known,
        baseline=[before.texts[index] for index in which],
        candidate=[after.texts[index] for index in which],
        agreement=evaluate.agreement(baseline, candidate, samples, (before, after), kept=kept, progress=progress),
        compared=compared,
        max_loss=max_loss,
    )


def _references(baseline: Model, samples: Samples) -> list[str | None]:
    """What would be right of each sample: its target, or what its labels say, to the end; None where there is neither."""
    reader, ends = Pipeline(baseline), GenerationOptions.merge(baseline.manifest.generation, samples.options).eos_ids
    texts: list[str | None] = []
    for entry in samples.entries:
        labels = entry.labels
        if entry.source.target is not None or labels is None:
            texts.append(None if entry.source.target is None else str(entry.source.target))
        else:
            ended = not ends or labels[-1] in ends
            texts.append(reader.text(labels if ended else np.append(labels, ends[0])))
    return texts


def _check_scatter(numbers: Sequence[NDArray[np.float64]]) -> None:
    """InputError where a number is the same in all references: r-squared is a share of how they scatter."""
    if len(numbers) < 2 or (np.ptp(np.stack(numbers), axis=0) == 0).any():
        raise InputError(
            f"r-squared: expected references that differ from each other, found {len(numbers)} with a number that is the same in all"
        )


def _known(references: Sequence[Any | None], metric: str) -> tuple[list[int], References | None]:
    """Which samples are judged, and what is right of each; all, by what fp32 says, where none has a reference."""
    which = [index for index, reference in enumerate(references) if reference is not None]
    if not which:
        return list(range(len(references))), None
    if len(which) < len(references):
        logger.warning(
            "%d of %d samples have no reference: %s is measured on the %d that have one",
            len(references) - len(which),
            len(references),
            metric,
            len(which),
        )
    return which, [[references[index]] for index in which]


def check_metric(manifest: Manifest, metric: str | None) -> None:
    """UsageError where ``metric`` judges other artifacts than the one that ``manifest`` describes."""
    head = head_of(manifest)
    if metric is None or (metric == head.metric if head else metric not in metrics.OF_ANSWERS):
        return
    expected = f"{head.metric}, which it is judged by" if head else f"one of {', '.join(metrics.METRICS)}"
    raise UsageError(f"--metric: expected of a model for {manifest.task} {expected}, found {metric!r}; leave it out")
