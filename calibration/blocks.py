"""A weight in blocks: codes of 4 or 8 bits, and for each block one scale and, in an asymmetric scheme, one zero point.

A weight is [K,N], as in MatMul(x [..,K], W [K,N]). Blocks run along K: rows g * block to (g + 1) * block of a column are one block;
where K is no multiple of the block, the last one is shorter. A block may be the whole column. A code c stands for
(c - zero) * scale, the arithmetic of ONNX's DequantizeLinear. How codes are found is in rounding.py, hqq.py and gptq.py; how engines
want them packed, in packing.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.errors import SourceError, UsageError, explain

Codes = NDArray[np.int8] | NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class BlockScheme:
    """Bits of a code, rows in a block (None: all of them), and whether zero is the middle of every block.

    A symmetric scheme has signed codes and no zero points, the one kind that every engine reads: TensorRT takes no zero point but 0.
    An asymmetric one has unsigned codes and fits blocks whose values lean to one side.
    """

    bits: int = 8
    block: int | None = 64
    symmetric: bool = True

    def __post_init__(self) -> None:
        problems = []
        if self.bits not in (4, 8):
            problems.append(f"bits: expected 4 or 8, got {self.bits}")
        if self.block not in (None, 16, 32, 64, 128, 256):
            problems.append(f"block: expected 16, 32, 64, 128 or 256 rows, got {self.block}")
        if problems:
            raise UsageError(explain("this scheme of weights does not exist:", problems))

    @property
    def lowest(self) -> int:
        """The least code: -8 or -127, or 0 where unsigned. -128 is left out: 8 bits lose nothing by it and stay symmetric."""
        return {4: -8, 8: -127}[self.bits] if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The greatest code: 7 or 127, or 15 or 255 where unsigned."""
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def spans(self, rows: int) -> Iterator[slice]:
        """The rows of each block of a weight [rows,N]."""
        block = self.block or rows
        return (slice(start, min(start + block, rows)) for start in range(0, rows, block))

    def count(self, rows: int) -> int:
        """Blocks in a column of ``rows`` values."""
        return 1 if self.block is None else -(-rows // self.block)


@dataclass(frozen=True, eq=False)
class Blocks:
    """A quantized weight: codes [K,N] int8 or uint8, scales [ceil(K/block),N] float32, zeros the same in uint8 or None.

    Codes are int8 and zeros None where the scheme is symmetric. 4-bit codes take a byte each here.
    """

    codes: Codes
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8] | None
    scheme: BlockScheme

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        assert self.codes.dtype == (np.int8 if self.scheme.symmetric else np.uint8)
        assert self.scales.shape == (self.scheme.count(rows), columns)
        assert self.scales.dtype == np.float32
        assert (self.zeros is None) == self.scheme.symmetric
        assert self.zeros is None or (self.zeros.shape == self.scales.shape and self.zeros.dtype == np.uint8)


def dequantize(blocks: Blocks) -> NDArray[np.float32]:
    """The weight [K,N] that engines compute with: (code - zero) * scale, in float32, rounded once."""
    weight = blocks.codes.astype(np.float32)
    for g, span in enumerate(blocks.scheme.spans(weight.shape[0])):
        if blocks.zeros is not None:
            weight[span] -= blocks.zeros[g]
        weight[span] *= blocks.scales[g]
    return weight


def as_matrix(weight: NDArray[Any], name: str) -> NDArray[np.float32]:
    """``weight`` [K,N] of any float type as float32; ``name`` is for the message where it cannot be quantized (SourceError)."""
    if weight.ndim != 2 or weight.size == 0:
        shape = list(weight.shape)
        raise SourceError(f"weight {name}: expected a matrix [K,N] to quantize, got shape {shape}; leave it in float")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is refused below
        matrix = np.asarray(weight, np.float32)
    finite = np.isfinite(matrix)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise SourceError(
            f"weight {name}: expected finite numbers, got {matrix.size - np.count_nonzero(finite)} that are not, "
            f"the first ({matrix[row, column]}) at [{row},{column}]; the checkpoint is damaged, load or train it anew"
        )
    return matrix
