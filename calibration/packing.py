"""Blocks as the operators that compute with them want their inputs.

Three arrangements, all standing for exactly what ``blocks.dequantize`` gives:
- DequantizeLinear, standard ONNX, the form of the neutral graph: codes int8, uint8, int4 or uint4 of the weight's shape, with a
block_size, or one scale for each column where the block is all of it;
- com.microsoft MatMulNBits: codes uint8 [N,blocks,bytes], column by column, 4-bit codes in pairs, the first in the low half of a byte;
- com.microsoft GatherBlockQuantized: the same bytes as rows [N,blocks * bytes], for the table that an embedding and a head share.

The last two read scales and zero points of one shape, so these are shared as they are, and codes whose bytes are equal, stored once
by a writer that tells tensors apart by content. MatMulNBits' own arrangement of codes, which GatherBlockQuantized takes too with
scales [N,blocks,1], would need a Reshape behind every lookup and other zero points; and as MatMulNBits copies its codes when a
session opens, one initializer for both would be held whole for the few rows that are looked up.

Codes are unsigned in both: a symmetric scheme's are moved up by 8 or 128, which is the zero point where no zero points are given.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.blocks import Blocks, BlockScheme
from txopt.runtime.errors import UsageError

_SIGNED = {4: ir.DataType.INT4, 8: ir.DataType.INT8}
_UNSIGNED = {4: ir.DataType.UINT4, 8: ir.DataType.UINT8}
_BITS = {dtype: bits for types in (_SIGNED, _UNSIGNED) for bits, dtype in types.items()}


@dataclass(frozen=True, eq=False)
class Packed:
    """Inputs of an operator in their order, without names, and its attributes, all integers."""

    codes: ir.TensorProtocol
    scales: ir.TensorProtocol
    zeros: ir.TensorProtocol | None
    attributes: dict[str, int]

    @property
    def inputs(self) -> tuple[ir.TensorProtocol, ...]:
        """What is there of codes, scales and zero points."""
        return (self.codes, self.scales) if self.zeros is None else (self.codes, self.scales, self.zeros)


def for_dequantize_linear(blocks: Blocks) -> Packed:
    """Inputs of a DequantizeLinear that gives the weight [K,N]: codes [K,N]; scales and zeros [blocks,N], axis 0, or [N], axis 1."""
    return _standard(blocks, axis=0)


def for_dequantized_table(blocks: Blocks) -> Packed:
    """Inputs of a DequantizeLinear that gives the table [N,K], the weight transposed: codes [N,K]; the others [N,blocks], axis 1, or
    [N], axis 0."""
    return _standard(blocks, axis=1)


def from_dequantize_linear(
    codes: ir.TensorProtocol,
    scales: ir.TensorProtocol,
    zeros: ir.TensorProtocol | None,
    *,
    axis: int,
    block_size: int | None,
) -> Blocks:
    """The blocks [K,N] whose inputs of a DequantizeLinear these are, whole columns where there is no block_size; the inverse of both
    functions above.

    UsageError where they are in no scheme: codes of another type, signed codes with zero points, blocks of another size.
    """
    bits = _BITS.get(codes.dtype)
    symmetric = codes.dtype in _SIGNED.values()
    if bits is None or (symmetric and zeros is not None):
        raise UsageError(
            f"quantized weight {codes.name}: expected codes of 4 or 8 bits, with zero points only where unsigned, got "
            f"{codes.dtype.name} {'without' if zeros is None else 'with'} zero points; leave its DequantizeLinear as it is"
        )
    scheme = BlockScheme(bits=bits, block=block_size, symmetric=symmetric)
    turned = _columns_first if is_table(axis, block_size) else _rows_first
    values = turned(codes.numpy().astype(np.int8 if symmetric else np.uint8))

    def grid(array: NDArray[Any]) -> NDArray[Any]:
        return array[None] if block_size is None else turned(array)

    steps = grid(scales.numpy().astype(np.float32))
    if symmetric:
        return Blocks(values, steps, None, scheme)
    offsets = np.zeros(steps.shape, np.uint8) if zeros is None else grid(zeros.numpy().astype(np.uint8))
    return Blocks(values, steps, offsets, scheme)


def is_table(axis: int, block_size: int | None) -> bool:
    """Whether a DequantizeLinear with these attributes gives a table [N,K], not a weight [K,N]."""
    return axis % 2 == (0 if block_size is None else 1)


def for_matmul_nbits(blocks: Blocks) -> Packed:
    """Inputs of a MatMulNBits behind x [..,K]: codes uint8 [N,blocks,block * bits / 8], scales [N,blocks], zeros uint8
    [N,ceil(blocks * bits / 8)] or none.

    The attributes leave accuracy_level to who knows what the engine is to compute in. A last block that is short is filled with the
    zero point, which stands for 0.
    """
    rows, columns = blocks.codes.shape
    scheme = blocks.scheme
    block = _bounded(scheme)
    codes = _column_bytes(blocks).reshape(columns, scheme.count(rows), block * scheme.bits // 8)
    attributes = {"K": rows, "N": columns, "bits": scheme.bits, "block_size": block}
    return Packed(ir.Tensor(codes), *_column_grids(blocks), attributes)


def for_gather(blocks: Blocks) -> Packed:
    """Inputs of a GatherBlockQuantized on the table [N,K], rows of which it gives: codes uint8 [N,blocks * block * bits / 8].

    Where K is no multiple of the block, a row comes out with zeros behind it, blocks * block numbers long: cut it to K.
    """
    scheme = blocks.scheme
    attributes = {"bits": scheme.bits, "block_size": _bounded(scheme), "gather_axis": 0, "quantize_axis": 1}
    return Packed(ir.Tensor(_column_bytes(blocks)), *_column_grids(blocks), attributes)


def _standard(blocks: Blocks, axis: int) -> Packed:
    scheme = blocks.scheme
    dtype = (_SIGNED if scheme.symmetric else _UNSIGNED)[scheme.bits]
    turned = _rows_first if axis == 0 else _columns_first
    codes = ir.Tensor(turned(blocks.codes), dtype=dtype)
    if scheme.block is None:
        whole = None if blocks.zeros is None else ir.Tensor(blocks.zeros[0], dtype=dtype)
        return Packed(codes, ir.Tensor(blocks.scales[0]), whole, {"axis": 1 - axis})
    zeros = None if blocks.zeros is None else ir.Tensor(turned(blocks.zeros), dtype=dtype)
    return Packed(codes, ir.Tensor(turned(blocks.scales)), zeros, {"axis": axis, "block_size": scheme.block})


def _bounded(scheme: BlockScheme) -> int:
    """Rows in a block, for operators that take no whole columns."""
    if scheme.block is None:
        raise UsageError("expected blocks of 16 to 256 rows for products in blocks, got whole columns")
    return scheme.block


def _column_bytes(blocks: Blocks) -> NDArray[np.uint8]:
    """Unsigned codes [N,blocks * block * bits / 8], each column's one behind the other."""
    scheme = blocks.scheme
    rows, columns = blocks.codes.shape
    padded = np.empty((columns, scheme.count(rows) * _bounded(scheme)), np.uint8)
    if blocks.zeros is None:
        middle = 2 ** (scheme.bits - 1)
        padded[:, :rows] = blocks.codes.T.view(np.uint8) + np.uint8(middle)  # modulo 256, so that -8 becomes 0
        padded[:, rows:] = middle
    else:
        padded[:, :rows] = blocks.codes.T
        padded[:, rows:] = blocks.zeros[-1][:, None]
    return padded if scheme.bits == 8 else _pairs(padded)


def _column_grids(blocks: Blocks) -> tuple[ir.TensorProtocol, ir.TensorProtocol | None]:
    """Scales [N,blocks], and zero points as uint8 [N,ceil(blocks * bits / 8)], packed like codes."""
    scales = ir.Tensor(_columns_first(blocks.scales))
    if blocks.zeros is None:
        return scales, None
    zeros = _columns_first(blocks.zeros)
    if blocks.scheme.bits == 4:
        zeros = _pairs(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2))))
    return scales, ir.Tensor(zeros)


def _pairs(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two values of 4 bits in a byte: [N,even] as [N,even / 2]."""
    return values[:, 0::2] | values[:, 1::2] << np.uint8(4)


def _rows_first(array: NDArray[Any]) -> NDArray[Any]:
    return array


def _columns_first(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array.T)
