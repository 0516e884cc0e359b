"""The precision that a source's weights are stored in, and the one that is computed in.

Both are the one asked for, but for bfloat16 where ONNX Runtime's CPU provider, which has no bfloat16 kernels, runs or proves the
artifact: there the weights are rounded to bfloat16 and everything is computed from them in float32. Engines of TensorRT compute in
bfloat16 all the same (lowering/tensorrt.py). Knows no model family and no graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from txopt.exporter.source import Source

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def computed_in(precision: str, target: str) -> torch.dtype:
    """The dtype that graphs for ``target`` are traced in."""
    return torch.float32 if precision == "bf16" and target != "cuda" else DTYPES[precision]


def islands(source: Source) -> list[str]:
    """Modules whose weights stay float32 in a narrower model (T5's wo), as transformers keeps them."""
    wide = {name.rpartition(".")[0] for name, value in source.module.named_parameters() if value.dtype == torch.float32}
    return sorted(wide)


def widen(source: Source) -> None:
    """Makes every weight float32, for good."""
    for tensor in _floats(source):
        tensor.data = tensor.data.float()


@contextmanager
def in_float32(source: Source) -> Iterator[None]:
    """Widens every narrower weight inside, and narrows it again afterwards, which loses nothing."""
    dtypes = [(tensor, tensor.dtype) for tensor in _floats(source)]
    try:
        widen(source)
        yield
    finally:
        for tensor, dtype in dtypes:
            tensor.data = tensor.data.to(dtype)


def _floats(source: Source) -> list[Tensor]:
    """Every float tensor of the source, once; its two modules share most of them."""
    parts = (source.module, source.traced)
    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    return list({id(tensor): tensor for tensor in tensors if tensor.is_floating_point()}.values())
