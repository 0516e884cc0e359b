"""Replays an artifact's reference cases and compares: the proof that it still says what PyTorch said.

Owns tolerances, the comparison, the invariance measurements and the report. It knows no backend and no model family; where a
deviation starts is read off the caches, layer by layer.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.answers import answers, counts, found
from txopt.runtime.artifact import Artifact
from txopt.runtime.cases import Case, Lengths, load, sample
from txopt.runtime.errors import LimitError, ParityError, TxoptError, explain
from txopt.runtime.graphs import source_masks
from txopt.runtime.manifest import QUANTIZED, Manifest
from txopt.runtime.model import Model
from txopt.runtime.options import GenerationOptions

Array = NDArray[Any]
_HALF = "where float16 holds too little: export with --calibration FILE, which finds it out, or in bf16 or fp32"
Measure = Callable[..., Any]  # (errors, axes) -> one error, or one for what is left of the axes

# Deviation allowed, as a share of the tensor's largest magnitude (at least 1), by the precision that the artifact computes in: the
# largest of a tensor; where activations are rounded to 8 bits the root mean square, for that is noise in every number.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": 1e-1, "int4": 1e-1, "fp8": 1e-1}


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """One comparison: where it is largest, and whether that is allowed. ``step`` and ``layer`` are None where they mean nothing."""

    case: str
    tensor: str
    error: float
    tolerance: float
    step: int | None = None
    layer: int | None = None

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # false for NaN, as it must be

    def __str__(self) -> str:
        place = "" if self.step is None else f" at step {self.step}"
        layer = "" if self.layer is None else f" of layer {self.layer}"
        return f'case "{self.case}": {self.tensor}{layer}{place} deviates by {self.error:.3g}, allowed {self.tolerance:.3g}'


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """What was compared, what came out, what was skipped and why; ``certificate`` is its form in the manifest.

    ``reference`` is who gave the answers that the artifact was held against.
    """

    precision: str
    tolerance: float
    deviations: tuple[Deviation, ...]
    ids: dict[str, str]
    near_ties: tuple[str, ...]
    invariance: dict[str, float]
    skipped: tuple[str, ...]
    failures: tuple[str, ...] = field(default=())
    reference: str = "PyTorch"

    @property
    def passed(self) -> bool:
        return not self.failures and all(deviation.holds for deviation in self.deviations)

    @property
    def largest_error(self) -> float:
        errors = [deviation.error for deviation in self.deviations]
        return float(np.max(errors)) if errors else 0.0  # NaN stays NaN

    def require(self) -> "ParityReport":
        """Itself, or ParityError naming the first place where the artifact left PyTorch's path."""
        if self.passed:
            return self
        broken = [deviation for deviation in self.deviations if not deviation.holds]
        problems = []
        if broken:
            first = min(broken, key=_order)
            problems.append(f"first deviation: {first}")
            layers = [deviation for deviation in broken if deviation.layer is not None]
            if first.layer is None and layers:
                problems.append(f"first layer: {min(layers, key=lambda deviation: deviation.layer or 0)}")
            problems += [
                str(deviation) for deviation in broken if deviation is not first and deviation.tensor == "logits"
            ]
        problems += self.failures
        if self.precision == "fp16" and self.reference == "PyTorch":
            problems = [
                *problems[:11],
                "where float16 holds too little: export with --calibration FILE, which finds out, or in bf16 or fp32",
            ]
        raise ParityError(explain(f"the artifact does not say what {self.reference} said:", problems[:12]))

    def certificate(self) -> dict[str, Any]:
        """JSON for the manifest: numbers rounded to three digits, so that equal runs are equal bytes."""
        worst: dict[str, float] = {}
        for item in self.deviations:
            key = f"{item.case}/{item.tensor}"
            if not item.error <= worst.get(key, -1.0):  # NaN is the worst there is, and 0 is an error too
                worst[key] = item.error
        rounded = {key: float(f"{value:.2e}") for key, value in sorted(worst.items())}
        result = {"precision": self.precision, "tolerance": self.tolerance, "errors": rounded, "ids": self.ids}
        invariance = {key: float(f"{value:.2e}") for key, value in self.invariance.items()}
        return {
            **result,
            "near_ties": list(self.near_ties),
            "invariance": invariance,
            "skipped": list(self.skipped),
            "passed": self.passed,
        }

    def to_json(self) -> dict[str, Any]:
        return {
            **self.certificate(),
            "failures": list(self.failures),
            "deviations": [asdict(d) for d in self.deviations if not d.holds],
        }


def verify(path: str | os.PathLike[str], *, device: str = "cpu", threads: int | None = None) -> ParityReport:
    """Replays the reference cases of the artifact at ``path``, without torch.

    Raises:
        ParityError: it deviates from PyTorch beyond the tolerance.
        ArtifactError: it is damaged.
    """
    artifact = Artifact.open(path)
    skipped = artifact.manifest.parity.get("skipped", ())
    return replay(artifact, load(artifact.path), device=device, threads=threads, skipped=skipped).require()


def replay(
    artifact: Artifact,
    cases: Sequence[Case],
    *,
    device: str = "cpu",
    threads: int | None = None,
    skipped: Sequence[str] = (),
) -> ParityReport:
    """Runs every case through the artifact; deviations are reported, not raised."""
    model = Model(artifact, device=device, threads=threads)
    arithmetic = model.session.arithmetic
    tolerance = TOLERANCE[arithmetic]
    deviations: list[Deviation] = []
    ids: dict[str, str] = {}
    ties: list[str] = []
    failures: list[str] = []
    notes = list(skipped)
    for case in cases:
        try:
            deviations += _forced(model, case, tolerance, _root_mean_square if arithmetic in QUANTIZED else np.max)
            for search in ("greedy", "beam"):
                if search in case.generated:
                    _searched(model, case, search, tolerance, ids, ties, failures)
        except LimitError as err:
            notes.append(f'case "{case.name}": more than these engines were built for: {err}')
        except TxoptError as err:  # NaN scores, or a graph that the engine cannot run: both are what parity is to find
            failures.append(f'case "{case.name}": {err}')
        if case.tokens.size and "beam" not in case.generated and case.generated:
            notes.append(f'case "{case.name}": beam search has no PyTorch reference for this source')
    if not deviations and not failures:
        failures.append("no reference case fits what these engines were built for, so nothing is proved")
    try:
        invariance = _invariance(model, cases)
    except LimitError as err:
        invariance = {}
        notes.append(f"invariance: more than these engines were built for: {err}")
    return ParityReport(
        precision=model.session.precision,
        tolerance=tolerance,
        deviations=tuple(deviations),
        ids=ids,
        near_ties=tuple(ties),
        invariance=invariance,
        skipped=tuple(dict.fromkeys(notes)),
        failures=tuple(failures),
        reference=reference_of(artifact.manifest),
    )


def reference_of(manifest: Manifest) -> str:
    """Who gave an artifact's reference answers: PyTorch, the .onnx files that it was made of, or its own rounded numbers."""
    if manifest.calibration is not None:  # made from another artifact, not from the source
        return "its rounded weights in float32"
    return "the original files" if manifest.source.get("kind") == "optimum" else "PyTorch"


def _forced(model: Model, case: Case, tolerance: float, measure: Measure) -> Iterator[Deviation]:
    """Teacher forcing along the case's schedule; what each layer wrote, then the logits, step by step."""
    got = answers(model, case)
    for name, expected in case.expected.items():
        actual = got[name] if name == "log_sum_exp" else sample(name, got[name], counts(model, case, got, name))
        yield from _compare(case, name, expected, actual, tolerance, measure)
    for name, (actual, expected) in found(model, case).items():
        yield from _compare(case, name, expected, actual, tolerance, measure)


def _root_mean_square(errors: Array, axis: tuple[int, ...] | None = None) -> Array:
    found: Array = np.sqrt(np.mean(np.square(errors), axis))
    return found


def _compare(
    case: Case, name: str, expected: Array, actual: Array, tolerance: float, measure: Measure
) -> Iterator[Deviation]:
    scale = max(1.0, float(np.abs(expected).max()))
    error = np.abs(actual.astype(np.float64) - expected) / scale
    kind, _, layer = (name, "", "") if name.startswith("memory") else name.partition(".")
    number = int(layer) if layer else None
    if name in ("logits", "log_sum_exp") and case.schedule:
        by_step = measure(error.reshape(*error.shape[:2], -1), (0, 2))
        wrong = np.flatnonzero(~(by_step <= tolerance))
        step = int(wrong[0]) if len(wrong) else int(by_step.argmax())
        yield Deviation(case=case.name, tensor=name, error=float(by_step[step]), tolerance=tolerance, step=step)
    elif kind.startswith("self_"):
        for place, step in ((0, 0), (1, sum(case.schedule) - 1)):
            worst = float(measure(error[:, :, place]))
            yield Deviation(case=case.name, tensor=kind, error=worst, tolerance=tolerance, step=step, layer=number)
    else:
        yield Deviation(case=case.name, tensor=kind, error=float(measure(error)), tolerance=tolerance, layer=number)


def _order(deviation: Deviation) -> tuple[int, int, int]:
    """In the order of computation: the source first, then step by step, layer by layer, the logits last."""
    place = {"memory": 0, "cross_key": 1, "cross_value": 1}.get(deviation.tensor.partition(".")[0], 2)
    layer = deviation.layer if deviation.layer is not None else 1 << 30 if place else 0
    return place, deviation.step or 0, layer


def _searched(
    model: Model, case: Case, search: str, tolerance: float, ids: dict[str, str], ties: list[str], failures: list[str]
) -> None:
    """Generated ids against PyTorch's, row by row; a difference counts as proven only at a near-tie."""
    expected = case.generated[search]
    start = {} if model.manifest.kind == "decoder" else {"decoder_input_ids": expected[:, :1]}
    failures += _start_problems(model, case, search)
    got = model.generate(**case.inputs, **start, **case.options[search])
    allowed = 2 * tolerance * max(1.0, float(np.abs(case.expected["logits"]).max()))
    filled = GenerationOptions.merge(model.manifest.generation, case.options[search])
    fill = filled.eos_ids if filled.pad_token_id is None else (filled.pad_token_id,)
    agree = 0
    for row, (want, have) in enumerate(zip(expected, got.sequences, strict=True)):
        differs = _first_difference(want, have, fill)
        if differs is None:
            agree += 1
            continue
        where = f'case "{case.name}", {search}, row {row}, token {differs}'
        if search == "greedy":
            distance, what = _margin(case, row, differs), "PyTorch's best two logits are"
        else:
            distance, what = _score_distance(case, got.scores, row), "the scores of PyTorch's beam and ours are"
        if distance is not None and distance <= allowed:
            ties.append(f"{where}: {what} {distance:.2e} apart, within {allowed:.2e}")
        else:
            found = "unknown" if distance is None else f"{distance:.2e}"
            failures.append(
                f"{where}: expected id {_at(want, differs)}, got {_at(have, differs)}, and this is no near-tie: {what} {found} apart"
            )
    ids[f"{case.name}/{search}"] = f"{agree} of {len(expected)} rows equal"


def _start_problems(model: Model, case: Case, search: str) -> list[str]:
    """Where generate() left to itself would start otherwise than the reference; given a start, it is not asked."""
    said = GenerationOptions.merge(model.manifest.generation, {}).decoder_start_token_id
    started = sorted(set(case.generated[search][:, 0].tolist()))
    if model.manifest.kind == "decoder" or said is None or started == [said]:  # None: generate() asks for a start
        return []
    return [f'case "{case.name}", {search}: PyTorch starts with id {started[0]}, the manifest says {said}']


def _first_difference(want: Array, have: Array, fill: Sequence[int]) -> int | None:
    """Where two rows part; not where one has more of what fills rows up until the longest of a batch ends."""
    width = min(len(want), len(have))
    unequal = np.flatnonzero(want[:width] != have[:width])
    if len(unequal):
        return int(unequal[0])
    rest = np.concatenate([want[width:], have[width:]])
    return None if np.isin(rest, fill).all() else width


def _margin(case: Case, row: int, token: int) -> float | None:
    if case.margins is None or not 0 < token <= case.margins.shape[1]:
        return None
    return float(case.margins[row, token - 1])


def _score_distance(case: Case, scores: Array | None, row: int) -> float | None:
    return None if case.scores is None or scores is None else float(abs(case.scores[row] - scores[row]))


def _at(ids: Array, place: int) -> str:
    return str(ids[place]) if place < len(ids) else "nothing"


def _invariance(model: Model, cases: Sequence[Case]) -> dict[str, float]:
    """How much a row's logits change with its padding and with its batch mates: largest absolute differences."""
    found: dict[str, float] = {}
    padded = next((case for case in cases if len(case.tokens) > 1), None)
    if padded is None or model.manifest.kind == "decoder":
        return found
    name = "logits" if "logits" in padded.expected else "embedding"
    together = answers(model, padded)
    worst = 0.0
    for row in range(len(padded.tokens)):
        alone = Case(
            name="alone",
            inputs=_trimmed(model, padded, row),
            tokens=padded.tokens[row : row + 1],
            schedule=padded.schedule,
        )
        mine = answers(model, alone)[name][0]
        theirs = together[name][row]
        shape = tuple(slice(size) for size in mine.shape)
        worst = max(worst, float(np.abs(mine - theirs[shape]).max()))
    masked = bool(source_masks(model.manifest.graphs))
    found["padding" if masked else "batch"] = worst
    if masked:
        found["batch"] = _batched(model, cases[0], name)
    return found


def _batched(model: Model, case: Case, name: str) -> float:
    """A case alone against itself between two others of its lengths, which hold other numbers of its own."""
    alone = answers(model, case)[name]
    between = Case(
        name="between",
        inputs={key: _between(value) for key, value in case.inputs.items()},
        tokens=_between(case.tokens),
        schedule=case.schedule,
    )
    rows = len(alone)
    return float(np.abs(answers(model, between)[name][rows : 2 * rows] - alone).max())


def _between(own: Array) -> Array:
    """``own`` between two of its first half, every place of the last axis twice: no mere reordering, which a mean would not show."""
    other = own[..., np.arange(own.shape[-1]) // 2] if own.ndim > 1 else own
    return np.concatenate([other, own, other])


def _trimmed(model: Model, case: Case, row: int) -> dict[str, Array]:
    """The inputs of one row without its padding."""
    lengths, trimmed = Lengths(case.inputs, source_masks(model.manifest.graphs)), {}
    for item in model.manifest.graphs["encoder"].inputs:
        value = case.inputs[item.name]
        sizes = list(zip(item.axes[1:], value.shape[1:], strict=True))
        cut = [size if isinstance(axis, int) else lengths.given(axis, size)[row] for axis, size in sizes]
        trimmed[item.name] = value[(slice(row, row + 1), *map(slice, cut))]
    return trimmed
