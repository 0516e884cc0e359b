"""Load time and peak memory of an artifact, measured in a process of its own: ``python -m txopt.benchmarks.footprint ARTIFACT``.

Peak memory is VmHWM of /proc/self/status: everything the process ever held at once, Python, engine and mapped weights included.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from txopt.runtime.errors import TxoptError


def footprint(
    artifact: Path, *, batch: int, source_length: int, new_tokens: int, device: str = "cpu", threads: int | None
) -> dict[str, float]:
    """load_s, peak_mb and base_mb (the process before it loads anything) of load + generate; memory of the host."""
    arguments = [str(artifact), device, str(batch), str(source_length), str(new_tokens), str(threads or 0)]
    command = [sys.executable, "-m", "txopt.benchmarks.footprint", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TxoptError(f"the footprint run failed: {done.stderr.strip()}")
    result: dict[str, float] = json.loads(done.stdout)
    return result


def peak_mb() -> float:
    """The most memory that this process has held at once, in MiB."""
    status = Path("/proc/self/status").read_text("ascii", errors="replace")
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return round(int(kilobytes) / 1024, 1)


def _main(arguments: list[str]) -> None:
    path, device = Path(arguments[0]), arguments[1]
    batch, source_length, new_tokens, threads = map(int, arguments[2:])
    from txopt.benchmarks.inputs import draw
    from txopt.runtime.model import load

    base = peak_mb()
    start = time.perf_counter()
    model = load(path, device=device, threads=threads or None)
    loaded = time.perf_counter() - start
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "num_beams": 1}
    if model.manifest.kind == "encoder":
        model.encode(**draw(model.artifact, batch, source_length))
    else:
        model.generate(**draw(model.artifact, batch, source_length), **options)
    print(json.dumps({"load_s": round(loaded, 3), "peak_mb": peak_mb(), "base_mb": base}))


if __name__ == "__main__":
    _main(sys.argv[1:])
