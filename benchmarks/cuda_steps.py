"""What ONNX Runtime's CUDA provider does in a decoder's steps, counted on fake_cuda.c: a process of its own, started by cuda.py.

``python -m txopt.benchmarks.cuda_steps ARTIFACT`` prints a JSON object. The encoder runs on the CPU: cuDNN has no stand-in.
"""

import ctypes
import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from txopt.benchmarks.fake_cuda import KINDS
from txopt.benchmarks.inputs import draw
from txopt.runtime.artifact import Artifact
from txopt.runtime.backends.opening import open_engines
from txopt.runtime.backends.ort_session import CUDA, GRAPHS, Place, open_session, session_options
from txopt.runtime.graphs import MASKS
from txopt.runtime.model import load
from txopt.runtime.row_decoder import RowDecoder

BATCH, LENGTH, STEPS = 2, 16, 5


def placed(file: Path) -> dict[str, list[str]]:
    """Operators by provider, before the provider's own fusions."""
    options = session_options(None, as_written=False)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session, _ = open_session(file.name, str(file), options, Place.of("cuda"), recorded=False)
    found: dict[str, list[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        found.setdefault(part.ep_name, []).extend(node.op_type for node in part.get_nodes())
    return found


def memories(artifact: Artifact) -> dict[str, Any]:
    """What the decoder reads of the encoder, which runs on the CPU, by name."""
    model = load(artifact.path)
    said = model.encode(**draw(artifact, BATCH, LENGTH))
    arrays = {name: model.session.array(value) for name, value in said.values.items()} | {
        f"{MASKS}{name}": mask for name, mask in said.masks.items()
    }
    return {item.name: arrays[item.name] for item in artifact.manifest.graphs["decoder"].inputs if item.name in arrays}


def counted(work: Callable[[], object]) -> dict[str, int]:
    """What ``work`` asked of the GPU."""
    library = ctypes.CDLL("libcudart.so.13")
    library.fake_counted.restype = ctypes.c_long
    library.fake_forget()
    work()
    return {kind: library.fake_counted(index) for index, kind in enumerate(KINDS)}


def main() -> None:
    onnxruntime.set_default_logger_severity(4)
    artifact, tokens = Artifact.open(sys.argv[1]), np.ones(BATCH, np.int64)
    where, read = placed(artifact.file(artifact.manifest.graphs["decoder"].file)), memories(artifact)
    on_cpu = Counter(operator for provider, mine in where.items() if provider != CUDA for operator in mine)
    document: dict[str, Any] = {"onnxruntime": onnxruntime.__version__, "gpu": len(where[CUDA]), "cpu": dict(on_cpu)}
    for device in ("cuda", GRAPHS):
        engines = open_engines(artifact, device=device, threads=None, as_written=False)
        fixed = {name: engines.runners["decoder"].tensor(array) for name, array in read.items()}
        decoder = RowDecoder(engines, BATCH, 1, fixed)
        decoder.prefill(np.ones((BATCH, 3), np.int64))
        steps = [counted(partial(decoder.advance, tokens)) for _ in range(STEPS)]
        document[device] = {"last": steps[-1], "recorded": sum(step["recorded"] for step in steps)}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
