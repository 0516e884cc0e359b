"""What fusing is worth to ONNX Runtime, and what it costs: ``python -m txopt.benchmarks.fused_speed [--out FILE.json]``.

Files of torch's two exporters, 512 wide with 3+3 layers and random weights, as they are and after ``txopt optimize``: both opened by
ONNX Runtime on the CPU with its own optimizations on, the same inputs in turn, at batch 1 with 8 and 64 and batch 8 with 128 tokens
on either side. The logits are compared before a time counts. Beside it stands the share of the unfused file's time that the engine
spends in products of matrices, which no fusion takes away: with everything else at no cost, one over it would be gained. The cost is
that of a T5 of 250M parameters: seconds by stage, and the peak memory of the process that does it over the size of its weights.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from txopt.benchmarks import kernels
from txopt.benchmarks.foreign_models import EXPORTERS, Size, build, write
from txopt.benchmarks.machine import machine
from txopt.benchmarks.timing import in_turn, ratio

SIZE = Size(layers=3, width=512, heads=8, vocabulary=8000, positions=512)
MODELS = (
    "T5",
    "BART",
    "Marian",
    "MVP",
    "TrOCR",
    "Whisper",
)  # SDPA-ready ones, written-out ones, and those without text
LARGE = Size(layers=13, width=768, heads=12, vocabulary=32128, positions=512)
SHAPES = ((1, 8), (1, 64), (8, 128))
REPEATS = 15
TOLERANCE = 1e-4


def measure(names: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {"machine": machine(), "cost": cost()}
    sys.stderr.write(f"cost: {json.dumps(results['cost'])}\n")
    for name in names:
        for exporter in EXPORTERS:
            with tempfile.TemporaryDirectory() as folder:
                results[f"{name} by {exporter}"] = _measured(name, exporter, Path(folder))
            sys.stderr.write(f"{name} by {exporter}: {json.dumps(results[f'{name} by {exporter}'])}\n")
    return results


def _measured(name: str, exporter: str, work: Path) -> dict[str, Any]:
    from txopt.exporter.foreign import optimize

    file = work / "in.onnx"
    write(build(name, SIZE, batch=2, source=16), exporter, file)
    report = optimize(file, work / "out")
    sessions = {"fused": _open(work / "out" / "model.onnx"), "as it was": _open(file)}
    times = {}
    for batch, length in SHAPES:
        model = build(name, SIZE, batch=batch, source=length, target=length)
        feeds = {key: value.numpy() for key, value in model.inputs.items()}
        logits = {key: session.run(None, feeds)[0] for key, session in sessions.items()}
        error = float(np.abs(logits["fused"] - logits["as it was"]).max() / max(1.0, np.abs(logits["as it was"]).max()))
        if not error <= TOLERANCE:
            raise SystemExit(
                f"{name} by {exporter}, batch {batch}: logits differ by {error:.1e}; a time would mean nothing"
            )
        calls = {key: partial(session.run, None, feeds) for key, session in sessions.items()}
        timed = in_turn(calls, repeats=REPEATS)
        speed = ratio(timed["fused"], timed["as it was"])
        times[f"batch {batch}, {length} tokens"] = {
            **{key: value.to_json() for key, value in timed.items()},
            "ratio": speed,
            "products": round(kernels.share_of_products(kernels.seconds_by_operator(file, feeds)), 3),
        }
    nodes = {"nodes_before": report.nodes_before, "nodes_after": report.nodes_after}
    return {**nodes, "times": times}


def cost() -> dict[str, Any]:
    """Each step in a process of its own: a child starts with the memory of whoever started it, and only its peak can be asked."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "in.onnx"
        _alone("write_large", file)
        weights = sum(part.stat().st_size for part in Path(folder).iterdir())
        fusing, whole = _alone("fuse_alone", file), _alone("fuse_and_prove", file)
    peaks = {"fusing": fusing["peak"], "with the proof": whole["peak"]}
    return {
        "weights_mb": round(weights / 1e6, 1),
        "fused": whole["fused"],
        "seconds": whole["seconds"],
        "peak_mb": {name: round(peak / 1e6, 1) for name, peak in peaks.items()},
        "peak_over_weights": {name: round(peak / weights, 2) for name, peak in peaks.items()},
    }


def write_large(file: Path) -> dict[str, Any]:
    write(build("T5", LARGE), "torchscript", file)
    return {}


def fuse_alone(file: Path) -> dict[str, Any]:
    """Reads, converts, cleans and fuses; writes and runs nothing."""
    from txopt.exporter.foreign import inspect

    inspect(file)
    return {"peak": _children()}


def fuse_and_prove(file: Path) -> dict[str, Any]:
    from txopt.exporter.foreign import optimize

    stages: list[tuple[str, float]] = []
    report = optimize(file, file.parent / "out", progress=lambda stage: stages.append((stage, time.perf_counter())))
    stages.append(("", time.perf_counter()))
    seconds = {stage: round(end - start, 1) for (stage, start), (_, end) in pairwise(stages)}
    seconds["all"] = round(stages[-1][1] - stages[0][1], 1)
    return {"peak": _children(), "fused": report.fused, "seconds": seconds}


def _alone(step: str, file: Path) -> dict[str, Any]:
    call = f"f.{step}(pathlib.Path({str(file)!r}))"
    code = f"import json, pathlib; from txopt.benchmarks import fused_speed as f; print(json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout.strip().rpartition("\n")[2])
    return answer


def _children() -> int:
    """Most resident bytes of any child so far."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _open(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")  # the other's idle threads would take its turn
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="some of them, by comma")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    arguments = parser.parse_args()
    text = json.dumps(measure(arguments.models.split(",")), indent=2)
    sys.stdout.write(text + "\n")
    if arguments.out:
        arguments.out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
