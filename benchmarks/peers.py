"""Who is measured: each peer opens the same weights and generates from the same inputs.

A peer is a name, a function from inputs to ids, and nothing else; a new one is a class here and a line in PEERS.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.errors import UsageError
from txopt.runtime.model import Model

Inputs = Mapping[str, NDArray[Any]]


class Peer(Protocol):
    """generate() of exactly ``new_tokens`` greedy tokens: int64 [B,P+new_tokens]."""

    name: str

    def generate(self, inputs: Inputs, new_tokens: int) -> NDArray[np.int64]: ...


class Txopt:
    name = "txopt"

    def __init__(self, model: Model) -> None:
        self._model = model

    def generate(self, inputs: Inputs, new_tokens: int) -> NDArray[np.int64]:
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "num_beams": 1, "do_sample": False}
        return self._model.generate(**inputs, **options).sequences


class TorchEager:
    """PyTorch's own generate(), eager mode, with the attention that transformers chooses (sdpa where there is one)."""

    name = "torch"

    def __init__(self, source: str, precision: str, threads: int | None) -> None:
        import torch

        from txopt.exporter.checkpoint import load
        from txopt.exporter.precision import DTYPES

        if threads is not None:
            torch.set_num_threads(threads)
        self._torch = torch
        self._source = load(source, DTYPES[precision]).source

    def generate(self, inputs: Inputs, new_tokens: int) -> NDArray[np.int64]:
        dtype = next(self._source.module.parameters()).dtype
        tensors = {name: self._torch.from_numpy(value) for name, value in inputs.items()}
        tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
        with self._torch.no_grad():
            options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "num_beams": 1, "do_sample": False}
            found = self._source.generate(tensors, **options)
        if found is None:
            raise UsageError("this source has no generate() of its own to compare with")
        return np.asarray(found.ids.numpy(), np.int64)


PEERS: dict[str, Callable[[str, str, int | None], Peer]] = {"torch": TorchEager}


def open_peer(name: str, source: str | Path | None, precision: str, threads: int | None) -> Peer:
    """The peer ``name`` on the weights of ``source``."""
    if name not in PEERS:
        raise UsageError(f"--against: expected one of {', '.join(PEERS)}, got {name!r}")
    if source is None:
        raise UsageError(
            f"--against {name} needs --source: the checkpoint or factory that the artifact was exported from"
        )
    return PEERS[name](str(source), precision, threads)
