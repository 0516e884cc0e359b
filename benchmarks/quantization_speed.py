"""What quantized artifacts gain in speed and size.

Models of published sizes with seeded random weights: speed depends on sizes alone. Rounded weights say other things than fp32's,
so ids are not compared; lengths are forced instead, and both artifacts take the same number of steps. What quantization does to the
text of trained weights is quantization_loss.py's.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from txopt.benchmarks.inputs import draw
from txopt.benchmarks.machine import machine
from txopt.benchmarks.main_road import build
from txopt.benchmarks.quantization_invariance import moved
from txopt.benchmarks.quantization_loss import sizes
from txopt.benchmarks.timing import in_turn, ratio
from txopt.exporter.pipeline import export
from txopt.exporter.quantize import Options, quantize_artifact
from txopt.runtime.model import Model

MODELS = ("t5-small", "marian")
# By precision; of fp8 none, for no CPU multiplies in it.
SCHEMES = {"int8": ("weights", "mixed", "rows", "static"), "int4": ("weights",), "fp8": ()}
BATCHES, SOURCE_LENGTH, NEW_TOKENS, REPEATS = (1, 8), 64, 64, 5


def measure(
    precisions: Sequence[str], parts: Sequence[str], work: Path, note: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """{"speed": {model: {scheme: row}}} and {"invariance": ...}, whichever of them is among ``parts``; "machine" with speed."""
    if "speed" in parts:
        yield {"machine": machine()}
    for name in MODELS:
        before = export(build(name, work / name), work / f"{name}-out")
        for precision, scheme in ((each, scheme) for each in precisions for scheme in SCHEMES[each]):
            shown = precision if scheme == "weights" else f"{precision} {scheme}"
            note(f"{name}, {shown}")
            # Its own loss is that of random weights on random ids, and speed depends on no method: the quickest will do.
            after = quantize_artifact(
                before.path,
                work / f"{name}-{precision}-{scheme}",
                Options(precision=precision, scheme=scheme, method=None if scheme == "static" else "rtn", limit=2),
            )
            baseline, candidate = Model(before), Model(after)
            if "speed" in parts:
                row: dict[str, Any] = {"size": sizes(before, after)}
                row |= {f"batch {batch}": _faster(baseline, candidate, batch) for batch in BATCHES}
                yield {"speed": {name: {shown: row}}}
            if "invariance" in parts:
                labels = {"weights": "rtn", "static": "mse static"}
                label = f"{precision} {labels.get(scheme, f'rtn {scheme}')}"  # as the losses' variants are named
                yield {"invariance": {name: {"fp32": moved(baseline), label: moved(candidate)}}}


def _faster(baseline: Model, candidate: Model, batch: int) -> dict[str, Any]:
    inputs = draw(baseline.artifact, batch, SOURCE_LENGTH)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "num_beams": 1}
    calls = {
        "quantized": lambda: candidate.generate(**inputs, **options),
        "fp32": lambda: baseline.generate(**inputs, **options),
    }
    times = in_turn(calls, repeats=REPEATS)
    return {
        "ratio": ratio(times["quantized"], times["fp32"]),
        **{name: timing.to_json() for name, timing in times.items()},
    }
