"""What ONNX Runtime's CUDA provider would do, without a GPU.

    pip download --no-deps onnxruntime-gpu
    python -m txopt.benchmarks.cuda --wheel onnxruntime_gpu-*.whl [--page docs/cuda.md]

The provider is the real one, the CUDA below it a stand-in that counts kernels and runs none (fake_cuda.c): where nodes are placed,
what a step launches and copies, and whether it is recorded as a CUDA graph are what a GPU would see. Numbers and times are not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

from txopt.benchmarks import fake_cuda, gpu_models
from txopt.benchmarks.fusion import put
from txopt.exporter.pipeline import export

PRECISIONS = ("fp32", "fp16")


def counted(artifact: Path, package: Path, libraries: Path) -> dict[str, Any]:
    """See cuda_steps.py."""
    code = "import runpy, sys; sys.modules['cuda'] = None; runpy.run_module('txopt.benchmarks.cuda_steps', run_name='__main__')"
    paths = os.pathsep.join([str(package), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code, str(artifact)],
        env={**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{artifact.name}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| | nodes on the GPU | on the CPU | launches of a step | copies on the GPU | to it, from it | as a CUDA graph |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        step, replayed = row["cuda"]["last"], row["cuda-graphs"]["last"]
        on_cpu = ", ".join(f"{count} {operator}" for operator, count in sorted(row["cpu"].items())) or "none"
        graph = f"{replayed['replayed']} launch" if replayed["launches"] == 0 else f"{replayed['launches']} launches"
        across = f"{step['to_device']}, {step['to_host']}"
        lines.append(
            f"| {name} | {row['gpu']} | {on_cpu} | {step['launches']} | {step['on_device']} | {across} | {graph} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--page", type=Path, help="write the table there, between its marks")
    arguments = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="txopt-") as folder:
        package, libraries = Path(folder) / "package", Path(folder) / "libraries"
        libraries.mkdir()
        try:
            with ZipFile(arguments.wheel) as wheel:
                wheel.extractall(package)
        except (OSError, BadZipFile) as err:
            parser.error(f"--wheel: expected a wheel of onnxruntime-gpu: {err}")
        fake_cuda.build(package, libraries)
        for family in gpu_models.FAMILIES:
            for precision in PRECISIONS:
                artifact = Path(folder) / f"{family}-{precision}"
                print(artifact.name, file=sys.stderr, flush=True)
                export(gpu_models.small(family), artifact, target="cuda", precision=precision)
                rows[f"{family} {precision}"] = counted(artifact, package, libraries)
    version = {row["onnxruntime"] for row in rows.values()}.pop()
    text = f"Decoders of two layers on onnxruntime-gpu {version}, two rows; no GPU, so nothing was computed.\n\n{table(rows)}"
    print(text)
    if arguments.page is not None:
        put(text, arguments.page)


if __name__ == "__main__":
    main()
