"""What a GPU alone can show, in one command: ``python -m txopt.benchmarks.gpu [--minutes 9] [--out FILE.json]``.

    machine    the GPU, its driver, the libraries, the day, and the bandwidth of its memory (a copy of one GiB, read and written)
    parity     small models of every main family in float16: the recorded cases, replayed on the device by each engine
    speed      T5-base, BART-large and Whisper-large-v3-turbo by size, float16, 64 tokens, batch 1, 8 and 64: tokens a second of
               PyTorch eager, PyTorch compiled, ONNX Runtime with and without CUDA graphs, and TensorRT, in turn; and what share of
               the bandwidth a step reaches
    roads      what those said that did not run

Nothing is downloaded. Each piece is written as soon as it is known, and what no time was left for is listed as not measured.
Without a GPU ``--rehearse`` runs the same steps on the CPU with toy models, to see that they run; its times mean nothing.
"""

import argparse
import datetime
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from txopt.benchmarks import gpu_models, gpu_roads
from txopt.benchmarks.gpu_bytes import step_bytes
from txopt.benchmarks.gpu_models import FAMILIES, Subject
from txopt.benchmarks.gpu_roads import COMPILED, EAGER, ORT, ORT_GRAPHS, ROADS, TENSORRT, Generate
from txopt.benchmarks.inputs import draw
from txopt.benchmarks.timing import Timing, in_turn, ratio
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import TxoptError

BATCHES, NEW_TOKENS, FEW_TOKENS, REPEATS = (1, 8, 64), 64, 8, 5
PACKAGES = ("torch", "transformers", "onnx", "onnxruntime-gpu", "onnxruntime", "tensorrt-rtx-cu13-bindings", "tensorrt")
RESULTS = Path(__file__).resolve().parent / "results"


class Bench:
    """One run: where files go, how long it may take, and which roads were found to work."""

    def __init__(self, work: Path, *, minutes: float, rehearse: bool) -> None:
        self.work, self.rehearse = work, rehearse
        self.end = time.monotonic() + 60 * minutes
        self.device = "cpu" if rehearse else "cuda"
        self.capability, self.runtime = "", "tensorrt-rtx"
        self.problems: dict[str, str] = {}
        self.skipped: list[str] = []

    def measure(self) -> Iterator[dict[str, Any]]:
        """Pieces of the document."""
        yield {"machine": self._machine()}
        yield {"parity": {name: self._parity(name) for name in self._in_time(FAMILIES[: 1 if self.rehearse else None])}}
        subjects = gpu_models.REHEARSED if self.rehearse else gpu_models.SUBJECTS
        for name in self._in_time(subjects):
            for batch, row in self._speed(name, subjects[name]):
                yield {"speed": {name: {batch: row}}}
        yield {"roads": {road: self.problems.get(road, "ran") for road in ROADS}, "not measured": self.skipped}

    def _in_time(self, names: Any) -> Iterator[str]:
        for name in names:
            if time.monotonic() < self.end:
                _note(str(name))
                yield name
            else:
                self.skipped.append(str(name))

    def _machine(self) -> dict[str, Any]:
        import torch

        versions = {}
        for package in PACKAGES:
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        found: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "versions": versions,
        }
        if not self.rehearse:
            major, minor = torch.cuda.get_device_capability()
            self.capability = f"SM{major}{minor}"
            found |= {"gpu": torch.cuda.get_device_name(), "capability": self.capability, "cuda": torch.version.cuda}
        self.bandwidth = _bandwidth(self.device)
        return {**found, "bandwidth_gb_s": round(self.bandwidth / 1e9, 1)}

    def _parity(self, name: str) -> dict[str, Any]:
        """By engine: the largest error and the tolerance, or what went wrong."""
        from txopt.exporter.pipeline import export

        found: dict[str, Any] = {}
        artifacts = {target: self.work / f"{name}-{target}" for target in (self.device, "tensorrt")}
        for road, target, device in (
            (ORT, self.device, self.device),
            (ORT_GRAPHS, self.device, "cuda-graphs"),
            (TENSORRT, "tensorrt", "tensorrt"),
        ):
            if road != ORT and self.rehearse:
                self.problems[road] = "a rehearsal has no GPU"
                continue
            try:
                if not artifacts[target].exists():
                    precision = "fp32" if self.rehearse else "fp16"
                    export(gpu_models.small(name), artifacts[target], target=target, precision=precision)
                if road == TENSORRT:
                    gpu_roads.build_engines(artifacts[target], self.runtime, self.capability, {"cache-length": 64})
                report = gpu_roads.verified(artifacts[target], device)
                found[road] = {"largest_error": max(report["errors"].values()), "tolerance": report["tolerance"]}
            except TxoptError as err:
                found[road] = {"problem": str(err)}
        return found

    def _speed(self, name: str, subject: Subject) -> Iterator[tuple[str, dict[str, Any]]]:
        from txopt.exporter.pipeline import export

        model = gpu_models.build(subject)
        precision = "fp32" if self.rehearse else "fp16"
        artifact = export(model, self.work / name.replace(" ", "-"), target=self.device, precision=precision)
        roads = self._opened(name, model, subject, artifact, precision)
        for batch in BATCHES[: 1 if self.rehearse else None]:
            if time.monotonic() > self.end:
                self.skipped.append(f"{name}, batch {batch}")
                continue
            _note(f"{name}, batch {batch}")
            yield f"batch {batch}", self._row(artifact, roads, subject, batch)

    def _opened(
        self, name: str, model: Any, subject: Subject, artifact: Artifact, precision: str
    ) -> dict[str, Generate]:
        """The roads that open this model; what the others say is among the problems."""
        from txopt.exporter.pipeline import export

        def tensorrt() -> Generate:
            out = self.work / f"{name}-tensorrt"
            made = export(model, out, target="tensorrt", precision=precision)
            limits = gpu_models.limits(made.manifest, subject.source)
            gpu_roads.build_engines(out, self.runtime, self.capability, limits)
            gpu_roads.verified(out, "tensorrt")  # in another process, before this one loads what may crash it
            return gpu_roads.txopt_road(out, "tensorrt")

        opened: dict[str, Generate] = {ORT: gpu_roads.txopt_road(artifact.path, self.device)}
        if not self.rehearse:
            opened[ORT_GRAPHS] = gpu_roads.txopt_road(artifact.path, "cuda-graphs")
            try:
                opened[TENSORRT] = tensorrt()
            except TxoptError as err:
                self.problems[TENSORRT] = str(err)
            model = model.half().to(self.device)
            opened[COMPILED] = gpu_roads.torch_road(model, self.device, compiled=True)
        opened[EAGER] = gpu_roads.torch_road(model, self.device, compiled=False)
        return opened

    def _row(self, artifact: Artifact, roads: Mapping[str, Generate], subject: Subject, batch: int) -> dict[str, Any]:
        inputs = draw(artifact, batch, subject.source)
        working, said = dict(roads), {}
        for road, generate in roads.items():
            try:
                said[road] = generate(inputs, NEW_TOKENS)
            except Exception as err:  # a compiler's or an engine's, of any kind: the others are measured all the same
                self.problems[road] = f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"
                del working[road]
        lengths = {
            tokens: in_turn({road: _call(run, inputs, tokens) for road, run in working.items()}, repeats=REPEATS)
            for tokens in (FEW_TOKENS, NEW_TOKENS)
        }
        whole = lengths[NEW_TOKENS]
        steps = {
            road: (whole[road].median - lengths[FEW_TOKENS][road].median) / (NEW_TOKENS - FEW_TOKENS) for road in whole
        }
        least = step_bytes(artifact, batch, subject.source, NEW_TOKENS // 2) / self.bandwidth
        return {road: self._measured(road, whole, steps[road], least, batch, said) for road in whole}

    def _measured(
        self,
        road: str,
        whole: Mapping[str, Timing],
        step: float,
        least: float,
        batch: int,
        said: Mapping[str, Any],
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            **whole[road].to_json(),
            "tokens_s": round(batch * NEW_TOKENS / whole[road].median, 1),
            "step_ms": round(step * 1e3, 3),
            "share_of_bandwidth": round(least / step, 3),
        }
        if EAGER in said:
            row["ids_as_eager"] = round(float(np.mean(said[road][:, -NEW_TOKENS:] == said[EAGER][:, -NEW_TOKENS:])), 4)
        for other in (EAGER, COMPILED):
            if other in whole and road not in (EAGER, COMPILED):
                row[f"against {other}"] = ratio(whole[road], whole[other])
        return row


def _call(generate: Generate, inputs: Any, tokens: int) -> Any:
    return lambda: generate(inputs, tokens)


def _bandwidth(device: str) -> float:
    """Bytes a second that memory is read and written by, the best of ten copies of one GiB."""
    import torch

    source = torch.ones(1 << 28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def _wait(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _merge(document: dict[str, Any], piece: Mapping[str, Any]) -> None:
    for key, value in piece.items():
        if isinstance(value, dict) and isinstance(document.get(key), dict):
            _merge(document[key], value)
        else:
            document[key] = value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="begin nothing new after so many")
    parser.add_argument("--out", type=Path, help="where the JSON goes; by default benchmarks/results/gpu-NAME.json")
    parser.add_argument(
        "--rehearse", action="store_true", help="the same steps on the CPU, toy models, no file by default"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not arguments.rehearse:
        import torch

        if not torch.cuda.is_available():
            sys.exit("expected a GPU that PyTorch sees, found none; --rehearse runs the same steps on the CPU")
    document: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="txopt-") as folder:
        for piece in Bench(Path(folder), minutes=arguments.minutes, rehearse=arguments.rehearse).measure():
            _merge(document, piece)
            out = arguments.out
            if out is None and not arguments.rehearse:
                out = RESULTS / f"gpu-{re.sub(r'[^a-z0-9]+', '-', document['machine']['gpu'].lower()).strip('-')}.json"
            if out is not None:
                out.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
