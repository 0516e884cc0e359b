"""Who is measured on a GPU: PyTorch eager and compiled, ONNX Runtime with and without CUDA graphs, TensorRT; same weights, float16.

A road opens a model once and generates greedily from arrays; all give the same number of tokens. Owns nothing of how they are timed.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.errors import TxoptError
from txopt.runtime.model import load

Inputs = Mapping[str, NDArray[Any]]
Generate = Callable[[Inputs, int], NDArray[np.int64]]

EAGER, COMPILED, TENSORRT = "PyTorch eager", "PyTorch compiled", "TensorRT"
ORT, ORT_GRAPHS = "ONNX Runtime", "ONNX Runtime, CUDA graphs"
ROADS = (EAGER, COMPILED, ORT, ORT_GRAPHS, TENSORRT)


def torch_road(model: Any, device: str, *, compiled: bool) -> Generate:
    """transformers' generate(); ``compiled`` with its static cache, which it compiles itself, with CUDA graphs."""
    import torch

    dtype = next(model.parameters()).dtype
    options: dict[str, Any] = {"cache_implementation": "static"} if compiled else {}

    def generate(inputs: Inputs, new_tokens: int) -> NDArray[np.int64]:
        tensors = {name: torch.from_numpy(value).to(device) for name, value in inputs.items()}
        tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
        with torch.no_grad():
            ids = model.generate(**tensors, **_greedy(new_tokens), **options)
        found: NDArray[np.int64] = ids.cpu().numpy()
        return found

    return generate


def txopt_road(artifact: Path, device: str) -> Generate:
    """The artifact on ONNX Runtime ("cuda", "cuda-graphs", or "cpu" in a rehearsal), or its engines ("tensorrt")."""
    model = load(artifact, device=device)

    def generate(inputs: Inputs, new_tokens: int) -> NDArray[np.int64]:
        return model.generate(**inputs, **_greedy(new_tokens)).sequences

    return generate


def _greedy(new_tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "num_beams": 1, "do_sample": False}


def build_engines(artifact: Path, runtime: str, capability: str, limits: Mapping[str, int]) -> None:
    """``txopt engine``, in a process of its own: a builder that crashes takes no measurement with it.

    Raises:
        TxoptError: it made none; the message says what it said.
    """
    given = [part for name, value in limits.items() for part in (f"--{name}", str(value))]
    _command("engine", str(artifact), "--runtime", runtime, "--capability", capability, *given)


def verified(artifact: Path, device: str) -> dict[str, Any]:
    """The parity report of ``txopt verify`` on ``device``, likewise in a process of its own."""
    report: dict[str, Any] = _command("verify", str(artifact), "--device", device)
    return report


def _command(*arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "txopt.cli", *arguments, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = " ".join(done.stderr.split())[-600:]
        raise TxoptError(f"txopt {arguments[0]} ended with {done.returncode}: {said}")
    return json.loads(done.stdout)
