"""Seconds and peak memory of quantizing Whisper tiny.en with five minutes of speech, against hearing the same speech in fp32.

Each run is a process of its own: ``python -m txopt.benchmarks.quantization_cost ARTIFACT TABLE [VARIANT OUT]``, whose VmHWM counts.
Reading a variant's samples, measuring their loss and proving the result belong to it. Only the variants that people take are
measured (COUNTED): each costs minutes.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from txopt.benchmarks.footprint import peak_mb
from txopt.benchmarks.quantization_loss import VARIANTS, Variant, place, whisper
from txopt.calibration import evaluate
from txopt.calibration.data import read
from txopt.exporter.quantize import quantize_artifact
from txopt.runtime.errors import TxoptError
from txopt.runtime.model import load

COUNTED = ("int8 rtn", "int8 mse static", "int4 descent")  # the default of each precision, and what TensorRT takes


def measure(
    variants: Sequence[Variant], speech: Sequence[Path], work: Path, note: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """{"cost": {"data": ..., "rows": {variant: {"seconds", "peak_mb"}}}}, "fp32" first, of those of ``variants`` in COUNTED."""
    folder = work / "cost"
    folder.mkdir()
    subject = whisper(folder, speech, None)
    yield {"cost": {"data": dict(subject.facts)}}
    for name in ("fp32", *(variant.name for variant in variants if variant.name in COUNTED)):
        note(f"cost of {name}")
        arguments = [] if name == "fp32" else [name, str(place(folder, name))]
        yield {"cost": {"rows": {name: _asked(subject.artifact.path, subject.calibration, arguments)}}}


def _asked(artifact: Path, table: Path, arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "txopt.benchmarks.quantization_cost", str(artifact), str(table), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"problem": done.stderr.strip().rpartition("\n")[2]}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _main(artifact: Path, table: Path, variant: str | None = None, out: str = "") -> None:
    start = time.perf_counter()
    if variant is None:
        model = load(artifact)
        evaluate.said(model, read(table, model, limit=None))
    else:
        options = next(known for known in VARIANTS if known.name == variant).with_data(table)
        try:
            quantize_artifact(artifact, out, replace(options, limit=None))
        except TxoptError as err:
            sys.exit(" ".join(str(err).split()))
    print(json.dumps({"seconds": round(time.perf_counter() - start, 1), "peak_mb": peak_mb()}))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
