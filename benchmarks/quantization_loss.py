"""What quantization costs in the task's own metric: g2p on all held-out words, Whisper tiny.en on ten minutes of speech.

Owns the ways of quantizing that are compared, and what they are compared on. What is measured, and by what rules, is the loss gate's
own: metric, paired interval, token agreement. Data of calibration and data of measurement have nothing in common.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from txopt.benchmarks import quantization_speech, whisper_tiny
from txopt.calibration import evaluate, gate
from txopt.calibration.amax import MSE, Absmax
from txopt.calibration.collect import Steps
from txopt.calibration.data import read
from txopt.calibration.metrics import References, metric
from txopt.calibration.recipe import Scheme
from txopt.calibration.samples import Samples
from txopt.calibration.weights import Method
from txopt.examples.g2p.data import load_lexicon, take
from txopt.exporter.pipeline import export
from txopt.exporter.quantize import Options, quantize_artifact
from txopt.exporter.weights import FILE
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import TxoptError
from txopt.runtime.model import Model

Note = Callable[[str], None]
Row = dict[str, Any]

# Of methods that look at no data, for what quantizing measures by itself; the losses here are measured on all samples.
BLIND = {"limit": 8}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the tables: how an artifact is quantized. ``note`` is the name of what ``options`` (exporter.quantize's) add."""

    scheme: str
    method: str
    note: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.scheme, self.method, self.note) if part)

    def with_data(self, calibration: Any) -> Options:
        return Options(precision=self.scheme, method=self.method, calibration=calibration, **self.options)


VARIANTS = (
    Variant(scheme="int8", method=Method.RTN, options=BLIND),  # other methods have nothing left to win at 8 bits
    Variant(scheme="int8", method=Method.RTN, note="mixed", options={**BLIND, "scheme": "mixed"}),
    Variant(scheme="int8", method=Method.RTN, note="rows", options={**BLIND, "scheme": "rows"}),
    Variant(scheme="int8", method=MSE.name, note="static", options={"scheme": Scheme.STATIC}),
    Variant(scheme="int4", method=Method.RTN, options=BLIND),
    Variant(scheme="int4", method=Method.HQQ, options=BLIND),
    Variant(scheme="int4", method=Method.CLIP),
    Variant(scheme="int4", method=Method.AWQ),
    Variant(scheme="int4", method=Method.GPTQ),
    Variant(scheme="int4", method=Method.DESCENT),
    # What calibration elsewhere sees, of as many samples: what the rows above are better by is the decode loop's worth.
    Variant(scheme="int4", method=Method.GPTQ, note="first step", options={"steps": Steps.FIRST}),
    Variant(scheme="int4", method=Method.DESCENT, note="first step", options={"steps": Steps.FIRST}),
    # No CPU multiplies in it: the engine reads and writes the codes, and multiplies in float32.
    Variant(scheme="fp8", method=Absmax.name, note="static", options={"scheme": Scheme.STATIC, "target": "tensorrt"}),
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and what it is measured on.

    Attributes:
        references: for each of ``samples``, in their order, all texts that are right.
        calibration: what quantizing may look at.
        metric: its name. allowed: points of it that may be lost, by scheme.
        facts: what the data are, for the report.
    """

    artifact: Artifact
    samples: Samples
    references: References
    calibration: Any
    metric: str
    allowed: Mapping[str, float]
    facts: Mapping[str, Any]


def g2p(work: Path, speech: Sequence[Path], limit: int | None) -> Subject:
    """The bundled model on every word of the test split; calibrated on words of the training split."""
    artifact = export("txopt.examples.g2p.model:factory", work / "g2p")
    lexicon = load_lexicon()
    test, train = take(lexicon, "test"), take(lexicon, "train")
    words = list(test)[:limit]
    samples = read([(word, " ".join(test[word][0])) for word in words], Model(artifact), limit=None)
    return Subject(
        artifact=artifact,
        samples=samples,
        references=[[" ".join(one) for one in test[str(entry.source.value)]] for entry in samples.entries],
        calibration=[(word, " ".join(spoken[0])) for word, spoken in train.items()],
        metric="word-error",
        allowed={"int8": 0.2, "int4": 0.5, "fp8": 0.2},
        facts={"what": "words of the held-out test split", **samples.to_json()},
    )


def whisper(work: Path, speech: Sequence[Path], limit: int | None) -> Subject:
    """Whisper tiny.en on the clips of quantization_speech.py, and on those of ``speech``."""
    artifact = export(whisper_tiny.checkpoint(work / "whisper-checkpoint"), work / "whisper")
    clips = work / "clips"
    clips.mkdir()
    made = quantization_speech.prepare(clips, speech, limit=limit)
    samples = read(made.test, Model(artifact), limit=None)
    return Subject(
        artifact=artifact,
        samples=samples,
        references=[[str(entry.source.target)] for entry in samples.entries],
        calibration=made.calibration,
        metric="wer",
        allowed={"int8": 0.3, "int4": 1.0, "fp8": 0.3},
        facts={"what": "clips", **made.facts, **samples.to_json()},
    )


SUBJECTS: dict[str, Callable[[Path, Sequence[Path], int | None], Subject]] = {"g2p": g2p, "whisper": whisper}


def measure(subject: Subject, variants: Sequence[Variant], work: Path, note: Note) -> Iterator[tuple[str, Row]]:
    """(variant's name, what it lost) for each of them; one that cannot be made says why."""
    baseline = Model(subject.artifact)
    note(f"fp32: {len(subject.samples)} samples")
    heard = evaluate.said(baseline, subject.samples)
    for variant in variants:
        note(variant.name)
        stages: list[tuple[str, float]] = []
        try:
            made = quantize_artifact(
                subject.artifact.path,
                place(work, variant.name),
                variant.with_data(subject.calibration),
                progress=_Watch(stages),
            )
        except TxoptError as err:
            yield variant.name, {"problem": " ".join(str(err).split())}
            continue
        stages.append(("end", time.perf_counter()))
        yield variant.name, _row(subject, baseline, heard, made) | {"seconds": _seconds(stages)}


def place(work: Path, variant: str) -> Path:
    """Where ``measure`` leaves the artifact of a variant."""
    return work / variant.replace(" ", "-")


def _row(subject: Subject, baseline: Model, heard: evaluate.Said, made: Artifact) -> Row:
    candidate = Model(made)
    after = evaluate.said(candidate, subject.samples)
    verdict = gate.judge(
        metric(subject.metric),
        references=subject.references,
        baseline=heard.texts,
        candidate=after.texts,
        agreement=evaluate.agreement(baseline, candidate, subject.samples, (heard, after)),
        compared=gate.Compared(
            data=subject.samples.sha256,
            baseline=gate.fingerprint(subject.artifact.manifest),
            candidate=gate.fingerprint(made.manifest),
        ),
    )
    return {
        **verdict.certificate(),
        "scheme": (made.manifest.calibration or {})["scheme"],
        "size": sizes(subject.artifact, made),
    }


def sizes(before: Artifact, after: Artifact) -> dict[str, float]:
    """Bytes of ``after`` over those of ``before``: of the weights, and of all files."""
    weights = after.manifest.files[FILE].size / before.manifest.files[FILE].size
    whole = [sum(file.size for file in artifact.manifest.files.values()) for artifact in (after, before)]
    return {"weights": round(weights, 4), "artifact": round(whole[0] / whole[1], 4)}


class _Watch:
    """A progress function that writes down when each stage began."""

    def __init__(self, stages: list[tuple[str, float]]) -> None:
        self._stages = stages

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        if not self._stages or self._stages[-1][0] != stage:
            self._stages.append((stage, time.perf_counter()))


def _seconds(stages: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Of every stage of quantizing, and of the whole."""
    spans = {name: round(later - start, 1) for (name, start), (_, later) in pairwise(stages)}
    return spans | {"whole": round(stages[-1][1] - stages[0][1], 1)}
